package o7s

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/ring"
)

// tap is the process's device on the fast path. All of its flows that the fast
// path carries send and receive through it: XDP puts the headers on what is
// written, and takes them off what is read.
//
// There is no goroutine that reads it: it is a source of the process's hub, so
// whoever leads there reads for all, and a reader that does not sleep yet looks
// itself.
type tap struct {
	fd  int
	hub *ring.Hub

	busy  atomic.Bool // somebody reads the device
	spare *frame      // of who does

	mu    sync.RWMutex // guards what follows
	flows map[uint32]*tapPath
	early []*frame // of flows that are not known yet

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

// newTap takes a copy of the descriptor.
func newTap(fd int, hub *ring.Hub) (*tap, error) {
	// Nonblocking it is, for all who have it. It does not go to the runtime's
	// poller: there, each packet would wake a thread while its reader is awake.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, err
	}
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	t := &tap{fd: own, hub: hub, flows: map[uint32]*tapPath{}}
	if err := hub.AddSource(own, func() bool { return t.drain(true, nil) }); err != nil {
		unix.Close(own)
		return nil, err
	}
	return t, nil
}

// close closes the device, after its flows and the hub.
func (t *tap) close() {
	for !t.busy.CompareAndSwap(false, true) { // a set may look at it, and never does again
		runtime.Gosched()
	}
	unix.Close(t.fd)
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
		p.push(f, false)
		return true
	})
	t.flows[p.handle] = p
}

func (t *tap) remove(p *tapPath) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.flows, p.handle)
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

// drainMax is how many frames are read at a time, more than a device holds (1000,
// its default): whoever reads for the others, too, must come back to his own
// deadline, or to what he does not block for, however much there is for them.
const drainMax = 1024

// drain reads the device until stop says so, or until it is empty, or for long
// enough, unless somebody else does. lead: the hub's leader calls it. It reports
// whether it ended before the device was empty.
func (t *tap) drain(lead bool, stop func() bool) bool {
	if !t.busy.CompareAndSwap(false, true) {
		return false
	}
	defer t.busy.Store(false)
	return t.empty(lead, stop)
}

// empty is drain for who has set busy.
func (t *tap) empty(lead bool, stop func() bool) bool {
	for range drainMax {
		if stop != nil && stop() {
			return true
		}
		if t.spare == nil {
			t.spare = t.get()
		}
		// Raw: it does not block.
		n, _, err := syscall.RawSyscall(unix.SYS_READ, uintptr(t.fd), uintptr(unsafe.Pointer(&t.spare.store)), frameSize)
		if err == unix.EINTR {
			continue
		}
		if err != 0 || n == 0 {
			// EAGAIN; or the device is gone, of which the daemon tells.
			return false
		}
		if t.dispatch(t.spare, int(n), lead) {
			t.spare = nil
		}
	}
	return true
}

// dispatch gives a frame to its flow, and reports whether the flow keeps it.
func (t *tap) dispatch(f *frame, n int, lead bool) bool {
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
	t.mu.RLock()
	p := t.flows[f.handle]
	t.mu.RUnlock()
	if p == nil {
		return t.keep(f, lead)
	}
	return p.accept(f, lead)
}

// accept takes a frame of its flow.
func (p *tapPath) accept(f *frame, lead bool) bool {
	p.received.Add(1)
	return len(f.payload) > 0 && p.push(f, lead) // empty: a keep-alive
}

// keep keeps a frame of an unknown flow for a while.
func (t *tap) keep(f *frame, lead bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.flows[f.handle]; p != nil { // known by now
		return p.accept(f, lead)
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

// tapPath is the path of a flow through the tap. The rings that every flow has
// are where packets come from that XDP left to the daemon.
type tapPath struct {
	tap    *tap
	end    *ring.End
	bell   *ring.HubEnd // of end
	done   func()       // after its Close
	handle uint32

	received, sent atomic.Uint64
	kicked         atomic.Bool
	shut           atomic.Bool

	qmu   sync.Mutex // guards queue, head and count
	queue []*frame   // a ring; its length is a power of two
	head  int
	count int
	n     atomic.Int32 // count, for looking without the lock

	// The waiting reader.
	read    *ring.Sleeper
	asleep  atomic.Bool
	armed   atomic.Bool // notify is to be called
	notify  atomic.Pointer[func(lead bool)]
	until   atomic.Int64 // deadline of writes, ns since 1970; 0: none
	spin    ring.Spinner
	some    func() bool // there is a packet
	ready   func() bool // or another reason to end a wait
	soon    func() bool
	ringMu  sync.Mutex // guards the consumer half of end, and state
	state   ring.State // of the peer, as was seen last
	ringEnd bool       // nothing more comes from end

	headroom int
	out      []byte // the frame being sent; made by the first
}

func newTapPath(t *tap, end *ring.End, bell *ring.HubEnd, done func(), handle uint32, headroom int) *tapPath {
	p := &tapPath{
		tap: t, end: end, bell: bell, done: done, handle: handle, headroom: max(headroom, tapHeader),
		read: t.hub.Sleeper(), spin: ring.Spinner{Max: ring.DefaultSpin},
	}
	p.some = func() bool { return p.n.Load() > 0 }
	p.ready = func() bool {
		return p.some() || p.kicked.Load() || p.shut.Load() || p.end.Peer()&ring.Closed != 0
	}
	p.soon = func() bool { return p.ready() || p.look() }
	// What came through the daemon came before the device had the flow.
	bell.Handle(p.fromRing)
	p.fromRing()
	t.add(p)
	return p
}

// fromRing moves what comes through the rings to the queue. It is called when
// the daemon rang.
func (p *tapPath) fromRing() {
	p.ringMu.Lock()
	defer p.ringMu.Unlock()
	for !p.ringEnd {
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
				if !p.push(f, false) {
					p.tap.put(f)
				}
			}
			p.end.Skip()
			p.end.Release()
			continue
		case errors.Is(err, ring.ErrEmpty):
			if !p.end.Arm() {
				continue
			}
		default:
			p.ringEnd = true
		}
		break
	}
	if s := p.end.Peer(); s != p.state {
		p.state = s
		p.kicked.Store(true) // the reader sees why
		p.read.Wake()
		p.tellOf(false)
	}
}

// push queues a frame unless the queue is full, and wakes the reader.
func (p *tapPath) push(f *frame, lead bool) bool {
	p.qmu.Lock()
	if p.count == tapQueue {
		p.qmu.Unlock()
		return false
	}
	if p.count == len(p.queue) {
		q := make([]*frame, max(2*p.count, 4))
		for i := range p.count {
			q[i] = p.queue[(p.head+i)&(p.count-1)]
		}
		p.queue, p.head = q, 0
	}
	p.queue[(p.head+p.count)&(len(p.queue)-1)] = f
	p.count++
	p.n.Store(int32(p.count))
	p.qmu.Unlock()
	if p.asleep.Load() {
		if lead { // if it is the reader itself that leads, it looks next
			p.read.Nudge()
		} else {
			p.read.Wake()
		}
	}
	p.tellOf(lead)
	return true
}

// tellOf calls who is to be told, once.
func (p *tapPath) tellOf(lead bool) {
	if p.armed.Load() && p.armed.Swap(false) {
		if f := p.notify.Load(); f != nil {
			(*f)(lead)
		}
	}
}

// OnRing sets what is called when something arrives after Arm.
func (p *tapPath) OnRing(f func(lead bool)) {
	if f == nil {
		p.notify.Store(nil)
		return
	}
	p.notify.Store(&f)
}

// Arm says that OnRing's function is to be called for the next packet; false:
// there is one already.
func (p *tapPath) Arm() bool {
	p.armed.Store(true)
	return p.n.Load() == 0 && !p.look()
}

// look reads the device, if nobody else does, until there is a packet for p.
func (p *tapPath) look() bool {
	p.tap.drain(false, p.some)
	return p.some()
}

// Settle reads what the device holds, after whoever reads it now: what he has in
// his hands may be for p. Once is enough: a device holds less than drainMax.
func (p *tapPath) Settle() {
	for !p.tap.busy.CompareAndSwap(false, true) {
		if p.shut.Load() {
			return // the device may be closed
		}
		runtime.Gosched()
	}
	defer p.tap.busy.Store(false)
	p.tap.empty(false, nil)
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
	p.asleep.Store(true)
	err := p.read.Wait(p.ready)
	p.asleep.Store(false)
	p.spin.Slept(time.Since(start))
	if err != nil {
		return err
	}
	return p.woken()
}

// woken ends a wait.
func (p *tapPath) woken() error {
	if p.shut.Load() {
		return net.ErrClosed
	}
	p.kicked.Store(false)
	return nil
}

func (p *tapPath) RxLen(limit int) int {
	// More than the first may wait in the device.
	p.tap.drain(false, func() bool { return int(p.n.Load()) >= limit })
	return min(int(p.n.Load()), limit)
}

// Frame is room for a packet behind what the device wants in front of it.
func (p *tapPath) Frame() []byte {
	if p.out == nil {
		p.out = make([]byte, p.headroom+p.end.MaxMessage())
		binary.LittleEndian.PutUint32(p.out, p.handle)
	}
	return p.out[p.headroom:]
}

// Put sends the packet at once: the device has no queue on this side.
func (p *tapPath) Put(b []byte) error {
	if len(b) > p.end.MaxMessage() {
		return ring.ErrTooLong
	}
	return p.Send(copy(p.Frame(), b))
}

// Send sends the first n bytes of the frame.
func (p *tapPath) Send(n int) error {
	frame := p.out[:p.headroom+n]
	for {
		// Raw: it does not block.
		_, _, err := syscall.RawSyscall(unix.SYS_WRITE, uintptr(p.tap.fd), uintptr(unsafe.Pointer(unsafe.SliceData(frame))), uintptr(len(frame)))
		switch err {
		case 0:
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
	if dl := p.until.Load(); dl != 0 && time.Now().UnixNano() >= dl {
		return os.ErrDeadlineExceeded
	}
	time.Sleep(50 * time.Microsecond)
	return nil
}

func (p *tapPath) TxLen(limit int) int { return p.end.TxLen(limit) }

func (p *tapPath) SetDeadline(d ring.Dir, t time.Time) error {
	switch {
	case p.shut.Load():
		return net.ErrClosed
	case d == ring.DirRead:
		p.read.SetDeadline(t)
	case t.IsZero():
		p.until.Store(0)
	default:
		p.until.Store(t.UnixNano())
	}
	return nil
}

func (p *tapPath) Kick(d ring.Dir) {
	if d == ring.DirRead {
		p.kicked.Store(true)
		p.read.Wake()
	}
}

func (p *tapPath) Peer() ring.State      { return p.end.Peer() }
func (p *tapPath) Own() ring.State       { return p.end.Own() }
func (p *tapPath) SetState(s ring.State) { p.end.SetState(s) }

// Progress takes in what the device has, as far as the queues allow: the
// program may not be reading, and keep-alives are among it.
func (p *tapPath) Progress() (received, sent uint64, full bool) {
	p.tap.drain(false, nil)
	return p.received.Load(), p.sent.Load(), false
}

func (p *tapPath) Shut() {
	p.shut.Store(true)
	p.end.Shut()
	p.read.Close()
}

func (p *tapPath) Close() error {
	p.tap.remove(p)
	p.Shut()
	p.bell.Handle(nil)
	p.ringMu.Lock() // the handler has left
	defer p.ringMu.Unlock()
	p.ringEnd = true
	for p.n.Load() > 0 {
		p.Skip()
	}
	defer p.done()
	return p.end.Close()
}
