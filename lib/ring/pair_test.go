package ring

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"
)

// Pair is one slot of a slab between two processes that are this one, or this
// one and a child.
type Pair struct {
	share *Share
	slot  uint32
	waits [2]int
	desks [2]Desk
}

// NewPair makes a slab and takes a slot of it; capacity 0 means
// DefaultCapacity.
func NewPair(capacity int) (*Pair, error) {
	if capacity == 0 {
		capacity = DefaultCapacity
	}
	p := &Pair{}
	var err error
	for i := range p.waits {
		if p.waits[i], err = NewWaitFD(); err != nil {
			return nil, err
		}
	}
	if p.share, err = NewShare(1, capacity, p.waits); err == nil {
		p.slot, err = p.share.Take()
	}
	if err != nil {
		unix.Close(p.waits[0])
		unix.Close(p.waits[1])
		return nil, err
	}
	return p, nil
}

// Grant is what the process at side is told, and FDs what comes with it.
func (p *Pair) Grant(side int) Grant {
	return Grant{Slab: 1, Slot: p.slot, Side: side, NewSlab: true, NewWait: true}
}

func (p *Pair) FDs(side int) []int {
	own := p.share.FDs(side)
	return []int{p.waits[side], own[0], own[1]}
}

// Open opens one end in this process.
func (p *Pair) Open(side, maxMessage int, spin time.Duration) (*End, error) {
	fds := p.FDs(side)
	for i, fd := range fds {
		var err error
		if fds[i], err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return nil, err
		}
	}
	e, _, err := p.desks[side].Open(p.Grant(side), fds, Config{MaxMessage: maxMessage, Spin: spin})
	return e, err
}

// Close closes everything. Its ends are closed.
func (p *Pair) Close() error {
	err := errors.Join(p.desks[0].Close(), p.desks[1].Close())
	p.share.Abandon()
	return errors.Join(err, unix.Close(p.waits[0]), unix.Close(p.waits[1]))
}
