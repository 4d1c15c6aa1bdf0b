package linkstate

import (
	"fmt"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/wire"
)

// invariants checks what must hold between any two events.
func (in *Instance) invariants() error {
	d := &in.db
	seen, own := 0, 0
	refs := map[int32]int32{}
	for l := range d.lists {
		n, prev, stamp := 0, int32(-1), int64(-1<<62)
		for s := d.lists[l].head; s >= 0; s = d.entries[s].next {
			e := &d.entries[s]
			if int(e.list) != l || e.prev != prev || e.stamp < stamp {
				return fmt.Errorf("list %d broken at slot %d: %+v", l, s, *e)
			}
			prev, stamp = s, e.stamp
			n++
		}
		if n != d.lists[l].n || prev != d.lists[l].tail {
			return fmt.Errorf("list %d has %d entries, says %d", l, n, d.lists[l].n)
		}
	}
	for s := range d.entries {
		e := &d.entries[s]
		if e.state == free {
			continue
		}
		seen++
		if e.own != (e.src == in.cfg.Self) || e.src == e.dst || e.src == 0 || e.dst == 0 {
			return fmt.Errorf("entry %+v", *e)
		}
		if e.own && e.state == live {
			own++
			if _, ok := in.findDT(e.dst); !ok {
				return fmt.Errorf("own entry without adjacency: %+v", *e)
			}
		} else if e.list < 0 {
			return fmt.Errorf("entry that never ages: %+v", *e)
		}
		if got, ok := d.lookup(e.src, e.dst); !ok || got != int32(s) {
			return fmt.Errorf("index of %d>%d is %d, want %d", e.src, e.dst, got, s)
		}
		r, ok := d.lookup(e.dst, e.src)
		if !ok {
			r = -1
		}
		if e.rev != r {
			return fmt.Errorf("reverse of %d>%d is %d, want %d", e.src, e.dst, e.rev, r)
		}
		if d.vertices[e.sv].addr != e.src || d.vertices[e.dv].addr != e.dst {
			return fmt.Errorf("vertices of %+v", *e)
		}
		refs[e.sv]++
		refs[e.dv]++
	}
	if seen != d.count() || own != d.numOwn || own != len(in.dt) {
		return fmt.Errorf("%d entries, index %d; own %d, counted %d, adjacencies %d", seen, d.count(), own, d.numOwn, len(in.dt))
	}
	for v := range d.vertices {
		if d.vertices[v].refs != refs[int32(v)] {
			return fmt.Errorf("vertex %d has %d references, want %d", v, d.vertices[v].refs, refs[int32(v)])
		}
	}
	for _, n := range in.mgmt {
		bits := 0
		for s := range d.entries {
			if n.has(int32(s)) {
				bits++
				if d.entries[s].state == free {
					return fmt.Errorf("free slot %d queued for %d", s, n.peer)
				}
			}
		}
		if bits != n.waiting {
			return fmt.Errorf("neighbour %d: %d bits, %d waiting", n.peer, bits, n.waiting)
		}
		if len(n.queue) > 128*len(n.pending)+burst+1 {
			return fmt.Errorf("neighbour %d: queue of %d", n.peer, len(n.queue))
		}
	}
	return nil
}

// FuzzReceive drives an instance with a byte string: each command byte is an
// event, and packets are taken as they are or made of small numbers, so that
// they meet.
func FuzzReceive(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10})
	f.Add(append([]byte{8, 24}, lsa(1, 2, 3)...))
	f.Add(append([]byte{8, 32}, withdraw(3, 2, 9)...))
	f.Add([]byte{4, 2, 4, 3, 6, 2, 3, 1, 6, 3, 2, 1, 7, 2, 3, 1, 6, 3, 1, 0, 6, 1, 3, 200, 10, 100, 5, 3, 10, 255})
	f.Fuzz(func(t *testing.T, data []byte) {
		in := mustNew(t, Config{Self: 1, Policy: LFA, MaxEntries: 40})
		now := t0
		in.MgmtUp(now, 1, 2)
		next := func() byte {
			if len(data) == 0 {
				return 0
			}
			b := data[0]
			data = data[1:]
			return b
		}
		small := func() uint64 { return uint64(next() % 12) }
		for len(data) > 0 {
			switch c := next(); c % 11 {
			case 0:
				in.MgmtUp(now, FlowID(small()), small())
			case 1:
				in.MgmtDown(now, FlowID(small()))
			case 2, 3:
				in.Leave(now)
			case 4:
				p := small()
				in.DTUp(now, FlowID(p), p)
			case 5:
				in.DTDown(now, FlowID(small()))
			case 6, 7:
				m := wire.LSA{Src: small(), Dst: small(), Seqno: uint64(next()), Withdraw: c%11 == 7}
				in.Receive(now, FlowID(1+c/11%3), m.AppendTo(nil))
			case 8:
				n := min(int(next()), len(data))
				in.Receive(now, 1, data[:n])
				data = data[n:]
			case 9:
				in.Conflict()
				in.Changes()
				in.LSDB(now)
			case 10:
				now = now.Add(time.Duration(next()) * 300 * time.Millisecond)
				in.Tick(now)
				in.Output()
				if d := in.NextDeadline(); !d.IsZero() && !d.After(now) {
					t.Fatalf("deadline %v is not after the tick at %v", d.Sub(t0), now.Sub(t0))
				}
			}
			if err := in.invariants(); err != nil {
				t.Fatal(err)
			}
		}
		now = now.Add(time.Hour)
		for range 100 {
			in.Tick(now)
			in.Output()
			now = now.Add(time.Second)
		}
		in.Leave(now)
		in.Tick(now.Add(time.Hour))
		if in.db.count() != 0 || len(in.Routes()) != 0 {
			t.Fatalf("left over: %+v", in.LSDB(now))
		}
	})
}
