package linkstate

import (
	"cmp"
	"container/heap"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/wire"
)

// A world is many members in one process and in virtual time. Members are
// instances, or models of the reference that do only what spec 42 §5 says,
// its oddities included.
type world struct {
	t      testing.TB
	now    time.Time
	rng    *rand.Rand
	events eventQueue
	seq    int
	nodes  map[uint64]*node
	links  []*link
	loss   float64       // of packets on management flows
	jitter time.Duration // on top of delay, so that packets overtake each other
	flowNo FlowID
}

const delay = 50 * time.Microsecond

type event struct {
	at  time.Time
	seq int
	do  func()
}

type eventQueue []event

func (q eventQueue) Len() int { return len(q) }
func (q eventQueue) Less(i, j int) bool {
	if !q[i].at.Equal(q[j].at) {
		return q[i].at.Before(q[j].at)
	}
	return q[i].seq < q[j].seq
}
func (q eventQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *eventQueue) Push(x any)   { *q = append(*q, x.(event)) }
func (q *eventQueue) Pop() any {
	o := *q
	e := o[len(o)-1]
	o[len(o)-1] = event{}
	*q = o[:len(o)-1]
	return e
}

type node struct {
	w     *world
	addr  uint64
	cfg   Config
	in    *Instance // nil for a reference member
	ref   *refNode
	alive bool
	wake  time.Time
	ends  map[FlowID]*link // management flows that still work
}

type link struct {
	a, b     *node
	mgmt, dt FlowID
	up       bool
}

func newWorld(t testing.TB, seed uint64) *world {
	return &world{t: t, now: t0, rng: rand.New(rand.NewPCG(seed, 7)), nodes: map[uint64]*node{}}
}

func (w *world) at(t time.Time, do func()) {
	w.seq++
	heap.Push(&w.events, event{t, w.seq, do})
}

func (w *world) run(d time.Duration) {
	end := w.now.Add(d)
	for len(w.events) > 0 && !w.events[0].at.After(end) {
		e := heap.Pop(&w.events).(event)
		w.now = e.at
		e.do()
	}
	w.now = end
}

func (w *world) add(addr uint64, cfg Config, reference bool) *node {
	cfg.Self = addr
	n := &node{w: w, addr: addr, cfg: cfg, alive: true, ends: map[FlowID]*link{}}
	if reference {
		n.ref = newRef(n)
	} else {
		in, err := New(cfg, w.now)
		if err != nil {
			w.t.Fatal(err)
		}
		n.in = in
	}
	w.nodes[addr] = n
	return n
}

// pump does what the owner of an instance does after each event.
func (n *node) pump() {
	if n.in == nil || !n.alive {
		return
	}
	n.in.Tick(n.w.now)
	for _, p := range n.in.Output() {
		n.transmit(p.Flow, slices.Clone(p.Bytes()))
	}
	if d := n.in.NextDeadline(); !d.IsZero() && !d.Equal(n.wake) {
		n.wake = d
		n.w.at(d, func() {
			if n.wake.Equal(d) {
				n.wake = time.Time{}
				n.pump()
			}
		})
	}
}

func (n *node) transmit(flow FlowID, pkt []byte) {
	w, l := n.w, n.ends[flow]
	if l == nil || !l.up || w.loss > 0 && w.rng.Float64() < w.loss {
		return
	}
	peer := l.a
	if peer == n {
		peer = l.b
	}
	d := delay
	if w.jitter > 0 {
		d += time.Duration(w.rng.Int64N(int64(w.jitter)))
	}
	w.at(w.now.Add(d), func() {
		if !peer.alive || peer.ends[flow] != l {
			return
		}
		if peer.ref != nil {
			peer.ref.arrive(flow, pkt)
			return
		}
		peer.in.Receive(w.now, flow, pkt)
		peer.pump()
	})
}

// connect makes the management and, a moment later, the data flow.
func (w *world) connect(a, b *node) *link {
	w.flowNo += 2
	l := &link{a: a, b: b, mgmt: w.flowNo, dt: w.flowNo + 1, up: true}
	w.links = append(w.links, l)
	w.bring(l)
	return l
}

func (w *world) bring(l *link) {
	l.up = true
	for _, n := range []*node{l.a, l.b} {
		peer := l.a
		if n == l.a {
			peer = l.b
		}
		n.ends[l.mgmt] = l
		if n.ref != nil {
			n.ref.mgmtUp(l.mgmt, peer.addr)
		} else {
			n.in.MgmtUp(w.now, l.mgmt, peer.addr)
		}
		n.pump()
	}
	mgmt := l.mgmt
	w.at(w.now.Add(2*time.Millisecond), func() {
		if !l.up || l.mgmt != mgmt {
			return
		}
		for _, n := range []*node{l.a, l.b} {
			peer := l.a
			if n == l.a {
				peer = l.b
			}
			if !n.alive {
				continue
			}
			if n.ref != nil {
				n.ref.dtUp(peer.addr)
			} else {
				n.in.DTUp(w.now, l.dt, peer.addr)
			}
			n.pump()
		}
	})
}

// cut takes the link away. Our members see it at once, reference members never.
func (w *world) cut(l *link) {
	l.up = false
	for _, n := range []*node{l.a, l.b} {
		if n.alive && n.in != nil {
			n.in.DTDown(w.now, l.dt)
			n.in.MgmtDown(w.now, l.mgmt)
			n.pump()
		}
		delete(n.ends, l.mgmt)
	}
}

func (w *world) heal(l *link) {
	w.flowNo += 2
	l.mgmt, l.dt = w.flowNo, w.flowNo+1
	w.bring(l)
}

// kill stops a member without a word; its neighbours that are ours notice.
func (w *world) kill(n *node) {
	n.alive = false
	for _, l := range w.links {
		if l.up && (l.a == n || l.b == n) {
			w.cut(l)
		}
	}
	delete(w.nodes, n.addr)
	w.links = slices.DeleteFunc(w.links, func(l *link) bool { return l.a == n || l.b == n })
}

// truth is the directed links that work.
func (w *world) truth() map[[2]uint64]bool {
	m := map[[2]uint64]bool{}
	for _, l := range w.links {
		if l.up {
			m[[2]uint64{l.a.addr, l.b.addr}] = true
			m[[2]uint64{l.b.addr, l.a.addr}] = true
		}
	}
	return m
}

// wrong returns what differs between the tables of our members and the truth.
func (w *world) wrong() error {
	o := newOracle(0, w.truth())
	for _, a := range w.sorted() {
		n := w.nodes[a]
		if n.in == nil {
			if r := n.ref; len(r.lagging) > 0 {
				return fmt.Errorf("reference node %d reads %d flows behind", a, len(r.lagging))
			}
			continue
		}
		o.self = a
		if err := o.check(n.cfg.Policy, n.in.Routes()); err != nil {
			return fmt.Errorf("node %d: %w", a, err)
		}
	}
	return nil
}

func (w *world) sorted() []uint64 {
	return slices.Sorted(maps.Keys(w.nodes))
}

// refNode does what spec 42 says the reference does: sequence numbers from 0,
// no withdrawal, ageing by a scan, own entries refreshed even when they came
// back from others, and one packet read per event (oddity 0).
type refNode struct {
	n       *node
	db      map[[2]uint64]*refEntry
	mgmt    map[uint64]FlowID
	peerOf  map[FlowID]uint64
	reading map[FlowID]bool
	queue   map[FlowID][][]byte
	lagging map[FlowID]bool
}

type refEntry struct {
	seq   uint64
	stamp time.Time
}

func newRef(n *node) *refNode {
	r := &refNode{
		n: n, db: map[[2]uint64]*refEntry{}, mgmt: map[uint64]FlowID{}, peerOf: map[FlowID]uint64{},
		reading: map[FlowID]bool{}, queue: map[FlowID][][]byte{}, lagging: map[FlowID]bool{},
	}
	n.w.at(n.w.now, r.scan)
	return r
}

func (r *refNode) scan() {
	if !r.n.alive {
		return
	}
	for _, k := range r.keys() {
		e := r.db[k]
		if r.n.w.now.Sub(e.stamp) > DefaultTTimeo {
			delete(r.db, k)
		} else if k[0] == r.n.addr {
			e.seq++
			e.stamp = r.n.w.now
			r.flood(lsa(k[0], k[1], e.seq), 0)
		}
	}
	r.n.w.at(r.n.w.now.Add(DefaultTUpdate), r.scan)
}

func (r *refNode) keys() [][2]uint64 {
	return slices.SortedFunc(maps.Keys(r.db), func(a, b [2]uint64) int {
		return cmp.Or(cmp.Compare(a[1], b[1]), cmp.Compare(a[0], b[0]))
	})
}

func (r *refNode) flood(pkt []byte, except uint64) {
	for _, a := range slices.Sorted(maps.Keys(r.mgmt)) {
		if a != except {
			r.n.transmit(r.mgmt[a], pkt)
		}
	}
}

func (r *refNode) mgmtUp(flow FlowID, peer uint64) {
	// The flow is added to the read set a while after CACEP, and then to the
	// neighbours.
	r.n.w.at(r.n.w.now.Add(20*time.Millisecond), func() {
		r.mgmt[peer], r.peerOf[flow] = flow, peer
		r.reading[flow] = true
		r.readOne(flow)
		for _, k := range r.keys() {
			r.n.transmit(flow, lsa(k[0], k[1], r.db[k].seq))
		}
	})
}

func (r *refNode) dtUp(peer uint64) {
	k := [2]uint64{r.n.addr, peer}
	r.flood(lsa(k[0], k[1], 0), 0)
	if r.db[k] == nil {
		r.db[k] = &refEntry{}
	}
	r.db[k].stamp = r.n.w.now
}

func (r *refNode) arrive(flow FlowID, pkt []byte) {
	r.queue[flow] = append(r.queue[flow], pkt)
	if r.reading[flow] {
		r.readOne(flow)
	}
}

func (r *refNode) readOne(flow FlowID) {
	q := r.queue[flow]
	if len(q) == 0 {
		return
	}
	pkt := q[0]
	r.queue[flow] = q[1:]
	if len(q) > 1 {
		r.lagging[flow] = true
	}
	if len(pkt) != 24 {
		return
	}
	m, _ := wire.ParseLSA(pkt)
	k := [2]uint64{m.Src, m.Dst}
	e := r.db[k]
	if e != nil && m.Seqno <= e.seq {
		return
	}
	if e == nil {
		e = &refEntry{}
		r.db[k] = e
	}
	e.seq, e.stamp = m.Seqno, r.n.w.now
	r.flood(pkt, r.peerOf[flow])
}

func (w *world) grid(side int, cfg Config, reference func(i int) bool) {
	for i := range side * side {
		w.add(uint64(i+1), cfg, reference != nil && reference(i))
	}
	for i := range side * side {
		n := w.nodes[uint64(i+1)]
		if i%side+1 < side {
			w.connect(n, w.nodes[uint64(i+2)])
		}
		if i+side < side*side {
			w.connect(n, w.nodes[uint64(i+side+1)])
		}
	}
}

// Our members converge at the speed of the links: a member that joins waits
// for nobody's settling time, and a cut is everywhere within milliseconds.
func TestSimConvergesFast(t *testing.T) {
	for _, p := range []Policy{Simple, LFA, ECMP} {
		w := newWorld(t, 1)
		w.grid(6, Config{Policy: p}, nil)
		w.run(time.Second)
		if err := w.wrong(); err != nil {
			t.Fatalf("%v: after start: %v", p, err)
		}
		n := w.add(1000, Config{Policy: p}, false)
		l := w.connect(w.nodes[1], n)
		w.run(20 * time.Millisecond)
		if err := w.wrong(); err != nil {
			t.Fatalf("%v: 20 ms after a member joined: %v", p, err)
		}
		w.run(2 * time.Second)
		for _, x := range []*link{l, w.links[7], w.links[20]} {
			w.cut(x)
			w.run(20 * time.Millisecond)
			if err := w.wrong(); err != nil {
				t.Fatalf("%v: 20 ms after a cut: %v", p, err)
			}
			w.run(time.Second)
			w.heal(x)
			w.run(30 * time.Millisecond)
			if err := w.wrong(); err != nil {
				t.Fatalf("%v: 30 ms after healing: %v", p, err)
			}
			w.run(2 * time.Second)
		}
	}
}

func TestSimLarge(t *testing.T) {
	if testing.Short() {
		t.Skip("256 members take a second or two")
	}
	w := newWorld(t, 1)
	w.grid(16, Config{}, nil)
	w.run(3 * time.Second)
	for _, n := range w.nodes {
		if r := len(n.in.Routes()); r != 255 {
			t.Fatalf("node %d has %d routes", n.addr, r)
		}
		if r := n.in.Stats().Runs; r > 25 {
			t.Errorf("node %d computed %d times", n.addr, r)
		}
	}
	w.cut(w.links[100])
	w.run(20 * time.Millisecond)
	if err := w.wrong(); err != nil {
		t.Fatal(err)
	}
}

// Losses, reordering, cuts, partitions, restarts under new addresses and with
// the same one; then quiet for as long as an entry may live.
func TestSimChaos(t *testing.T) {
	for seed := range uint64(6) {
		for _, mixed := range []bool{false, true} {
			t.Run(fmt.Sprintf("seed %d mixed %v", seed, mixed), func(t *testing.T) {
				w := newWorld(t, seed)
				cfg := Config{Policy: Policy(seed % 3)}
				w.grid(4, cfg, func(i int) bool { return mixed && i%3 == int(seed%3) })
				w.run(time.Second)
				if err := w.wrong(); err != nil {
					t.Fatalf("after start: %v", err)
				}
				w.loss, w.jitter = 0.2, 3*time.Millisecond
				next := uint64(100)
				for range 60 {
					w.run(time.Duration(w.rng.Int64N(int64(5 * time.Second))))
					l := w.links[w.rng.IntN(len(w.links))]
					// A reference member never notices that a link is gone, nor
					// that it is back, so leave it its links.
					refs := l.a.ref != nil || l.b.ref != nil
					switch {
					case w.rng.IntN(4) == 0:
						// The member comes back with a new address at its old place.
						old := l.a
						var peers []*node
						for _, x := range w.links {
							if x.a == old && x.up {
								peers = append(peers, x.b)
							} else if x.b == old && x.up {
								peers = append(peers, x.a)
							}
						}
						if len(peers) == 0 {
							continue
						}
						w.kill(old)
						n := w.add(next, cfg, old.ref != nil)
						next++
						for _, p := range peers {
							w.connect(n, p)
						}
					case refs:
					case l.up:
						w.cut(l)
					default:
						w.heal(l)
					}
				}
				w.loss, w.jitter = 0, 0
				w.run(DefaultTTimeo + 3*DefaultTUpdate)
				for _, n := range w.nodes {
					if n.in != nil {
						if err := n.in.invariants(); err != nil {
							t.Fatal(err)
						}
						if c, ok := n.in.Conflict(); ok {
							t.Errorf("node %d sees a conflict: %+v", n.addr, c)
						}
					}
					if n.ref != nil {
						clear(n.ref.lagging) // the chaos may have caused that
					}
				}
				if err := w.wrong(); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// A path through reference members converges by ageing.
func TestSimReferenceAges(t *testing.T) {
	w := newWorld(t, 3)
	a, r, b, c := w.add(1, Config{}, false), w.add(2, Config{}, true), w.add(3, Config{}, false), w.add(4, Config{}, false)
	w.connect(a, r)
	w.connect(r, b)
	l := w.connect(b, c)
	w.run(time.Second)
	if err := w.wrong(); err != nil {
		t.Fatal(err)
	}
	w.cut(l)
	w.run(time.Second)
	if n := len(a.in.Routes()); n != 3 {
		t.Errorf("a has %d routes: the withdrawal went through a reference member", n)
	}
	w.run(DefaultTTimeo + DefaultTUpdate)
	if err := w.wrong(); err != nil {
		t.Fatal(err)
	}
	w.heal(l)
	w.run(DefaultTUpdate)
	if err := w.wrong(); err != nil {
		t.Fatal(err)
	}
	// A dead reference member: its LSAs age out.
	w.kill(r)
	w.run(DefaultTTimeo + DefaultTUpdate)
	if err := w.wrong(); err != nil {
		t.Fatal(err)
	}
}

// A reference member that joins reads no flow behind, however large the
// database is that it gets.
func TestSimReferenceReaderDoesNotLag(t *testing.T) {
	w := newWorld(t, 4)
	w.grid(4, Config{}, nil)
	w.run(time.Second)
	w.connect(w.nodes[16], w.add(50, Config{}, true))
	w.run(time.Second)
	if err := w.wrong(); err != nil {
		t.Fatal(err)
	}
	if n := len(w.nodes[50].ref.db); n != 2*len(w.links) {
		t.Errorf("reference member has %d entries, want %d", n, 2*len(w.links))
	}
}
