package irm

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/ring"
)

// directCapacity is the size of each direction of a flow between two processes:
// it takes packets of 256 KiB, as the reference's user pools do (spec 47 §4.4).
const directCapacity = 512 << 10

// directMTU is the longest packet of such a flow, less the ring's header.
const directMTU = directCapacity/2 - 8

// slot is where the rings of a flow are, in the hands of the flows at its ends.
type slot struct {
	share *ring.Share
	n     uint32
	users atomic.Int32 // flows that have not ended
}

// done says that one of the flows has ended.
func (s *slot) done() {
	if s.users.Add(-1) == 0 {
		s.share.Give(s.n)
	}
}

// shared is a slab between two processes, or one and the daemon (nil).
type shared struct {
	*ring.Share
	sides [2]*session
	sent  [2]bool // the process has the descriptors; guarded by IRM.shareMu
}

// waitFD is the descriptor on which the process waits. IRM.shareMu is held.
func (s *session) waitFD() (int, error) {
	if s.wait < 0 {
		fd, err := ring.NewWaitFD()
		if err != nil {
			return -1, err
		}
		s.wait = fd
	}
	return s.wait, nil
}

// pairShare returns the slab between two processes, which may be one.
func (m *IRM) pairShare(a, b *session) (*shared, error) {
	m.shareMu.Lock()
	defer m.shareMu.Unlock()
	for _, x := range a.shares {
		if x.sides == [2]*session{a, b} || x.sides == [2]*session{b, a} {
			return x, nil
		}
	}
	if a.unshared || b.unshared {
		return nil, errLeft
	}
	var waits [2]int
	for i, s := range []*session{a, b} {
		var err error
		if waits[i], err = s.waitFD(); err != nil {
			return nil, err
		}
	}
	m.lastShare++
	share, err := ring.NewShare(m.lastShare, directCapacity, waits)
	if err != nil {
		return nil, err
	}
	x := &shared{Share: share, sides: [2]*session{a, b}}
	a.shares = append(a.shares, x)
	if b != a {
		b.shares = append(b.shares, x)
	}
	return x, nil
}

// ownShare returns the slab between the process and the daemon, which makes it,
// and the hub that serves it, with the first flow.
func (s *session) ownShare() (*shared, error) {
	m := s.m
	m.shareMu.Lock()
	defer m.shareMu.Unlock()
	if s.own != nil {
		return s.own, nil
	}
	if s.unshared {
		return nil, errLeft
	}
	wait, err := s.waitFD()
	if err != nil {
		return nil, err
	}
	mine, err := ring.NewWaitFD()
	if err != nil {
		return nil, err
	}
	m.lastShare++
	share, err := ring.NewShare(m.lastShare, ring.DefaultCapacity, [2]int{1 - daemonSide: wait, daemonSide: mine})
	if err != nil {
		_ = unix.Close(mine)
		return nil, err
	}
	slab, err := share.Open(daemonSide)
	if err != nil {
		share.Close()
		_ = unix.Close(mine)
		return nil, err
	}
	hub, err := ring.NewHub(mine)
	if err != nil {
		share.Close()
		_ = slab.Close()
		return nil, err
	}
	hub.AddSlab(slab)
	hub.Serve()
	s.slab, s.hub = slab, hub
	s.own = &shared{Share: share, sides: [2]*session{1 - daemonSide: s}}
	s.shares = append(s.shares, s.own)
	return s.own, nil
}

// take takes a slot of x for users flows.
func (x *shared) take(users int32) (*slot, error) {
	n, err := x.Take()
	if err != nil {
		return nil, err
	}
	s := &slot{share: x.Share, n: n}
	s.users.Store(users)
	return s, nil
}

// granted fills in what the process at side needs to open the slot, and returns
// the descriptors, which stay ours. Until a reply with them is known to have
// gone, each has them.
func (x *shared) granted(g *ring.Grant, n uint32, side int) (fds []int) {
	s := x.sides[side]
	s.m.shareMu.Lock()
	defer s.m.shareMu.Unlock()
	*g = ring.Grant{Slab: x.ID, Slot: n, Side: side, NewSlab: !x.sent[side], NewWait: !s.waitSent}
	if g.NewWait {
		fds = append(fds, s.wait)
	}
	if g.NewSlab {
		own := x.FDs(side)
		fds = append(fds, own[:]...)
	}
	return fds
}

// told says that the process has what granted returned.
func (x *shared) told(side int) {
	s := x.sides[side]
	s.m.shareMu.Lock()
	defer s.m.shareMu.Unlock()
	x.sent[side], s.waitSent = true, true
}

// unshare ends what the process shares with others. Its flows are closed.
func (s *session) unshare() {
	m := s.m
	m.shareMu.Lock()
	s.unshared = true
	list, hub, slab, wait := s.shares, s.hub, s.slab, s.wait
	s.shares, s.own, s.hub, s.slab, s.wait = nil, nil, nil, nil, -1
	for _, x := range list {
		for _, o := range x.sides {
			if o != nil && o != s {
				o.shares = slices.DeleteFunc(o.shares, func(y *shared) bool { return y == x })
			}
		}
	}
	m.shareMu.Unlock()
	if hub != nil {
		hub.RemoveSlab(slab)
		_ = hub.Close()
		_ = slab.Close()
	}
	for _, x := range list {
		for _, o := range x.sides {
			if o != nil && o != s {
				o.event(ipc.FlowEvent{Type: "slab", Slab: x.ID})
			}
		}
		x.Close()
	}
	if wait >= 0 {
		_ = unix.Close(wait)
	}
}

// daemonSide is the daemon's side of a pair that it shares with a process.
const daemonSide = 1

// pump moves the packets of a flow between the rings of a process and the
// layer. It is the flow's sink, and the handler of what the process rings for.
type pump struct {
	f       *flow
	end     *ring.End
	waiter  *ring.HubEnd
	dropped atomic.Uint64 // packets for which the ring had no room

	rmu  sync.Mutex // guards the consumer half of end, and left
	left bool       // nothing is taken any more

	mu     sync.Mutex // guards the producer half of end, and what follows
	closed bool
	opened bool         // the process has the flow
	events []ipcp.Event // for when it does
}

// newPump opens the daemon's end of the slot.
func newPump(f *flow, mtu int) (*pump, error) {
	s := f.session
	w, err := s.hub.End(s.slab, f.slot.n)
	if err != nil {
		return nil, err
	}
	end, err := s.slab.Open(f.slot.n, w, ring.Config{MaxMessage: mtu, Spin: -1})
	if err != nil {
		_ = w.Close()
		return nil, err
	}
	return &pump{f: f, end: end, waiter: w}, nil
}

// start begins to take what the process writes.
func (p *pump) start() {
	p.waiter.Handle(p.serve)
	p.serve()
}

const (
	// pumpBatch is how many packets are taken between two releases of memory.
	pumpBatch = 32
	// pumpTurn is how many before the other flows of the process have theirs.
	pumpTurn = 4 * pumpBatch
)

// serve takes what the process has written and passes it down.
func (p *pump) serve() {
	p.rmu.Lock()
	defer p.rmu.Unlock()
	for turn := 0; !p.left; {
		n, err := p.take(nil)
		p.end.Release()
		switch {
		case err != nil && !errors.Is(err, ring.ErrEmpty):
			p.left = true
			p.f.m.complain("process spoiled its flow", "pid", p.f.session.pid, "flow", p.f.id, "err", err)
			p.f.event(ipcp.EventDealloc)
			return
		case err != nil && n == 0 && p.end.Arm():
			return // it rings
		}
		if turn += n; turn >= pumpTurn {
			p.waiter.Again()
			return
		}
	}
}

// take passes a batch down, as long as grace, bytes that are still taken, lasts.
func (p *pump) take(grace *int) (n int, err error) {
	for n < pumpBatch {
		msg, err := p.end.Next()
		if err != nil {
			return n, err
		}
		if grace != nil {
			if *grace -= len(msg) + 8; *grace < 0 {
				return 0, ring.ErrEmpty
			}
		}
		b := packet.Get(len(msg))
		copy(b.Bytes(), msg)
		p.end.Skip()
		_ = p.f.lower.Send(b) // the layer counts what it cannot send
		n++
	}
	return n, nil
}

// leave passes down what the process has written, and takes nothing any more.
func (p *pump) leave() {
	p.waiter.Handle(nil)
	p.rmu.Lock()
	defer p.rmu.Unlock()
	grace := ring.DefaultCapacity // what the ring can hold
	for !p.left {
		n, err := p.take(&grace)
		p.end.Release()
		p.left = err != nil && (n == 0 || !errors.Is(err, ring.ErrEmpty))
	}
}

// close gives up the rings, after leave and after the flow was closed.
func (p *pump) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	_ = p.end.Close()
}

// Receive passes packets to the process. It does not block: what the ring has
// no room for is dropped.
func (p *pump) Receive(pkts []*packet.Buf) {
	lost := 0
	p.mu.Lock()
	for _, b := range pkts {
		if p.closed || p.end.Put(b.Bytes()) != nil {
			lost++
		}
		b.Release()
	}
	if !p.closed {
		p.end.Flush()
	}
	p.mu.Unlock()
	if lost > 0 {
		p.dropped.Add(uint64(lost))
		p.f.m.stats.ringDrops.Add(uint64(lost))
	}
}

// open says that the process knows the flow, and tells it what happened meanwhile.
func (p *pump) open() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.opened = true
	for _, e := range p.events {
		p.tell(e)
	}
	p.events = nil
}

// FlowEvent tells the process, also through the rings: a reader wakes up.
func (p *pump) FlowEvent(e ipcp.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.opened {
		p.events = append(p.events, e)
		return
	}
	p.tell(e)
}

func (p *pump) tell(e ipcp.Event) {
	p.f.event(e)
	if p.closed {
		return
	}
	switch e {
	case ipcp.EventDown:
		p.end.SetState(p.end.Own() | ring.Down)
	case ipcp.EventUp:
		p.end.SetState(p.end.Own() &^ ring.Down)
	case ipcp.EventDealloc:
		p.end.SetState(p.end.Own() | ring.Closed)
	}
}
