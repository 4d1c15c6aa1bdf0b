package eth

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/eth/core"
	"github.com/o7s/o7s-router/ipcp/eth/journal"
	"github.com/o7s/o7s-router/ipcp/inbox"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/qos"
)

// Flow is our end of a flow of the layer.
type Flow struct {
	l         *IPCP
	local     uint16
	info      ipcp.FlowInfo // complete when connected
	connected atomic.Bool
	// Constant once connected:
	peer   core.MAC
	remote uint16
	header []byte // of the frames we send, less the length

	box    inbox.Box
	gone   atomic.Bool // released by the peer or the layer
	closed atomic.Bool // released by the user

	rxPkts, rxBytes, txPkts, txBytes atomic.Uint64

	offMu sync.Mutex // guards off
	off   *offload   // XDP serves the flow for a program
}

var (
	_ ipcp.Flow        = (*Flow)(nil)
	_ ipcp.FlowCounter = (*Flow)(nil)
	_ ipcp.Lingerer    = (*Flow)(nil)
)

// newFlow installs a flow at an endpoint: what comes for it is kept from now
// on. The caller holds l.mu.
func (l *IPCP) newFlow(local uint16, q qos.Spec) *Flow {
	f := &Flow{l: l, local: local}
	f.info = ipcp.FlowInfo{
		Layer: l.cfg.LayerName, IPCP: l.name, Type: ipcp.EthDIX,
		QoS: q, MTU: l.maxSDU, MPL: mpl, Local: endpointText(l.mac, local),
	}
	l.flows[local].Store(f)
	l.block.SetUser(local)
	return f
}

func endpointText(m core.MAC, ep uint16) string { return fmt.Sprintf("%s/%d", macString(m), ep) }

// connect completes f. The caller holds l.mu; nobody sends yet.
func (f *Flow) connect(peer core.MAC, remote uint16) {
	f.peer, f.remote = peer, remote
	f.header = f.l.framer.Header(peer, f.l.mac, remote, f.local)
	f.info.Remote = endpointText(peer, remote)
	f.l.journal.Note(journal.Entry{Local: f.local, Remote: remote, MAC: peer})
	f.connected.Store(true)
}

// Info describes the flow.
func (f *Flow) Info() ipcp.FlowInfo { return f.info }

// SetSink says who receives.
func (f *Flow) SetSink(s ipcp.Sink) { f.box.SetSink(s) }

// Send makes a frame of b, in place, and passes it to the device.
func (f *Flow) Send(b *packet.Buf) error {
	l, n := f.l, b.Len()
	var err error
	switch {
	case f.closed.Load():
		err = o7serr.ENOTALLOC
	case f.gone.Load() || l.down.Load():
		l.n.sendDown.Add(1)
		err = o7serr.EFLOWDOWN
	case n > l.maxSDU:
		l.n.sendTooLong.Add(1)
		err = o7serr.EMSGSIZE
	}
	if err != nil {
		b.Release()
		return err
	}
	f.txPkts.Add(1)
	f.txBytes.Add(uint64(n))
	l.n.txData.Add(1)
	l.n.txBytes.Add(uint64(n))
	if l.own(f.peer) {
		l.n.looped.Add(1)
		l.deliverOwn(f.remote, b)
		return nil
	}
	h := b.Push(len(f.header))
	if h == nil { // the layers above used up the head room
		b = moved(b)
		h = b.Push(len(f.header))
	}
	copy(h, f.header)
	l.framer.SetLength(h, n)
	if err := l.dev.Send(b); err != nil {
		l.n.txFailed.Add(1)
		return err
	}
	return nil
}

// moved copies a packet into a buffer with head room.
func moved(b *packet.Buf) *packet.Buf {
	c := packet.From(b.Bytes())
	b.Release()
	return c
}

// Close is CloseLinger without a quarantine.
func (f *Flow) Close() error { return f.CloseLinger(0) }

// CloseLinger releases our end and tells the peer. It waits for a running call
// of the sink, so it must not be called from it. The endpoint is in quarantine
// for d.
func (f *Flow) CloseLinger(d time.Duration) error {
	if f.closed.Swap(true) {
		return nil
	}
	f.unload(0)
	// Fails after the layer was left, which released the endpoint.
	_ = f.l.do("flow deallocation", func(now time.Time, c *core.Core) {
		if f.l.flows[f.local].Load() == f {
			c.Close(now, f.local, d)
		}
	})
	if !f.box.Close() {
		return o7serr.Wrap(o7serr.EINVAL, "flow closed from its own sink")
	}
	return nil
}

// discard follows the removal of f from the table: a pending flow that nobody
// has got is over, others are closed by their user.
func (f *Flow) discard() {
	if !f.connected.Load() {
		f.box.Close()
	}
}

// released tells the user that the other end, or the layer, is gone.
func (f *Flow) released() {
	if !f.gone.Swap(true) {
		f.offloadState(false)
		f.box.Event(ipcp.EventDealloc)
	}
}

// deliver passes packets up. The slice stays the caller's.
func (f *Flow) deliver(pkts []*packet.Buf) {
	n := 0
	for _, b := range pkts {
		n += b.Len()
	}
	f.rxPkts.Add(uint64(len(pkts)))
	f.rxBytes.Add(uint64(n))
	f.box.Deliver(pkts)
}

func (l *IPCP) deliverOwn(endpoint uint16, b *packet.Buf) {
	f := l.flow(endpoint)
	if f == nil {
		l.n.unknown.Add(1)
		b.Release()
		return
	}
	f.rxPkts.Add(1)
	f.rxBytes.Add(uint64(b.Len()))
	f.box.DeliverOne(b)
}

func (l *IPCP) flow(endpoint uint16) *Flow {
	if int(endpoint) >= len(l.flows) {
		return nil
	}
	return l.flows[endpoint].Load()
}

// chunk is how many frames are sorted by flow at a time.
const chunk = 64

// scratch is the demultiplexer's memory, one per receiving goroutine.
type scratch struct {
	flows [chunk]*Flow
	run   [chunk]*packet.Buf
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// receive demultiplexes frames. It is called by the device, from several
// goroutines, and owns the buffers.
func (l *IPCP) receive(frames []*packet.Buf) {
	s := scratches.Get().(*scratch)
	for len(frames) > 0 {
		n := min(len(frames), chunk)
		l.demux(s, frames[:n])
		frames = frames[n:]
	}
	scratches.Put(s)
}

func (l *IPCP) demux(s *scratch, frames []*packet.Buf) {
	data, bytes := 0, 0
	for i, b := range frames {
		f := l.classify(b)
		if s.flows[i] = f; f != nil {
			data++
			bytes += b.Len()
		}
	}
	if data == 0 {
		return
	}
	l.n.rxData.Add(uint64(data))
	l.n.rxBytes.Add(uint64(bytes))
	// One call per flow, in the order of the first packet of each.
	for i := range frames {
		f := s.flows[i]
		if f == nil {
			continue
		}
		run := s.run[:0]
		for j := i; j < len(frames); j++ {
			if s.flows[j] == f {
				run = append(run, frames[j])
				s.flows[j] = nil
			}
		}
		f.deliver(run)
		clear(run)
	}
}

// classify strips a data frame to its payload and returns its flow; other
// frames are dealt with, or dropped, and released.
func (l *IPCP) classify(b *packet.Buf) *Flow {
	h, err := l.framer.Parse(b.Bytes())
	broadcast := h.Dst[0] == 0xff && isBroadcast(h.Dst)
	switch {
	case err == core.ErrOtherProtocol:
		l.n.otherProtocol.Add(1)
	case err != nil:
		l.n.malformed.Add(1)
	case h.Dst != l.mac && !broadcast:
		l.n.misaddressed.Add(1)
	case h.Local == 0:
		l.n.rxMgmt.Add(1)
		_ = l.do("receive", func(now time.Time, c *core.Core) {
			c.Receive(now, h.Src, h.Dst, b.Bytes()[h.Offset:h.Offset+h.Bytes])
		})
	case broadcast:
		l.n.broadcastData.Add(1)
	default:
		if f := l.flow(h.Local); f != nil {
			b.Pull(h.Offset)
			b.Trim(h.Bytes)
			return f
		}
		l.n.unknown.Add(1)
		l.strayFrame(h.Src, h.Local)
	}
	b.Release()
	return nil
}

// strayEvery bounds how often frames for endpoints without a flow are looked
// at: they may come at any rate.
const strayEvery = int64(5 * time.Millisecond)

// strayFrame sees to it that a peer learns of a release that it has missed.
func (l *IPCP) strayFrame(from core.MAC, endpoint uint16) {
	now, last := time.Now().UnixNano(), l.stray.Load()
	if now-last < strayEvery && now >= last || !l.stray.CompareAndSwap(last, now) {
		return
	}
	_ = l.do("stray frame", func(now time.Time, c *core.Core) { c.Stray(now, from, endpoint) })
}

func isBroadcast(m core.MAC) bool { return m == core.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff} }
