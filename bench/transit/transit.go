// Package transit measures forwarding: our XDP program with tables of several
// sizes, a bare redirect, a plain array table, and kernel IPv4 forwarding, on
// veth paths of their own, in turns.
package transit

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/o7s/o7s-router/bench/live"
	"github.com/o7s/o7s-router/bench/router"
	"github.com/o7s/o7s-router/bench/row"
	"github.com/o7s/o7s-router/bpf"
)

// runTime is how long a row sends in one round: long against the fixed cost of
// a call, short against the machine's drift.
const runTime = 700 * time.Millisecond

// unsaturated is the share of the generator's own rate above which a row is
// not the forwarder's limit but the generator's.
const unsaturated = 0.9

const base = "transit/base"

var sizes = map[string]uint32{"transit/10": 10, "transit/1k": 1000, "transit/100k": 100_000, "transit/1M": 1_000_000}

// Group is the rows of this package.
func Group() row.Group {
	return row.Group{
		Name: "transit", Rounds: 7, Setup: setup,
		Rows:   []string{"transit/base", "transit/bare", "transit/10", "transit/1k", "transit/100k", "transit/1M", "transit/array-1M", "transit/kernel-ipv4"},
		Always: []string{"transit/base", "transit/bare"},
	}
}

// Bars is what forwarding must reach.
func Bars() []row.Bar {
	bars := []row.Bar{
		{Row: "transit/1k", To: "transit/bare", MinRatio: 0.85, Why: "1 000 destinations against a redirect without parsing"},
		{Row: "transit/1M", To: "transit/bare", MinRatio: 0.50, Why: "1 000 000 destinations in random order"},
		{Row: "transit/1M", To: "transit/array-1M", MinRatio: 1, Why: "against a plain array with one read"},
		{Row: "transit/1k", To: "transit/kernel-ipv4", MinRatio: 3.5, Why: "against kernel IPv4 forwarding"},
	}
	for _, n := range Group().Rows {
		if n != base {
			bars = append(bars, row.Bar{Row: n, To: base, MaxRatio: unsaturated, Why: "saturated: the forwarder is the limit, not the generator"})
		}
	}
	return bars
}

func setup(_ context.Context, names []string) ([]row.Row, func(), error) {
	var (
		rows  []row.Row
		downs []func()
	)
	down := func() {
		for i := len(downs) - 1; i >= 0; i-- {
			downs[i]()
		}
	}
	for i, n := range names {
		p, err := live.NewPath(fmt.Sprint(i))
		if err != nil {
			down()
			return nil, nil, fmt.Errorf("%s: %w", n, err)
		}
		downs = append(downs, p.Close)
		d, lossy, err := prepare(p, n)
		if err != nil {
			down()
			return nil, nil, fmt.Errorf("%s: %w", n, err)
		}
		downs = append(downs, d)
		r := row.Row{Name: n, Unit: "Mpps", RatioTo: "transit/bare", Measure: func(context.Context) (float64, error) { return p.Rate(runTime, lossy) }}
		if n == "transit/bare" {
			r.RatioTo = ""
		}
		rows = append(rows, r)
	}
	return rows, down, nil
}

// prepare makes the forwarder of a row and its generator.
func prepare(p *live.Path, name string) (down func(), lossy bool, err error) {
	gen := live.Config{Program: bpf.BenchProgGenO7s, First: 1, Count: 1000, Random: true}
	down = func() {}
	mac := live.MAC(p.In)
	switch name {
	case base:
		err = p.Short()
	case "transit/bare":
		down, err = p.Bare()
	case "transit/kernel-ipv4":
		gen.Program, gen.First = bpf.BenchProgGenIpv4, binary.BigEndian.Uint32([]byte{10, 1, 0, 0})
		err = kernelRouter(p)
		lossy = true // it has queues
	case "transit/array-1M":
		gen.Count = 1_000_000
		mac, down, err = arrayRouter(p, gen.Count)
	default:
		gen.Count = sizes[name]
		down, err = bucketRouter(p, gen.Count)
	}
	if err != nil {
		return nil, false, err
	}
	gen.Template = router.Frame(mac)
	if name == "transit/kernel-ipv4" {
		gen.Template = ipv4Frame(mac)
	}
	if err := p.Generate(gen); err != nil {
		down()
		return nil, false, err
	}
	return down, lossy, nil
}

// ipv4Frame is a UDP packet whose header checksum is that for destination 0.
func ipv4Frame(mac [6]byte) (f [live.FrameLen]byte) {
	copy(f[0:], mac[:])
	copy(f[6:], []byte{2, 0, 0, 0, 0, 1, 0x08, 0x00})
	ip := f[14:34]
	ip[0], ip[8], ip[9] = 0x45, 60, 17
	binary.BigEndian.PutUint16(ip[2:], live.FrameLen-14)
	copy(ip[12:], []byte{10, 200, 1, 2})
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	sum = sum&0xffff + sum>>16
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
	udp := f[34:]
	binary.BigEndian.PutUint16(udp[0:], 9)
	binary.BigEndian.PutUint16(udp[2:], 9)
	binary.BigEndian.PutUint16(udp[4:], live.FrameLen-34)
	return f
}

// bucketRouter makes the product forward between In and Out with n destinations.
func bucketRouter(p *live.Path, n uint32) (func(), error) {
	r, err := router.New(p.In.Attrs().Name, int(n))
	if err != nil {
		return nil, err
	}
	w, err := r.Wire(p.Out.Attrs().Name, live.MAC(p.Far))
	if err == nil {
		err = r.Layer.Replace(router.Routes(n, w, nil))
	}
	if err != nil {
		r.Close()
		return nil, err
	}
	return r.Close, nil
}

// arrayRouter is bucketRouter with a plain array in place of the table. It
// returns the address that frames must carry.
func arrayRouter(p *live.Path, n uint32) (mac [6]byte, down func(), err error) {
	// The product attaches its own program to its ports. So this one's port is a
	// spare device, and the program for that port is attached to In.
	spare, _, err := live.Pair(p.In.Attrs().Name+"x", p.In.Attrs().Name+"y")
	if err != nil {
		return mac, nil, err
	}
	r, err := router.New(spare.Attrs().Name, int(n))
	if err != nil {
		return mac, nil, err
	}
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	w, err := r.Wire(p.Out.Attrs().Name, live.MAC(p.Far))
	if err != nil {
		return mac, nil, err
	}
	if err := r.Layer.Replace(router.Routes(n, w, nil)); err != nil {
		return mac, nil, err
	}
	if err := r.Flatten(n); err != nil {
		return mac, nil, err
	}
	prog, err := r.Plane.Program("xdp_array", r.In.Slot(), nil)
	if err != nil {
		return mac, nil, err
	}
	defer prog.Close() // the link keeps it
	x, err := live.Attach(prog, p.In)
	if err != nil {
		return mac, nil, err
	}
	return live.MAC(spare), func() { _ = x.Close(); r.Close() }, nil
}

// kernelRouter makes the kernel forward IPv4 between In and Out.
func kernelRouter(p *live.Path) error {
	if err := p.Stack(); err != nil {
		return err
	}
	for _, a := range []struct {
		l    netlink.Link
		addr string
	}{{p.In, "10.200.1.1/24"}, {p.Out, "10.200.2.1/24"}} {
		addr, err := netlink.ParseAddr(a.addr)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(a.l, addr); err != nil {
			return fmt.Errorf("address %s: %w", a.addr, err)
		}
		if err := live.EnableForwarding(a.l.Attrs().Name); err != nil {
			return err
		}
	}
	gw := net.IPv4(10, 200, 2, 2)
	err := netlink.NeighSet(&netlink.Neigh{
		LinkIndex: p.Out.Attrs().Index, IP: gw, State: netlink.NUD_PERMANENT, HardwareAddr: p.Far.Attrs().HardwareAddr,
	})
	if err != nil {
		return fmt.Errorf("neighbour: %w", err)
	}
	_, dst, _ := net.ParseCIDR("10.0.0.0/9")
	if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: gw, LinkIndex: p.Out.Attrs().Index}); err != nil {
		return fmt.Errorf("route: %w", err)
	}
	return nil
}
