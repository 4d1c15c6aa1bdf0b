package linkstate

import (
	"cmp"
	"slices"
	"time"

	"github.com/o7s/o7s-router/lib/wire"
)

// Packet is one LSA to send on a management flow.
type Packet struct {
	Flow FlowID
	n    uint8
	b    [wire.WithdrawLen]byte
}

// Bytes returns the packet, 24 or 32 bytes; valid as long as p.
func (p *Packet) Bytes() []byte { return p.b[:p.n] }

// neighbor is a management neighbour. What it must be sent is a queue of
// database slots, not of packets: a slot that is queued twice goes once, with
// what is known when it goes, so a queue does not outgrow the database.
type neighbor struct {
	peer  uint64
	flows []FlowID // newest last; only that one is sent on

	queue []int32 // slots in order from head; those not in pending are skipped
	head  int
	// pending has the bits of the slots to send.
	pending []uint64
	waiting int // bits set

	// A reference peer reads one packet when it starts to read and then one per
	// arrival, so what was sent before, but for the first packet, lags behind for
	// ever (spec 42 §12, oddity 0). Therefore one packet goes at once, the rest
	// when the peer has sent something, which proves that its reader runs, or at
	// settled.
	proven  bool
	first   bool // the one packet is gone
	settled int64

	window int64 // start of the current pace interval
	sent   int   // packets in it
	now    int64 // time of the last send, for deadline
}

func (n *neighbor) flow() FlowID { return n.flows[len(n.flows)-1] }

func (n *neighbor) has(s int32) bool {
	w := int(s >> 6)
	return w < len(n.pending) && n.pending[w]&(1<<(s&63)) != 0
}

// push queues the entry in slot s.
func (n *neighbor) push(s int32) {
	if n.has(s) {
		return
	}
	for int(s>>6) >= len(n.pending) {
		n.pending = append(n.pending, 0)
	}
	n.pending[s>>6] |= 1 << (s & 63)
	n.waiting++
	if len(n.queue) > 128*len(n.pending)+burst {
		n.compact()
	}
	n.queue = append(n.queue, s)
}

// drop takes slot s off the queue.
func (n *neighbor) drop(s int32) {
	if n.has(s) {
		n.pending[s>>6] &^= 1 << (s & 63)
		n.waiting--
	}
}

// compact removes skipped and repeated slots; the caller's new slot is pending
// but not queued yet, so its bit stays with the copy it appends.
func (n *neighbor) compact() {
	seen := make([]uint64, len(n.pending))
	out := n.queue[:0]
	for _, s := range n.queue[n.head:] {
		if n.has(s) && seen[s>>6]&(1<<(s&63)) == 0 {
			seen[s>>6] |= 1 << (s & 63)
			out = append(out, s)
		}
	}
	n.queue, n.head = out, 0
}

func (n *neighbor) pop() int32 {
	for n.head < len(n.queue) {
		s := n.queue[n.head]
		n.head++
		if n.head == len(n.queue) {
			n.queue, n.head = n.queue[:0], 0
		}
		if n.has(s) {
			n.drop(s)
			return s
		}
	}
	return -1
}

// deadline is when the neighbour can be sent more.
func (n *neighbor) deadline() (int64, bool) {
	switch {
	case n.waiting == 0:
		return 0, false
	case !n.proven && n.first && n.now < n.settled:
		return n.settled, true
	case n.sent >= burst:
		return n.window + int64(pace), true
	}
	return n.now, true
}

// MgmtUp reports a management flow to a neighbour and queues the whole
// database for it. A second flow to the same neighbour replaces the first for
// sending (spec 42 §3).
func (in *Instance) MgmtUp(now time.Time, flow FlowID, peer uint64) {
	if peer == 0 {
		return
	}
	if peer == in.cfg.Self {
		in.setConflict(wire.LSA{Src: peer, Dst: peer})
		return
	}
	if old := in.byFlow[flow]; old != nil && old.peer != peer {
		in.MgmtDown(now, flow)
	}
	i, ok := in.findMgmt(peer)
	if !ok {
		in.mgmt = slices.Insert(in.mgmt, i, &neighbor{peer: peer})
	}
	n := in.mgmt[i]
	in.byFlow[flow] = n
	n.flows = append(slices.DeleteFunc(n.flows, func(f FlowID) bool { return f == flow }), flow)
	in.restart(in.ns(now), n)
}

// restart begins to talk on the neighbour's newest flow.
func (in *Instance) restart(t int64, n *neighbor) {
	*n = neighbor{
		peer: n.peer, flows: n.flows, queue: n.queue[:0], pending: n.pending[:0],
		settled: t + int64(in.cfg.Settle), now: t,
	}
	for _, s := range in.db.sorted(false) {
		n.push(s)
	}
}

// MgmtDown reports that a management flow is gone. The database stays (spec 42
// §5.7). Unknown flows are ignored.
func (in *Instance) MgmtDown(now time.Time, flow FlowID) {
	n := in.byFlow[flow]
	if n == nil {
		return
	}
	delete(in.byFlow, flow)
	newest := n.flow() == flow
	n.flows = slices.DeleteFunc(n.flows, func(f FlowID) bool { return f == flow })
	switch {
	case len(n.flows) == 0:
		i, _ := in.findMgmt(n.peer)
		in.mgmt = slices.Delete(in.mgmt, i, i+1)
	case newest:
		in.restart(in.ns(now), n)
	}
}

func (in *Instance) findMgmt(peer uint64) (int, bool) {
	return slices.BinarySearchFunc(in.mgmt, peer, func(n *neighbor, p uint64) int { return cmp.Compare(n.peer, p) })
}

// flood queues the entry for every neighbour but the one it came from.
func (in *Instance) flood(s int32, from *neighbor) {
	if in.cfg.NoWithdraw && in.db.entries[s].state == withdrawn {
		for _, n := range in.mgmt {
			n.drop(s)
		}
		return
	}
	for _, n := range in.mgmt {
		if n != from {
			n.push(s)
		} else {
			n.drop(s)
		}
	}
}

// send moves what the neighbour may get now to the output.
func (in *Instance) send(t int64, n *neighbor) {
	n.now = t
	if t >= n.window+int64(pace) {
		n.window, n.sent = t, 0
	}
	open := n.proven || t >= n.settled
	for n.waiting > 0 && n.sent < burst && (open || !n.first) {
		s := n.pop()
		if s < 0 {
			return
		}
		e := &in.db.entries[s]
		m := wire.LSA{Dst: e.dst, Src: e.src, Seqno: e.seq, Withdraw: e.state == withdrawn}
		if m.Withdraw && in.cfg.NoWithdraw {
			continue
		}
		in.out = append(in.out, Packet{Flow: n.flow()})
		p := &in.out[len(in.out)-1]
		p.n = uint8(len(m.AppendTo(p.b[:0])))
		if m.Withdraw {
			in.stats.TxWithdraw++
		} else {
			in.stats.TxLSA++
		}
		n.sent++
		n.first = true
	}
}

// Output returns the packets to send, in order per flow, and forgets them. The
// slice is valid until the next Tick. A packet that cannot be sent may be
// dropped: the next refresh repairs it.
func (in *Instance) Output() []Packet {
	if in.outTaken {
		return nil
	}
	in.outTaken = true
	return in.out
}
