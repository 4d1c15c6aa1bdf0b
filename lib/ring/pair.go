package ring

import (
	"time"

	"golang.org/x/sys/unix"
)

// Pair is a new pair of rings in memory of its own, with the descriptors that
// its two ends need. Those not given away by Open belong to the Pair.
type Pair struct {
	Memory int
	Size   int64 // of the region, which starts at offset 0

	wait, ring [2]int // side i waits on wait[i], the other side rings ring[i]
}

// NewPair makes a pair of rings; capacity 0 means DefaultCapacity.
func NewPair(capacity int) (*Pair, error) {
	if capacity == 0 {
		capacity = DefaultCapacity
	}
	p := &Pair{Memory: -1, Size: RegionSize(capacity), wait: [2]int{-1, -1}, ring: [2]int{-1, -1}}
	var err error
	if p.Memory, err = NewMemory(p.Size); err != nil {
		return nil, err
	}
	if err = Format(p.Memory, 0, capacity); err != nil {
		p.Close()
		return nil, err
	}
	for i := range p.ring {
		if p.ring[i], p.wait[i], err = NewBell(); err != nil {
			p.Close()
			return nil, err
		}
	}
	return p, nil
}

// FDs are the descriptors for the process that has side: the memory, the one
// to wait on, the one to wake the other end. They are to be sent, not kept:
// they belong to the Pair.
func (p *Pair) FDs(side int) [3]int { return [3]int{p.Memory, p.wait[side], p.ring[1-side]} }

// Open opens one end in this process and gives it the descriptors it needs.
func (p *Pair) Open(side, maxMessage int, spin time.Duration) (*End, error) {
	fds := p.FDs(side)
	e, err := OpenFDs(fds, Config{Size: p.Size, Side: side, MaxMessage: maxMessage, Spin: spin})
	p.wait[side], p.ring[1-side] = -1, -1
	return e, err
}

// OpenFDs is Open with the three descriptors of Pair.FDs in this process: it
// takes over the second and the third, also on error, the memory stays the
// caller's. It fills in what c says of descriptors.
func OpenFDs(fds [3]int, c Config) (*End, error) {
	w, err := NewWaiter(fds[1])
	if err != nil {
		unix.Close(fds[1])
		unix.Close(fds[2])
		return nil, err
	}
	c.Memory, c.Waiter, c.Bell = fds[0], w, BellFromFD(fds[2])
	e, err := Open(c)
	if err != nil {
		w.Close()
		c.Bell.Close()
		return nil, err
	}
	return e, nil
}

// Close closes the descriptors that still belong to the Pair. Open ends and
// other processes are not affected.
func (p *Pair) Close() {
	for _, fd := range []*int{&p.Memory, &p.wait[0], &p.wait[1], &p.ring[0], &p.ring[1]} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}
