package irm

import (
	"errors"
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

// rings are the descriptors of a pair of rings until the processes at its ends
// have them. Afterwards the daemon needs none of them.
type rings struct {
	capacity int
	memory   int
	wait     [2]int // by side: becomes readable when the side is to wake up
	ring     [2]int // by side: wakes the side up
	holders  atomic.Int32
}

// newRings makes a pair of rings. release must be called once for each of
// holders.
func newRings(capacity int, holders int32) (*rings, error) {
	r := &rings{capacity: capacity, memory: -1, wait: [2]int{-1, -1}, ring: [2]int{-1, -1}}
	r.holders.Store(holders)
	var err error
	if r.memory, err = ring.NewMemory(ring.RegionSize(capacity)); err == nil {
		err = ring.Format(r.memory, 0, capacity)
	}
	for side := range 2 {
		if err == nil {
			r.ring[side], r.wait[side], err = ring.NewBell()
		}
	}
	if err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

func (r *rings) close() {
	for _, fd := range []int{r.memory, r.wait[0], r.wait[1], r.ring[0], r.ring[1]} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// release says that one holder needs the descriptors no more.
func (r *rings) release() {
	if r.holders.Add(-1) == 0 {
		r.close()
	}
}

func (r *rings) region() ipc.Region { return ipc.Region{Size: ring.RegionSize(r.capacity)} }

// fds are the descriptors for the process at side, in the order of ipc.FlowResult.
func (r *rings) fds(side int) []int { return []int{r.memory, r.wait[side], r.ring[1-side]} }

// daemonSide is the daemon's side of a pair that it shares with a process.
const daemonSide = 1

// pump moves the packets of a flow between the rings of a process and the
// layer. It is the flow's sink.
type pump struct {
	f       *flow
	end     *ring.End
	done    chan struct{} // closed when run ended
	dropped atomic.Uint64 // packets for which the ring had no room

	leaving atomic.Bool // run stops once the ring is empty

	mu     sync.Mutex // guards the producer half of end, and closed
	closed bool
}

// newPump takes the daemon's descriptors of f.rings.
func newPump(f *flow, mtu int) (*pump, error) {
	r := f.rings
	w, err := ring.NewWaiter(r.wait[daemonSide])
	if err != nil {
		return nil, err
	}
	r.wait[daemonSide] = -1
	bell := ring.BellFromFD(r.ring[1-daemonSide])
	r.ring[1-daemonSide] = -1
	end, err := ring.Open(ring.Config{
		Memory: r.memory, Size: ring.RegionSize(r.capacity), Side: daemonSide, MaxMessage: mtu, Waiter: w, Bell: bell,
	})
	if err != nil {
		_ = w.Close()
		bell.Close()
		return nil, err
	}
	return &pump{f: f, end: end, done: make(chan struct{})}, nil
}

// Between two looks at whether the pump is leaving, and between two releases
// of ring memory, run takes at most this many packets.
const pumpBatch = 32

// run takes what the process writes and passes it down, until leave.
func (p *pump) run() {
	defer close(p.done)
	grace := p.f.rings.capacity // bytes taken after leave: what the ring can hold
	for {
		n, err := p.take(&grace)
		p.end.Release()
		switch {
		case err == nil:
			continue
		case !errors.Is(err, ring.ErrEmpty):
			p.f.m.complain("process spoiled its flow", "pid", p.f.session.pid, "flow", p.f.id, "err", err)
			p.f.event(ipcp.EventDealloc)
			return
		case n > 0:
			continue
		}
		// A process that closed its end writes no more, but a wait for it
		// would return at once, for ever.
		if p.leaving.Load() || p.end.Peer()&ring.Closed != 0 {
			return
		}
		if p.end.WaitRead() != nil {
			return
		}
	}
}

// take passes a batch down.
func (p *pump) take(grace *int) (n int, err error) {
	leaving := p.leaving.Load()
	for n < pumpBatch {
		msg, err := p.end.Next()
		if err != nil {
			return n, err
		}
		if leaving {
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

// leave lets run pass down what the process has written, and ends it.
func (p *pump) leave() {
	p.leaving.Store(true)
	p.end.Kick(ring.DirRead)
	<-p.done
}

// close unmaps the rings, after leave and after the flow was closed.
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

// FlowEvent tells the process, also through the rings: a reader wakes up.
func (p *pump) FlowEvent(e ipcp.Event) {
	p.f.event(e)
	p.mu.Lock()
	defer p.mu.Unlock()
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
