// Package ring moves packets between two processes through shared memory: a
// pair of rings, one for each direction, each with one producer and one
// consumer. Messages keep their boundaries, an empty message is one too (a
// keep-alive). While the other end is awake a message costs no system call.
//
// The other end is not trusted. The positions this end owns live in its own
// memory; what it reads from the shared memory (the other's position, the
// length of a record) is fetched once and checked before use, so a hostile
// peer can spoil the messages of this flow, but not make this end panic, read
// beyond the rings or loop. The memory is sealed against shrinking, so that
// an access cannot fault.
//
// The rings of all flows between two processes are in one memory, a slab, see
// Slab. Numbers are in host order: it never leaves the machine. A record is a
// header of 8 bytes (the length in the low half, 0 in the high half) and the
// message, padded to 8 bytes. A record is contiguous: where it does not fit
// before the end of the area, a header with the length wrapMark sends the
// consumer to the start.
package ring

import (
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/o7serr"
)

// DefaultCapacity is the size of one direction's area in bytes: about 170
// packets of 1500 bytes or 3600 of 64. Memory is used as traffic touches it.
const DefaultCapacity = 256 << 10

// Limits of a capacity, which is a power of two.
const (
	MinCapacity = 4 << 10
	MaxCapacity = 64 << 20
)

// Errors. All are permanent for the end, except ErrEmpty, ErrFull and ErrTooLong.
var (
	ErrEmpty   = fmt.Errorf("ring is empty: %w", o7serr.EAGAIN)
	ErrFull    = fmt.Errorf("ring is full: %w", o7serr.EAGAIN)
	ErrTooLong = fmt.Errorf("message is longer than the ring takes: %w", o7serr.EMSGSIZE)
	ErrCorrupt = fmt.Errorf("other end corrupted the ring: %w", o7serr.EFLOWDOWN)
)

const (
	page      = 4096
	header    = 8          // bytes in front of each message
	wrapMark  = 0xffffffff // length that means: go on at the start
	hotWindow = 32 << 10   // see put

	magic = 0x6f377331 // "o7s1"

	// Offsets in the control words of a pair. 128 bytes apart: processors fetch
	// lines in pairs. What the consumer sets when it waits is beside what the
	// producer writes, which looks there with each message, and the other way
	// round.
	ctlSize     = 640
	offMagic    = 0
	offCapacity = 8
	offState    = 16  // + 4*side: what that side says of itself, State bits
	offRing     = 128 // + ringStride*ring, and in it:
	ringStride  = 256
	offHead     = 0   // written by the producer
	offHungry   = 8   // consumer waits for data: set by it, taken by the producer
	offTail     = 128 // written by the consumer
	offBlocked  = 136 // producer waits for room: set by it, taken by the consumer
)

// State is what an end says of itself; the other end sees it.
type State uint32

// State bits.
const (
	Closed State = 1 << iota // the end is gone for good
	Down                     // the flow is down for now
	Ended                    // this end writes no more; what it wrote before is still in the ring
)

// NewMemory makes a shared memory object of size bytes, sealed against change
// of its size. The caller closes the descriptor; mappings live on.
func NewMemory(size int64) (fd int, err error) {
	fd, err = unix.MemfdCreate("o7s-ring", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if err == unix.EINVAL { // before Linux 6.3
		fd, err = unix.MemfdCreate("o7s-ring", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return -1, fmt.Errorf("memfd: %w", err)
	}
	if err = unix.Ftruncate(fd, size); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("memfd of %d bytes: %w", size, err)
	}
	return fd, nil
}

func word64(m []byte, off int) *atomic.Uint64 { return (*atomic.Uint64)(unsafe.Pointer(&m[off])) }
func word32(m []byte, off int) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&m[off])) }

// Config says how to open an end.
type Config struct {
	MaxMessage int           // longest message in bytes; 0: as long as the ring takes
	Spin       time.Duration // how long a wait may look before it sleeps; 0: DefaultSpin, negative: not at all
}

// End is one end of a pair of rings. One goroutine at a time may produce
// (Put, Flush, Write, WriteBatch, WaitWrite) and one may consume (Next, Skip,
// Release, Read, ReadBatch, WaitRead); the two are independent of each other.
// The remaining methods, Close excepted, may be called at any time.
type End struct {
	max    int
	closed bool
	waiter Waiter
	bell   bell
	state  atomic.Uint32 // State of this side; own is for the other end to see
	own    *atomic.Uint32
	peer   *atomic.Uint32 // State of the other
	kicked atomic.Uint32  // 1<<Dir: a wait of that direction is to return
	seen   [2]uint32      // by Dir: peer, as waits of that direction know it

	_ [128]byte
	p producer
	_ [128]byte
	c consumer
	_ [128]byte
}

type producer struct {
	data          []byte
	mask          uint64
	pos           uint64 // end of what is written
	shown         uint64 // end of what the consumer may see
	limit         uint64 // tail as last seen, plus the capacity
	need          uint64 // bytes that a waiting producer wants free
	head, tail    *atomic.Uint64
	hungry, block *atomic.Uint32
	ready         func() bool
	soon          func() bool
	spin          Spinner
}

type consumer struct {
	data          []byte
	mask          uint64
	pos           uint64 // start of the next record
	freed         uint64 // what the producer has been told
	limit         uint64 // head as last seen
	size          uint64 // of the record that Next returned, 0: none
	head, tail    *atomic.Uint64
	hungry, block *atomic.Uint32
	ready         func() bool
	soon          func() bool
	spin          Spinner
}

// attach makes an end of the control words m and the data of the two rings: side 0
// writes ring 0 and reads ring 1.
func attach(m []byte, areas [2][]byte, side int, w Waiter, b bell, c Config) (*End, error) {
	capacity := len(areas[0])
	if word32(m, offMagic).Load() != magic || word64(m, offCapacity).Load() != uint64(capacity) {
		return nil, errors.New("shared memory holds no rings of this version")
	}
	e := &End{
		max: capacity/2 - header, waiter: w, bell: b,
		own:  word32(m, offState+4*side),
		peer: word32(m, offState+4*(1-side)),
	}
	if c.Spin == 0 {
		c.Spin = DefaultSpin
	}
	e.p.spin.Max, e.c.spin.Max = c.Spin, c.Spin
	if c.MaxMessage > 0 && c.MaxMessage < e.max {
		e.max = c.MaxMessage
	}
	area := func(ring int) ([]byte, []byte) { return m[offRing+ringStride*ring:], areas[ring] }
	ctl, data := area(side)
	p := &e.p
	p.data, p.mask = data, uint64(capacity-1)
	p.head, p.tail = word64(ctl, offHead), word64(ctl, offTail)
	p.hungry, p.block = word32(ctl, offHungry), word32(ctl, offBlocked)
	p.pos = p.head.Load() // both ends start where the slot stands
	p.shown = p.pos
	p.limit = p.pos
	p.ready, p.soon = e.room, e.roomSoon
	ctl, data = area(1 - side)
	q := &e.c
	q.data, q.mask = data, uint64(capacity-1)
	q.head, q.tail = word64(ctl, offHead), word64(ctl, offTail)
	q.hungry, q.block = word32(ctl, offHungry), word32(ctl, offBlocked)
	q.pos = q.tail.Load()
	q.freed = q.pos
	q.limit = q.pos
	q.ready, q.soon = e.filled, e.filledSoon
	if p.pos%header != 0 || q.pos%header != 0 {
		return nil, ErrCorrupt
	}
	return e, nil
}

// MaxMessage is the longest message in bytes.
func (e *End) MaxMessage() int { return e.max }

// size is the number of bytes that a message of n bytes occupies.
func recordSize(n int) uint64 { return header + (uint64(n)+7)&^7 }

// Producing.

// fetch reads how far the consumer is.
func (p *producer) fetch() error {
	tail := p.tail.Load()
	if p.pos-tail > p.mask+1 || tail%header != 0 {
		return ErrCorrupt
	}
	p.limit = tail + p.mask + 1
	return nil
}

// Put copies a message into the ring. The other end sees it after Flush.
// Errors: ErrFull, ErrTooLong, ErrCorrupt.
func (e *End) Put(msg []byte) error {
	if len(msg) > e.max {
		return ErrTooLong
	}
	p := &e.p
	size := recordSize(len(msg))
	off := p.pos & p.mask
	if off&(hotWindow-1) < size && off >= hotWindow && off >= size {
		// Once in a window: when the consumer has everything, start over at
		// the front. A quiet flow stays in a few pages, which are in the
		// cache, and never touches the rest of its memory.
		if err := p.fetch(); err != nil {
			return err
		}
		if p.limit-p.pos == p.mask+1 {
			off = p.wrap(off)
		}
	}
	need := size
	if rest := p.mask + 1 - off; rest < size {
		need += rest
	}
	if p.limit-p.pos < need {
		if err := p.fetch(); err != nil {
			return err
		}
		if p.limit-p.pos < need {
			p.need = need
			return ErrFull
		}
	}
	if need != size {
		off = p.wrap(off)
	}
	rec := p.data[off : off+size]
	// A plain store: Flush publishes it.
	*(*uint64)(unsafe.Pointer(unsafe.SliceData(rec))) = uint64(len(msg))
	copy(rec[header:], msg)
	p.pos += size
	return nil
}

// wrap writes the record that leads to the start of the area.
func (p *producer) wrap(off uint64) uint64 {
	*(*uint64)(unsafe.Pointer(&p.data[off])) = wrapMark
	p.pos += p.mask + 1 - off
	return 0
}

// Flush shows the other end what was Put, and wakes it if it sleeps.
func (e *End) Flush() {
	p := &e.p
	if p.shown == p.pos {
		return
	}
	p.shown = p.pos
	p.head.Store(p.pos)
	// Stores and loads of sync/atomic are in one order that both ends agree
	// on: either the consumer's look at head after setting hungry finds this
	// message, or this load finds hungry.
	if p.hungry.Load() != 0 && p.hungry.Swap(0) != 0 {
		e.bell.ring()
	}
}

// Write sends one message: Put and Flush.
func (e *End) Write(msg []byte) error {
	if err := e.Put(msg); err != nil {
		return err
	}
	e.Flush()
	return nil
}

// WriteBatch sends the messages that fit, with one wake-up, and returns how
// many. An error is that of the first message that was not sent.
func (e *End) WriteBatch(msgs [][]byte) (n int, err error) {
	for n < len(msgs) {
		if err = e.Put(msgs[n]); err != nil {
			break
		}
		n++
	}
	e.Flush()
	return n, err
}

// room says whether a producer that found the ring full should try again. It
// runs inside a wait, so it announces the waiter first.
func (e *End) room() bool {
	p := &e.p
	p.block.Store(1)
	ok := p.fetch() != nil || p.limit-p.pos >= p.need || e.stop(DirWrite)
	if ok {
		p.block.Store(0)
	}
	return ok
}

// WaitWrite blocks after ErrFull until the message may fit, the other end
// changes its state or Kick is called; the caller tries again and looks.
// Errors are those of the Waiter.
func (e *End) WaitWrite() error {
	e.Flush() // the room may have to come from what was Put
	return e.wait(DirWrite, &e.p.spin, e.p.soon, e.p.ready, e.p.block)
}

// Consuming.

// fetch reads how far the producer is.
func (c *consumer) fetch() error {
	head := c.head.Load()
	if head-c.pos > c.mask+1 || head%header != 0 {
		return ErrCorrupt
	}
	c.limit = head
	return nil
}

// Next returns the next message, in shared memory: valid until Release or the
// next Next, and its bytes may change under a hostile peer, its length not. It
// returns the same message until Skip. Errors: ErrEmpty, ErrCorrupt.
func (e *End) Next() ([]byte, error) {
	c := &e.c
	if c.limit == c.pos {
		if err := c.fetch(); err != nil {
			return nil, err
		}
		if c.limit == c.pos {
			return nil, ErrEmpty
		}
	}
	for {
		off := c.pos & c.mask
		used, rest := c.limit-c.pos, c.mask+1-off
		// One fetch: a peer that changes the length meanwhile changes nothing.
		h := (*atomic.Uint64)(unsafe.Pointer(&c.data[off])).Load()
		if h == wrapMark {
			// Not at the start: no region full of these keeps us here.
			if rest > used || off == 0 {
				return nil, ErrCorrupt
			}
			c.pos += rest
			if c.pos == c.limit {
				if err := c.fetch(); err != nil {
					return nil, err
				}
				if c.pos == c.limit {
					return nil, ErrEmpty
				}
			}
			continue
		}
		if h > uint64(len(c.data)) {
			return nil, ErrCorrupt
		}
		size := recordSize(int(h))
		if size > used || size > rest {
			return nil, ErrCorrupt
		}
		c.size = size
		return c.data[off+header : off+header+h : off+size], nil
	}
}

// Skip passes over the message that Next returned. The memory stays the
// consumer's until Release.
func (e *End) Skip() {
	e.c.pos += e.c.size
	e.c.size = 0
}

// Release gives the memory of everything skipped back to the other end, and
// wakes it if it waits for room.
func (e *End) Release() {
	c := &e.c
	if c.freed == c.pos {
		return
	}
	c.freed = c.pos
	c.tail.Store(c.pos)
	if c.block.Load() != 0 {
		e.unblock()
	}
}

// unblock wakes the producer once a quarter of the ring is free, or all that
// there is: waking it for each message would make both ends switch for each.
func (e *End) unblock() {
	c := &e.c
	head := c.head.Load()
	if head-c.pos > c.mask+1-(c.mask+1)/4 && head-c.pos <= c.mask+1 {
		return
	}
	if c.block.Swap(0) != 0 {
		e.bell.ring()
	}
}

// Read receives one message into p. It returns the length of the message,
// which may exceed len(p); the rest is lost then.
func (e *End) Read(p []byte) (int, error) {
	m, err := e.Next()
	if err != nil {
		return 0, err
	}
	copy(p, m)
	e.Skip()
	e.Release()
	return len(m), nil
}

// ReadBatch receives up to len(bufs) messages, message i into bufs[i] with its
// length, which may exceed that of the buffer, in sizes[i]. It returns how many
// there were; an error only when there was none.
func (e *End) ReadBatch(bufs [][]byte, sizes []int) (n int, err error) {
	for n < len(bufs) {
		m, err := e.Next()
		if err != nil {
			if n == 0 {
				return 0, err
			}
			break // it is found again by the next call
		}
		copy(bufs[n], m)
		sizes[n] = len(m)
		e.Skip()
		n++
	}
	e.Release()
	return n, nil
}

// filled is room for the consumer.
func (e *End) filled() bool {
	c := &e.c
	c.hungry.Store(1)
	ok := c.fetch() != nil || c.limit != c.pos || e.stop(DirRead)
	if ok {
		c.hungry.Store(0)
	}
	return ok
}

// WaitRead blocks after ErrEmpty until there may be a message, the other end
// changes its state or Kick is called; the caller tries again and looks.
// Errors are those of the Waiter.
func (e *End) WaitRead() error {
	e.Release() // the other end may need the room to send something
	return e.wait(DirRead, &e.c.spin, e.c.soon, e.c.ready, e.c.hungry)
}

// stop reports whether a wait has to end although the ring did not change.
func (e *End) stop(d Dir) bool {
	if e.kicked.Load()&(1<<d) != 0 {
		e.kicked.And(^uint32(1 << d))
		return true
	}
	s := e.peer.Load()
	if State(s)&Closed != 0 {
		return true
	}
	changed := s != e.seen[d]
	e.seen[d] = s
	return changed
}

func (e *End) wait(d Dir, s *Spinner, soon, ready func() bool, flag *atomic.Uint32) error {
	if e.Own()&Closed != 0 {
		return net.ErrClosed
	}
	start := time.Now()
	if s.Spin(start, soon) {
		return nil
	}
	err := e.waiter.Wait(d, ready)
	if err != nil {
		flag.Store(0)
	}
	s.Slept(time.Since(start))
	return err
}

// filledSoon and roomSoon look, without announcing a waiter, whether a wait is
// to end.
func (e *End) filledSoon() bool { return e.c.head.Load() != e.c.pos || e.stop(DirRead) }

func (e *End) roomSoon() bool {
	return e.p.tail.Load()+e.p.mask+1-e.p.pos >= e.p.need || e.stop(DirWrite)
}

// Arm makes the other end ring when it sends something, without a wait; false:
// there is something already. A change of its state rings in any case. It is for
// the consumer.
func (e *End) Arm() bool {
	c := &e.c
	c.hungry.Store(1)
	if c.fetch() != nil || c.limit != c.pos {
		c.hungry.Store(0)
		return false
	}
	return true
}

// Kick makes the wait of one direction return, now or, when there is none, the
// next one at once.
func (e *End) Kick(d Dir) {
	e.kicked.Or(1 << d)
	e.waiter.Kick(d)
}

// Peer is what the other end says of itself.
func (e *End) Peer() State { return State(e.peer.Load()) }

// SetState says what this end is, and wakes the other.
func (e *End) SetState(s State) {
	if State(e.state.Swap(uint32(s))) != s {
		e.own.Store(uint32(s))
		e.bell.ring()
	}
}

// Own is what this end says of itself.
func (e *End) Own() State { return State(e.state.Load()) }

// SetDeadline ends waits of one direction at t, present ones too; zero: never.
func (e *End) SetDeadline(d Dir, t time.Time) error { return e.waiter.SetDeadline(d, t) }

// Progress are numbers that change when the other end sent something and when
// this one did, for those who look now and then. full says that the other end
// may have had no room to send more.
func (e *End) Progress() (received, sent uint64, full bool) {
	received = e.c.head.Load()
	used := received - e.c.tail.Load()
	return received, e.p.head.Load(), used+recordSize(e.max) > e.c.mask+1
}

// Waiter is the waiter given to Open.
func (e *End) Waiter() Waiter { return e.waiter }

// RxLen is the number of messages that wait to be read, at most limit (each
// costs a look at its header). For the consumer.
func (e *End) RxLen(limit int) int {
	c := e.c // a copy to walk with
	if c.fetch() != nil {
		return 0
	}
	return count(c.data, c.mask, c.pos, c.limit, limit)
}

// TxLen is the number of messages that the other end has not read yet, at
// most limit. For the producer.
func (e *End) TxLen(limit int) int {
	p := e.p
	if p.fetch() != nil {
		return 0
	}
	return count(p.data, p.mask, p.limit-p.mask-1, p.shown, limit)
}

func count(data []byte, mask, pos, end uint64, limit int) (n int) {
	for pos != end && n < limit {
		off := pos & mask
		used, rest := end-pos, mask+1-off
		h := (*atomic.Uint64)(unsafe.Pointer(&data[off])).Load()
		if h == wrapMark && off != 0 && rest <= used {
			pos += rest
			continue
		}
		if h > mask || recordSize(int(h)) > min(used, rest) {
			break
		}
		pos += recordSize(int(h))
		n++
	}
	return n
}

// Shut tells the other end that this one is gone and makes every wait of this
// end, present and future, return net.ErrClosed. It may be called at any time before Close.
func (e *End) Shut() {
	e.SetState(e.Own() | Closed)
	e.waiter.Close()
}

// Close shuts the end and leaves its memory, which is the slab's. Nobody may use it any more, or be using it.
func (e *End) Close() error {
	if e.closed {
		return nil
	}
	e.Shut()
	e.closed = true
	return nil
}
