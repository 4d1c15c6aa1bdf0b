package ring

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/o7serr"
)

// Grant says where the rings of a flow are, to the process that gets them with
// descriptors beside it: with NewWait the one to wait on, with NewSlab the memory
// and the one that wakes the other side, in this order. A process has seen the
// others before.
type Grant struct {
	Slab    uint32 `json:"slab"`
	Slot    uint32 `json:"slot"`
	Side    int    `json:"side"` // side 0 writes ring 0 and reads ring 1
	NewSlab bool   `json:"new_slab,omitempty"`
	NewWait bool   `json:"new_wait,omitempty"`
}

// FDs is the number of descriptors that come with the grant.
func (g Grant) FDs() (n int) {
	if g.NewWait {
		n++
	}
	if g.NewSlab {
		n += 2
	}
	return n
}

// Share is a slab in the hands of whoever makes it for two processes, and gives
// its slots away. It is safe for concurrent use.
type Share struct {
	ID       uint32
	Capacity int

	memory int
	bells  [2]int // of the sides: they wake the side that waits

	mu   sync.Mutex // guards what follows
	free []uint32
	next uint32 // no slot from here on was used yet
	used int
	last bool // closed once no slot is used
}

// NewShare makes a slab. waits are the wait descriptors of its two sides, which
// stay the caller's.
func NewShare(id uint32, capacity int, waits [2]int) (*Share, error) {
	s := &Share{ID: id, Capacity: capacity, memory: -1, bells: [2]int{-1, -1}}
	var err error
	s.memory, err = NewSlab(capacity)
	for i := range waits {
		if err == nil {
			s.bells[i], err = NewSlabBell(waits[i])
		}
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// Take returns a slot that nobody uses, formatted. Errors: o7serr.EAGAIN when
// there is none.
func (s *Share) Take() (slot uint32, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch n := len(s.free); {
	case s.last:
		return 0, errors.New("slab is closed")
	case n > 0:
		slot, s.free = s.free[n-1], s.free[:n-1]
	case s.next < SlabSlots:
		slot = s.next
		s.next++
	default:
		return 0, o7serr.Wrap(o7serr.EAGAIN, "all %d slots of the slab are in use", SlabSlots)
	}
	if err := Format(s.memory, slot, s.Capacity); err != nil {
		s.free = append(s.free, slot)
		return 0, fmt.Errorf("format rings: %w", err)
	}
	s.used++
	return slot, nil
}

// Give takes a slot back, and its memory. No end of it is open any more.
func (s *Share) Give(slot uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = FreeSlot(s.memory, slot, s.Capacity) // Format clears what matters
	s.free = append(s.free, slot)
	s.used--
	s.end()
}

// Close closes the descriptors once the last slot is given back. Processes that
// have them are not affected.
func (s *Share) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = true
	s.end()
}

// Abandon closes the descriptors whatever is in use.
func (s *Share) Abandon() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = true
	s.close()
}

func (s *Share) end() {
	if s.last && s.used == 0 {
		s.close()
	}
}

func (s *Share) close() {
	for _, fd := range []*int{&s.memory, &s.bells[0], &s.bells[1]} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

// FDs are the memory and the descriptor with which side wakes the other. They
// stay the Share's.
func (s *Share) FDs(side int) [2]int { return [2]int{s.memory, s.bells[1-side]} }

// Open maps the slab as side in this process.
func (s *Share) Open(side int) (*Slab, error) {
	bell, err := unix.FcntlInt(uintptr(s.bells[1-side]), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return OpenSlab(s.memory, side, bell)
}

// Desk is where a process opens what it is granted: its hub and its slabs. The
// zero value is ready to use. It is safe for concurrent use.
type Desk struct {
	mu    sync.Mutex // guards what follows
	hub   *Hub
	slabs map[deskKey]*deskSlab
}

// deskSlab is a slab and what is open of it.
type deskSlab struct {
	*Slab
	ends int
	gone bool // the process at the other side has left
}

// deskKey names a slab as a side sees it: a process can have both.
type deskKey struct {
	slab uint32
	side int
}

// Hub is the process's hub, nil before the first grant.
func (d *Desk) Hub() *Hub {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.hub
}

// Open opens the end that g grants. fds are the descriptors that came with it,
// which are taken over, also on error. Done is to be called after its Close.
func (d *Desk) Open(g Grant, fds []int, c Config) (*End, *HubEnd, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e, w, err := d.open(g, fds, c)
	if err != nil {
		return nil, nil, fmt.Errorf("open flow: %w", err)
	}
	return e, w, nil
}

func (d *Desk) open(g Grant, fds []int, c Config) (*End, *HubEnd, error) {
	left := fds
	defer func() {
		for _, fd := range left {
			unix.Close(fd)
		}
	}()
	if len(fds) != g.FDs() {
		return nil, nil, fmt.Errorf("%d descriptors with the grant of a flow, want %d", len(fds), g.FDs())
	}
	if g.NewWait {
		if d.hub == nil {
			wait := left[0]
			left = left[1:]
			h, err := NewHub(wait)
			if err != nil {
				return nil, nil, err
			}
			d.hub = h
		} else {
			unix.Close(left[0]) // the same, sent again
			left = left[1:]
		}
	}
	if d.hub == nil {
		return nil, nil, errors.New("grant without a descriptor to wait on")
	}
	key := deskKey{g.Slab, g.Side}
	s := d.slabs[key]
	if s == nil {
		if !g.NewSlab {
			return nil, nil, errors.New("grant in a slab that is not known")
		}
		bell := left[1]
		left = left[:1]
		slab, err := OpenSlab(left[0], g.Side, bell)
		if err != nil {
			return nil, nil, err
		}
		s = &deskSlab{Slab: slab}
		if d.slabs == nil {
			d.slabs = map[deskKey]*deskSlab{}
		}
		d.slabs[key] = s
		d.hub.AddSlab(slab)
	}
	w, err := d.hub.End(s.Slab, g.Slot)
	if err != nil {
		return nil, nil, err
	}
	e, err := s.Open(g.Slot, w, c)
	if err != nil {
		w.Close()
		return nil, nil, err
	}
	s.ends++
	return e, w, nil
}

// Done says that the end that g granted is closed.
func (d *Desk) Done(g Grant) {
	d.mu.Lock()
	defer d.mu.Unlock()
	key := deskKey{g.Slab, g.Side}
	if s := d.slabs[key]; s != nil {
		s.ends--
		d.drop(key, s)
	}
}

// Gone says that the process at the other side of a slab has left: the slab is
// unmapped with the last end in it.
func (d *Desk) Gone(slab uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for side := range 2 {
		key := deskKey{slab, side}
		if s := d.slabs[key]; s != nil {
			s.gone = true
			d.drop(key, s)
		}
	}
}

func (d *Desk) drop(key deskKey, s *deskSlab) {
	if s.gone && s.ends == 0 {
		delete(d.slabs, key)
		d.hub.RemoveSlab(s.Slab)
		_ = s.Close()
	}
}

// Close unmaps the slabs and closes the hub. No end is open any more.
func (d *Desk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hub == nil {
		return nil
	}
	err := d.hub.Close()
	for _, s := range d.slabs {
		d.hub.RemoveSlab(s.Slab)
		err = errors.Join(err, s.Close())
	}
	d.hub, d.slabs = nil, nil
	return err
}
