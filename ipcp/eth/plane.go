package eth

import (
	"fmt"
	"log/slog"

	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/eth/core"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
)

// New returns an eth-dix IPC process on a port of the data plane. In the
// directory notes it keeps who its flows are with, for a daemon that takes the
// place of this one when it is killed; "": nowhere.
func New(name string, host ipcp.Host, plane *fastpath.Plane, notes string, log *slog.Logger) ipcp.Layer {
	l := NewDIX(name, host, func(device string) (Device, error) {
		p, err := plane.OpenPort(device)
		if err != nil {
			return nil, err
		}
		return planePort{p, plane}, nil
	}, log)
	l.notes = notes
	return l
}

// planePort makes a Device of a port.
type planePort struct {
	*fastpath.Port
	plane *fastpath.Plane
}

func (p planePort) MAC() core.MAC { return core.MAC(p.Port.MAC()) }

func (p planePort) Claim(etherType uint16, rx func([]*packet.Buf)) (Block, error) {
	b, err := p.Port.Claim(etherType, rx)
	if err != nil {
		return nil, err // not b: a nil *EthBlock is not a nil Block
	}
	return b, nil
}

// Wire describes the flow to a unicast layer that wants XDP to forward on it:
// the port, the first 16 bytes of every frame, the largest payload in bytes,
// and the endpoint on which packets come in. What there is of it is returned
// also when ok is false and packets must pass through Send; reason says why.
func (f *Flow) Wire() (port *fastpath.Port, header [16]byte, mtu int, block *fastpath.EthBlock, localEID uint16, ok bool, reason string) {
	port, header, mtu, block, localEID, ok, reason = f.wire()
	if ok && !f.info.QoS.IsRaw() {
		// What such a flow carries are the packets of its end-to-end protocol,
		// not those of the layer above.
		ok, reason = false, "the flow has end-to-end functions (FRCP or CRC)"
	}
	return port, header, mtu, block, localEID, ok, reason
}

// wire is Wire for one who treats the flow's packets as opaque.
func (f *Flow) wire() (port *fastpath.Port, header [16]byte, mtu int, block *fastpath.EthBlock, localEID uint16, ok bool, reason string) {
	l := f.l
	p, isPlane := l.dev.(planePort)
	if isPlane {
		port = p.Port
		block, _ = l.block.(*fastpath.EthBlock)
	}
	mtu, localEID = l.maxSDU, f.local
	if f.connected.Load() {
		copy(header[:], f.header)
	}
	switch {
	case !isPlane:
		reason = "the device is not a port of the data plane"
	case !f.connected.Load() || f.closed.Load() || f.gone.Load():
		reason = "the flow is not allocated"
	case l.own(f.peer):
		reason = "both ends of the flow are on this machine"
	case p.Mode() == fastpath.ModePacket:
		reason = "no XDP on " + p.Name()
	default:
		ok = true
	}
	return port, header, mtu, block, localEID, ok, reason
}

// offload is a flow in the hands of XDP and of one program.
type offload struct {
	app    *fastpath.App
	wire   *fastpath.Wire
	handle uint32
}

// OffloadApp lets the program behind app send and receive the flow's packets
// through the kernel alone, until UnloadApp or Close. headroom is what frames
// that the program writes have in front of the payload, bytes. Packets that
// arrived before still go to the sink. Errors: ENOTSUP with the reason when
// XDP cannot carry the flow or a program has it already.
func (f *Flow) OffloadApp(app *fastpath.App) (handle uint32, headroom int, err error) {
	f.offMu.Lock()
	defer f.offMu.Unlock()
	// The program's library has the end-to-end functions, if there are any.
	port, header, mtu, block, local, ok, reason := f.wire()
	if ok && f.off != nil {
		ok, reason = false, "a program has the flow already"
	}
	if !ok {
		return 0, 0, o7serr.Wrap(o7serr.ENOTSUP, "offload: %s", reason)
	}
	wire, err := f.l.dev.(planePort).plane.NewWire(fastpath.WireSpec{Port: port, Header: header, MTU: mtu, User: f})
	if err != nil {
		return 0, 0, fmt.Errorf("offload: %w", err)
	}
	if xdp, why := wire.Path(); !xdp {
		wire.Release()
		return 0, 0, o7serr.Wrap(o7serr.ENOTSUP, "offload: %s", why)
	}
	wire.SetState(!f.l.down.Load())
	if handle, headroom, err = app.AddEthFlow(block, local, wire); err != nil {
		wire.Release()
		return 0, 0, fmt.Errorf("offload: %w", err)
	}
	f.off = &offload{app, wire, handle}
	return handle, headroom, nil
}

// UnloadApp takes the flow back: its packets pass through user space again.
func (f *Flow) UnloadApp(handle uint32) {
	if f.unload(handle) {
		f.l.mu.Lock()
		defer f.l.mu.Unlock()
		if f.l.flows[f.local].Load() == f {
			f.l.block.SetUser(f.local)
		}
	}
}

// unload ends the offload with the handle, or with any if it is 0.
func (f *Flow) unload(handle uint32) bool {
	f.offMu.Lock()
	defer f.offMu.Unlock()
	o := f.off
	if o == nil || handle != 0 && handle != o.handle {
		return false
	}
	f.off = nil
	rx, tx := o.app.Counters(o.handle)
	f.rxPkts.Add(rx.Packets)
	f.rxBytes.Add(rx.Bytes)
	f.txPkts.Add(tx.Packets)
	f.txBytes.Add(tx.Bytes)
	o.app.Remove(o.handle)
	o.wire.Release()
	return true
}

// offloadState stops or restarts what the program sends.
func (f *Flow) offloadState(up bool) {
	f.offMu.Lock()
	defer f.offMu.Unlock()
	if f.off != nil {
		f.off.wire.SetState(up && !f.gone.Load())
	}
}

// Stat counts the flow's packets: those that passed through user space and
// those that XDP exchanged with a program.
func (f *Flow) Stat() ipcp.FlowStat {
	f.offMu.Lock()
	defer f.offMu.Unlock()
	s := ipcp.FlowStat{
		RxPackets: f.rxPkts.Load(), RxBytes: f.rxBytes.Load(),
		TxPackets: f.txPkts.Load(), TxBytes: f.txBytes.Load(),
	}
	if f.off != nil {
		rx, tx := f.off.app.Counters(f.off.handle)
		s.RxPackets += rx.Packets
		s.RxBytes += rx.Bytes
		s.TxPackets += tx.Packets
		s.TxBytes += tx.Bytes
	}
	return s
}
