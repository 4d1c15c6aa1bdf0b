// Package router sets up the product's fast path for the benchmarks: one port
// where frames come in, a unicast layer, and wires to send them on.
package router

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/o7s/o7s-router/bench/live"
	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/fastpath/fib"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/wire"
)

const (
	inEID  = 64         // of the flow on which frames come in
	outEID = 65         // of the neighbours' flows
	self   = 0xfffffffe // own address, none of the destinations
	mtu    = 1496       // of the wires, bytes
)

// Router is a fast path with one port to receive on.
type Router struct {
	Plane *fastpath.Plane
	In    *fastpath.Port
	Layer *fastpath.Layer
	Back  *fastpath.Wire // to whom frames come from

	block *fastpath.EthBlock
	outs  []*fastpath.Port
}

// New makes a router for n destinations that receives at a device.
func New(in string, n int) (*Router, error) {
	plane, err := fastpath.New(fastpath.Options{MaxRoutes: n, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	r := &Router{Plane: plane}
	if err := r.setup(in); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (r *Router) setup(in string) (err error) {
	if ok, why := r.Plane.Kernel(); !ok {
		return fmt.Errorf("no kernel data path: %s", why)
	}
	if r.In, err = r.Plane.OpenPort(in); err != nil {
		return err
	}
	r.block, err = r.In.Claim(wire.DefaultEtherType, func(pkts []*packet.Buf) {
		for _, b := range pkts {
			b.Release()
		}
	})
	if err != nil {
		return err
	}
	if r.Layer, err = r.Plane.NewLayer("bench", self, 4); err != nil {
		return err
	}
	if r.Back, err = r.wire(r.In, [6]byte{2, 0, 0, 0, 0, 1}); err != nil {
		return err
	}
	r.block.SetDT(inEID, r.Back)
	return nil
}

func (r *Router) wire(p *fastpath.Port, to [6]byte) (*fastpath.Wire, error) {
	s := fastpath.WireSpec{Port: p, MTU: mtu}
	copy(s.Header[0:], to[:])
	copy(s.Header[6:], p.MAC())
	binary.BigEndian.PutUint16(s.Header[12:], wire.DefaultEtherType)
	binary.BigEndian.PutUint16(s.Header[14:], outEID)
	return r.Layer.NewWire(s)
}

// Wire opens a device and makes a wire to the neighbour behind it. It is an
// error when XDP cannot send on it.
func (r *Router) Wire(out string, to [6]byte) (*fastpath.Wire, error) {
	p, err := r.Plane.OpenPort(out)
	if err != nil {
		return nil, err
	}
	r.outs = append(r.outs, p)
	w, err := r.wire(p, to)
	if err != nil {
		return nil, err
	}
	if xdp, why := w.Path(); !xdp {
		return nil, fmt.Errorf("wire is not forwarded in XDP: %s", why)
	}
	return w, nil
}

// Routes are routes to the destinations 1..n over one wire.
func Routes(n uint32, via, alternate *fastpath.Wire) []fastpath.Route {
	next := []*fastpath.Wire{via}
	routes := make([]fastpath.Route, n)
	for i := range routes {
		routes[i] = fastpath.Route{Dst: uint64(i) + 1, NextHops: next, Alternate: alternate}
	}
	return routes
}

// Flatten lays the routes to 1..n out as a plain array with one entry per
// address, for the programs that look there. It overwrites all tables, and
// nothing else may touch them afterwards.
func (r *Router) Flatten(n uint32) error {
	t := r.Plane.Tables()
	for i := range t.Layers {
		if atomic.LoadUint64(&t.Layers[i].Addr) != self {
			continue
		}
		nh := fib.Find(t.FIB, fib.Ref(atomic.LoadUint64(&t.Layers[i].Fib)), 1)
		array := fib.MakeRef(1, n/fib.Slots+1) // bucket 0 is what no table looks like
		first := array.Base() * fib.Slots
		if int(first+array.Buckets()*fib.Slots) > len(t.FIB) {
			return errors.New("the table has no room for an array")
		}
		for a := range array.Buckets() * fib.Slots {
			e := uint64(0)
			if a > 0 && a <= n {
				e = uint64(a) | uint64(nh)<<32
			}
			atomic.StoreUint64(&t.FIB[first+a], e)
		}
		atomic.StoreUint64(&t.Layers[i].Fib, uint64(array))
		return nil
	}
	return errors.New("no layer")
}

// Verdicts returns how many frames the program at the receiving port has
// forwarded, and how many met any other end.
func (r *Router) Verdicts() (forwarded, other uint64) {
	for _, s := range r.Plane.Snapshot() {
		if s.Slot != r.In.Slot() {
			continue
		}
		for reason, n := range s.Verdicts {
			if bpf.Reason(reason) == bpf.Forward {
				forwarded += n
			} else {
				other += n
			}
		}
	}
	return forwarded, other
}

// Frame is a data-transfer packet, destination 0, in a frame for a device with
// the given address.
func Frame(mac [6]byte) (f [live.FrameLen]byte) {
	wire.PutDIX(f[:wire.DIXHeaderLen], mac, [6]byte{2, 0, 0, 0, 0, 1}, wire.DefaultEtherType, inEID, live.FrameLen-wire.DIXHeaderLen)
	wire.PutDT(f[wire.DIXHeaderLen:wire.DIXHeaderLen+wire.DTLen(4)], 4, wire.DT{TTL: 60, EID: 1 << 33})
	return f
}

// Close detaches everything.
func (r *Router) Close() {
	if r.block != nil {
		r.block.Release()
	}
	if r.Layer != nil {
		_ = r.Layer.Close()
	}
	for _, p := range r.outs {
		_ = p.Close()
	}
	if r.In != nil {
		_ = r.In.Close()
	}
	_ = r.Plane.Close() // nothing is left to do about an error
}
