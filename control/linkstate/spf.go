package linkstate

import (
	"cmp"
	"math/bits"
	"slices"
)

// Route is how to reach one destination.
type Route struct {
	Dst uint64
	// NextHops are neighbour addresses, ascending; one unless the policy is ECMP.
	NextHops []uint64
	// Alternate is the neighbour to use when the link to NextHops[0] is down; 0
	// when there is none. LFA only.
	Alternate uint64
	Cost      int // hops
}

// Equal reports whether both say the same.
func (r Route) Equal(o Route) bool {
	return r.Dst == o.Dst && r.Alternate == o.Alternate && r.Cost == o.Cost && slices.Equal(r.NextHops, o.NextHops)
}

// table is a forwarding table by ascending destination; hops backs NextHops.
type table struct {
	routes []Route
	hops   []uint64
}

// graph computes tables. Its buffers are kept from run to run.
type graph struct {
	order []int32 // vertices by ascending address
	used  int

	// Usable links as compressed rows: those of v are to[off[v]:off[v+1]].
	off, fill, to []int32

	dist, dist2, queue []int32
	hop                []int32  // lowest rank of a first hop
	nbrs               []int32  // neighbours of self by ascending address; the index is the rank
	alt                []int32  // rank of the alternate or -1
	altKey             []uint32 // how good it is, lower is better
	sets               []uint64 // bit set of first-hop ranks per vertex
}

func resize[T any](s []T, n int) []T {
	if cap(s) < n {
		return make([]T, n, n+n/4)
	}
	return s[:n]
}

// build takes the usable links, those with both directions in the database.
func (g *graph) build(d *lsdb) {
	nv := len(d.vertices)
	if d.newVertices {
		d.newVertices = false
		g.order = g.order[:0]
		for v := range d.vertices {
			if d.vertices[v].refs > 0 {
				g.order = append(g.order, int32(v))
			}
		}
		slices.SortFunc(g.order, func(a, b int32) int {
			return cmp.Compare(d.vertices[a].addr, d.vertices[b].addr)
		})
	}
	g.used = len(g.order)
	g.off = resize(g.off, nv+1)
	clear(g.off)
	for s := range d.entries {
		if d.usable(int32(s)) {
			g.off[d.entries[s].sv+1]++
		}
	}
	for v := range nv {
		g.off[v+1] += g.off[v]
	}
	g.fill = append(g.fill[:0], g.off[:nv]...)
	g.to = resize(g.to, int(g.off[nv]))
	for s := range d.entries {
		if d.usable(int32(s)) {
			e := &d.entries[s]
			g.to[g.fill[e.sv]] = e.dv
			g.fill[e.sv]++
		}
	}
}

// bfs fills dist with the hop distances from root, -1 where unreachable, and
// leaves the vertices in the order of their distance in queue.
func (g *graph) bfs(root int32, dist []int32) {
	for i := range dist {
		dist[i] = -1
	}
	q := append(g.queue[:0], root)
	dist[root] = 0
	for i := 0; i < len(q); i++ {
		u := q[i]
		du := dist[u] + 1
		for _, v := range g.to[g.off[u]:g.off[u+1]] {
			if dist[v] < 0 {
				dist[v] = du
				q = append(q, v)
			}
		}
	}
	g.queue = q
}

// routes computes the table of self. Ties go to the neighbour with the lowest
// address, so the result depends on the database alone, not on its history.
func (g *graph) routes(d *lsdb, self uint64, p Policy, t *table) {
	t.routes, t.hops = t.routes[:0], t.hops[:0]
	root, ok := d.vertexIndex[self]
	if !ok {
		return
	}
	nv := len(d.vertices)
	g.dist = resize(g.dist, nv)
	g.bfs(root, g.dist)
	if len(g.queue) == 1 {
		return
	}
	g.nbrs = append(g.nbrs[:0], g.to[g.off[root]:g.off[root+1]]...)
	slices.SortFunc(g.nbrs, func(a, b int32) int {
		return cmp.Compare(d.vertices[a].addr, d.vertices[b].addr)
	})

	if p == ECMP {
		g.firstHopSets(nv)
	} else {
		g.firstHops(nv)
	}
	if p == LFA {
		g.alternates(nv)
	}

	words := (len(g.nbrs) + 63) / 64
	for _, v := range g.order {
		if g.dist[v] <= 0 {
			continue
		}
		r := Route{Dst: d.vertices[v].addr, Cost: int(g.dist[v])}
		start := len(t.hops)
		if p == ECMP {
			for w, set := range g.sets[int(v)*words : (int(v)+1)*words] {
				for ; set != 0; set &= set - 1 {
					t.hops = append(t.hops, d.vertices[g.nbrs[w*64+bits.TrailingZeros64(set)]].addr)
				}
			}
		} else {
			t.hops = append(t.hops, d.vertices[g.nbrs[g.hop[v]]].addr)
		}
		r.NextHops = t.hops[start:len(t.hops):len(t.hops)]
		if p == LFA && g.alt[v] >= 0 {
			r.Alternate = d.vertices[g.nbrs[g.alt[v]]].addr
		}
		t.routes = append(t.routes, r)
	}
}

// firstHops gives every vertex the lowest neighbour that is on a shortest path
// to it. A vertex's parents all come before it in the queue.
func (g *graph) firstHops(nv int) {
	g.hop = resize(g.hop, nv)
	for i := range g.hop {
		g.hop[i] = int32(len(g.nbrs))
	}
	for rank, n := range g.nbrs {
		g.hop[n] = int32(rank)
	}
	for _, u := range g.queue[1:] {
		du, h := g.dist[u]+1, g.hop[u]
		for _, v := range g.to[g.off[u]:g.off[u+1]] {
			if g.dist[v] == du && h < g.hop[v] {
				g.hop[v] = h
			}
		}
	}
}

// firstHopSets gives every vertex all neighbours n with D(n,v) + 1 = D(self,v)
// (spec 42 §8.2): the union of its parents' sets.
func (g *graph) firstHopSets(nv int) {
	words := (len(g.nbrs) + 63) / 64
	g.sets = resize(g.sets, nv*words)
	clear(g.sets)
	for rank, n := range g.nbrs {
		g.sets[int(n)*words+rank/64] |= 1 << (rank % 64)
	}
	for _, u := range g.queue[1:] {
		du := g.dist[u] + 1
		from := g.sets[int(u)*words : (int(u)+1)*words]
		for _, v := range g.to[g.off[u]:g.off[u+1]] {
			if g.dist[v] == du {
				to := g.sets[int(v)*words : (int(v)+1)*words]
				for w := range from {
					to[w] |= from[w]
				}
			}
		}
	}
}

// alternates chooses among the neighbours n of spec 42 §8.3,
//
//	D(n,v) < D(n,self) + D(self,v),   D(n,self) = 1,
//
// one whose path also avoids the primary node, then the shortest, then the
// lowest address. The primary p is on a shortest path, so D(p,v) is D(self,v)-1
// and one distance array at a time is enough.
func (g *graph) alternates(nv int) {
	g.alt = resize(g.alt, nv)
	g.altKey = resize(g.altKey, nv)
	for i := range g.alt {
		g.alt[i], g.altKey[i] = -1, ^uint32(0)
	}
	g.dist2 = resize(g.dist2, nv)
	for rank, n := range g.nbrs {
		g.bfs(n, g.dist2)
		d2 := g.dist2
		for _, v := range g.queue {
			h := g.hop[v]
			if g.dist[v] <= 0 || h == int32(rank) || v == n || d2[v] > g.dist[v] {
				continue
			}
			key := uint32(d2[v])
			if p := g.nbrs[h]; v != p && d2[v] >= d2[p]+g.dist[v]-1 {
				key |= 1 << 31 // may run through the primary
			}
			if key < g.altKey[v] {
				g.alt[v], g.altKey[v] = int32(rank), key
			}
		}
	}
}

// Routes returns the forwarding table by ascending destination. It is valid
// until the next Tick and must not be changed.
func (in *Instance) Routes() []Route { return in.cur.routes }

// Changes returns what differs from the table at the last call: routes that are
// new or changed, and destinations that are gone. Both are by ascending
// address and valid until the next Tick.
func (in *Instance) Changes() (set []Route, gone []uint64) {
	if in.curTaken {
		return nil, nil
	}
	in.curTaken = true
	in.changed, in.removed = in.changed[:0], in.removed[:0]
	a, b := in.prev.routes, in.cur.routes
	for len(a) > 0 || len(b) > 0 {
		switch {
		case len(b) == 0 || len(a) > 0 && a[0].Dst < b[0].Dst:
			in.removed = append(in.removed, a[0].Dst)
			a = a[1:]
		case len(a) == 0 || b[0].Dst < a[0].Dst:
			in.changed = append(in.changed, b[0])
			b = b[1:]
		default:
			if !a[0].Equal(b[0]) {
				in.changed = append(in.changed, b[0])
			}
			a, b = a[1:], b[1:]
		}
	}
	return in.changed, in.removed
}
