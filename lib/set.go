package o7s

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/ring"
)

// Set is a set of flows whose events one goroutine waits for (spec 33 §8). A
// flow is in one set at most. All methods are safe for concurrent use; of
// several goroutines that wait at the same time each event goes to one. Close
// ends its use; the flows are not affected.
//
// EventPacket tells that a flow has a message to read. When a Read leaves
// another one, the event comes again; so a program may read one message for each
// event, or all until o7serr.EAGAIN, which it is told of once more at most. The
// end of a stream, and what makes the flow fail, are read like a message, and
// told of like one. The other events are those of Flow.Events.
//
// Waiting costs the same for one flow as for ten thousand: what arrives leaves a
// mark, and the waiting goroutine looks at the marks itself.
type Set struct {
	wmu  sync.Mutex // held by the goroutine that waits
	spin ring.Spinner

	mu      sync.Mutex // guards what follows
	flows   map[*Flow]struct{}
	rung    []*Flow    // may have a message
	spare   []*Flow    // rung, of the last time
	events  []SetEvent // that are not messages
	session *session   // of the first flow; its hub is where the set waits
	sleeper *ring.Sleeper
	woken   bool
	closed  bool

	pending atomic.Bool // there is something in rung or events, or woken or closed
	asleep  atomic.Bool
}

// SetEvent is an event of a flow in a set.
type SetEvent struct {
	Flow  *Flow
	Event Event
}

// maxSetEvents bounds the events that wait, messages excepted: as the reference
// (spec 33 §8). The oldest are dropped.
const maxSetEvents = 1024

var (
	errInSet     = fmt.Errorf("flow is in a set already: %w", o7serr.EPERM)
	errSetClosed = fmt.Errorf("set is closed: %w", net.ErrClosed)
)

// NewSet returns an empty set.
func NewSet() *Set {
	return &Set{flows: map[*Flow]struct{}{}, spin: ring.Spinner{Max: ring.DefaultSpin}}
}

// Add puts f into the set. When it has messages already, that is an event.
// Errors: o7serr.EPERM when it is in another set, net.ErrClosed.
func (s *Set) Add(f *Flow) error {
	if f.state.Load()&stateClosed != 0 {
		return errClosed
	}
	if !f.set.CompareAndSwap(nil, s) {
		if f.set.Load() == s {
			return nil
		}
		return errInSet
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		f.set.Store(nil)
		return errSetClosed
	}
	hub := f.session.desk.Hub()
	foreign := false
	if s.session == nil {
		s.session, s.sleeper = f.session, hub.Sleeper()
	} else if foreign = s.session != f.session; foreign {
		hub.Serve() // the set does not wait there
	}
	s.flows[f] = struct{}{}
	s.mu.Unlock()
	f.path.OnRing(func(lead bool) { s.note(f, lead && !foreign) })
	s.note(f, false)
	return nil
}

// Del takes f out of the set.
func (s *Set) Del(f *Flow) {
	if !f.set.CompareAndSwap(s, nil) {
		return
	}
	f.path.OnRing(nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.flows, f)
	keep := s.events[:0]
	for _, e := range s.events {
		if e.Flow != f {
			keep = append(keep, e)
		}
	}
	s.events = keep
}

// Has reports whether f is in the set.
func (s *Set) Has(f *Flow) bool { return f.set.Load() == s }

// Len is the number of flows in the set.
func (s *Set) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.flows)
}

// Zero takes all flows out of the set.
func (s *Set) Zero() {
	s.mu.Lock()
	list := make([]*Flow, 0, len(s.flows))
	for f := range s.flows {
		list = append(list, f)
	}
	s.mu.Unlock()
	for _, f := range list {
		s.Del(f)
	}
}

// Close empties the set and ends its use: a Wait fails with net.ErrClosed.
func (s *Set) Close() error {
	s.mu.Lock()
	s.closed = true
	s.pending.Store(true)
	s.mu.Unlock()
	s.wake(false)
	s.Zero()
	return nil
}

// Wake ends the Wait under way, or else the next one, without events.
func (s *Set) Wake() {
	s.mu.Lock()
	s.woken = true
	s.pending.Store(true)
	s.mu.Unlock()
	s.wake(false)
}

// note says that f may have a message. It does not block, and is called with
// locks of f's path held.
func (s *Set) note(f *Flow, lead bool) {
	if f.noted.Swap(true) {
		return
	}
	s.mu.Lock()
	s.rung = append(s.rung, f)
	s.pending.Store(true)
	s.mu.Unlock()
	s.wake(lead)
}

// event says what happened to f.
func (s *Set) event(f *Flow, e Event) {
	s.mu.Lock()
	if len(s.events) == maxSetEvents {
		s.events = append(s.events[:0], s.events[1:]...)
	}
	s.events = append(s.events, SetEvent{f, e})
	s.pending.Store(true)
	s.mu.Unlock()
	s.wake(false)
}

// wake wakes the goroutine that waits. lead: the leader of the set's hub calls,
// which is that goroutine itself, or lets it follow.
func (s *Set) wake(lead bool) {
	if !s.asleep.Load() {
		return
	}
	s.mu.Lock()
	sl := s.sleeper
	s.mu.Unlock()
	switch {
	case sl == nil:
	case lead:
		sl.Nudge()
	default:
		sl.Wake()
	}
}

// Wait blocks until there are events, for d at most, and returns how many it put
// into evs. d < 0 means for ever, 0 not at all. Errors: os.ErrDeadlineExceeded
// (also o7serr.ETIMEDOUT) when there were none in time, net.ErrClosed. It returns
// 0 and no error after Wake.
func (s *Set) Wait(evs []SetEvent, d time.Duration) (int, error) {
	if len(evs) == 0 {
		return 0, fmt.Errorf("no room for events: %w", o7serr.EINVAL)
	}
	s.wmu.Lock()
	defer s.wmu.Unlock()
	start := time.Now()
	var until time.Time
	if d >= 0 {
		until = start.Add(d)
	}
	for looked := false; ; {
		n, err := s.take(evs)
		if n > 0 || err != nil || s.wasWoken() {
			return n, err
		}
		s.mu.Lock()
		sl, ses := s.sleeper, s.session
		if sl == nil { // no flow yet: there is nothing to wait at
			sl = idleHub().Sleeper()
			s.sleeper = sl
		}
		s.mu.Unlock()
		if !looked || d == 0 {
			// What was rung for while nobody led is still at the doors.
			if d == 0 && looked {
				return 0, errTimedOut
			}
			looked = true
			s.look(ses, sl)
			continue
		}
		if s.spin.Spin(start, func() bool { return s.soon(ses) }) {
			s.look(ses, sl)
			continue
		}
		sl.SetDeadline(until)
		s.asleep.Store(true)
		err = sl.Wait(s.pending.Load)
		s.asleep.Store(false)
		s.spin.Slept(time.Since(start))
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if n, err := s.take(evs); n > 0 || err != nil {
				return n, err
			}
			return 0, errTimedOut
		case err != nil && s.adopt():
			// The hub is gone with its daemon: wait at another flow's.
		case err != nil:
			return 0, waitError(err)
		}
		start = time.Now()
	}
}

// soon reports whether there may be something.
func (s *Set) soon(ses *session) bool {
	if s.pending.Load() {
		return true
	}
	if ses == nil {
		return false
	}
	if t := ses.device(); t != nil {
		t.drain(false, s.pending.Load)
	}
	return s.pending.Load() || ses.desk.Hub().Rung()
}

// look takes in what has arrived, unless somebody else leads.
func (s *Set) look(ses *session, sl *ring.Sleeper) {
	if ses == nil {
		return
	}
	if t := ses.device(); t != nil {
		t.drain(false, nil)
	}
	if h := ses.desk.Hub(); h != nil {
		h.TryLook(sl)
	}
}

// adopt moves the set to the hub of a flow that it has, if that is another one.
func (s *Set) adopt() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for f := range s.flows {
		if h := f.session.desk.Hub(); f.session != s.session && h != nil {
			s.session, s.sleeper = f.session, h.Sleeper()
			return true
		}
	}
	return false
}

func (s *Set) wasWoken() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.woken
	s.woken = false
	return w
}

// take moves what has happened to evs. s.wmu is held.
func (s *Set) take(evs []SetEvent) (n int, err error) {
	if !s.pending.Load() {
		return 0, nil
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return 0, errSetClosed
	}
	n = copy(evs, s.events)
	s.events = append(s.events[:0], s.events[n:]...)
	rung := s.rung
	s.rung, s.spare = s.spare[:0], nil
	s.pending.Store(len(s.events) > 0)
	s.mu.Unlock()
	i := 0
	for ; i < len(rung) && n < len(evs); i++ {
		f := rung[i]
		rung[i] = nil
		f.noted.Store(false)
		if f.set.Load() == s && f.hasMessage() {
			evs[n] = SetEvent{f, EventPacket}
			n++
		}
	}
	s.mu.Lock()
	if i < len(rung) { // their turn comes first next time
		s.rung = append(append([]*Flow(nil), rung[i:]...), s.rung...)
		s.pending.Store(true)
	}
	clear(rung)
	s.spare = rung[:0]
	s.mu.Unlock()
	return n, nil
}

// hasMessage reports whether a read would return at once. Otherwise the flow's
// path calls for the next message.
func (f *Flow) hasMessage() bool {
	if !f.rmu.TryLock() {
		return false // who reads looks again
	}
	defer f.rmu.Unlock()
	return f.peek()
}

// peek is hasMessage for who holds rmu.
func (f *Flow) peek() bool {
	if f.state.Load()&stateClosed != 0 {
		return false
	}
	if f.mark || f.rest > 0 {
		return true
	}
	for {
		m, err := f.path.Next()
		switch {
		case err == nil && len(m) == 0:
			f.path.Skip()
			f.path.Release()
		case !errors.Is(err, ring.ErrEmpty): // nil, too
			return true
		case f.path.Arm():
			return f.trouble(false) != nil
		}
	}
}

// again tells the flow's set of what a read left. rmu is held.
func (f *Flow) again(err error) {
	s := f.set.Load()
	if s == nil || err != nil && !errors.Is(err, o7serr.EAGAIN) {
		return
	}
	if f.peek() {
		s.note(f, false)
	}
}

// idleHub is where sets without flows wait: for a deadline, or to be woken.
var idleHub = sync.OnceValue(func() *ring.Hub {
	h, err := ring.NewHub(-1)
	if err != nil {
		panic(err) // without descriptors there are no flows either
	}
	return h
})
