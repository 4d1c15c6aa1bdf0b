package calls

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// maxSets is how many sets a process may have (spec 33 §8).
const maxSets = 32

// maxEvents is how many events one wait returns. The rest is returned by the
// next, so this is no limit.
const maxEvents = 256

// Event is what a queue holds.
type Event struct {
	FD   int
	Type int // enum fqtype
}

// waiter is what this package needs of a set of flows.
type waiter interface {
	Add(*o7s.Flow) error
	Del(*o7s.Flow)
	Has(*o7s.Flow) bool
	Zero()
	Close() error
	// Wait waits for at least one event; for an interruption by Wake it may
	// return none.
	Wait(evs []o7s.SetEvent, d time.Duration) (int, error)
	Wake()
}

// set is an fset_t.
type set struct {
	w    waiter
	gate gate // held by the thread that waits; guards evs
	evs  [maxEvents]o7s.SetEvent

	mu    sync.Mutex // guards what follows
	flows map[*o7s.Flow]*desc
}

// drop removes a flow.
func (s *set) drop(d *desc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.flows[d.flow] != nil {
		delete(s.flows, d.flow)
		s.w.Del(d.flow)
	}
}

func (p *Process) allSets() []*set {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*set
	for _, s := range p.sets {
		if s != nil {
			out = append(out, s)
		}
	}
	return out
}

// NewSet is fset_create: the number of a set, from 0.
func (p *Process) NewSet() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.sets {
		if p.sets[i] == nil {
			s := &set{w: o7s.NewSet(), flows: map[*o7s.Flow]*desc{}}
			s.gate.init()
			p.sets[i] = s
			return i
		}
	}
	return -int(syscall.EMFILE)
}

func (p *Process) set(n int) *set {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n < 0 || n >= maxSets {
		return nil
	}
	return p.sets[n]
}

// CloseSet is fset_destroy.
func (p *Process) CloseSet(n int) {
	s := p.set(n)
	if s == nil {
		return
	}
	p.mu.Lock()
	p.sets[n] = nil
	p.mu.Unlock()
	s.w.Close()
}

// ZeroSet is fset_zero.
func (p *Process) ZeroSet(n int) {
	if s := p.set(n); s != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		clear(s.flows)
		s.w.Zero()
	}
}

// AddSet is fset_add.
func (p *Process) AddSet(n, fd int) int {
	s := p.set(n)
	d, _ := p.get(fd)
	if s == nil || d == nil {
		return code(o7serr.EINVAL)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.flows[d.flow] != nil {
		return 0
	}
	if err := s.w.Add(d.flow); err != nil {
		return code(err)
	}
	s.flows[d.flow] = d
	return 0
}

// DelSet is fset_del.
func (p *Process) DelSet(n, fd int) {
	s := p.set(n)
	if d, _ := p.get(fd); s != nil && d != nil {
		s.drop(d)
	}
}

// HasSet is fset_has.
func (p *Process) HasSet(n, fd int) bool {
	s := p.set(n)
	d, _ := p.get(fd)
	if s == nil || d == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flows[d.flow] != nil
}

// Events is fevent: it waits for events of a set, gives each to put and
// returns their number or a negative one. timeo < 0 waits for ever.
func (p *Process) Events(n int, timeo time.Duration, seen uint32, limit int, put func(i int, e Event)) int {
	s := p.set(n)
	if s == nil {
		return code(o7serr.EINVAL)
	}
	var end time.Time
	if timeo > 0 {
		end = time.Now().Add(timeo)
	}
	if no := s.gate.lock(p, seen, timeo); no != 0 {
		return no
	}
	defer s.gate.unlock()
	for {
		// After the look at gen, Wake reaches this wait.
		if p.kicked(seen) == nil {
			return Interrupted
		}
		if timeo > 0 {
			timeo = max(time.Until(end), 0)
		}
		k, err := s.w.Wait(s.evs[:min(limit, maxEvents)], timeo)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return code(o7serr.ETIMEDOUT)
		}
		if err != nil {
			return code(err)
		}
		if k = s.deliver(s.evs[:k], put); k > 0 {
			return k
		}
	}
}

// deliver passes events on, less those of flows that were released meanwhile.
func (s *set) deliver(evs []o7s.SetEvent, put func(int, Event)) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for i, e := range evs {
		if d := s.flows[e.Flow]; d != nil {
			put(n, Event{FD: d.fd, Type: int(e.Event)})
			n++
		}
		evs[i] = o7s.SetEvent{} // holds no flow
	}
	return n
}
