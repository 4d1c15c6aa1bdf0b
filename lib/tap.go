package o7s

import (
	"encoding/binary"
	"errors"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/ring"
)

// tap is the process's device on the fast path. All of its flows that the fast
// path carries send and receive through it: XDP puts the headers on what is
// written, and takes them off what is read.
//
// There is no goroutine that reads it. Of the goroutines that wait for a
// message, one leads: it waits for the device, keeps what is its own and hands
// the rest over. When it has its message it leaves, and one of those that
// follow takes over. So the message of a single reader is not passed from
// goroutine to goroutine, which costs more than the message.
type tap struct {
	file *os.File
	conn syscall.RawConn
	fd   int

	flows atomic.Pointer[map[uint32]*tapPath] // by handle; replaced by changes, under mu

	mu       sync.Mutex // guards what follows
	leader   *tapPath   // reads the device; nil: nobody
	waiting  []*tapPath // followers
	deadline time.Time  // of the file
	early    []*frame   // of flows that are not known yet

	spare *frame // the leader's

	poolMu sync.Mutex // guards pool
	pool   []*frame
}

// Frames of the device, see fastpath.App: {handle, offset, length} in front on
// the way in, {handle} and room for headers on the way out, little-endian.
const (
	tapHeader = 8
	// Larger than any frame of the device: native XDP takes one page less
	// what the kernel keeps of it.
	frameSize = 4096
	poolSize  = 256 // frames kept for later
	// The first packets of a flow can be here before the reply that announces it.
	maxEarly = 64
)

// frame is a packet received.
type frame struct {
	handle  uint32
	payload []byte
	store   [frameSize]byte
}

func newTap(fd int) (*tap, error) {
	// Nonblocking it is, for all who have it; it goes to the runtime's poller.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, err
	}
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	t := &tap{file: os.NewFile(uintptr(own), "o7s-tap"), fd: own}
	if t.conn, err = t.file.SyscallConn(); err != nil {
		t.file.Close()
		return nil, err
	}
	t.flows.Store(&map[uint32]*tapPath{})
	return t, nil
}

// close closes the device, after its flows.
func (t *tap) close() {
	t.file.Close()
}

// add lets p have the packets with its handle, those that came too early first.
func (t *tap) add(p *tapPath) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.early = slices.DeleteFunc(t.early, func(f *frame) bool {
		if f.handle != p.handle {
			return false
		}
		p.received.Add(1)
		p.push(f)
		return true
	})
	m := maps.Clone(*t.flows.Load())
	m[p.handle] = p
	t.flows.Store(&m)
}

func (t *tap) remove(p *tapPath) {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := maps.Clone(*t.flows.Load())
	delete(m, p.handle)
	t.flows.Store(&m)
}

func (t *tap) get() *frame {
	t.poolMu.Lock()
	defer t.poolMu.Unlock()
	if n := len(t.pool); n > 0 {
		f := t.pool[n-1]
		t.pool = t.pool[:n-1]
		return f
	}
	return new(frame)
}

func (t *tap) put(f *frame) {
	t.poolMu.Lock()
	defer t.poolMu.Unlock()
	if len(t.pool) < poolSize {
		t.pool = append(t.pool, f)
	}
}

// lead makes p the leader unless there is one. A caller that would follow is
// entered as waiting.
func (t *tap) lead(p *tapPath, follow bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.leader == nil {
		t.leader = p
		return true
	}
	if follow && !p.follows {
		p.follows = true
		t.waiting = append(t.waiting, p)
	}
	return false
}

// leave ends the lead.
func (t *tap) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.leader = nil
	t.promote()
}

// unfollow ends p's waiting.
func (t *tap) unfollow(p *tapPath) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !p.follows {
		return
	}
	p.follows = false
	i, last := slices.Index(t.waiting, p), len(t.waiting)-1
	t.waiting[i], t.waiting[last] = t.waiting[last], nil
	t.waiting = t.waiting[:last]
	t.promote() // in case it was p that was to take over
}

// promote sees to it that there is a leader if anybody waits. mu is held.
func (t *tap) promote() {
	if t.leader == nil && len(t.waiting) > 0 {
		t.waiting[len(t.waiting)-1].wake()
	}
}

// setDeadline sets the file's deadline to that of the leader. mu is held.
func (t *tap) setDeadline(d time.Time) {
	if !t.deadline.Equal(d) {
		t.deadline = d
		_ = t.file.SetReadDeadline(d)
	}
}

// drainMax is how many frames are read at a time, more than a device holds (1000,
// its default): whoever reads for the others, too, must come back to his own
// deadline, or to what he does not block for, however much there is for them.
const drainMax = 1024

// drain reads the device until stop says so, or until it is empty, or for long
// enough. Only the leader calls it. It reports whether it ended before the
// device was empty.
func (t *tap) drain(stop func() bool) bool {
	for range drainMax {
		if stop() {
			break
		}
		if t.spare == nil {
			t.spare = t.get()
		}
		n, err := unix.Read(t.fd, t.spare.store[:])
		if err == unix.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			// EAGAIN; or the device is gone, of which the daemon tells.
			return false
		}
		if t.dispatch(t.spare, n) {
			t.spare = nil
		}
	}
	return true
}

// dispatch gives a frame to its flow, and reports whether the flow keeps it.
func (t *tap) dispatch(f *frame, n int) bool {
	if n < tapHeader {
		return false
	}
	f.handle = binary.LittleEndian.Uint32(f.store[:])
	offset := int(binary.LittleEndian.Uint16(f.store[4:]))
	length := int(binary.LittleEndian.Uint16(f.store[6:]))
	if offset < tapHeader || offset+length > n {
		return false // the kernel's own
	}
	f.payload = f.store[offset : offset+length]
	p := (*t.flows.Load())[f.handle]
	if p == nil {
		return t.keep(f)
	}
	return p.accept(f)
}

// accept takes a frame of its flow.
func (p *tapPath) accept(f *frame) bool {
	p.received.Add(1)
	return len(f.payload) > 0 && p.push(f) // empty: a keep-alive
}

// keep keeps a frame of an unknown flow for a while.
func (t *tap) keep(f *frame) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := (*t.flows.Load())[f.handle]; p != nil { // known by now
		return p.accept(f)
	}
	if len(f.payload) == 0 {
		return false
	}
	if len(t.early) == maxEarly { // released flows have packets, too
		t.early = slices.Delete(t.early, 0, 1)
	}
	t.early = append(t.early, f)
	return true
}

// tapQueue bounds the packets that wait for a reader, as in the reference.
const tapQueue = 1024

// tapPath is the path of a flow through the tap. The ring pair that every flow
// has is where packets come from that XDP left to the daemon.
type tapPath struct {
	tap    *tap
	end    *ring.End
	handle uint32

	received, sent atomic.Uint64
	kicked         atomic.Bool
	shut           atomic.Bool
	done           chan struct{} // closed when the ring's reader ended

	qmu   sync.Mutex // guards queue, head and count
	queue []*frame   // a ring; its length is a power of two
	head  int
	count int
	n     atomic.Int32 // count, for looking without the lock

	// The waiting reader.
	sig     chan struct{} // to the reader
	follows bool          // in tap.waiting; guarded by tap.mu
	dmu     sync.Mutex    // guards dl
	dl      [2]time.Time  // deadlines, by ring.Dir
	timer   *time.Timer
	spin    ring.Spinner
	some    func() bool // there is a packet
	ready   func() bool // or another reason to end a wait
	soon    func() bool
	leadFn  func(uintptr) bool

	// The writer.
	out      []byte // the frame being sent
	headroom int
}

func newTapPath(t *tap, end *ring.End, handle uint32, headroom int) *tapPath {
	p := &tapPath{
		tap: t, end: end, handle: handle, headroom: max(headroom, tapHeader),
		sig: make(chan struct{}, 1), done: make(chan struct{}), timer: time.NewTimer(time.Hour),
		queue: make([]*frame, 16), spin: ring.Spinner{Max: ring.DefaultSpin},
	}
	p.timer.Stop()
	p.out = make([]byte, p.headroom, frameSize)
	binary.LittleEndian.PutUint32(p.out, handle)
	p.some = func() bool { return p.n.Load() > 0 }
	p.ready = func() bool {
		return p.some() || p.kicked.Load() || p.shut.Load() || p.end.Peer()&ring.Closed != 0
	}
	p.soon = func() bool { return p.ready() || p.look() }
	p.leadFn = func(uintptr) bool { return p.tap.drain(p.ready) }
	t.add(p)
	go p.pump()
	return p
}

// pump moves what comes through the ring to the queue.
func (p *tapPath) pump() {
	defer close(p.done)
	for {
		m, err := p.end.Next()
		switch {
		case err == nil:
			p.received.Add(1)
			if len(m) > 0 {
				f := p.tap.get()
				if len(m) > len(f.store) {
					f.payload = append([]byte(nil), m...)
				} else {
					f.payload = f.store[:copy(f.store[:], m)]
				}
				if !p.push(f) {
					p.tap.put(f)
				}
				p.interrupt() // a reader that leads waits for the device, not for this
			}
			p.end.Skip()
			p.end.Release()
			continue
		case errors.Is(err, ring.ErrEmpty) && p.end.Peer()&ring.Closed == 0:
			if p.end.WaitRead() == nil {
				p.Kick(ring.DirRead) // a packet, or a change of state
				continue
			}
		}
		p.interrupt() // nothing more will come: the reader sees why
		return
	}
}

// push queues a frame unless the queue is full, and wakes a follower.
func (p *tapPath) push(f *frame) bool {
	p.qmu.Lock()
	if p.count == tapQueue {
		p.qmu.Unlock()
		return false
	}
	if p.count == len(p.queue) {
		q := make([]*frame, 2*p.count)
		for i := range p.count {
			q[i] = p.queue[(p.head+i)&(p.count-1)]
		}
		p.queue, p.head = q, 0
	}
	p.queue[(p.head+p.count)&(len(p.queue)-1)] = f
	p.count++
	p.n.Store(int32(p.count))
	p.qmu.Unlock()
	p.wake()
	return true
}

// wake wakes the reader if it follows; it is harmless otherwise.
func (p *tapPath) wake() {
	select {
	case p.sig <- struct{}{}:
	default:
	}
}

var past = time.Unix(1, 0)

// interrupt makes the waiting reader look again, also when it leads.
func (p *tapPath) interrupt() {
	p.wake()
	p.tap.mu.Lock()
	defer p.tap.mu.Unlock()
	if p.tap.leader == p {
		p.tap.setDeadline(past)
	}
}

// look reads the device, if nobody else does, until there is a packet for p.
func (p *tapPath) look() bool {
	if p.tap.lead(p, false) {
		p.tap.drain(p.some)
		p.tap.leave()
	}
	return p.some()
}

func (p *tapPath) Next() ([]byte, error) {
	if p.n.Load() == 0 && !p.look() {
		return nil, ring.ErrEmpty
	}
	p.qmu.Lock()
	defer p.qmu.Unlock()
	if p.count == 0 { // ready for another reason
		return nil, ring.ErrEmpty
	}
	return p.queue[p.head].payload, nil
}

func (p *tapPath) Skip() {
	p.qmu.Lock()
	if p.count == 0 {
		p.qmu.Unlock()
		return
	}
	f := p.queue[p.head]
	p.queue[p.head] = nil
	p.head = (p.head + 1) & (len(p.queue) - 1)
	p.count--
	p.n.Store(int32(p.count))
	p.qmu.Unlock()
	p.tap.put(f)
}

func (p *tapPath) Release() {}

func (p *tapPath) WaitRead() error {
	start := time.Now()
	if p.shut.Load() {
		return net.ErrClosed
	}
	if p.spin.Spin(start, p.soon) {
		return p.woken()
	}
	err := p.sleep()
	p.spin.Slept(time.Since(start))
	return err
}

// woken ends a wait.
func (p *tapPath) woken() error {
	if p.shut.Load() {
		return net.ErrClosed
	}
	p.kicked.Store(false)
	return nil
}

func (p *tapPath) sleep() error {
	t := p.tap
	defer t.unfollow(p)
	for {
		if p.ready() {
			return p.woken()
		}
		if p.deadlinePassed() {
			return os.ErrDeadlineExceeded
		}
		if !t.lead(p, true) {
			p.follow()
			continue
		}
		t.unfollow(p)
		t.mu.Lock()
		t.setDeadline(p.deadline())
		t.mu.Unlock()
		// leadFn asks ready first, so an interrupt before the deadline was set
		// is not lost.
		err := t.conn.Read(p.leadFn)
		t.leave()
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return net.ErrClosed
		}
	}
}

// follow sleeps until something may have changed.
func (p *tapPath) follow() {
	dl := p.deadline()
	if dl.IsZero() {
		<-p.sig
		return
	}
	p.timer.Reset(time.Until(dl))
	select {
	case <-p.sig:
		p.timer.Stop()
	case <-p.timer.C:
	}
}

// deadline is the deadline of reads.
func (p *tapPath) deadline() time.Time {
	p.dmu.Lock()
	defer p.dmu.Unlock()
	return p.dl[ring.DirRead]
}

func (p *tapPath) deadlinePassed() bool {
	dl := p.deadline()
	return !dl.IsZero() && !time.Now().Before(dl)
}

func (p *tapPath) RxLen(limit int) int {
	p.look()
	return min(int(p.n.Load()), limit)
}

// Frame is room for a packet behind what the device wants in front of it.
func (p *tapPath) Frame() []byte { return p.out[p.headroom:cap(p.out)] }

// Put sends the packet at once: the device has no queue on this side.
func (p *tapPath) Put(b []byte) error {
	if len(b) > p.end.MaxMessage() || len(b) > cap(p.out)-p.headroom {
		return ring.ErrTooLong
	}
	return p.Send(copy(p.Frame(), b))
}

// Send sends the first n bytes of the frame.
func (p *tapPath) Send(n int) error {
	frame := p.out[:p.headroom+n]
	for {
		_, err := unix.Write(p.tap.fd, frame)
		switch err {
		case nil:
			p.sent.Add(1)
			return nil
		case unix.EINTR:
		case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
			return ring.ErrFull
		case unix.EIO, unix.EBADFD: // the device is down or gone
			return o7serr.EFLOWDOWN
		default:
			return err
		}
	}
}

func (p *tapPath) Flush() {}

// WaitWrite waits for the kernel's memory, which nothing announces.
func (p *tapPath) WaitWrite() error {
	if p.shut.Load() {
		return net.ErrClosed
	}
	p.dmu.Lock()
	dl := p.dl[ring.DirWrite]
	p.dmu.Unlock()
	if !dl.IsZero() && !time.Now().Before(dl) {
		return os.ErrDeadlineExceeded
	}
	time.Sleep(50 * time.Microsecond)
	return nil
}

func (p *tapPath) TxLen(limit int) int { return p.end.TxLen(limit) }

func (p *tapPath) SetDeadline(d ring.Dir, t time.Time) error {
	if p.shut.Load() {
		return net.ErrClosed
	}
	p.dmu.Lock()
	p.dl[d] = t
	p.dmu.Unlock()
	if d == ring.DirRead {
		p.interrupt()
	}
	return nil
}

func (p *tapPath) Kick(d ring.Dir) {
	if d == ring.DirRead {
		p.kicked.Store(true)
		p.interrupt()
	}
}

func (p *tapPath) Peer() ring.State      { return p.end.Peer() }
func (p *tapPath) Own() ring.State       { return p.end.Own() }
func (p *tapPath) SetState(s ring.State) { p.end.SetState(s) }

// Progress takes in what the device has, as far as the queues allow: the
// program may not be reading, and keep-alives are among it.
func (p *tapPath) Progress() (received, sent uint64, full bool) {
	if p.tap.lead(p, false) {
		frames := 0
		p.tap.drain(func() bool { frames++; return frames > tapQueue })
		p.tap.leave()
	}
	return p.received.Load(), p.sent.Load(), false
}

func (p *tapPath) Shut() {
	p.shut.Store(true)
	p.end.Shut()
	p.interrupt()
}

func (p *tapPath) Close() error {
	p.tap.remove(p)
	p.Shut()
	<-p.done
	p.timer.Stop()
	return p.end.Close()
}
