package fastpath

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/fastpath/fib"
	"github.com/o7s/o7s-router/fastpath/model"
)

// manyRoutes is more than a wide table has.
const manyRoutes = 260_000

// randomRoutes returns routes with distinct destinations over wires by turns.
func randomRoutes(rng *rand.Rand, n int, wires []*Wire) []Route {
	seen := make(map[uint64]bool, n)
	list := make([]Route, 0, n)
	for len(list) < n {
		dst := uint64(rng.Uint32())
		if dst == 0 || seen[dst] {
			continue
		}
		seen[dst] = true
		k := len(list) % len(wires)
		list = append(list, Route{Dst: dst, NextHops: wires[k : k+1]})
	}
	return list
}

// A table that grows changes its layout on the way, and loses nothing.
func TestGrowLarge(t *testing.T) {
	p, _ := testPlane(t, false, 500_000)
	l := must[*Layer](t)(p.NewLayer("l", 1, 4))
	var wires []*Wire
	for range 3 {
		wires = append(wires, must[*Wire](t)(l.NewWire(WireSpec{})))
	}
	list := randomRoutes(rand.New(rand.NewPCG(1, 2)), 400_000, wires)
	check := func(n int, narrow bool) {
		t.Helper()
		if l.Len() != n || l.table.Ref().Narrow() != narrow {
			t.Fatalf("%d routes, narrow %v; want %d, %v", l.Len(), l.table.Ref().Narrow(), n, narrow)
		}
		for i, r := range list {
			if w, ok := l.Lookup(r.Dst, 64); ok != (i < n) || ok && w != r.NextHops[0] {
				t.Fatalf("route %d of %d: %v %v", i, n, w, ok)
			}
		}
	}
	const few = 200_000
	if err := l.Replace(list[:few]); err != nil {
		t.Fatal(err)
	}
	check(few, false)
	for _, r := range list[few:] {
		if err := l.Set(r); err != nil {
			t.Fatal(err)
		}
	}
	check(len(list), true)
	for _, r := range list[few:] {
		if !l.Delete(r.Dst) {
			t.Fatalf("no route to %#x", r.Dst)
		}
	}
	check(few, true)
	if err := l.Replace(list); err != nil {
		t.Fatal(err)
	}
	check(len(list), true)
	if err := l.Replace(list[:few]); err != nil {
		t.Fatal(err)
	}
	check(few, false)
}

// The kernel's program finds in a narrow table what the model and a map do,
// entries in each place of their buckets and addresses next to them.
func TestKernelNarrowTable(t *testing.T) {
	p, _ := testPlane(t, true, manyRoutes)
	in := must[*Port](t)(p.OpenPort("eth0"))
	out := must[*Port](t)(p.OpenPort("eth1"))
	block := must[*EthBlock](t)(in.Claim(testType, nil))
	l := must[*Layer](t)(p.NewLayer("l", 0, 4))
	var wires []*Wire
	for i := range 3 {
		spec := WireSpec{Port: out, MTU: 1496}
		spec.Header[0] = byte(i) + 1
		wires = append(wires, must[*Wire](t)(l.NewWire(spec)))
	}
	block.SetDT(100, wires[0])
	prog := must[*ebpf.Program](t)(p.kernel.program(progRouter, in.slot, nil))
	defer prog.Close()

	rng := rand.New(rand.NewPCG(3, 4))
	list := randomRoutes(rng, manyRoutes, wires)
	if err := l.Replace(list); err != nil {
		t.Fatal(err)
	}
	// Fuller than intended, so that no place stays unused.
	for buckets := l.table.Ref().Buckets(); l.Len() < int(buckets)*15; {
		more := randomRoutes(rng, 1000, wires)
		for _, r := range more {
			if err := l.Set(r); err != nil {
				t.Fatal(err)
			}
		}
		list = append(list, more...)
	}
	if !l.table.Ref().Narrow() {
		t.Fatal("the table is wide")
	}
	t.Logf("%d routes in %d buckets", l.Len(), l.table.Ref().Buckets())
	hop := make(map[uint32]*Wire, len(list))
	for _, r := range list {
		hop[uint32(r.Dst)] = r.NextHops[0]
	}

	m := &model.Pipeline{Tables: p.t, Counters: model.NewCounters(p.t)}
	frame := make([]byte, 64)
	result := make([]byte, len(frame)+256)
	run := func(dst uint32) {
		t.Helper()
		clear(frame)
		copy(frame, in.MAC())
		binary.BigEndian.PutUint16(frame[12:], testType)
		binary.BigEndian.PutUint16(frame[14:], 100)
		binary.BigEndian.PutUint16(frame[16:], uint16(len(frame)-headerRoom))
		binary.LittleEndian.PutUint32(frame[18:], dst)
		frame[18+5] = 60 // hop limit
		binary.LittleEndian.PutUint64(frame[18+7:], 64)
		o := ebpf.RunOptions{Data: frame, DataOut: result}
		action, err := prog.Run(&o)
		if err != nil {
			t.Fatal(err)
		}
		w := hop[dst]
		if want := fib.Find(p.t.FIB, l.table.Ref(), dst); (want != 0) != (w != nil) {
			t.Fatalf("model: %#x has next hop %d, wire %v", dst, want, w)
		}
		wantAction, r, _ := m.Frame(in.slot, 0, frame)
		if action != wantAction || (r == bpf.Forward) != (w != nil) {
			t.Fatalf("%#x: kernel %d, model %d (%v), route %v", dst, action, wantAction, r, w != nil)
		}
		if w != nil && (o.DataOut[0] != p.t.Wires[w.slot].Hdr[0] || frame[0] != o.DataOut[0]) {
			t.Fatalf("%#x: kernel took wire %d, model %d, route's is %d", dst, o.DataOut[0], frame[0], p.t.Wires[w.slot].Hdr[0])
		}
	}
	for range 15000 {
		dst := uint32(list[rng.IntN(len(list))].Dst)
		run(dst)
		// Differs in one bit, or in little more than its tag.
		run(dst ^ 1<<rng.Uint32N(32))
		run(rng.Uint32())
	}
	run(0)
	for range 2000 {
		i := rng.IntN(len(list))
		dst := uint32(list[i].Dst)
		if l.Delete(uint64(dst)) != (hop[dst] != nil) {
			t.Fatalf("delete %#x", dst)
		}
		delete(hop, dst)
		run(dst)
		if i%2 == 0 {
			hop[dst] = wires[i%3]
			if err := l.Set(Route{Dst: uint64(dst), NextHops: wires[i%3 : i%3+1]}); err != nil {
				t.Fatal(err)
			}
			run(dst)
		}
	}
}
