// Package model is the XDP pipeline (bpf/pipeline.h) in Go, on the same
// tables: the oracle of the differential tests, and the next-hop selection of
// packets that user space forwards.
//
// Its steps and their order are those of the C program; a change there is a
// change here.
package model

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/fastpath/fib"
	"github.com/o7s/o7s-router/fastpath/tables"
)

// Sizes of the headers (spec 10 §2.1, spec 20 §2).
const (
	ethSize = 14
	dixSize = 4
	dtFixed = 11 // without the address
)

// FirstFlowEID is the lowest endpoint number of a flow; lower ones are
// components of the layer (spec 20 §2.3).
const FirstFlowEID = 64

// Counters are what the programs count, of one CPU.
type Counters struct {
	Verdicts []bpf.RouterVerdictCount // by port slot
	DT       []bpf.RouterDtCount      // by wire*Cubes+cube
	Apps     []bpf.RouterAppCount     // by slot in Apps
}

// NewCounters returns zero counters that fit the tables.
func NewCounters(t *tables.Tables) *Counters {
	return &Counters{
		Verdicts: make([]bpf.RouterVerdictCount, len(t.Ports)),
		DT:       make([]bpf.RouterDtCount, len(t.Wires)*tables.Cubes),
		Apps:     make([]bpf.RouterAppCount, len(t.Apps)),
	}
}

func (c *Counters) dt(wire uint32, cube uint8, which int, bytes int) {
	n := &c.DT[wire*tables.Cubes+uint32(cube)].C[which]
	n.Packets++
	n.Bytes += uint64(bytes)
}

// Pipeline is one instance of the XDP programs. It is not safe for concurrent
// use.
type Pipeline struct {
	Tables   *tables.Tables
	Counters *Counters
	// Socket tells whether an AF_XDP socket is bound to a port's queue; nil: never.
	Socket func(port, queue uint32) bool
	// Array looks destinations up in a plain array, as xdp_array does.
	Array bool
}

// Frame does what xdp_o7s does with a frame that arrived on a port: it changes
// the frame in place, counts, and returns the action and reason. out is the
// port slot of a redirect (action XDPRedirect, reason Forward or AppRx).
func (p *Pipeline) Frame(port, queue uint32, frame []byte) (action uint32, r bpf.Reason, out uint32) {
	r, out = p.ingress(port, frame)
	return p.leave(port, queue, r, out)
}

// App does what xdp_app does with a frame that a program wrote to its tap.
func (p *Pipeline) App(port, queue uint32, frame []byte) (action uint32, r bpf.Reason, out uint32) {
	r, out = p.egress(port, frame)
	return p.leave(port, queue, r, out)
}

func (p *Pipeline) leave(port, queue uint32, r bpf.Reason, out uint32) (uint32, bpf.Reason, uint32) {
	action := bpf.XDPPass
	switch {
	case r >= bpf.DropMAC:
		action = bpf.XDPDrop
	case r >= bpf.Forward:
		action = bpf.XDPRedirect
	case r >= bpf.UserMgmt:
		if queue < tables.QueuesPerPort && p.Socket != nil && p.Socket(port, queue) {
			action = bpf.XDPRedirect
		} else {
			r = bpf.PassNoSocket
		}
	case r == bpf.Aborted:
		action = bpf.XDPAborted
	}
	p.Counters.Verdicts[port].N[r]++
	return action, r, out
}

func (p *Pipeline) ingress(port uint32, frame []byte) (bpf.Reason, uint32) {
	t := p.Tables
	if len(frame) < ethSize {
		return bpf.PassOther, 0
	}
	own := &t.Ports[port]
	etherType := uint32(binary.LittleEndian.Uint16(frame[12:]))
	block, ours := uint32(0), false
	for i := range own.Proto {
		proto := atomic.LoadUint32(&own.Proto[i])
		if proto != 0 && proto&0xffff == etherType {
			block, ours = proto>>16, true
			break
		}
	}
	if !ours {
		return bpf.PassOther, 0
	}
	const broadcast = 1<<48 - 1
	if mac := tables.MAC(frame); mac != atomic.LoadUint64(&own.Mac) && mac != broadcast {
		return bpf.DropMAC, 0
	}
	if len(frame) < ethSize+dixSize {
		return bpf.DropTruncated, 0
	}
	eid := uint32(binary.BigEndian.Uint16(frame[14:]))
	length := int(binary.BigEndian.Uint16(frame[16:]))
	if length > len(frame)-ethSize-dixSize {
		return bpf.DropLength, 0
	}
	if eid == 0 {
		return bpf.UserMgmt, 0
	}
	if eid >= tables.EIDsPerBlock {
		return bpf.DropEID, 0
	}
	switch e := t.LoadEndpoint(block, eid); e.Kind() {
	case tables.EndpointDT:
		if length == 0 {
			return bpf.UserKeepalive, 0
		}
		return p.transfer(frame, e.Layer(), e.Index(), length)
	case tables.EndpointUser:
		return bpf.UserFlow, 0
	case tables.EndpointApp:
		a := &t.Apps[e.Index()]
		if atomic.LoadUint32(&a.Handle) == 0 || !p.deliver(frame, e.Index(), ethSize+dixSize, length) {
			return bpf.DropEID, 0
		}
		return bpf.AppRx, a.Port
	}
	return bpf.DropEID, 0
}

func (p *Pipeline) transfer(frame []byte, layer, in uint32, length int) (bpf.Reason, uint32) {
	t := p.Tables
	l := &t.Layers[layer]
	header := int(l.AddrSize) + dtFixed
	if length < header {
		return bpf.DropDTTruncated, 0
	}
	dt := frame[ethSize+dixSize:]
	var dst uint64
	if l.AddrSize == 4 {
		dst = uint64(binary.LittleEndian.Uint32(dt))
	} else {
		dst = binary.LittleEndian.Uint64(dt)
	}
	rest := dt[l.AddrSize:]
	cube, hops, eid := rest[0], rest[1], binary.LittleEndian.Uint64(rest[3:])
	if cube >= tables.Cubes {
		return bpf.DropCube, 0
	}
	if dst == 0 || dst != atomic.LoadUint64(&l.Addr) {
		return p.forward(frame, rest, layer, in, cube, hops, dst, eid, length)
	}
	if eid < FirstFlowEID {
		return bpf.UserLocal, 0
	}
	slot := t.FindFlow(layer, eid)
	if slot == 0 {
		return bpf.UserLocal, 0
	}
	a := &t.Apps[slot]
	if atomic.LoadUint32(&a.Handle) == 0 || a.LocalEid != eid ||
		!p.deliver(frame, slot, ethSize+dixSize+header, length-header) {
		return bpf.UserLocal, 0
	}
	p.Counters.dt(in, cube, tables.DTRcvd, length)
	p.Counters.dt(in, cube, tables.DTLocalRcvd, length)
	return bpf.AppRx, a.Port
}

func (p *Pipeline) forward(frame, rest []byte, layer, in uint32, cube, hops uint8, dst, eid uint64, bytes int) (bpf.Reason, uint32) {
	t, c := p.Tables, p.Counters
	if hops <= 1 {
		c.dt(in, cube, tables.DTRcvd, bytes)
		c.dt(in, cube, tables.DTTTL, bytes)
		return bpf.DropTTL, 0
	}
	out, r := p.nextHop(layer, dst, eid)
	if r == bpf.UserPunt {
		return r, 0
	}
	c.dt(in, cube, tables.DTRcvd, bytes)
	if r == bpf.DropNoRoute {
		c.dt(in, cube, tables.DTNhop, bytes)
		return r, 0
	}
	if r == bpf.Forward {
		r = p.fits(out, frame)
	}
	if r != bpf.Forward {
		c.dt(out, cube, tables.DTFailed, bytes)
		return r, 0
	}
	c.dt(out, cube, tables.DTSent, bytes)
	copy(frame, t.Wires[out].Hdr[:])
	rest[1] = hops - 1
	return bpf.Forward, t.Wires[out].Port
}

// fits tells whether a wire takes the frame now: Forward, or why not.
func (p *Pipeline) fits(wire uint32, frame []byte) bpf.Reason {
	w := &p.Tables.Wires[wire]
	if len(frame) > int(w.MaxFrame) {
		return bpf.DropMTU
	}
	if p.Tables.Ports[w.Port].Flags&tables.PortTx == 0 {
		return bpf.DropNoPort
	}
	return bpf.Forward
}

func (p *Pipeline) deliver(frame []byte, slot uint32, offset, length int) bool {
	a := &p.Tables.Apps[slot]
	if p.Tables.Ports[a.Port].Flags&tables.PortTx == 0 {
		return false
	}
	n := &p.Counters.Apps[slot].Rx
	n.Packets++
	n.Bytes += uint64(length)
	binary.LittleEndian.PutUint32(frame, a.Handle)
	binary.LittleEndian.PutUint16(frame[4:], uint16(offset))
	binary.LittleEndian.PutUint16(frame[6:], uint16(length))
	return true
}

func (p *Pipeline) egress(port uint32, frame []byte) (bpf.Reason, uint32) {
	t, c := p.Tables, p.Counters
	length := len(frame) - ethSize - dixSize
	if length < 0 {
		return bpf.DropAppTruncated, 0
	}
	handle := binary.LittleEndian.Uint32(frame)
	slot := handle & 0xffff
	if handle == 0 || int(slot) >= len(t.Apps) {
		return bpf.DropAppHandle, 0
	}
	a := &t.Apps[slot]
	if atomic.LoadUint32(&a.Handle) != handle || a.Port != port {
		return bpf.DropAppHandle, 0
	}
	header := int(a.AddrSize) + dtFixed
	var out uint32
	var r bpf.Reason
	if a.Kind == tables.AppDT {
		if length < header {
			return bpf.DropAppTruncated, 0
		}
		out, r = p.nextHop(a.Layer, a.Dst, a.Eid)
	} else {
		out, r = a.Wire, wireReason(t, a.Wire)
	}
	if r == bpf.UserPunt {
		return bpf.AppPunt, 0
	}
	if r == bpf.DropNoRoute {
		return r, 0
	}
	mtu := r
	if r == bpf.Forward {
		mtu = p.fits(out, frame)
	}
	if mtu == bpf.DropNexthopDown || mtu == bpf.DropMTU {
		c.dt(out, a.Cube, tables.DTFailed, length)
		return mtu, 0
	}
	payload := length
	if a.Kind == tables.AppDT {
		p := frame[ethSize+dixSize:]
		if a.AddrSize == 4 {
			binary.LittleEndian.PutUint32(p, uint32(a.Dst))
		} else {
			binary.LittleEndian.PutUint64(p, a.Dst)
		}
		p = p[a.AddrSize:]
		p[0], p[1], p[2] = a.Cube, a.Ttl, 0
		binary.LittleEndian.PutUint64(p[3:], a.Eid)
		payload -= header
	}
	w := &t.Wires[out]
	copy(frame, w.Hdr[:])
	binary.BigEndian.PutUint16(frame[16:], uint16(length))
	if mtu == bpf.DropNoPort {
		c.dt(out, a.Cube, tables.DTFailed, length)
		return mtu, 0
	}
	c.dt(out, a.Cube, tables.DTSent, length)
	c.dt(out, a.Cube, tables.DTLocalSent, length)
	n := &c.Apps[slot].Tx
	n.Packets++
	n.Bytes += uint64(payload)
	return bpf.AppTx, w.Port
}

func (p *Pipeline) nextHop(layer uint32, dst, eid uint64) (uint32, bpf.Reason) {
	if !p.Array {
		return Forward(p.Tables, layer, dst, eid)
	}
	ref := fib.Ref(p.Tables.Layers[layer].Fib)
	i := uint64(ref.Base())*fib.Slots + dst
	if i >= uint64(len(p.Tables.FIB)) {
		return 0, bpf.Aborted
	}
	nh := uint32(p.Tables.FIB[i] >> 32)
	if nh == 0 {
		return 0, bpf.DropNoRoute
	}
	return choose(p.Tables, nh, dst, eid)
}

// Forward chooses the wire for destination dst and EID eid in a layer, as XDP
// does: reason Forward (the wire is up), UserPunt (up, but XDP must not use
// it), DropNexthopDown (the wire is the first choice, and down) or
// DropNoRoute. It is safe beside writers as long as the caller holds off the
// reuse of regions and next hops (fastpath.Layer.Lookup does).
func Forward(t *tables.Tables, layer uint32, dst, eid uint64) (wire uint32, r bpf.Reason) {
	l := &t.Layers[layer]
	var nh uint32
	if atomic.LoadUint32(&l.AddrSize) == 4 {
		nh = fib.Find(t.FIB, fib.Ref(atomic.LoadUint64(&l.Fib)), uint32(dst))
	} else if v, ok := t.FIB8.Load(tables.FIB8Key{Addr: dst, Layer: layer}); ok {
		nh = v.(uint32)
	}
	if nh == 0 {
		return 0, bpf.DropNoRoute
	}
	return choose(t, nh, dst, eid)
}

func wireReason(t *tables.Tables, wire uint32) bpf.Reason {
	switch atomic.LoadUint32(&t.Wires[wire].State) {
	case tables.WireUp:
		return bpf.Forward
	case tables.WirePunt:
		return bpf.UserPunt
	}
	return bpf.DropNexthopDown
}

func choose(t *tables.Tables, nexthop uint32, dst, eid uint64) (uint32, bpf.Reason) {
	nh := &t.NextHops[nexthop]
	n, k := min(atomic.LoadUint32(&nh.Count), tables.ECMPWays), uint32(0)
	if n > 1 {
		k = tables.Scale(tables.Mix(dst, eid), n)
	}
	first := atomic.LoadUint32(&nh.Wire[k])
	for range n {
		w := atomic.LoadUint32(&nh.Wire[k])
		if r := wireReason(t, w); r != bpf.DropNexthopDown {
			return w, r
		}
		if k++; k == n {
			k = 0
		}
	}
	if w := atomic.LoadUint32(&nh.Alternate); w != 0 {
		if r := wireReason(t, w); r != bpf.DropNexthopDown {
			return w, r
		}
	}
	return first, bpf.DropNexthopDown
}
