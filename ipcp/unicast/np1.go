package unicast

import (
	"strconv"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/inbox"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/wire"
)

// flow is one end of an N+1 flow: what the flow allocator made for a program
// or for a layer above.
type flow struct {
	l     *Layer
	info  ipcp.FlowInfo
	local uint64 // own EID
	// Set once, before the flow is handed out.
	remoteAddr, remoteEID uint64

	in   inbox.Box
	dead atomic.Bool // released by the peer, the layer or the user

	rxPkts, rxBytes, txPkts, txBytes atomic.Uint64
}

func (f *flow) Info() ipcp.FlowInfo { return f.info }

// Stat returns the flow's user-space counters.
func (f *flow) Stat() ipcp.FlowStat {
	return ipcp.FlowStat{RxPackets: f.rxPkts.Load(), RxBytes: f.rxBytes.Load(), TxPackets: f.txPkts.Load(), TxBytes: f.txBytes.Load()}
}

func (f *flow) Send(b *packet.Buf) error {
	if f.dead.Load() {
		b.Release()
		return o7serr.EFLOWDOWN
	}
	n := b.Len()
	if n > f.info.MTU {
		b.Release()
		return o7serr.EMSGSIZE
	}
	f.txPkts.Add(1)
	f.txBytes.Add(uint64(n))
	return f.l.dt.send(f.remoteAddr, f.remoteEID, b)
}

// deliver passes packets up; the slice stays the caller's.
func (f *flow) deliver(pkts []*packet.Buf) {
	f.rxPkts.Add(uint64(len(pkts)))
	for _, b := range pkts {
		f.rxBytes.Add(uint64(b.Len()))
	}
	f.in.Deliver(pkts)
}

func (f *flow) SetSink(s ipcp.Sink) { f.in.SetSink(s) }

// kill ends the flow from below: the peer released it, or the layer ends.
func (f *flow) kill() {
	if !f.dead.Swap(true) {
		f.in.Event(ipcp.EventDealloc)
	}
}

// Close releases this end. There is no quarantine to be had (ipcp.Lingerer):
// half of an EID is random and new for each flow, so what is still on its way
// to this one never reaches another.
func (f *flow) Close() error {
	f.dead.Store(true)
	if f.in.Closed() {
		return nil
	}
	f.l.loop.post(func(now time.Time) { f.l.closeFlow(now, f) })
	f.in.Close()
	return nil
}

// OffloadApp lets the program behind app send and receive this flow's packets
// through the kernel alone.
func (f *flow) OffloadApp(app *fastpath.App) (handle uint32, headroom int, err error) {
	if f.dead.Load() {
		return 0, 0, o7serr.EFLOWDOWN
	}
	return app.AddDTFlow(f.l.dt.table, f.local, f.remoteAddr, f.remoteEID, f.l.dt.ttl)
}

func endpointText(addr, eid uint64) string {
	return wire.AddrString(addr) + "/" + strconv.FormatUint(eid, 16)
}
