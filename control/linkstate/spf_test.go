package linkstate

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"gonum.org/v1/gonum/graph/path"
	"gonum.org/v1/gonum/graph/simple"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/lib/wire"
)

// learn gives in one announcement, over a management flow to address mgmt.
func learn(in *Instance, now time.Time, src, dst, seq uint64) {
	in.Receive(now, 1, wire.LSA{Src: src, Dst: dst, Seqno: seq}.AppendTo(nil))
}

// oracle is spec 42 §7 and §8 written down with gonum's shortest paths.
type oracle struct {
	self  uint64
	links map[[2]uint64]bool // directed
	all   path.AllShortest
	nodes map[uint64]bool
}

func newOracle(self uint64, links map[[2]uint64]bool) *oracle {
	o := &oracle{self: self, links: links, nodes: map[uint64]bool{}}
	g := simple.NewUndirectedGraph()
	for l, up := range links {
		if up && links[[2]uint64{l[1], l[0]}] {
			o.nodes[l[0]], o.nodes[l[1]] = true, true
			g.SetEdge(simple.Edge{F: simple.Node(l[0]), T: simple.Node(l[1])})
		}
	}
	o.all = path.DijkstraAllPaths(g)
	return o
}

func (o *oracle) dist(a, b uint64) float64 {
	if a == b {
		return 0
	}
	if !o.nodes[a] || !o.nodes[b] {
		return math.Inf(1)
	}
	return o.all.Weight(int64(a), int64(b))
}

func (o *oracle) usable(a, b uint64) bool {
	return o.links[[2]uint64{a, b}] && o.links[[2]uint64{b, a}]
}

// check compares a table with the oracle.
func (o *oracle) check(p Policy, routes []Route) error {
	got := map[uint64]Route{}
	last := uint64(0)
	for _, r := range routes {
		if r.Dst <= last {
			return fmt.Errorf("routes out of order at %d", r.Dst)
		}
		last = r.Dst
		got[r.Dst] = r
	}
	for d := range o.nodes {
		if d == o.self {
			continue
		}
		dist := o.dist(o.self, d)
		r, ok := got[d]
		if ok != !math.IsInf(dist, 1) {
			return fmt.Errorf("route to %d: %v, distance %v", d, r, dist)
		}
		delete(got, d)
		if !ok {
			continue
		}
		if float64(r.Cost) != dist {
			return fmt.Errorf("cost to %d is %d, want %v", d, r.Cost, dist)
		}
		var hops []uint64
		alternates := map[uint64]bool{}
		protecting := false
		for _, n := range slices.Sorted(maps.Keys(o.nodes)) {
			if o.usable(o.self, n) && o.dist(n, d)+1 == dist {
				hops = append(hops, n)
			}
		}
		primary := hops[0]
		for n := range o.nodes {
			if o.usable(o.self, n) && n != d && n != primary && o.dist(n, d) < 1+dist {
				alternates[n] = true
				if o.dist(n, d) < o.dist(n, primary)+o.dist(primary, d) {
					protecting = true
				}
			}
		}
		if p != ECMP {
			hops = hops[:1]
		}
		if diff := cmp.Diff(hops, r.NextHops); diff != "" {
			return fmt.Errorf("next hops to %d (-want +got): %s", d, diff)
		}
		switch {
		case p != LFA || len(alternates) == 0:
			if r.Alternate != 0 {
				return fmt.Errorf("alternate %d to %d is not loop-free", r.Alternate, d)
			}
		case !alternates[r.Alternate]:
			return fmt.Errorf("alternate %d to %d, want one of %v", r.Alternate, d, alternates)
		case protecting && primary != d && o.dist(r.Alternate, d) >= o.dist(r.Alternate, primary)+o.dist(primary, d):
			return fmt.Errorf("alternate %d to %d runs through the primary %d, but another does not", r.Alternate, d, primary)
		}
	}
	if len(got) != 0 {
		return fmt.Errorf("routes to unknown destinations: %v", got)
	}
	return nil
}

// Any sequence of announcements, withdrawals and adjacencies gives the table
// that the oracle computes from what is announced; and the changes told to the
// owner add up to it.
func TestRoutesAgainstOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const self = 1
		p := Policy(rapid.IntRange(0, 2).Draw(t, "policy"))
		nodes := rapid.IntRange(2, 14).Draw(t, "nodes")
		in, err := New(Config{Self: self, Policy: p}, t0)
		if err != nil {
			t.Fatal(err)
		}
		in.MgmtUp(t0, 1, 2)
		links := map[[2]uint64]bool{}
		seqs := map[[2]uint64]uint64{}
		installed := map[uint64]Route{}
		node := rapid.Uint64Range(1, uint64(nodes))
		now := t0
		for range rapid.IntRange(1, 8).Draw(t, "rounds") {
			for range rapid.IntRange(1, 40).Draw(t, "changes") {
				a, b := node.Draw(t, "a"), node.Draw(t, "b")
				up := rapid.IntRange(0, 3).Draw(t, "up") > 0
				if a == b {
					continue
				}
				both := rapid.Bool().Draw(t, "both")
				for _, l := range [][2]uint64{{a, b}, {b, a}} {
					switch {
					case l[0] == self && up:
						in.DTUp(now, FlowID(l[1]), l[1])
					case l[0] == self:
						in.DTDown(now, FlowID(l[1]))
					case up:
						seqs[l]++
						learn(in, now, l[0], l[1], seqs[l])
					default:
						in.Receive(now, 1, withdraw(l[0], l[1], seqs[l]))
					}
					links[l] = up
					if !both {
						break
					}
				}
			}
			now = now.Add(time.Second)
			in.Tick(now)
			in.Output()
			if err := newOracle(self, links).check(p, in.Routes()); err != nil {
				t.Fatalf("%v: %v\nlinks %v", p, err, links)
			}
			if rapid.Bool().Draw(t, "take") {
				set, gone := in.Changes()
				for _, r := range set {
					r.NextHops = append([]uint64(nil), r.NextHops...)
					if old, ok := installed[r.Dst]; ok && old.Equal(r) {
						t.Fatalf("unchanged route told again: %v", r)
					}
					installed[r.Dst] = r
				}
				for _, d := range gone {
					if _, ok := installed[d]; !ok {
						t.Fatalf("removal of %d, which was not installed", d)
					}
					delete(installed, d)
				}
				if len(installed) != len(in.Routes()) {
					t.Fatalf("%d installed, %d routes", len(installed), len(in.Routes()))
				}
				for _, r := range in.Routes() {
					if !r.Equal(installed[r.Dst]) {
						t.Fatalf("installed %v, want %v", installed[r.Dst], r)
					}
				}
			}
		}
	})
}

// A hub with more neighbours than one word of the first-hop set has bits.
func TestWideECMP(t *testing.T) {
	in := mustNew(t, Config{Self: 1, Policy: ECMP})
	in.MgmtUp(t0, 1, 2)
	const far, n = 1000, 150
	for i := uint64(2); i < 2+n; i++ {
		in.DTUp(t0, FlowID(i), i)
		for _, l := range [][2]uint64{{i, 1}, {i, far}, {far, i}} {
			learn(in, t0, l[0], l[1], 0)
		}
	}
	in.Tick(t0)
	in.Tick(t0.Add(time.Second))
	r := in.Routes()
	if len(r) != n+1 || len(r[n].NextHops) != n || r[n].NextHops[n-1] != n+1 {
		t.Errorf("%d routes, last %+v", len(r), r[len(r)-1])
	}
}

// Spec 42 §8.3 on the ring of four with one diagonal: every destination has an
// alternate.
func TestMesh4HasAlternates(t *testing.T) {
	links := map[[2]uint64]bool{}
	for _, l := range [][2]uint64{{1, 2}, {2, 3}, {3, 4}, {4, 1}, {1, 3}} {
		links[l], links[[2]uint64{l[1], l[0]}] = true, true
	}
	for self := uint64(1); self <= 4; self++ {
		in := mustNew(t, Config{Self: self, Policy: LFA})
		in.MgmtUp(t0, 1, 99)
		for l := range links {
			if l[0] == self {
				in.DTUp(t0, FlowID(l[1]), l[1])
			} else {
				learn(in, t0, l[0], l[1], 0)
			}
		}
		in.Tick(t0)
		in.Tick(t0.Add(time.Second))
		if len(in.Routes()) != 3 {
			t.Errorf("node %d: routes %v", self, in.Routes())
		}
		for _, r := range in.Routes() {
			if r.Alternate == 0 || r.Alternate == r.NextHops[0] {
				t.Errorf("node %d: no alternate in %+v", self, r)
			}
		}
	}
}

// loaded returns node 1 of a connected random graph with the given mean degree.
func loaded(tb testing.TB, nodes, links int, p Policy) *Instance {
	in := mustNew(tb, Config{Self: 1, Policy: p})
	in.MgmtUp(t0, 1, 2)
	r := rand.New(rand.NewPCG(1, 2))
	seen := map[[2]uint64]bool{}
	add := func(a, b uint64) {
		if a == b || seen[[2]uint64{a, b}] {
			return
		}
		seen[[2]uint64{a, b}], seen[[2]uint64{b, a}] = true, true
		for _, l := range [][2]uint64{{a, b}, {b, a}} {
			if l[0] == 1 {
				in.DTUp(t0, FlowID(l[1]), l[1])
			} else {
				learn(in, t0, l[0], l[1], 0)
			}
		}
	}
	for i := 2; i <= nodes; i++ {
		add(uint64(i), 1+r.Uint64N(uint64(i-1)))
	}
	for len(seen) < 2*links {
		add(1+r.Uint64N(uint64(nodes)), 1+r.Uint64N(uint64(nodes)))
	}
	in.Tick(t0)
	in.Tick(t0.Add(time.Second))
	if len(in.Routes()) != nodes-1 {
		tb.Fatalf("%d routes for %d nodes", len(in.Routes()), nodes)
	}
	return in
}

func BenchmarkSPF(b *testing.B) {
	for _, n := range []struct{ nodes, links int }{{1000, 5000}, {100_000, 200_000}} {
		for _, p := range []Policy{Simple, LFA, ECMP} {
			b.Run(fmt.Sprintf("%d/%v", n.nodes, p), func(b *testing.B) {
				in := loaded(b, n.nodes, n.links, p)
				b.ReportAllocs()
				for b.Loop() {
					in.graph.build(&in.db)
					in.graph.routes(&in.db, 1, p, &in.cur)
				}
			})
		}
	}
}

func BenchmarkRefresh(b *testing.B) {
	in := loaded(b, 1000, 5000, Simple)
	in.MgmtUp(t0, 2, 3)
	now := t0.Add(time.Minute)
	in.Tick(now)
	in.Output()
	buf := make([]byte, 0, 32)
	var src, dst []uint64
	for _, e := range in.LSDB(now) {
		if !e.Own {
			src, dst = append(src, e.Src), append(dst, e.Dst)
		}
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		k := i % len(src)
		in.Receive(now, 1, wire.LSA{Src: src[k], Dst: dst[k], Seqno: uint64(1 + i)}.AppendTo(buf))
		if i%32 == 0 {
			now = now.Add(pace)
			in.Tick(now)
			in.Output()
		}
	}
}
