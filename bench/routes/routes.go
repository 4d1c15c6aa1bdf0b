// Package routes measures what the forwarding table takes to change: 100 000
// routes put into it, and a failed next hop replaced for all of them while
// packets pass.
package routes

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/o7s/o7s-router/bench/live"
	"github.com/o7s/o7s-router/bench/router"
	"github.com/o7s/o7s-router/bench/row"
	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/control/linkstate"
	"github.com/o7s/o7s-router/fastpath"
)

const (
	install = "routes/install-100k"
	change  = "routes/nexthop-change-100k"

	count      = 100_000
	neighbours = 8

	// traffic is how long packets flow in one round, and changes how often the
	// next hop fails meanwhile.
	traffic = 400 * time.Millisecond
	changes = 8
)

// Group is the rows of this package.
func Group() row.Group {
	return row.Group{Name: "routes", Rounds: 7, Setup: setup, Rows: []string{install, change}}
}

// Bars is how fast the table must change.
func Bars() []row.Bar {
	return []row.Bar{
		{Row: install, Max: 50, Why: "100 000 routes in the table, from the shortest-path result"},
		{Row: change, Max: 50, Why: "a failed next hop replaced for all, under live traffic without a wrong verdict"},
	}
}

func setup(_ context.Context, names []string) ([]row.Row, func(), error) {
	var rows []row.Row
	var downs []func()
	down := func() {
		for i := len(downs) - 1; i >= 0; i-- {
			downs[i]()
		}
	}
	for _, n := range names {
		b := &bed{}
		downs = append(downs, b.close)
		if err := b.build(n[len("routes/"):][:2]); err != nil {
			down()
			return nil, nil, fmt.Errorf("%s: %w", n, err)
		}
		if n == install {
			rows = append(rows, row.Row{Name: n, Unit: "ms", Measure: b.install()})
		} else {
			rows = append(rows, row.Row{Name: n, Unit: "us", Measure: b.change})
		}
	}
	return rows, down, nil
}

// bed is a router with one port to receive on and two to send on, each of which
// leads to a sink.
type bed struct {
	links []netlink.Link
	sinks [2]*live.Sink
	far   [2]netlink.Link
	out   [2]netlink.Link
	r     *router.Router
	wires [2]*fastpath.Wire
	gen   *live.Generator
	seed  uint64
}

func (b *bed) pair(x, y string) (netlink.Link, netlink.Link, error) {
	p, q, err := live.Pair(x, y)
	if err == nil {
		b.links = append(b.links, p)
	}
	return p, q, err
}

func (b *bed) build(id string) error {
	gen, in, err := b.pair("rg"+id, "ri"+id)
	if err != nil {
		return err
	}
	if b.r, err = router.New(in.Attrs().Name, count); err != nil {
		return err
	}
	for i := range b.sinks {
		if b.out[i], b.far[i], err = b.pair(fmt.Sprint("ro", id, i), fmt.Sprint("rs", id, i)); err != nil {
			return err
		}
		if b.sinks[i], err = live.NewSink(b.far[i]); err != nil {
			return err
		}
		if b.wires[i], err = b.r.Wire(b.out[i].Attrs().Name, live.MAC(b.far[i])); err != nil {
			return err
		}
	}
	if err := b.reset(); err != nil {
		return err
	}
	b.gen, err = live.NewGenerator(gen, live.Config{
		Program: bpf.BenchProgGenO7s, Template: router.Frame(live.MAC(in)), First: 1, Count: count, Random: true,
	})
	return err
}

func (b *bed) close() {
	if b.gen != nil {
		b.gen.Close()
	}
	if b.r != nil {
		b.r.Close()
	}
	for _, s := range b.sinks {
		if s != nil {
			s.Close()
		}
	}
	for _, l := range b.links {
		_ = netlink.LinkDel(l) // the namespace goes anyway
	}
}

// install measures from a shortest-path result, which is new in every round, to
// the table in use: what the unicast layer does with it (writeTable in
// package ipcp/unicast), and then one change of the fast path's table.
func (b *bed) install() func(context.Context) (float64, error) {
	var wires [neighbours]*fastpath.Wire
	return func(context.Context) (float64, error) {
		if wires[0] == nil {
			for i := range wires {
				w, err := b.r.Wire(b.out[i%2].Attrs().Name, live.MAC(b.far[i%2]))
				if err != nil {
					return 0, err
				}
				wires[i] = w
			}
		}
		b.seed++
		result := shortestPaths(b.seed)
		byPeer := map[uint64]*fastpath.Wire{}
		for i, w := range wires {
			byPeer[uint64(i)+1] = w
		}

		start := time.Now()
		table := make([]fastpath.Route, 0, len(result))
		reach := make(map[uint64]struct{}, len(result))
		for _, r := range result {
			fr := fastpath.Route{Dst: r.Dst}
			for _, nh := range r.NextHops {
				if w := byPeer[nh]; w != nil {
					fr.NextHops = append(fr.NextHops, w)
				}
			}
			if r.Alternate != 0 {
				fr.Alternate = byPeer[r.Alternate]
			}
			table = append(table, fr)
			reach[r.Dst] = struct{}{}
		}
		if err := b.r.Layer.Replace(table); err != nil {
			return 0, err
		}
		took := time.Since(start)
		if n := b.r.Layer.Len(); n != len(reach) {
			return 0, fmt.Errorf("%d of %d routes are in the table", n, len(reach))
		}
		return took.Seconds() * 1e3, nil
	}
}

// shortestPaths is a routing result: random addresses, as the layer draws them,
// in ascending order, each over one neighbour with another as the alternate.
func shortestPaths(seed uint64) []linkstate.Route {
	rng := rand.New(rand.NewPCG(seed, 1))
	out := make([]linkstate.Route, count)
	for i := range out {
		n := rng.Uint64N(neighbours)
		out[i] = linkstate.Route{
			Dst: uint64(rng.Uint32N(1<<32-2)) + 1, NextHops: []uint64{n + 1}, Alternate: (n+1)%neighbours + 1, Cost: 2,
		}
	}
	slices.SortFunc(out, func(a, b linkstate.Route) int { return int(int64(a.Dst) - int64(b.Dst)) })
	return out
}

// reset makes wire 0 the next hop of all routes and wire 1 the alternate.
func (b *bed) reset() error {
	b.wires[0].SetState(true)
	return b.r.Layer.Replace(router.Routes(count, b.wires[0], b.wires[1]))
}

// change measures a failing neighbour being replaced in all routes: its wire is
// taken down, from which moment on the alternate serves, and then the other
// wire takes its place. Packets pass all the time; each must be forwarded, and
// none over the failed wire.
func (b *bed) change(ctx context.Context) (float64, error) {
	done, err := live.Pin(1) // the generator has the other one
	if err != nil {
		return 0, err
	}
	defer done()
	forwarded, other := b.r.Verdicts()
	arrived, err := b.arrived()
	if err != nil {
		return 0, err
	}
	type flood struct {
		n   uint32
		err error
	}
	end := make(chan flood, 1)
	go func() {
		n, _, err := b.gen.Fill(traffic)
		end <- flood{n, err}
	}()
	var took []float64
	for range changes {
		time.Sleep(traffic / changes / 4)
		start := time.Now()
		b.wires[0].SetState(false)
		if err := b.r.Layer.Switch(b.wires[0], b.wires[1]); err != nil {
			return 0, err
		}
		took = append(took, time.Since(start).Seconds()*1e6)
		if err := b.quiet(); err != nil {
			return 0, err
		}
		if err := b.reset(); err != nil {
			return 0, err
		}
	}
	f := <-end
	if f.err != nil {
		return 0, f.err
	}
	now, err := b.arrived()
	if err != nil {
		return 0, err
	}
	fwd, oth := b.r.Verdicts()
	if oth != other || fwd-forwarded < uint64(f.n) || now-arrived != fwd-forwarded {
		return 0, fmt.Errorf("wrong verdicts: %d sent, %d forwarded, %d not, %d arrived", f.n, fwd-forwarded, oth-other, now-arrived)
	}
	slices.Sort(took)
	return took[len(took)/2], ctx.Err()
}

// quiet checks that nothing goes over the failed wire. A packet that a program
// was working on at the change may still arrive: programs run for microseconds.
func (b *bed) quiet() error {
	time.Sleep(time.Millisecond)
	before, err := b.sinks[0].Received()
	if err != nil {
		return err
	}
	time.Sleep(time.Millisecond)
	after, err := b.sinks[0].Received()
	if err != nil {
		return err
	}
	if after != before {
		return fmt.Errorf("wrong verdicts: %d packets went over a wire that is down", after-before)
	}
	return nil
}

func (b *bed) arrived() (n uint64, err error) {
	for _, s := range b.sinks {
		k, err := s.Received()
		if err != nil {
			return 0, err
		}
		n += k
	}
	return n, nil
}
