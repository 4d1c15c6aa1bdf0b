package local

import (
	"sync/atomic"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/inbox"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
)

// MaxSDU is the largest packet of a flow inside the machine, in bytes: the
// limit of the packet buffers (spec 12 §6).
const MaxSDU = 1 << 20

// Flow is one end of a pair of ends on this machine. What is sent on one end
// is received by the other end's sink in the same call, without a copy.
type Flow struct {
	info   ipcp.FlowInfo
	pair   *pair
	side   int
	box    inbox.Box
	gone   atomic.Bool // this end was closed
	down   atomic.Bool // the other end, or the layer, released the flow
	txPkts atomic.Uint64
	txLen  atomic.Uint64
}

// pair is what the two ends share; its address identifies the flow.
type pair struct {
	ends    [2]*Flow
	release func() // run when the first end is closed
	once    atomic.Bool
}

var (
	_ ipcp.Flow        = (*Flow)(nil)
	_ ipcp.FlowCounter = (*Flow)(nil)
)

// NewPair returns the two connected ends of a flow that info describes as the
// first end sees it. An MTU of 0 means MaxSDU. It serves flows of the local
// layer and those that the resource manager makes directly (spec 33 §3).
func NewPair(info ipcp.FlowInfo) (a, b *Flow) {
	return newPair(info, func() {})
}

func newPair(info ipcp.FlowInfo, release func()) (a, b *Flow) {
	if info.MTU == 0 {
		info.MTU = MaxSDU
	}
	p := &pair{release: release}
	a = &Flow{info: info, pair: p, side: 0}
	info.Local, info.Remote = info.Remote, info.Local
	b = &Flow{info: info, pair: p, side: 1}
	p.ends = [2]*Flow{a, b}
	return a, b
}

// Pair identifies the flow and this end of it: both ends return the same id,
// and sides 0 (the requester's) and 1. Who holds both ends can give their
// users one shared-memory ring pair and keep the ends for their life only.
func (f *Flow) Pair() (id any, side int) { return f.pair, f.side }

func (f *Flow) other() *Flow { return f.pair.ends[1-f.side] }

// Info describes the flow.
func (f *Flow) Info() ipcp.FlowInfo { return f.info }

// Send passes b to the other end's sink before it returns.
func (f *Flow) Send(b *packet.Buf) error {
	n := b.Len()
	var err error
	switch {
	case f.gone.Load():
		err = o7serr.ENOTALLOC
	case f.down.Load():
		err = o7serr.EFLOWDOWN
	case n > f.info.MTU:
		err = o7serr.EMSGSIZE
	}
	if err != nil {
		b.Release()
		return err
	}
	f.txPkts.Add(1)
	f.txLen.Add(uint64(n))
	f.other().box.DeliverOne(b)
	return nil
}

// SetSink says who receives.
func (f *Flow) SetSink(s ipcp.Sink) { f.box.SetSink(s) }

// Close releases this end and tells the other one at once (spec 12 §5). It
// waits for a running call of the sink, so it must not be called from it.
func (f *Flow) Close() error {
	if f.gone.Swap(true) {
		return nil
	}
	clean := f.box.Close()
	f.other().dealloc()
	if !f.pair.once.Swap(true) {
		f.pair.release()
	}
	if !clean {
		return o7serr.Wrap(o7serr.EINVAL, "flow closed from its own sink")
	}
	return nil
}

// dealloc tells the user of f that the flow is over.
func (f *Flow) dealloc() {
	if !f.down.Swap(true) {
		f.box.Event(ipcp.EventDealloc)
	}
}

// Stat counts what passed this end. What the other end sent is received.
func (f *Flow) Stat() ipcp.FlowStat {
	o := f.other()
	return ipcp.FlowStat{
		RxPackets: o.txPkts.Load(), RxBytes: o.txLen.Load(),
		TxPackets: f.txPkts.Load(), TxBytes: f.txLen.Load(),
	}
}
