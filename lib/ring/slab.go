package ring

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A slab is the shared memory of two processes: slots for the rings of all
// flows between them, and one door for each side. Never more than two processes
// have a slab, for whoever has it sees all that passes in it.
//
// A process that waits for any of many rings does not look at them all. Who
// rings for a slot leaves a bit at the other's door, and rings the bell behind
// it, a system call, only if the other sleeps.
//
//	page 0   magic, capacity, number of slots
//	page 1   door of side 0: what side 1 rang for
//	page 2   door of side 1
//	control  ctlSize for each slot, see ring.go
//	data     two areas of the capacity for each slot
//
// The memory is as large as all slots, but takes only what is touched: a slot
// that carries little, a page of each area and its part of a control page, of
// which six slots have one.
const (
	slabMagic  = 0x6f377362 // "o7sb"
	slabHeader = 3 * page
	slabData   = slabHeader + SlabSlots*ctlSize // a multiple of the page size

	offSlots = 16

	// In a door. What a single ring touches is in one cache line: a ring that
	// finds the mailbox in use sets a bit.
	doorSleeps  = 0   // 32 bits: the side is asleep, or about to be; whoever takes it rings the bell
	doorMail    = 4   // 32 bits: the number of a slot, plus 1
	doorSummary = 8   // a bit for each word of the bitmap that is not 0
	doorBits    = 128 // a bit for each slot

	// SlabSlots is how many slots a slab has: the flows that one process may
	// have.
	SlabSlots = 16384
)

// SlabSize is the number of bytes of a slab whose rings have the given capacity.
func SlabSize(capacity int) int64 { return slabData + SlabSlots*2*int64(capacity) }

// ctlOffset is where the control words of a slot are.
func ctlOffset(slot uint32) int64 { return slabHeader + int64(slot)*ctlSize }

// dataOffset is where the first area of a slot is.
func dataOffset(slot uint32, capacity int) int64 { return slabData + int64(slot)*2*int64(capacity) }

// NewSlab makes the memory of a slab. The caller closes the descriptor;
// mappings live on.
func NewSlab(capacity int) (fd int, err error) {
	if !validCapacity(uint64(capacity)) {
		return -1, fmt.Errorf("capacity %d: not a power of two between %d and %d", capacity, MinCapacity, MaxCapacity)
	}
	if fd, err = NewMemory(SlabSize(capacity)); err != nil {
		return -1, err
	}
	m, err := unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("map slab: %w", err)
	}
	word64(m, offCapacity).Store(uint64(capacity))
	word64(m, offSlots).Store(SlabSlots)
	word32(m, offMagic).Store(slabMagic)
	return fd, unix.Munmap(m)
}

func validCapacity(c uint64) bool {
	return c >= MinCapacity && c <= MaxCapacity && bits.OnesCount64(c) == 1
}

// Format writes the control words of a slot for a fresh pair of rings. Whoever
// gives the slots away does it, before either end is opened.
func Format(fd int, slot uint32, capacity int) error {
	var ctl [ctlSize]byte
	binary.NativeEndian.PutUint32(ctl[offMagic:], magic)
	binary.NativeEndian.PutUint64(ctl[offCapacity:], uint64(capacity))
	_, err := unix.Pwrite(fd, ctl[:], ctlOffset(slot))
	return err
}

// FreeSlot gives the memory of a slot's data back to the system.
func FreeSlot(fd int, slot uint32, capacity int) error {
	return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, dataOffset(slot, capacity), 2*int64(capacity))
}

// Slab is one side's view of a slab.
type Slab struct {
	mem      []byte
	capacity int
	side     int
	own      door // where the other side rings
	peer     door
	bell     int // descriptor behind the peer's door
}

// OpenSlab maps the slab in the memory fd, which stays the caller's. bell is the
// descriptor that wakes the other side; it belongs to the Slab afterwards, also
// on error.
func OpenSlab(fd, side, bell int) (*Slab, error) {
	s, err := openSlab(fd, side)
	if err != nil {
		unix.Close(bell)
		return nil, err
	}
	s.bell = bell
	return s, nil
}

func openSlab(fd, side int) (*Slab, error) {
	if side&^1 != 0 {
		return nil, fmt.Errorf("no such side: %d", side)
	}
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return nil, errors.New("shared memory is not sealed against shrinking")
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	capacity := int((st.Size - slabData) / (2 * SlabSlots))
	if st.Size < slabData || !validCapacity(uint64(capacity)) || SlabSize(capacity) != st.Size {
		return nil, fmt.Errorf("%d bytes are no slab of rings", st.Size)
	}
	m, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map slab: %w", err)
	}
	if word32(m, offMagic).Load() != slabMagic || word64(m, offCapacity).Load() != uint64(capacity) || word64(m, offSlots).Load() != SlabSlots {
		unix.Munmap(m)
		return nil, errors.New("shared memory holds no slab of this version")
	}
	return &Slab{mem: m, capacity: capacity, side: side, own: doorAt(m, side), peer: doorAt(m, 1-side)}, nil
}

// Close unmaps the slab, after all of its ends were closed.
func (s *Slab) Close() error {
	unix.Close(s.bell)
	m := s.mem
	s.mem = nil
	return unix.Munmap(m)
}

// Open opens this side's end of a slot, which waits with w.
func (s *Slab) Open(slot uint32, w Waiter, c Config) (*End, error) {
	if slot >= SlabSlots {
		return nil, fmt.Errorf("slab has no slot %d", slot)
	}
	ctl := ctlOffset(slot)
	var areas [2][]byte
	for i := range areas {
		off := dataOffset(slot, s.capacity) + int64(i*s.capacity)
		areas[i] = s.mem[off : off+int64(s.capacity) : off+int64(s.capacity)]
	}
	b := bell{door: &s.peer, slot: slot, fd: s.bell}
	return attach(s.mem[ctl:ctl+ctlSize:ctl+ctlSize], areas, s.side, w, b, c)
}

// door is where one side finds what the other rang for. Bits that the other
// side sets without reason cost a look, no more.
type door struct {
	sleeps  *atomic.Uint32
	mail    *atomic.Uint32
	summary []uint64
	bits    []uint64
}

func doorAt(m []byte, side int) door {
	d := m[page*(1+side) : page*(2+side)]
	return door{
		sleeps:  word32(d, doorSleeps),
		mail:    word32(d, doorMail),
		summary: unsafe.Slice((*uint64)(unsafe.Pointer(&d[doorSummary])), SlabSlots/64/64),
		bits:    unsafe.Slice((*uint64)(unsafe.Pointer(&d[doorBits])), SlabSlots/64),
	}
}

// ring leaves a note for the slot, and reports whether the bell has to be rung.
func (d *door) ring(slot uint32) bool {
	if m := d.mail.Load(); m != slot+1 && (m != 0 || !d.mail.CompareAndSwap(0, slot+1)) {
		orUint64(&d.bits[slot/64], 1<<(slot%64))
		orUint64(&d.summary[slot/64/64], 1<<(slot/64%64))
	}
	return d.sleeps.Load() != 0 && d.sleeps.Swap(0) != 0
}

// some reports whether there may be notes.
func (d *door) some() bool {
	if d.mail.Load() != 0 {
		return true
	}
	for i := range d.summary {
		if atomic.LoadUint64(&d.summary[i]) != 0 {
			return true
		}
	}
	return false
}

// take removes the notes and calls f for the slot of each.
func (d *door) take(f func(slot uint32)) {
	if d.mail.Load() != 0 {
		if slot := d.mail.Swap(0) - 1; slot < SlabSlots {
			f(slot)
		}
	}
	for i := range d.summary {
		if atomic.LoadUint64(&d.summary[i]) == 0 {
			continue
		}
		// The summary first: a bit that is set meanwhile sets it again.
		for w := atomic.SwapUint64(&d.summary[i], 0); w != 0; w &= w - 1 {
			at := uint32(i*64 + bits.TrailingZeros64(w))
			for b := atomic.SwapUint64(&d.bits[at], 0); b != 0; b &= b - 1 {
				f(at*64 + uint32(bits.TrailingZeros64(b)))
			}
		}
	}
}

func orUint64(p *uint64, v uint64) {
	if atomic.LoadUint64(p)&v != v {
		atomic.OrUint64(p, v)
	}
}

// NewWaitFD makes the descriptor on which a process waits for all of its slabs:
// an epoll descriptor that watches the eventfds which NewSlabBell makes. The
// process that waits does not get those, so it cannot fill a counter up and take
// O_NONBLOCK away, which would block the ringer (the daemon, say) for ever.
//
// Nobody ever reads an eventfd. Watched edge-triggered, every ring is an event.
func NewWaitFD() (int, error) { return unix.EpollCreate1(unix.EPOLL_CLOEXEC) }

// NewSlabBell makes the eventfd that wakes a process whose wait descriptor is
// wait. Whoever keeps the slab keeps the eventfd open, too: with its last
// descriptor a ring that was not noticed yet would be forgotten.
func NewSlabBell(wait int) (int, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, err
	}
	if err := unix.EpollCtl(wait, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func ringFD(fd int) {
	// Raw: the call cannot block, so the scheduler need not know. A full
	// counter (2^64-2 rings, or the peer's doing) is the peer's loss.
	syscall.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&one)), uintptr(len(one)))
}
