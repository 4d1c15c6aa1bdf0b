package calls

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// desc is an allocated descriptor.
type desc struct {
	fd   int
	flow *o7s.Flow
	rd   side
	wr   side

	mu    sync.Mutex // guards what follows
	flags o7s.Flags  // as set last
}

func newDesc(fd int, f *o7s.Flow) *desc {
	d := &desc{fd: fd, flow: f, flags: o7s.Default}
	d.rd.init(f.SetReadDeadline)
	d.wr.init(f.SetWriteDeadline)
	return d
}

// side is one direction of a descriptor.
type side struct {
	gate  gate
	timeo atomic.Int64 // of each call in ns, -1: none
	poll  atomic.Bool  // timeo is 0, and the flags ask for blocking
	quick atomic.Bool  // calls do not block: poll, or the flags say so

	mu       sync.Mutex // guards what follows
	deadline func(time.Time) error
	bounced  bool // the deadline has passed because of an interruption
}

func (s *side) init(deadline func(time.Time) error) {
	s.gate.init()
	s.deadline = deadline
	s.timeo.Store(-1)
}

// past is a deadline that ends a wait now.
var past = time.Unix(1, 0)

// bounce ends the wait of whoever is in a call on this side, or the next.
func (s *side) bounce() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bounced = true
	_ = s.deadline(past) // fails on a flow that is closed, which nobody waits for
}

// settle is asked after a wait was timed out: was it bounce? The gate is still
// locked, or the next would find a deadline that has passed and no reason.
func (s *side) settle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.bounced {
		return false
	}
	s.bounced = false
	_ = s.deadline(time.Time{})
	return true
}

// instant is for how long a call that does not block waits for another one on
// the same side, which either blocks or is over soon.
const instant = time.Millisecond

// enter locks the gate, or returns the number of the reason why it did not. The
// call that has it may have begun with other flags, and without a time-out.
func (s *side) enter(p *Process, seen uint32) int {
	wait := time.Duration(s.timeo.Load())
	quick := s.quick.Load()
	if quick {
		wait = instant
	}
	no := s.gate.lock(p, seen, wait)
	if quick && no == code(o7serr.ETIMEDOUT) && !s.poll.Load() {
		return code(o7serr.EAGAIN)
	}
	return no
}

// finish makes the number of what a read or write returned.
func (s *side) finish(n int, err error) int {
	switch {
	case err == nil:
		return n
	case err == io.EOF: //nolint:errorlint // exactly
		// 0 is the end of a message here, so the end of the stream cannot be.
		return code(o7serr.EFLOWDOWN)
	case errors.Is(err, o7serr.EAGAIN):
		if s.poll.Load() {
			return code(o7serr.ETIMEDOUT)
		}
	case errors.Is(err, os.ErrDeadlineExceeded):
		if s.settle() {
			return Interrupted
		}
	}
	return code(err)
}

// Read is flow_read. seen is explained with Process.gen.
func (p *Process) Read(fd int, b []byte, seen uint32) int {
	d, no := p.get(fd)
	if d == nil {
		return no
	}
	if no = d.rd.enter(p, seen); no != 0 {
		return no
	}
	n := d.rd.finish(d.flow.Read(b))
	d.rd.gate.unlock()
	return n
}

// Write is flow_write.
func (p *Process) Write(fd int, b []byte, seen uint32) int {
	d, no := p.get(fd)
	if d == nil {
		return no
	}
	if no = d.wr.enter(p, seen); no != 0 {
		return no
	}
	n := d.wr.finish(d.flow.Write(b))
	d.wr.gate.unlock()
	return n
}

// gate is a mutex whose wait ends with an interruption or a time-out.
type gate struct {
	state atomic.Int32  // 0: open, 1: taken, 2: taken, and somebody may wait
	wake  chan struct{} // to one that waits
}

func (g *gate) init() { g.wake = make(chan struct{}, 1) }

// lock returns 0, or the number of the reason why it did not lock. timeo < 0
// waits for ever.
func (g *gate) lock(p *Process, seen uint32, timeo time.Duration) int {
	// The look at gen is what makes an interruption reach a wait that is
	// about to begin: see Process.gen.
	if p.gen.Load() != seen {
		return Interrupted
	}
	if g.state.CompareAndSwap(0, 1) {
		return 0
	}
	var expired <-chan time.Time
	if timeo >= 0 {
		t := time.NewTimer(timeo)
		defer t.Stop()
		expired = t.C
	}
	kick := p.kicked(seen)
	if kick == nil {
		return Interrupted
	}
	for g.state.Swap(2) != 0 {
		select {
		case <-g.wake:
		case <-kick:
			return Interrupted
		case <-expired:
			return code(o7serr.ETIMEDOUT)
		}
	}
	return 0
}

func (g *gate) unlock() {
	if g.state.Swap(0) == 2 {
		select {
		case g.wake <- struct{}{}:
		default:
		}
	}
}
