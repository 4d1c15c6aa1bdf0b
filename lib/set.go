package o7s

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
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
// end of a stream is read like a message, and told of like one. The other events
// are those of Flow.Events; a flow that was released is told of by them alone.
// What happened before Add is told with it. EventDealloc and EventPeer come
// behind one EventPacket for each message that is left to read, so a program may
// close the flow when it is told. An event that nobody waited for is told once,
// as of the last time.
//
// Waiting costs the same for one flow as for ten thousand: what arrives leaves a
// mark, and the waiting goroutine looks at the marks itself.
type Set struct {
	wmu  sync.Mutex // held by the goroutine that waits
	spin ring.Spinner

	mu      sync.Mutex // guards what follows
	flows   map[*Flow]*member
	rung    []*member // may have a message
	spare   []*member // rung, of the last time
	evented []*member // have events that are not messages
	session *session  // of the first flow
	hub     *ring.Hub // its hub, where the set waits; the idle one when there is no flow
	sleeper *ring.Sleeper
	woken   bool
	closed  bool

	pending atomic.Bool // there is something in rung or evented, or woken or closed
	asleep  atomic.Bool
}

// member is a flow in a set.
type member struct {
	set   *Set
	flow  *Flow
	noted atomic.Bool // in Set.rung
	told  atomic.Bool // of a message, and nothing was read since

	// Guarded by Set.mu.
	events [kinds]Event // to be told, the oldest first
	n      int          // how many
	listed bool         // in Set.evented

	// Of the goroutine that waits.
	owed    int  // packets to be told before events
	counted bool // they were
	over    bool // released, as far as this look goes
}

// kinds is how many events there are besides EventPacket.
const kinds = 4

// SetEvent is an event of a flow in a set.
type SetEvent struct {
	Flow  *Flow
	Event Event
}

var (
	errInSet     = fmt.Errorf("flow is in a set already: %w", o7serr.EPERM)
	errSetClosed = fmt.Errorf("set is closed: %w", net.ErrClosed)
)

// NewSet returns an empty set.
func NewSet() *Set {
	return &Set{flows: map[*Flow]*member{}, spin: ring.Spinner{Max: ring.DefaultSpin}}
}

// Add puts f into the set. When it has messages already, that is an event.
// Errors: o7serr.EPERM when it is in another set, net.ErrClosed.
func (s *Set) Add(f *Flow) error {
	if f.state.Load()&stateClosed != 0 {
		return errClosed
	}
	m := &member{set: s, flow: f}
	if !f.set.CompareAndSwap(nil, m) {
		if s.Has(f) {
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
	idle := s.sleeper
	if s.session == nil {
		s.session, s.hub = f.session, f.hub
		s.sleeper = s.hub.Sleeper()
	} else {
		idle = nil
		if s.hub != f.hub {
			f.hub.Serve() // the set does not wait there
		}
	}
	s.flows[f] = m
	s.mu.Unlock()
	// Flow.Close sets its state first, and then looks for a set: either it
	// finds this one, or we find the flow closed.
	f.emu.Lock()
	open := f.events != nil && f.state.Load()&stateClosed == 0
	if open {
		f.path.OnRing(m.ring)
		for _, e := range [...]Event{EventDown, EventPeer, EventDealloc} {
			if f.standing&e != 0 {
				m.event(e)
			}
		}
	}
	f.emu.Unlock()
	if !open {
		s.Del(f)
		return errClosed
	}
	m.note(false)
	if idle != nil {
		idle.Wake() // who waits already does so elsewhere
	}
	return nil
}

// Del takes f out of the set.
func (s *Set) Del(f *Flow) {
	s.mu.Lock()
	m := s.flows[f]
	delete(s.flows, f)
	s.mu.Unlock()
	if m == nil {
		return
	}
	f.emu.Lock()
	if f.events != nil { // else the path may be closed
		f.path.OnRing(nil)
	}
	f.emu.Unlock()
	f.set.CompareAndSwap(m, nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	m.n = 0
	if m.listed {
		s.evented = slices.DeleteFunc(s.evented, func(o *member) bool { return o == m })
	}
}

// Has reports whether f is in the set.
func (s *Set) Has(f *Flow) bool {
	m := f.set.Load()
	return m != nil && m.set == s
}

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

// note says that the flow may have a message. It does not block, and is called
// with locks of the flow's path held. lead: the leader of the set's hub calls.
func (m *member) note(lead bool) {
	if m.noted.Swap(true) {
		return
	}
	s := m.set
	s.mu.Lock()
	s.rung = append(s.rung, m)
	s.pending.Store(true)
	s.mu.Unlock()
	s.wake(lead)
}

// ring is note for the flow's path. lead: the leader of the flow's hub calls.
func (m *member) ring(lead bool) {
	if lead {
		m.set.mu.Lock()
		lead = m.set.hub == m.flow.hub
		m.set.mu.Unlock()
	}
	m.note(lead)
}

// event says what happened to the flow.
func (m *member) event(e Event) {
	s := m.set
	s.mu.Lock()
	if i := slices.Index(m.events[:m.n], e); i >= 0 {
		copy(m.events[i:m.n], m.events[i+1:m.n])
		m.n--
	}
	m.events[m.n] = e
	m.n++
	if !m.listed {
		m.listed = true
		s.evented = append(s.evented, m)
	}
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
		if s.sleeper == nil { // no flow yet: there is nothing to wait at
			s.hub = idleHub()
			s.sleeper = s.hub.Sleeper()
		}
		sl, ses, hub := s.sleeper, s.session, s.hub
		s.mu.Unlock()
		if !looked || d == 0 {
			// What was rung for while nobody led is still at the doors.
			if d == 0 && looked {
				return 0, errTimedOut
			}
			looked = true
			s.look(ses, hub, sl)
			continue
		}
		if s.spin.Spin(start, func() bool { return s.soon(ses, hub) }) {
			if !s.pending.Load() { // else looking again only costs a system call
				s.look(ses, hub, sl)
			}
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
		case err != nil:
			s.adopt(hub) // it is gone with its client
		}
		start = time.Now()
	}
}

// soon reports whether there may be something.
func (s *Set) soon(ses *session, hub *ring.Hub) bool {
	if s.pending.Load() {
		return true
	}
	if ses == nil {
		return false
	}
	if t := ses.device(); t != nil {
		t.drain(false, s.pending.Load)
	}
	return s.pending.Load() || hub.Rung()
}

// look takes in what has arrived, unless somebody else leads.
func (s *Set) look(ses *session, hub *ring.Hub, sl *ring.Sleeper) {
	if ses == nil {
		return
	}
	if t := ses.device(); t != nil {
		t.drain(false, nil)
	}
	hub.TryLook(sl)
}

// adopt moves the set from a hub that was closed to that of a flow which it
// still has; without one it waits for a flow.
func (s *Set) adopt(hub *ring.Hub) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hub != hub {
		return
	}
	s.session, s.hub, s.sleeper = nil, nil, nil
	for f := range s.flows {
		if f.hub != hub {
			s.session, s.hub, s.sleeper = f.session, f.hub, f.hub.Sleeper()
			return
		}
	}
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
	evented := s.evented
	s.evented = nil // seldom: not worth a spare
	rung := s.rung
	s.rung, s.spare = s.spare[:0], nil
	s.pending.Store(false)
	s.mu.Unlock()
	j := 0
	for ; j < len(evented); j++ {
		k, all := evented[j].tell(evs[n:])
		if n += k; !all {
			break
		}
	}
	i := 0
	for ; i < len(rung) && n < len(evs); i++ {
		m := rung[i]
		rung[i] = nil
		m.noted.Store(false)
		if m.over || m.flow.set.Load() != m {
			continue
		}
		m.told.Store(true) // first: a read may come in between
		if m.flow.hasMessage() {
			evs[n] = SetEvent{m.flow, EventPacket}
			n++
		} else {
			m.told.Store(false)
		}
	}
	for _, m := range evented {
		m.over = false
	}
	s.mu.Lock()
	if i < len(rung) { // their turn comes first next time
		s.rung = append(append([]*member(nil), rung[i:]...), s.rung...)
		s.pending.Store(true)
	}
	if j < len(evented) {
		s.evented = append(evented[j:], s.evented...)
		s.pending.Store(true)
	}
	clear(rung)
	s.spare = rung[:0]
	s.mu.Unlock()
	return n, nil
}

// tell puts what happened to the flow into evs, and reports whether all of it
// had room. Who is told that the flow was released may close it at once: the
// messages that are left come first. set.wmu is held.
func (m *member) tell(evs []SetEvent) (n int, all bool) {
	s, f := m.set, m.flow
	if f.set.Load() != m {
		return 0, true // taken out while we look
	}
	s.mu.Lock()
	released := slices.Contains(m.events[:m.n], EventDealloc)
	last := released || slices.Contains(m.events[:m.n], EventPeer)
	s.mu.Unlock()
	if last && !m.counted { // takes locks under which events come
		m.counted = true
		m.owed = f.left(released)
		if m.owed > 0 && m.told.Load() {
			m.owed--
		}
	}
	for ; m.owed > 0 && n < len(evs); m.owed-- {
		evs[n] = SetEvent{f, EventPacket}
		n++
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	k := 0
	for ; k < m.n && n < len(evs); k++ {
		evs[n] = SetEvent{f, m.events[k]}
		m.over = m.over || m.events[k] == EventDealloc
		n++
	}
	m.n = copy(m.events[:], m.events[k:m.n])
	if m.listed = m.n > 0; !m.listed {
		m.counted = false
	}
	return n, !m.listed
}

// left is how many reads there are for a flow that gets nothing more. released:
// of an ordered one the end is read, too.
func (f *Flow) left(released bool) int {
	if !f.glimpse(&f.rmu) {
		return 0 // a reader is blocked: there is nothing
	}
	defer f.rmu.Unlock()
	if f.state.Load()&stateClosed != 0 {
		return 0
	}
	n := f.path.RxLen(math.MaxInt)
	if released && !f.over && f.ordered() {
		n++
	}
	return n
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
	if f.info.Direct {
		f.turn()
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
		case err == nil:
			return true
		case !errors.Is(err, ring.ErrEmpty):
			return !f.over
		case f.path.Arm():
			return !f.over && f.trouble(false) == io.EOF //nolint:errorlint // exactly what it returns
		}
	}
}

// turn tells the flow's set when the program at the other end has set or cleared
// its DOWN flag. rmu is held.
func (f *Flow) turn() {
	st := f.path.Peer()
	off := st&ring.Down != 0
	if off == f.off || st&ring.Closed != 0 {
		return
	}
	m := f.set.Load()
	if m == nil {
		return
	}
	f.off = off
	if off {
		m.event(EventDown)
	} else {
		m.event(EventUp)
	}
}

// again tells the flow's set of what a read left. rmu is held.
func (f *Flow) again(err error) {
	switch {
	case err == nil:
		f.over = false
	case err == errTooLong, errors.Is(err, o7serr.EAGAIN), errors.Is(err, os.ErrDeadlineExceeded): //nolint:errorlint // our own
	case err == errAccess, err == error(o7serr.EFLOWDOWN): //nolint:errorlint // exactly: not the end
		return
	default:
		f.over = true
	}
	m := f.set.Load()
	if m == nil {
		return
	}
	m.told.Store(false)
	if f.over {
		return
	}
	// The next Wait looks, which is soon enough, and not in the way of the
	// answer to what was read; one that sleeps is only woken for a message.
	if !m.set.asleep.Load() || f.peek() {
		m.note(false)
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
