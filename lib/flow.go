package o7s

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/lib/frcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/ring"
)

// path is the way of a flow's packets to and from this process: a pair of
// rings (*ring.End, whose documentation holds) or the fast path's device. An
// end-to-end protocol is a path on top of another.
type path interface {
	// Receiving; one goroutine at a time. Packets of length 0 may appear.
	Next() ([]byte, error)
	Skip()
	Release()
	WaitRead() error
	RxLen(limit int) int

	// OnRing sets what is called, without blocking, when something arrives
	// after Arm while nobody reads; lead tells that it is the hub's leader who
	// calls. Arm reports whether nothing is there yet. It is for the receiver.
	OnRing(f func(lead bool))
	Arm() bool

	// Sending; one goroutine at a time.
	Put(p []byte) error
	Flush()
	WaitWrite() error
	TxLen(limit int) int

	// At any time before Close.
	SetDeadline(d ring.Dir, t time.Time) error
	Kick(d ring.Dir)
	Peer() ring.State
	Own() ring.State
	SetState(ring.State)
	Progress() (received, sent uint64, full bool)
	Shut()

	Close() error
}

// Flags change how a flow reads and writes (spec 33 §7).
type Flags uint32

// Flags. The numbers are those of the reference's interface.
const (
	RDONLY   Flags = 0o0
	WRONLY   Flags = 0o1
	RDWR     Flags = 0o2
	ACCMODE  Flags = 0o3
	DOWN     Flags = 0o4    // the flow is down; setting it tells the other end of the flow's memory
	RNOBLOCK Flags = 0o1000 // reads do not block
	WNOBLOCK Flags = 0o2000 // writes do not block
	NONBLOCK       = RNOBLOCK | WNOBLOCK
	RNOPART  Flags = 0o10000 // a message longer than the buffer is an error
	WNOPART  Flags = 0o20000 // always so: messages are not split
	Default        = RDWR | WNOPART
)

// Event is something that happened to a flow (spec 33 §8).
type Event uint8

// Events; the numbers are those of the reference's interface.
const (
	EventPacket  Event = 1  // there is a message to read; of flows in a Set only
	EventDown    Event = 2  // the flow is down
	EventUp      Event = 4  // and up again
	EventDealloc Event = 16 // the other end, or the layer, released it
	EventPeer    Event = 32 // nothing was heard from the peer for the time-out
)

func (e Event) String() string {
	switch e {
	case EventPacket:
		return "packet"
	case EventDown:
		return "down"
	case EventUp:
		return "up"
	case EventDealloc:
		return "dealloc"
	case EventPeer:
		return "peer"
	}
	return fmt.Sprintf("event %d", uint8(e))
}

// Errors.
var (
	errClosed   = fmt.Errorf("flow is closed: %w (%w)", net.ErrClosed, o7serr.ENOTALLOC)
	errDealloc  = fmt.Errorf("flow was released by the other end: %w", o7serr.EFLOWDOWN)
	errAccess   = fmt.Errorf("flow is not open for this: %w", o7serr.EPERM)
	errTooLong  = fmt.Errorf("message does not fit the buffer: %w", o7serr.EMSGSIZE)
	errEnded    = fmt.Errorf("flow was ended for writing: %w", o7serr.EPIPE)
	errNoFRCT   = fmt.Errorf("flow has no in_order: %w", o7serr.EPERM)
	errNoEnd    = fmt.Errorf("flow has no end of stream, use a qos with in_order: %w", o7serr.ENOTSUP)
	errTimedOut = error(timeoutError{})
)

// timeoutError is an expired deadline in the words of both worlds.
type timeoutError struct{}

func (timeoutError) Error() string        { return "flow: deadline exceeded" }
func (timeoutError) Timeout() bool        { return true }
func (timeoutError) Temporary() bool      { return true }
func (timeoutError) Is(target error) bool { return target == os.ErrDeadlineExceeded } //nolint:errorlint // sentinel
func (timeoutError) Unwrap() error        { return o7serr.ETIMEDOUT }

// What a flow suffers from; bits of Flow.state.
const (
	stateDown uint32 = 1 << iota
	stateDealloc
	statePeer
	stateOrphan // the daemon is gone, and with it what carried the packets
	stateClosed
	stateEnded // by CloseWrite
)

// Flow is one end of a flow. It is a net.Conn that preserves messages. All
// methods are safe for concurrent use; of several that read at once each gets
// whole messages.
type Flow struct {
	session *session
	id      uint32
	fd      int
	info    ipc.FlowResult
	path    path
	hub     *ring.Hub
	watch   watch    // guarded by session.mu
	e2e     *e2ePath // path, if that runs the end-to-end protocol

	set atomic.Pointer[member] // in a Set

	flags   atomic.Uint32 // Flags as set
	state   atomic.Uint32 // state bits
	daemon  atomic.Pointer[error]
	closing sync.Once
	linger  atomic.Int64 // ns plus 1; 0: as long as the protocol tries

	rmu  sync.Mutex // held by the reader; guards what follows and the receiving half of path
	rest int        // bytes of the next message that were read already
	mark bool       // the next read returns 0: it marks the end of a message
	over bool       // a read has told that no more comes
	off  bool       // the set was told that the program at the other end set DOWN
	rto  timeouts

	wmu sync.Mutex // held by the writer; guards the sending half of path
	wto timeouts

	emu      sync.Mutex // guards the sending half of events, and standing
	events   chan Event // nil after Close
	evs      <-chan Event
	standing Event // what has happened and still holds: for a set that the flow gets into
}

// timeouts are what ends the waits of one direction: a deadline, as in package
// net, and the reference's time-out of each call.
type timeouts struct {
	mu       sync.Mutex // guards what follows
	deadline time.Time
	each     time.Duration // 0: none
}

// eventQueue is how many events wait for a program that does not look.
const eventQueue = 16

func newFlow(s *session, info ipc.FlowResult, p path) *Flow {
	f := &Flow{session: s, id: info.Flow, info: info, path: p, events: make(chan Event, eventQueue)}
	f.evs = f.events
	f.hub = s.desk.Hub()
	f.e2e, _ = p.(*e2ePath)
	f.flags.Store(uint32(Default))
	return f
}

// ordered reports whether the flow is a stream with an end: the peer's closing
// it is then no error.
func (f *Flow) ordered() bool { return f.info.QoS.InOrder != 0 }

// trouble is the error of a read from an empty queue, or of a write; nil when
// all is well.
func (f *Flow) trouble(write bool) error {
	st := f.state.Load()
	if st&stateClosed != 0 {
		return errClosed // the path may be closed, too
	}
	peer := f.path.Peer()
	if Flags(f.flags.Load())&DOWN != 0 {
		peer |= ring.Down
	}
	switch {
	case st&^stateEnded == 0 && peer == 0:
		return nil
	case st&stateOrphan != 0:
		return *f.daemon.Load()
	case f.info.Direct && !write && (peer&ring.Ended != 0 || peer&(ring.Closed|ring.Down) == ring.Closed && f.ordered()):
		return io.EOF
	case st&stateDealloc != 0 && peer&ring.Closed == 0 && f.e2e != nil && !write:
		return nil // the protocol returns it, behind what has arrived: a writer may be about to take that in
	case st&stateDealloc != 0 || peer&ring.Closed != 0:
		return errDealloc
	case f.e2e != nil && st&statePeer == 0:
		// Down is a link's affair: the protocol goes on trying as long as the
		// time-outs allow.
		return nil
	case st&stateDown != 0 || peer&ring.Down != 0:
		return o7serr.EFLOWDOWN
	case st&statePeer != 0 && !write:
		return o7serr.EFLOWPEER
	}
	return nil
}

// Read reads the next message, or what an earlier Read left of it, into p.
// When p is filled exactly to the end of a message, the next Read returns 0 at
// once: a message ends with a Read that does not fill its buffer. With RNOPART
// a message longer than p is lost and o7serr.EMSGSIZE returned, and there are
// no such marks. Errors of an empty queue: os.ErrDeadlineExceeded (also
// o7serr.ETIMEDOUT), o7serr.EAGAIN with RNOBLOCK, o7serr.EFLOWDOWN,
// o7serr.EFLOWPEER, net.ErrClosed, o7serr.EIRMD when the daemon died. When the
// peer has ended its direction (CloseWrite, or Close of a flow with in_order)
// it is io.EOF.
func (f *Flow) Read(p []byte) (int, error) {
	f.rmu.Lock()
	defer f.rmu.Unlock()
	n, err := f.read(p)
	f.again(err)
	return n, err
}

func (f *Flow) read(p []byte) (int, error) {
	if f.mark {
		f.mark = false
		return 0, nil
	}
	if len(p) == 0 {
		return 0, nil
	}
	m, err := f.next()
	if err != nil {
		return 0, err
	}
	n := copy(p, m[f.rest:])
	whole := f.rest+n == len(m)
	noPart := Flags(f.flags.Load())&RNOPART != 0
	if !whole && !noPart {
		f.rest += n
		return n, nil
	}
	f.rest = 0
	f.path.Skip()
	f.path.Release()
	if !whole {
		return 0, errTooLong
	}
	f.mark = n == len(p) && !noPart
	return n, nil
}

// ReadBatch reads one message or more, as many as are there, up to len(bufs):
// message i into bufs[i], its length into sizes[i]. What does not fit its
// buffer is lost; the size tells. It returns the number of messages, and
// blocks for the first only. Errors are those of Read.
func (f *Flow) ReadBatch(bufs [][]byte, sizes []int) (int, error) {
	if len(bufs) == 0 {
		return 0, nil
	}
	_ = sizes[len(bufs)-1]
	f.rmu.Lock()
	defer f.rmu.Unlock()
	n, err := f.readBatch(bufs, sizes)
	f.again(err)
	return n, err
}

func (f *Flow) readBatch(bufs [][]byte, sizes []int) (int, error) {
	f.mark = false
	m, err := f.next()
	if err != nil {
		return 0, err
	}
	n := 0
	for {
		m = m[f.rest:]
		f.rest = 0
		copy(bufs[n], m)
		sizes[n] = len(m)
		f.path.Skip()
		n++
		for n < len(bufs) {
			if m, err = f.path.Next(); err != nil || len(m) > 0 {
				break
			}
			f.path.Skip() // a keep-alive
		}
		if n == len(bufs) || err != nil {
			f.path.Release()
			return n, nil
		}
	}
}

// next waits for a message that is not a keep-alive. f.rmu is held.
func (f *Flow) next() ([]byte, error) {
	flags := Flags(f.flags.Load())
	if flags&ACCMODE == WRONLY {
		return nil, errAccess
	}
	armed := false
	for {
		// Trouble first: what was sent before it happened is still read.
		trouble := f.trouble(false)
		if trouble == errClosed { //nolint:errorlint // our own
			return nil, trouble
		}
		m, err := f.path.Next()
		switch {
		case err == nil && len(m) == 0:
			f.path.Skip()
			f.path.Release()
			continue
		case err == nil:
			if armed {
				f.disarm(ring.DirRead, &f.rto)
			}
			return m, nil
		case !errors.Is(err, ring.ErrEmpty):
		case trouble != nil:
			err = trouble
		case flags&RNOBLOCK != 0:
			err = o7serr.EAGAIN
		default:
			armed = armed || f.arm(ring.DirRead, &f.rto)
			if err = f.path.WaitRead(); err == nil {
				continue
			}
			err = waitError(err)
		}
		if armed {
			f.disarm(ring.DirRead, &f.rto)
		}
		return nil, err
	}
}

// arm starts the time-out of one call, if there is one.
func (f *Flow) arm(d ring.Dir, t *timeouts) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.each <= 0 {
		return false
	}
	end := time.Now().Add(t.each)
	if !t.deadline.IsZero() && t.deadline.Before(end) {
		return false
	}
	_ = f.path.SetDeadline(d, end)
	return true
}

// disarm undoes arm.
func (f *Flow) disarm(d ring.Dir, t *timeouts) {
	t.mu.Lock()
	defer t.mu.Unlock()
	_ = f.path.SetDeadline(d, t.deadline)
}

// waitError translates what a path's wait returned.
func waitError(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errTimedOut
	case errors.Is(err, net.ErrClosed):
		return errClosed
	}
	return err
}

// Write sends p as one message. It blocks while the queue is full; a message
// larger than the MTU also until the peer was heard of, a second at most. A message
// of length 0 is a keep-alive, which the peer's program does not see. Errors:
// os.ErrDeadlineExceeded (also o7serr.ETIMEDOUT), o7serr.EAGAIN with WNOBLOCK,
// o7serr.EMSGSIZE for more than MaxMessage bytes, o7serr.EFLOWDOWN,
// o7serr.EPIPE after CloseWrite, net.ErrClosed, o7serr.EIRMD when the daemon
// died.
func (f *Flow) Write(p []byte) (int, error) {
	f.wmu.Lock()
	defer f.wmu.Unlock()
	if err := f.put(p); err != nil {
		return 0, err
	}
	f.path.Flush()
	return len(p), nil
}

// WriteBatch sends messages with one wake-up of the receiver, in order, and
// returns how many. An error is that of the first that was not sent.
func (f *Flow) WriteBatch(msgs [][]byte) (n int, err error) {
	f.wmu.Lock()
	defer f.wmu.Unlock()
	for _, m := range msgs {
		if err = f.put(m); err != nil {
			break
		}
		n++
	}
	if f.state.Load()&stateClosed == 0 {
		f.path.Flush()
	}
	return n, err
}

// put queues a message. f.wmu is held.
func (f *Flow) put(p []byte) error {
	flags := Flags(f.flags.Load())
	if flags&ACCMODE == RDONLY {
		return errAccess
	}
	if f.state.Load()&(stateEnded|stateClosed) == stateEnded && len(p) > 0 {
		return errEnded
	}
	armed := false
	for {
		err := f.trouble(true)
		if err == nil {
			err = f.path.Put(p)
		}
		switch {
		case err == nil:
		case errors.Is(err, ring.ErrTooLong):
			err = fmt.Errorf("message of %d bytes on a flow that carries %d: %w", len(p), f.MaxMessage(), o7serr.EMSGSIZE)
		case !errors.Is(err, ring.ErrFull):
		case flags&WNOBLOCK != 0:
			err = o7serr.EAGAIN
		default:
			armed = armed || f.arm(ring.DirWrite, &f.wto)
			if err = f.path.WaitWrite(); err == nil {
				continue
			}
			err = waitError(err)
			if f.e2e != nil {
				f.e2e.cancelWrite()
			}
		}
		if armed {
			f.disarm(ring.DirWrite, &f.wto)
		}
		return err
	}
}

// keepAlive sends an empty packet, unless a writer is at work, which is as
// good. session.mu is held.
func (f *Flow) keepAlive() {
	if !f.wmu.TryLock() {
		return
	}
	defer f.wmu.Unlock()
	if f.trouble(true) == nil && f.path.Put(nil) == nil {
		f.path.Flush()
	}
}

// Events tells what happens to the flow. The oldest are dropped when nobody
// looks. The channel is closed with the flow.
func (f *Flow) Events() <-chan Event { return f.evs }

// event notes an event and wakes whoever waits.
func (f *Flow) event(e Event) {
	switch e {
	case EventDown:
		f.state.Or(stateDown)
	case EventUp:
		f.state.And(^stateDown)
	case EventDealloc:
		f.state.Or(stateDealloc)
		if f.e2e != nil {
			f.e2e.fail(errDealloc)
		}
	case EventPeer:
		f.state.Or(statePeer)
	}
	f.emu.Lock()
	defer f.emu.Unlock()
	if f.events == nil {
		return // and the path may be closed
	}
	for {
		select {
		case f.events <- e:
		default:
			select {
			case <-f.events:
			default:
			}
			continue
		}
		break
	}
	if f.standing |= e; e == EventUp {
		f.standing &^= EventUp | EventDown
	}
	f.path.Kick(ring.DirRead)
	f.path.Kick(ring.DirWrite)
	if m := f.set.Load(); m != nil {
		m.event(e)
	}
}

// orphan is called when the daemon died. A flow to a program on this machine
// does not need it; its end is then noticed by the time-out of the peer.
func (f *Flow) orphan(err error) {
	if f.info.Direct {
		return
	}
	f.daemon.Store(&err)
	f.state.Or(stateOrphan)
	f.event(EventDown)
}

// CloseWrite ends this end's direction: the peer reads io.EOF after everything
// that was written, and may go on sending. It works within the machine and on
// flows with in_order between ends of this implementation (spec 50 §3); towards
// another peer it has no effect that the peer sees. It waits for a Write of
// another goroutine, which a deadline ends. Errors: o7serr.ENOTSUP on
// flows without order over a layer, net.ErrClosed.
func (f *Flow) CloseWrite() error {
	if f.e2e == nil && !f.info.Direct {
		return errNoEnd
	}
	f.wmu.Lock()
	defer f.wmu.Unlock()
	if f.state.Load()&stateClosed != 0 {
		return errClosed
	}
	if f.state.Or(stateEnded)&stateEnded != 0 {
		return nil
	}
	if f.e2e != nil {
		return f.e2e.closeWrite()
	}
	f.path.Flush()
	f.emu.Lock()
	defer f.emu.Unlock()
	f.path.SetState(f.path.Own() | ring.Ended)
	return nil
}

// SetLinger bounds how long Close waits until what was written is acknowledged,
// on reliable flows over a layer; 0: not at all. Without it that is until the
// flow is given up, 120 s after the peer was last heard of (spec 30 §9).
func (f *Flow) SetLinger(d time.Duration) { f.linger.Store(int64(max(d, 0)) + 1) }

// Close releases the flow (flow_dealloc). What was written is still delivered:
// on a reliable flow over a layer Close waits for that, see SetLinger. Reads
// and writes under way return net.ErrClosed.
func (f *Flow) Close() error {
	err := errClosed
	f.closing.Do(func() {
		f.state.Or(stateClosed)
		if m := f.set.Load(); m != nil {
			m.set.Del(f)
		}
		f.path.Shut()
		f.rmu.Lock()
		f.wmu.Lock()
		var quarantine time.Duration
		if f.e2e != nil {
			deadline := frcp.Never
			if l := f.linger.Load(); l > 0 {
				deadline = nanotime() + l - 1
			}
			quarantine = f.e2e.finish(deadline)
		}
		f.session.forget(f) // no keep-alive any more
		f.emu.Lock()
		close(f.events)
		f.events = nil
		err = f.path.Close()
		f.emu.Unlock()
		f.wmu.Unlock()
		f.rmu.Unlock()
		f.session.reap()
		err = errors.Join(err, f.session.release(f.id, quarantine))
	})
	return err
}

// Dealloc is Close under the name the reference gives it.
func (f *Flow) Dealloc() error { return f.Close() }

// SetDeadline sets both deadlines.
func (f *Flow) SetDeadline(t time.Time) error {
	return errors.Join(f.SetReadDeadline(t), f.SetWriteDeadline(t))
}

// SetReadDeadline ends reads, present and later ones, at t; zero: never.
// Messages that are there are read even after it.
func (f *Flow) SetReadDeadline(t time.Time) error { return f.setDeadline(ring.DirRead, &f.rto, t) }

// SetWriteDeadline does so for writes.
func (f *Flow) SetWriteDeadline(t time.Time) error { return f.setDeadline(ring.DirWrite, &f.wto, t) }

func (f *Flow) setDeadline(d ring.Dir, to *timeouts, t time.Time) error {
	to.mu.Lock()
	defer to.mu.Unlock()
	to.deadline = t
	if err := f.path.SetDeadline(d, t); err != nil {
		return waitError(err)
	}
	return nil
}

// SetReadTimeout bounds how long each later Read blocks; 0: not at all. An
// earlier deadline comes first.
func (f *Flow) SetReadTimeout(d time.Duration) { f.rto.set(d) }

// SetWriteTimeout does so for Write.
func (f *Flow) SetWriteTimeout(d time.Duration) { f.wto.set(d) }

// ReadTimeout is the time-out of reads, 0: none.
func (f *Flow) ReadTimeout() time.Duration { return f.rto.get() }

// WriteTimeout is the time-out of writes, 0: none.
func (f *Flow) WriteTimeout() time.Duration { return f.wto.get() }

func (t *timeouts) set(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.each = max(d, 0)
}

func (t *timeouts) get() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.each
}

// Flags are the flags of the flow; DOWN as things are.
func (f *Flow) Flags() Flags {
	fl := Flags(f.flags.Load()) &^ DOWN
	f.emu.Lock()
	defer f.emu.Unlock()
	if f.events == nil {
		return fl | DOWN
	}
	if f.state.Load()&^(statePeer|stateEnded) != 0 || (f.path.Peer()|f.path.Own())&(ring.Down|ring.Closed) != 0 {
		fl |= DOWN
	}
	return fl
}

// SetFlags sets the flags. Setting or clearing DOWN is what the other end of
// the flow's memory, the daemon or the program there, sees as the flow going
// down or up: a Set there has EventDown and EventUp. Calls under way keep the
// flags they started with.
func (f *Flow) SetFlags(fl Flags) error {
	if fl&ACCMODE == ACCMODE {
		return fmt.Errorf("access mode 3: %w", o7serr.EINVAL)
	}
	f.emu.Lock()
	defer f.emu.Unlock()
	if f.events == nil {
		return errClosed
	}
	f.flags.Store(uint32(fl))
	if fl&DOWN != 0 {
		f.path.SetState(f.path.Own() | ring.Down)
		f.path.Kick(ring.DirRead)
		f.path.Kick(ring.DirWrite)
	} else {
		f.path.SetState(f.path.Own() &^ ring.Down)
	}
	if m := f.set.Load(); m != nil {
		m.note(false) // it may be open for reading again
	}
	return nil
}

// queueLimit is the longest queue length reported: the reference's queues have
// 1024 places.
const queueLimit = 1023

// RxLen is the number of messages that wait to be read, at most 1023.
func (f *Flow) RxLen() int {
	if !f.glimpse(&f.rmu) {
		return 0 // a reader is blocked: there is nothing
	}
	defer f.rmu.Unlock()
	if f.state.Load()&stateClosed != 0 {
		return 0
	}
	return f.path.RxLen(queueLimit)
}

// TxLen is the number of messages written that the other end of the flow's
// memory has not taken yet, at most 1023.
func (f *Flow) TxLen() int {
	if !f.glimpse(&f.wmu) {
		return queueLimit // a writer is blocked: it is full
	}
	defer f.wmu.Unlock()
	if f.state.Load()&stateClosed != 0 {
		return 0
	}
	return f.path.TxLen(queueLimit)
}

// glimpse takes a lock that is held for an instant, or for as long as somebody
// is blocked.
func (f *Flow) glimpse(mu *sync.Mutex) bool {
	for range 1000 {
		if mu.TryLock() {
			return true
		}
		runtime.Gosched()
	}
	return false
}

// FD is the number of the flow in this process: the lowest from 64 that was
// free, as the reference numbers them.
func (f *Flow) FD() int { return f.fd }

// ID is the number of the flow at the daemon.
func (f *Flow) ID() uint32 { return f.id }

// QoS is the quality of service that was asked for.
func (f *Flow) QoS() qos.Spec { return f.info.QoS }

// Name is the name the flow was allocated to.
func (f *Flow) Name() string { return f.info.Name }

// Layer is the layer that carries the flow, "" within the machine.
func (f *Flow) Layer() string { return f.info.Layer }

// Direct reports whether the other end is a program on this machine.
func (f *Flow) Direct() bool { return f.info.Direct }

// MTU is the longest message that travels in one packet, in bytes.
func (f *Flow) MTU() int {
	if f.e2e != nil {
		return f.e2e.mtu
	}
	return f.info.MTU
}

// MaxMessage is the longest message in bytes: more than the MTU where messages
// are cut into fragments, which takes in_order and a peer of this
// implementation that was heard of.
func (f *Flow) MaxMessage() int {
	if f.e2e != nil {
		return f.e2e.maxMessage()
	}
	return f.info.MTU
}

// MPL is the longest time a packet of the flow may live in the network.
func (f *Flow) MPL() time.Duration { return time.Duration(f.info.MPL) * time.Millisecond }

// FRCT flags: the machinery of the end-to-end protocol (spec 30 §12).
const (
	FRCTRtx     = frcp.FlagRTX     // lost packets are sent again
	FRCTRescntl = frcp.FlagRescntl // flow control
	FRCTLinger  = frcp.FlagLinger  // Close waits for acknowledgements
)

// FRCTFlags are the FRCT flags of a flow with in_order. Errors: o7serr.EPERM on
// other flows.
func (f *Flow) FRCTFlags() (int, error) {
	switch {
	case f.info.QoS.InOrder == 0:
		return 0, errNoFRCT
	case f.info.QoS.Loss != 0:
		return FRCTRescntl, nil
	case f.linger.Load() == 1:
		return FRCTRtx | FRCTRescntl, nil
	}
	return FRCTRtx | FRCTRescntl | FRCTLinger, nil
}

// SetFRCTFlags sets FRCTLinger as flags have it. The others follow from the
// quality of service and stay as they are, as in the reference. Errors:
// o7serr.EPERM on flows without in_order.
func (f *Flow) SetFRCTFlags(flags int) error {
	switch {
	case f.info.QoS.InOrder == 0:
		return errNoFRCT
	case flags&FRCTLinger == 0:
		f.SetLinger(0)
	default:
		f.linger.CompareAndSwap(1, 0)
	}
	return nil
}

// Stats are the counters of the end-to-end protocol; zero on flows without.
func (f *Flow) Stats() frcp.Stats {
	if f.e2e == nil {
		return frcp.Stats{}
	}
	return f.e2e.stats()
}

// Addr is the address of an end of a flow: the name it was allocated to.
type Addr string

// Network is "o7s".
func (Addr) Network() string { return "o7s" }

func (a Addr) String() string { return string(a) }

// LocalAddr is the name of the flow.
func (f *Flow) LocalAddr() net.Addr { return Addr(f.info.Name) }

// RemoteAddr is the name of the flow: ends of a flow have no names of their own.
func (f *Flow) RemoteAddr() net.Addr { return Addr(f.info.Name) }

var _ net.Conn = (*Flow)(nil)
