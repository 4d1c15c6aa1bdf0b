// Package kittest has flows in memory for the tests of the tools; they work in
// virtual time.
package kittest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
)

// Pipe is one end of a flow in memory.
type Pipe struct {
	Spec qos.Spec
	Max  int                 // longest message
	Drop func(m []byte) bool // loses a message that is written; nil: none

	fd     int
	in     <-chan []byte
	out    chan<- []byte
	once   sync.Once
	closed chan struct{}
	peer   *Pipe

	mu       sync.Mutex // guards what follows
	timeout  [2]time.Duration
	deadline [2]time.Time
	moved    [2]chan struct{} // closed when the deadline changes
	flags    o7s.Flags
}

var _ kit.Flow = (*Pipe)(nil)

// queue is how many messages wait in a pipe.
const queue = 1024

// New returns the two ends of a flow, both numbered fd.
func New(fd int) (a, b *Pipe) {
	x, y := make(chan []byte, queue), make(chan []byte, queue)
	a, b = newPipe(fd, x, y), newPipe(fd, y, x)
	a.peer, b.peer = b, a
	return a, b
}

func newPipe(fd int, in, out chan []byte) *Pipe {
	return &Pipe{
		Spec: qos.Raw, Max: 1 << 20, fd: fd, in: in, out: out, closed: make(chan struct{}),
		moved: [2]chan struct{}{make(chan struct{}), make(chan struct{})},
	}
}

// expiry is the time at which a call that begins now ends.
func (p *Pipe) expiry(dir int, each bool) (t time.Time, moved chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t = p.deadline[dir]
	if d := p.timeout[dir]; d > 0 && each {
		if u := time.Now().Add(d); t.IsZero() || u.Before(t) {
			t = u
		}
	}
	return t, p.moved[dir]
}

// wait runs try, which waits for a channel or expired, until it has a result.
func (p *Pipe) wait(dir int, try func(expired <-chan time.Time, moved <-chan struct{}) (bool, error)) error {
	first, _ := p.expiry(dir, true)
	for {
		t, moved := p.expiry(dir, false)
		if !first.IsZero() && (t.IsZero() || first.Before(t)) {
			t = first
		}
		var expired <-chan time.Time
		if !t.IsZero() {
			timer := time.NewTimer(time.Until(t))
			defer timer.Stop()
			expired = timer.C
		}
		if done, err := try(expired, moved); done {
			return err
		}
		first, _ = p.expiry(dir, true)
	}
}

func (p *Pipe) next() (m []byte, err error) {
	select {
	case m = <-p.in:
		return m, nil
	default:
	}
	p.mu.Lock()
	poll := p.flags&o7s.RNOBLOCK != 0
	p.mu.Unlock()
	if poll {
		time.Sleep(time.Millisecond) // lets virtual time pass
		select {
		case <-p.closed:
			return nil, net.ErrClosed
		default:
			return nil, o7serr.EAGAIN
		}
	}
	err = p.wait(0, func(expired <-chan time.Time, moved <-chan struct{}) (bool, error) {
		select {
		case m = <-p.in:
			return true, nil
		case <-p.closed:
			return true, net.ErrClosed
		case <-p.peer.closed:
			select {
			case m = <-p.in:
				return true, nil
			default:
			}
			if p.Spec.InOrder != 0 {
				return true, io.EOF
			}
			return true, o7serr.EFLOWDOWN
		case <-expired:
			return true, os.ErrDeadlineExceeded
		case <-moved:
			return false, nil
		}
	})
	return m, err
}

func (p *Pipe) Read(b []byte) (int, error) {
	m, err := p.next()
	if err != nil {
		return 0, err
	}
	if len(m) > len(b) {
		return 0, o7serr.EMSGSIZE
	}
	return copy(b, m), nil
}

// ReadBatch is that of a flow.
func (p *Pipe) ReadBatch(bufs [][]byte, sizes []int) (int, error) {
	m, err := p.next()
	for n := 0; ; n++ {
		if err != nil {
			return n, err
		}
		copy(bufs[n], m)
		sizes[n] = len(m)
		if n+1 == len(bufs) {
			return n + 1, nil
		}
		select {
		case m = <-p.in:
		default:
			return n + 1, nil
		}
	}
}

func (p *Pipe) Write(b []byte) (n int, err error) {
	if len(b) > p.Max {
		return 0, fmt.Errorf("message of %d bytes on a flow that carries %d: %w", len(b), p.Max, o7serr.EMSGSIZE)
	}
	if p.Drop != nil && p.Drop(b) {
		return len(b), nil
	}
	b = bytes.Clone(b)
	err = p.wait(1, func(expired <-chan time.Time, moved <-chan struct{}) (bool, error) {
		select {
		case <-p.closed:
			return true, net.ErrClosed
		case <-p.peer.closed:
			return true, o7serr.EFLOWDOWN
		default:
		}
		select {
		case p.out <- b:
			n = len(b)
			return true, nil
		default:
		}
		p.mu.Lock()
		poll := p.flags&o7s.WNOBLOCK != 0
		p.mu.Unlock()
		if poll {
			return true, o7serr.EAGAIN
		}
		select {
		case <-p.closed:
			return true, net.ErrClosed
		case <-p.peer.closed:
			return true, o7serr.EFLOWDOWN
		case p.out <- b:
			n = len(b)
			return true, nil
		case <-expired:
			return true, os.ErrDeadlineExceeded
		case <-moved:
			return false, nil
		}
	})
	return n, err
}

// WriteBatch is that of a flow.
func (p *Pipe) WriteBatch(msgs [][]byte) (int, error) {
	for i, m := range msgs {
		if _, err := p.Write(m); err != nil {
			return i, err
		}
	}
	return len(msgs), nil
}

// Close releases the end.
func (p *Pipe) Close() error { p.once.Do(func() { close(p.closed) }); return nil }

// FD is its number.
func (p *Pipe) FD() int { return p.fd }

// MTU is the longest message.
func (p *Pipe) MTU() int { return p.Max }

// QoS is the quality asked for.
func (p *Pipe) QoS() qos.Spec { return p.Spec }

// SetFlags sets the flags; RNOBLOCK and WNOBLOCK work.
func (p *Pipe) SetFlags(f o7s.Flags) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.flags = f
	return nil
}

// SetReadTimeout bounds each later read.
func (p *Pipe) SetReadTimeout(d time.Duration) { p.setTimeout(0, d) }

// SetWriteTimeout bounds each later write.
func (p *Pipe) SetWriteTimeout(d time.Duration) { p.setTimeout(1, d) }

func (p *Pipe) setTimeout(dir int, d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.timeout[dir] = d
}

// SetReadDeadline ends reads, also those under way.
func (p *Pipe) SetReadDeadline(t time.Time) error { return p.setDeadline(0, t) }

// SetWriteDeadline ends writes, also those under way.
func (p *Pipe) SetWriteDeadline(t time.Time) error { return p.setDeadline(1, t) }

func (p *Pipe) setDeadline(dir int, t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deadline[dir] = t
	close(p.moved[dir])
	p.moved[dir] = make(chan struct{})
	return nil
}

// Network is a network on which every allocation reaches Far, and flows sent to
// Flows are accepted; nil there is a daemon that dies.
type Network struct {
	Far   func(*Pipe)      // runs as the other end; nil: the name is unknown
	Make  func(a, b *Pipe) // changes a flow before it is used
	Flows chan kit.Flow

	QoS qos.Spec // of the last allocation
}

// Alloc makes a flow to Far.
func (n *Network) Alloc(_ context.Context, _ string, q qos.Spec) (kit.Flow, error) {
	if n.Far == nil {
		return nil, o7serr.Wrap(o7serr.ENAME, "allocate flow")
	}
	n.QoS = q
	a, b := New(64)
	a.Spec, b.Spec = q, q
	if n.Make != nil {
		n.Make(a, b)
	}
	go n.Far(b)
	return a, nil
}

// Accept waits for a flow.
func (n *Network) Accept(ctx context.Context) (kit.Flow, error) {
	select {
	case f := <-n.Flows:
		if f == nil {
			return nil, o7serr.Wrap(o7serr.EIRMD, "no daemon")
		}
		return f, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
