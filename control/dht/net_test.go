package dht

import (
	"container/heap"
	"crypto/sha3"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/wire"
)

func newRand(seed uint64) *rand.Rand {
	var s [32]byte
	binary.LittleEndian.PutUint64(s[:], seed)
	return rand.New(rand.NewChaCha8(s))
}

var epoch = time.Date(2026, 2, 22, 12, 0, 0, 0, time.UTC)

func nameKey(s string) []byte {
	h := sha3.Sum256([]byte(s))
	return h[:]
}

// peer is a member in the simulated layer: a Node or a reference-like one.
type peer interface {
	Receive(now time.Time, p []byte)
	Tick(now time.Time)
	NextDeadline() time.Time
	Messages() []Message
	Register(now time.Time, key []byte) error
	Query(now time.Time, key []byte) QueryID
	Results() []Result
}

type event struct {
	at   time.Time
	seq  int
	addr uint64 // member it concerns
	data []byte // nil: deadline
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at.Before(e[j].at) || e[i].at.Equal(e[j].at) && e[i].seq < e[j].seq
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any     { o := *e; x := o[len(o)-1]; *e = o[:len(o)-1]; return x }

// network runs members in virtual time.
type network struct {
	t        testing.TB
	rnd      *rand.Rand
	now      time.Time
	seq      int
	q        events
	peers    map[uint64]peer
	order    []uint64
	wake     map[uint64]time.Time
	loss     float64
	latency  func() time.Duration
	sent     int
	maxBytes int
	answers  map[uint64]map[QueryID]Result
	when     map[uint64]map[QueryID]time.Time
	trace    func(from, to uint64, p []byte)
	// routed says whether from can reach to; nil: always.
	routed func(from, to uint64) bool
}

func newNetwork(t testing.TB, seed uint64) *network {
	n := &network{
		t: t, rnd: newRand(seed), now: epoch,
		peers: map[uint64]peer{}, wake: map[uint64]time.Time{},
		answers: map[uint64]map[QueryID]Result{}, when: map[uint64]map[QueryID]time.Time{},
	}
	n.latency = func() time.Duration { return time.Duration(200+n.rnd.IntN(2000)) * time.Microsecond }
	return n
}

func (n *network) push(e event) {
	n.seq++
	e.seq = n.seq
	heap.Push(&n.q, e)
}

// flush takes what a member produced and schedules its next deadline.
func (n *network) flush(addr uint64) {
	p := n.peers[addr]
	if p == nil {
		return
	}
	for _, m := range p.Messages() {
		n.sent++
		n.maxBytes = max(n.maxBytes, len(m.Payload))
		checkMessage(n.t, addr, m)
		if n.trace != nil {
			n.trace(addr, m.Dst, m.Payload)
		}
		if n.routed != nil && !n.routed(addr, m.Dst) || n.rnd.Float64() < n.loss {
			continue
		}
		n.push(event{at: n.now.Add(n.latency()), addr: m.Dst, data: m.Payload})
	}
	for _, r := range p.Results() {
		if n.answers[addr] == nil {
			n.answers[addr], n.when[addr] = map[QueryID]Result{}, map[QueryID]time.Time{}
		}
		if _, twice := n.answers[addr][r.ID]; twice {
			n.t.Errorf("query %d of %x answered twice", r.ID, addr)
		}
		n.answers[addr][r.ID], n.when[addr][r.ID] = r, n.now
	}
	if d := p.NextDeadline(); !d.Equal(n.wake[addr]) {
		if d.Before(n.now) {
			d = n.now
		}
		n.wake[addr] = d
		n.push(event{at: d, addr: addr})
	}
}

// checkMessage holds every member to the rules for senders.
func checkMessage(t testing.TB, from uint64, m Message) {
	d, err := wire.DecodeDHT(m.Payload)
	switch {
	case err != nil:
		t.Fatalf("%x sent an undecodable message: %v", from, err)
	case m.Dst == from || m.Dst == 0:
		t.Fatalf("%x sent a message to %x", from, m.Dst)
	case d.Code > 4:
		t.Fatalf("%x sent code %d", from, d.Code)
	case (d.Code == 2 || d.Code == 4) && len(d.Node.Contacts) == 0:
		t.Fatalf("%x sent a reply without contacts", from)
	case (d.Code == 1 || d.Code == 3) && d.Find.Cookie == 0:
		t.Fatalf("%x sent cookie 0", from)
	case len(m.Payload) > 1400:
		t.Fatalf("%x sent %d bytes", from, len(m.Payload))
	}
}

func (n *network) add(addr uint64, p peer) {
	n.peers[addr] = p
	n.order = append(n.order, addr)
	n.flush(addr)
}

func (n *network) crash(addr uint64) { delete(n.peers, addr); delete(n.wake, addr) }

func (n *network) run(d time.Duration) {
	end := n.now.Add(d)
	for len(n.q) > 0 && !n.q[0].at.After(end) {
		e := heap.Pop(&n.q).(event)
		if e.at.After(n.now) {
			n.now = e.at
		}
		p := n.peers[e.addr]
		if p == nil {
			continue
		}
		if e.data != nil {
			p.Receive(n.now, e.data)
		} else {
			if !n.wake[e.addr].Equal(e.at) {
				continue // replaced by another deadline
			}
			n.wake[e.addr] = time.Time{}
			p.Tick(n.now)
			if d := p.NextDeadline(); !d.After(n.now) {
				n.t.Fatalf("%x: deadline %v is not after %v", e.addr, d, n.now)
			}
		}
		n.flush(e.addr)
	}
	n.now = end
}

func (n *network) do(addr uint64, f func(p peer)) { f(n.peers[addr]); n.flush(addr) }

// query runs until the query of addr is answered and returns the answer and
// how long it took.
func (n *network) query(addr uint64, key []byte) ([]uint64, time.Duration) {
	n.t.Helper()
	start := n.now
	var q QueryID
	n.do(addr, func(p peer) { q = p.Query(n.now, key) })
	for range 3000 {
		if r, ok := n.answers[addr][q]; ok {
			return r.Addrs, n.when[addr][q].Sub(start)
		}
		n.run(time.Millisecond)
	}
	n.t.Fatalf("query of %x not answered in 3 s", addr)
	return nil, 0
}

func (n *network) node(addr uint64) *Node { return n.peers[addr].(*Node) }

func (n *network) config(addr, via uint64) Config {
	c := Config{Self: addr, Peer: via, AddrSize: 4, Rand: newRand(n.rnd.Uint64())}
	if n.routed != nil {
		c.Reachable = func(a uint64) bool { return n.routed(addr, a) }
	}
	return c
}

func (n *network) join(addr, via uint64) *Node {
	n.t.Helper()
	d, err := New(n.config(addr, via), n.now)
	if err != nil {
		n.t.Fatal(err)
	}
	n.add(addr, d)
	return d
}

func address(i int) uint64 { return uint64(0x10000000 + i*7919) }

// layer lets size members join, each through an earlier one.
func layer(t testing.TB, seed uint64, size int, mk func(n *network, i int, addr, via uint64)) *network {
	n := newNetwork(t, seed)
	for i := range size {
		var via uint64
		if i > 0 {
			via = address(n.rnd.IntN(i))
		}
		mk(n, i, address(i), via)
		n.run(50 * time.Millisecond)
	}
	n.run(5 * time.Second)
	return n
}

func ours(n *network, _ int, addr, via uint64) { n.join(addr, via) }

func name(i int) string { return fmt.Sprintf("name.%d", i) }
