package ring

import (
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Hub waits, for one process, for all of its slabs and for further sources with
// one descriptor. It has no goroutine of its own unless Serve is called.
//
// Of the goroutines that wait, one leads: it looks at the sources, sleeps in the
// runtime's poller, wakes those that follow when something is theirs, and leaves
// when something is its own; then one that follows takes over. So what arrives
// for the only one that waits is not passed from goroutine to goroutine, which
// costs more than the message.
//
// What is rung for and nobody waits for is handed to a Handler, if it has one.
type Hub struct {
	file *os.File
	conn syscall.RawConn
	fd   int // of file

	slabs  atomic.Pointer[[]*hubSlab]
	doorMu sync.RWMutex // held for reading while looking at doors, else their memory could go

	mu       sync.Mutex // guards what follows
	leader   *Sleeper
	waiting  []*Sleeper
	deadline time.Time // of file
	sources  []*source
	armed    bool // the sources are watched
	closed   bool

	serve   *Sleeper // of the goroutine of Serve; nil: none
	parked  bool     // that waits until nobody leads
	serving sync.WaitGroup

	handMu sync.Mutex // held while what was rung for is handed out: that has to be complete before a leader sleeps
	hands  []*HubEnd  // reused
}

// hubSlab is a slab at the hub, and the waiters of its slots.
type hubSlab struct {
	slab *Slab
	ends []atomic.Pointer[HubEnd]
}

// source is a descriptor besides the slabs, and how it is read.
type source struct {
	fd   int
	look func() (more bool) // called by the leader; nil: the wait descriptor
}

// NewHub returns a hub that waits for the descriptor wait (see NewWaitFD), which
// belongs to it afterwards, also on error. wait -1 means that there is none yet.
func NewHub(wait int) (*Hub, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	h := &Hub{fd: fd}
	if wait >= 0 {
		err = unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, wait, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(wait)})
		if err == nil {
			h.sources = append(h.sources, &source{fd: wait})
		} else {
			unix.Close(wait)
		}
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	h.file = os.NewFile(uintptr(fd), "o7s-hub")
	if h.conn, err = h.file.SyscallConn(); err != nil {
		h.file.Close()
		return nil, err
	}
	h.slabs.Store(&[]*hubSlab{})
	return h, nil
}

// AddSlab makes the hub wait for what is rung for in s, too.
func (h *Hub) AddSlab(s *Slab) {
	h.mu.Lock()
	defer h.mu.Unlock()
	list := append(slices.Clone(*h.slabs.Load()), &hubSlab{slab: s, ends: make([]atomic.Pointer[HubEnd], SlabSlots)})
	h.slabs.Store(&list)
	h.nudge()
}

// RemoveSlab undoes AddSlab. No end of it is open any more.
func (h *Hub) RemoveSlab(s *Slab) {
	h.doorMu.Lock() // nobody looks at the door
	defer h.doorMu.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	list := slices.DeleteFunc(slices.Clone(*h.slabs.Load()), func(x *hubSlab) bool { return x.slab == s })
	h.slabs.Store(&list)
}

// AddSource adds a descriptor that becomes readable. It stays the caller's.
// look takes what is there, without blocking, wakes or notes whomever it is for,
// and reports whether it left something; the leader calls it. The descriptor is
// watched only while the leader sleeps: each event on one that is always watched
// would wake a thread, and whoever causes it pays for that.
func (h *Hub) AddSource(fd int, look func() (more bool)) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	ev := unix.EpollEvent{Fd: int32(fd)}
	if h.armed {
		ev.Events = unix.EPOLLIN
	}
	if err := unix.EpollCtl(h.fd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return err
	}
	h.sources = append(h.sources, &source{fd, look})
	h.nudge()
	return nil
}

// Close ends all waits, with net.ErrClosed.
func (h *Hub) Close() error {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return nil
	}
	h.closed = true
	for _, s := range h.waiting {
		s.wake()
	}
	if h.serve != nil {
		h.serve.wake()
	}
	h.mu.Unlock()
	err := h.file.Close()
	h.serving.Wait()
	for _, s := range h.sources {
		if s.look == nil { // the wait descriptor is ours
			unix.Close(s.fd)
		}
	}
	return err
}

// Sleeper is one that can wait at a hub: a direction of an end, a set of flows.
// One goroutine at a time waits with it; the other methods may be called at any
// time.
type Sleeper struct {
	hub      *Hub
	sig      chan struct{} // to it while it follows
	follows  bool          // in hub.waiting; guarded by hub.mu
	closed   atomic.Bool
	mu       sync.Mutex // guards deadline
	deadline time.Time
	timer    *time.Timer // of the goroutine that waits
	ready    func() bool // of the present wait
	poll     func(uintptr) bool
}

// Sleeper returns one that has not waited yet.
func (h *Hub) Sleeper() *Sleeper { return &Sleeper{hub: h, sig: make(chan struct{}, 1)} }

// pollFunc is what the leader gives to the poller: it runs before each sleep.
func (s *Sleeper) pollFunc(uintptr) bool {
	h := s.hub
	for {
		if s.ready() {
			return true
		}
		// What is rung for from here on finds the doors asleep, and wakes us.
		h.arm(true)
		more := h.look()
		if s.ready() {
			return true
		}
		if !more {
			return false
		}
	}
}

// Nudge makes a wait that follows look again. It is enough for who leads, and
// costs less than Wake.
func (s *Sleeper) Nudge() { s.wake() }

// wake makes a wait that follows look again.
func (s *Sleeper) wake() {
	select {
	case s.sig <- struct{}{}:
	default:
	}
}

// Wake makes a wait ask ready again, wherever it sleeps.
func (s *Sleeper) Wake() {
	h := s.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	s.wake()
	if h.leader == s {
		h.setDeadline(past)
	}
}

// SetDeadline ends waits at t, present ones too; zero: never.
func (s *Sleeper) SetDeadline(t time.Time) {
	s.mu.Lock()
	same := s.deadline.Equal(t)
	s.deadline = t
	s.mu.Unlock()
	if !same {
		s.Wake()
	}
}

// Close makes every wait return net.ErrClosed.
func (s *Sleeper) Close() {
	if !s.closed.Swap(true) {
		s.Wake()
	}
}

func (s *Sleeper) until() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.deadline
}

// Wait blocks until ready returns true. Errors: os.ErrDeadlineExceeded,
// net.ErrClosed.
func (s *Sleeper) Wait(ready func() bool) error {
	if s.poll == nil {
		s.poll = s.pollFunc // made once, so that waiting does not allocate
	}
	h := s.hub
	s.ready = ready
	defer h.unfollow(s)
	for {
		if ready() {
			return nil
		}
		if s.closed.Load() {
			return net.ErrClosed
		}
		dl := s.until()
		if !dl.IsZero() && !time.Now().Before(dl) {
			return os.ErrDeadlineExceeded
		}
		switch lead, open := h.lead(s); {
		case !open:
			return net.ErrClosed
		case !lead:
			s.follow(dl)
			continue
		}
		if s.closed.Load() { // before it led, so nobody ended its sleep
			h.leave()
			return net.ErrClosed
		}
		err := h.conn.Read(s.poll)
		h.leave()
		switch {
		case err == nil:
			return nil // ready said so, and may do so only once
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return net.ErrClosed
		}
	}
}

// follow sleeps until something may have changed.
func (s *Sleeper) follow(dl time.Time) {
	if dl.IsZero() {
		<-s.sig
		return
	}
	if s.timer == nil {
		s.timer = time.NewTimer(time.Until(dl))
	} else {
		s.timer.Reset(time.Until(dl))
	}
	select {
	case <-s.sig:
		s.timer.Stop()
	case <-s.timer.C:
	}
}

// lead makes s the leader unless there is one; then it follows. The goroutine
// of Serve gives way.
func (h *Hub) lead(s *Sleeper) (leads, open bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return false, false
	}
	if h.leader == nil {
		h.leader = s
		h.drop(s)
		h.setDeadline(s.until())
		return true, true
	}
	if !s.follows {
		s.follows = true
		h.waiting = append(h.waiting, s)
	}
	if h.leader == h.serve && s != h.serve {
		h.setDeadline(past)
	}
	return false, true
}

// drop takes s out of those that follow. mu is held.
func (h *Hub) drop(s *Sleeper) {
	if s.follows {
		s.follows = false
		i, last := slices.Index(h.waiting, s), len(h.waiting)-1
		h.waiting[i], h.waiting[last] = h.waiting[last], nil
		h.waiting = h.waiting[:last]
	}
}

func (h *Hub) leave() {
	h.arm(false)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.leader = nil
	h.promote()
}

func (h *Hub) unfollow(s *Sleeper) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.follows {
		h.drop(s)
		h.promote() // in case it was s that was to take over
	}
}

// promote sees to it that there is a leader if anybody waits. mu is held.
func (h *Hub) promote() {
	switch {
	case h.leader != nil:
	case len(h.waiting) > 0:
		h.waiting[len(h.waiting)-1].wake()
	case h.parked:
		h.parked = false
		h.serve.wake()
	}
}

// nudge makes the leader look at changed sources. mu is held.
func (h *Hub) nudge() {
	if h.leader != nil {
		h.setDeadline(past)
	}
}

// setDeadline sets the deadline of the leader's sleep. mu is held.
func (h *Hub) setDeadline(d time.Time) {
	if !h.deadline.Equal(d) {
		h.deadline = d
		_ = h.file.SetReadDeadline(d)
	}
}

// arm puts the doors to sleep and watches the sources, or undoes that.
func (h *Hub) arm(on bool) {
	v := uint32(0)
	if on {
		v = 1
	}
	h.doorMu.RLock()
	for _, s := range *h.slabs.Load() {
		if d := &s.slab.own; d.sleeps.Load() != v {
			d.sleeps.Store(v)
		}
	}
	h.doorMu.RUnlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.armed == on {
		return
	}
	h.armed = on
	for _, s := range h.sources {
		if s.look != nil {
			ev := unix.EpollEvent{Fd: int32(s.fd)}
			if on {
				ev.Events = unix.EPOLLIN
			}
			_ = unix.EpollCtl(h.fd, unix.EPOLL_CTL_MOD, s.fd, &ev) // gone with its descriptor at worst
		}
	}
}

// Rung reports whether something was rung for that the leader has not seen.
func (h *Hub) Rung() bool {
	h.doorMu.RLock()
	defer h.doorMu.RUnlock()
	for _, s := range *h.slabs.Load() {
		if s.slab.own.some() {
			return true
		}
	}
	return false
}

// TryLook does what a leader does before it sleeps, as s, unless somebody leads.
func (h *Hub) TryLook(s *Sleeper) {
	h.mu.Lock()
	if h.leader != nil || h.closed {
		h.mu.Unlock()
		return
	}
	h.leader = s
	sources := h.sources
	h.mu.Unlock()
	h.handOut()
	for _, s := range sources {
		if s.look != nil {
			s.look()
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.leader = nil
	h.promote()
}

// look hands out what was rung for and looks at the other sources. It reports
// whether one of them has more. The leader calls it.
func (h *Hub) look() (more bool) {
	if h.Rung() {
		h.handOut()
	}
	h.mu.Lock()
	sources := h.sources
	h.mu.Unlock()
	for _, s := range sources {
		if s.look != nil && s.look() {
			more = true
		}
	}
	return more || h.Rung() // by Again
}

func (h *Hub) handOut() {
	h.handMu.Lock()
	defer h.handMu.Unlock()
	h.doorMu.RLock()
	for _, s := range *h.slabs.Load() {
		s.slab.own.take(func(slot uint32) {
			if e := s.ends[slot].Load(); e != nil {
				h.hands = append(h.hands, e)
			}
		})
	}
	h.doorMu.RUnlock()
	for i, e := range h.hands {
		h.hands[i] = nil
		e.rung()
	}
	h.hands = h.hands[:0]
}

// Serve starts a goroutine that leads while nobody else does, so that Handlers
// are called. It gives way to whoever waits, and comes back when nobody has led
// for a while.
func (h *Hub) Serve() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.serve != nil || h.closed {
		return
	}
	h.serve = h.Sleeper()
	h.serving.Go(h.run)
}

// serveAfter is for how long nobody leads before the goroutine of Serve does:
// longer than a program takes between two reads of a busy flow, as long as the
// reference's own delay (spec 30 §6).
const serveAfter = 5 * time.Millisecond

func (h *Hub) run() {
	for h.park() {
		// Whoever led may be back in a moment.
		time.Sleep(serveAfter)
		h.mu.Lock()
		taken, closed := h.leader != nil, h.closed
		h.mu.Unlock()
		if closed {
			return
		}
		if !taken {
			_ = h.serve.Wait(h.wanted)
		}
	}
}

// park waits until nobody leads; false: the hub is closed.
func (h *Hub) park() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.leader != nil && !h.closed {
		h.parked = true
		h.mu.Unlock()
		<-h.serve.sig
		h.mu.Lock()
	}
	return !h.closed
}

// wanted reports whether somebody else waits for the lead.
func (h *Hub) wanted() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.waiting) > 0 || h.leader != nil && h.leader != h.serve
}

// Handler is called when a slot was rung for that no goroutine waits for, by
// whoever leads: it must not block.
type Handler func()

// HubEnd is the Waiter of an End at a hub.
type HubEnd struct {
	at      *atomic.Pointer[HubEnd]
	own     *door
	slot    uint32
	dir     [2]*Sleeper
	handler atomic.Pointer[Handler]
}

// End returns the Waiter of the end in a slot of s, which is at the hub.
func (h *Hub) End(s *Slab, slot uint32) (*HubEnd, error) {
	if slot < SlabSlots {
		for _, x := range *h.slabs.Load() {
			if x.slab == s {
				e := &HubEnd{at: &x.ends[slot], own: &s.own, slot: slot, dir: [2]*Sleeper{h.Sleeper(), h.Sleeper()}}
				if !e.at.CompareAndSwap(nil, e) {
					return nil, errors.New("slot is in use")
				}
				return e, nil
			}
		}
	}
	return nil, errors.New("no such slot")
}

// Handle sets what is called when the end was rung for; nil: nothing.
func (e *HubEnd) Handle(f Handler) {
	if f == nil {
		e.handler.Store(nil)
		return
	}
	e.handler.Store(&f)
}

// Again has the handler called once more, after those of other ends.
func (e *HubEnd) Again() { e.own.ring(e.slot) }

// rung tells the end that something changed.
func (e *HubEnd) rung() {
	for _, s := range e.dir {
		s.wake()
	}
	if f := e.handler.Load(); f != nil {
		(*f)()
	}
}

// Wait implements Waiter.
func (e *HubEnd) Wait(d Dir, ready func() bool) error { return e.dir[d].Wait(ready) }

// SetDeadline implements Waiter.
func (e *HubEnd) SetDeadline(d Dir, t time.Time) error {
	if e.dir[d].closed.Load() {
		return net.ErrClosed
	}
	e.dir[d].SetDeadline(t)
	return nil
}

// Kick implements Waiter.
func (e *HubEnd) Kick(d Dir) { e.dir[d].Wake() }

// Close implements Waiter.
func (e *HubEnd) Close() error {
	e.at.CompareAndSwap(e, nil)
	e.handler.Store(nil)
	for _, s := range e.dir {
		s.Close()
	}
	return nil
}
