// Package inbox is the receiving half of a flow between two layers of the
// daemon (ipcp.Flow): it keeps what arrives before there is somebody to take
// it, hands packets to the sink without a lock, and makes Close a barrier.
package inbox

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/packet"
)

// Limit is how many packets wait for a sink; the rest is dropped. It covers
// what a peer sends between its reply and the moment our user takes the flow.
const Limit = 64

// closed marks a closed box in the count of running calls. It is so far below
// zero that calls which come too late never bring the count back above it.
const closed = -1 << 40

// patience bounds how long Close waits for a running call of the sink. Sinks
// must not block, so a longer wait means that Close was called from the sink.
const patience = time.Second

// Box is the inbox of one flow. The zero value is ready. Deliver may be called
// from several goroutines; each one's packets stay in order.
type Box struct {
	sink  atomic.Pointer[ipcp.Sink] // nil while packets must be queued
	calls atomic.Int64              // running calls of the sink; below zero: closed
	drops atomic.Uint64

	mu       sync.Mutex // guards what follows
	queue    []*packet.Buf
	events   []ipcp.Event
	next     ipcp.Sink // the sink that a running flush will install
	flushing bool
	done     bool
}

// Deliver hands packets to the sink, or keeps them until there is one. It owns
// the buffers, not the slice. A closed box releases them.
func (b *Box) Deliver(pkts []*packet.Buf) {
	if b.calls.Add(1) > 0 {
		if s := b.sink.Load(); s != nil {
			(*s).Receive(pkts)
		} else {
			b.keep(pkts)
		}
	} else {
		b.drop(pkts)
	}
	b.calls.Add(-1)
}

// DeliverOne is Deliver for a single packet.
func (b *Box) DeliverOne(p *packet.Buf) {
	one := ones.Get().(*[1]*packet.Buf)
	one[0] = p
	b.Deliver(one[:])
	one[0] = nil
	ones.Put(one)
}

// ones holds slices of one packet, which would escape to the heap otherwise.
var ones = sync.Pool{New: func() any { return new([1]*packet.Buf) }}

func (b *Box) keep(pkts []*packet.Buf) {
	b.mu.Lock()
	if s := b.sink.Load(); s != nil { // installed since
		b.mu.Unlock()
		(*s).Receive(pkts)
		return
	}
	n := min(Limit-len(b.queue), len(pkts))
	if b.done {
		n = 0
	}
	b.queue = append(b.queue, pkts[:n]...)
	b.mu.Unlock()
	b.drop(pkts[n:])
}

func (b *Box) drop(pkts []*packet.Buf) {
	b.drops.Add(uint64(len(pkts)))
	for _, p := range pkts {
		p.Release()
	}
}

// Event tells the sink about e, or keeps e, once, for the sink to come.
func (b *Box) Event(e ipcp.Event) {
	if b.calls.Add(1) > 0 {
		b.mu.Lock()
		s := b.sink.Load()
		if s == nil && !b.done {
			b.remember(e)
		}
		b.mu.Unlock()
		if s != nil {
			(*s).FlowEvent(e)
		}
	}
	b.calls.Add(-1)
}

// remember keeps e without letting a flapping interface fill the list: only
// the last of down and up counts. The caller holds mu.
func (b *Box) remember(e ipcp.Event) {
	kept := b.events[:0]
	for _, old := range b.events {
		updown := old == ipcp.EventDown || old == ipcp.EventUp
		if old == e || updown && (e == ipcp.EventDown || e == ipcp.EventUp) {
			continue
		}
		kept = append(kept, old)
	}
	b.events = append(kept, e)
}

// SetSink says who receives from now on. What waited goes to it first, packets
// before events; packets that arrive meanwhile queue up behind.
func (b *Box) SetSink(s ipcp.Sink) {
	b.mu.Lock()
	b.next = s
	if b.flushing || b.done {
		b.mu.Unlock()
		return
	}
	b.flushing = true
	for len(b.queue)+len(b.events) > 0 && !b.done {
		to, pkts, events := b.next, b.queue, b.events
		b.queue, b.events = nil, nil
		b.mu.Unlock()
		b.flush(to, pkts, events)
		b.mu.Lock()
	}
	if !b.done {
		to := b.next
		b.sink.Store(&to)
	}
	b.flushing = false
	b.mu.Unlock()
}

func (b *Box) flush(to ipcp.Sink, pkts []*packet.Buf, events []ipcp.Event) {
	if b.calls.Add(1) > 0 {
		if len(pkts) > 0 {
			to.Receive(pkts)
		}
		for _, e := range events {
			to.FlowEvent(e)
		}
	} else {
		b.drop(pkts)
	}
	b.calls.Add(-1)
}

// Close releases what waits and returns once no call of the sink runs any
// more, and none will. It reports false when a call still ran after a second:
// sinks do not block, so Close must have been called from the sink.
// Closing twice is harmless.
func (b *Box) Close() bool {
	b.mu.Lock()
	first := !b.done
	b.done = true
	queue := b.queue
	b.queue, b.events = nil, nil
	b.mu.Unlock()
	b.drop(queue)
	if first {
		b.calls.Add(closed)
	}
	var limit time.Time
	for i := 0; b.calls.Load() != closed; i++ {
		if i < 64 {
			runtime.Gosched()
			continue
		}
		switch now := time.Now(); {
		case limit.IsZero():
			limit = now.Add(patience)
		case now.After(limit):
			return false
		}
		time.Sleep(20 * time.Microsecond)
	}
	return true
}

// Closed reports whether Close was called.
func (b *Box) Closed() bool { return b.calls.Load() < 0 }

// Drops counts packets released because too many waited or the box was closed.
func (b *Box) Drops() uint64 { return b.drops.Load() }
