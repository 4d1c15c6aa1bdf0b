package unicast

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/o7s/o7s-router/control/cacep"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/wire"
)

// maxEarly bounds the packets that a peer may send before a component has
// taken the flow: an LSDB replication of a large layer fits.
const maxEarly = 4096

// pending is the sink of an N-1 flow while a handshake runs on it. Packets are
// read one by one; what is left goes to the component's sink at hand-over, so
// nothing a peer sends early is lost or reordered.
type pending struct {
	mu   sync.Mutex // guards all below
	next ipcp.Sink  // after hand-over
	pkts []*packet.Buf
	gone bool // the flow was released by its layer or peer
	wake chan struct{}
}

func newPending() *pending { return &pending{wake: make(chan struct{}, 1)} }

func (p *pending) Receive(pkts []*packet.Buf) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.next != nil {
		p.next.Receive(pkts)
		return
	}
	for _, b := range pkts {
		if b.Len() == 0 || len(p.pkts) >= maxEarly { // keep-alives say nothing here
			b.Release()
			continue
		}
		p.pkts = append(p.pkts, b)
	}
	p.signal()
}

func (p *pending) FlowEvent(e ipcp.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.next != nil {
		p.next.FlowEvent(e)
		return
	}
	if e == ipcp.EventDealloc || e == ipcp.EventPeer {
		p.gone = true
	}
	p.signal()
}

func (p *pending) signal() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// read returns the next packet as a slice of its own.
func (p *pending) read(ctx context.Context, timeout time.Duration) ([]byte, error) {
	t := time.NewTimer(timeout)
	defer t.Stop()
	for {
		p.mu.Lock()
		if len(p.pkts) > 0 {
			b := p.pkts[0]
			p.pkts = p.pkts[1:]
			p.mu.Unlock()
			out := append([]byte(nil), b.Bytes()...)
			b.Release()
			return out, nil
		}
		gone := p.gone
		p.mu.Unlock()
		if gone {
			return nil, fmt.Errorf("peer released the flow: %w", o7serr.EFLOWDOWN)
		}
		select {
		case <-p.wake:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-t.C:
			return nil, fmt.Errorf("no message in time: %w", o7serr.ETIMEDOUT)
		}
	}
}

// readCEP returns the first handshake message that comes within the time-out.
// Endpoint numbers are used again when a member restarts, so what a neighbour
// still sends to its former self, or to ours, may come before it; neither link
// state nor data decodes as a handshake.
func (p *pending) readCEP(ctx context.Context) ([]byte, error) {
	var stray error
	for end := time.Now().Add(cacep.Timeout); ; {
		msg, err := p.read(ctx, time.Until(end))
		switch {
		case err != nil && stray != nil:
			return nil, fmt.Errorf("%w, only: %w", err, stray)
		case err != nil:
			return nil, err
		}
		if _, stray = wire.DecodeCEP(msg); stray == nil {
			return msg, nil
		}
		if !time.Now().Before(end) {
			return nil, stray
		}
	}
}

// handOver passes what is queued, and all that follows, to next.
func (p *pending) handOver(f ipcp.Flow, next ipcp.Sink) {
	p.mu.Lock()
	if len(p.pkts) > 0 {
		next.Receive(p.pkts)
		p.pkts = nil
	}
	if p.gone {
		next.FlowEvent(ipcp.EventDealloc)
	}
	p.next = next
	p.mu.Unlock()
	f.SetSink(next)
}

// drop releases what is queued.
func (p *pending) drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.pkts {
		b.Release()
	}
	p.pkts = nil
}
