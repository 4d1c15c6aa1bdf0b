package fastpath

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/o7s/o7s-router/fastpath/fib"
)

// BenchmarkProgramRun is the cost of the transit program for one packet, as
// the kernel measures it, the headers written anew for each (which "harness"
// alone costs). Destinations are random.
func BenchmarkProgramRun(b *testing.B) {
	for _, routes := range []int{1000, 1_000_000} {
		p, _ := testPlane(b, true, routes*2)
		in := must[*Port](b)(p.OpenPort("eth0"))
		out := must[*Port](b)(p.OpenPort("eth1"))
		block := must[*EthBlock](b)(in.Claim(testType, nil))
		l := must[*Layer](b)(p.NewLayer("bench", 0xffffffff, 4))
		var wires []*Wire
		for range 4 {
			wires = append(wires, must[*Wire](b)(l.NewWire(WireSpec{Port: out, MTU: 1496})))
		}
		block.SetDT(100, wires[0])
		list := make([]Route, routes)
		for i := range list {
			list[i] = Route{Dst: uint64(i) + 1, NextHops: wires[i%4 : i%4+1]}
		}
		if err := l.Replace(list); err != nil {
			b.Fatal(err)
		}
		var header [5]uint64
		var frame [64]byte
		copy(frame[:], in.MAC())
		binary.BigEndian.PutUint16(frame[12:], testType)
		binary.BigEndian.PutUint16(frame[14:], 100)
		binary.BigEndian.PutUint16(frame[16:], uint16(len(frame)-headerRoom))
		frame[18+5] = 60 // hop limit
		binary.LittleEndian.PutUint64(frame[18+7:], 64)
		for i := range header {
			header[i] = binary.LittleEndian.Uint64(frame[8*i:])
		}
		for what, name := range []string{"table", "array", "harness"} {
			b.Run(fmt.Sprintf("%d/%s", routes, name), func(b *testing.B) {
				if name == "array" {
					plain(b, p, l, routes)
				}
				prog := must[*ebpf.Program](b)(p.Program("xdp_run", in.Slot(), map[string]any{
					"run_header": header, "run_count": uint32(routes), "run_random": uint32(1), "run_what": uint32(what),
				}))
				defer prog.Close()
				before := p.kernel.verdicts(in.Slot())
				const repeat = 1 << 20
				var total time.Duration
				for b.Loop() {
					_, d, err := prog.Benchmark(frame[:], repeat, nil)
					if err != nil {
						b.Fatal(err)
					}
					total += d
				}
				b.ReportMetric(float64(total)/float64(b.N), "ns/packet")
				after := p.kernel.verdicts(in.Slot())
				if name == "harness" {
					return
				}
				for r := range after {
					if n := after[r] - before[r]; n > 0 && r != 9 {
						b.Fatalf("%d packets met reason %d", n, r)
					}
				}
			})
		}
		block.Release()
		l.Close()
		p.Close()
	}
}

// plain fills the layer's region as an array indexed by address: it needs
// one eighth of a bucket for each, which the region has.
func plain(b *testing.B, p *Plane, l *Layer, routes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ref, ok := p.arena.Alloc(uint32(routes/fib.Slots + 2))
	if !ok {
		b.Fatal("arena too small")
	}
	next := fib.NewTable(p.t.FIB, ref)
	for a := 1; a <= routes; a++ {
		p.t.FIB[int(ref.Base())*fib.Slots+a] = uint64(a) | uint64(fib.Find(p.t.FIB, l.table.Ref(), uint32(a)))<<32
	}
	l.switchTo(next)
}

// BenchmarkReplace is the time from a routing result to the table in use.
func BenchmarkReplace(b *testing.B) {
	for _, kernel := range []bool{true, false} {
		for _, routes := range []int{1000, 100_000, 1_000_000} {
			b.Run(fmt.Sprintf("kernel=%v/%d", kernel, routes), func(b *testing.B) {
				p, _ := testPlane(b, kernel, routes)
				port := must[*Port](b)(p.OpenPort("eth0"))
				l := must[*Layer](b)(p.NewLayer("bench", 1, 4))
				var wires []*Wire
				for range 8 {
					wires = append(wires, must[*Wire](b)(l.NewWire(WireSpec{Port: port, MTU: 1496})))
				}
				rng := rand.New(rand.NewPCG(1, 2))
				list := make([]Route, routes)
				for i := range list {
					list[i] = Route{Dst: uint64(rng.Uint32() | 1), NextHops: wires[i%8 : i%8+1], Alternate: wires[(i+1)%8]}
				}
				for b.Loop() {
					if err := l.Replace(list); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkNextHopDown is the time to take a neighbour away from every route.
func BenchmarkNextHopDown(b *testing.B) {
	p, _ := testPlane(b, true, 100)
	port := must[*Port](b)(p.OpenPort("eth0"))
	l := must[*Layer](b)(p.NewLayer("bench", 1, 4))
	w := must[*Wire](b)(l.NewWire(WireSpec{Port: port, MTU: 1496}))
	up := false
	for b.Loop() {
		w.SetState(up)
		up = !up
	}
}

func BenchmarkLookup(b *testing.B) {
	for _, routes := range []int{1000, 1_000_000} {
		b.Run(fmt.Sprint(routes), func(b *testing.B) {
			p, _ := testPlane(b, false, routes)
			l := must[*Layer](b)(p.NewLayer("bench", 1, 4))
			w := must[*Wire](b)(l.NewWire(WireSpec{MTU: 1496}))
			list := make([]Route, routes)
			for i := range list {
				list[i] = Route{Dst: uint64(i + 1), NextHops: []*Wire{w}}
			}
			if err := l.Replace(list); err != nil {
				b.Fatal(err)
			}
			x := uint64(1)
			b.ReportAllocs()
			for b.Loop() {
				x = x*6364136223846793005 + 1442695040888963407
				if _, ok := l.Lookup((x>>32)*uint64(routes)>>32+1, x); !ok {
					b.Fatal("no route")
				}
			}
		})
	}
}
