package fib

import (
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

func narrowRef(base, buckets uint32) Ref { return Size{Narrow: true}.Ref(MakeRef(base, buckets)) }

// crowd returns addresses both of whose buckets are among the first few of the
// table at ref: what an adversary would choose.
func crowd(ref Ref, buckets uint32) (addrs []uint32) {
	end := uint64(buckets) << 32 / uint64(ref.Buckets())
	for x := range uint32(end) {
		a := x * narrowInv1
		_, second := ref.narrowSpots(a)
		if a != 0 && second.slot/narrowSlots-ref.Base() < buckets {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// Place and key of either choice tell the address: no two addresses have the
// same, so a match is never false.
func TestNarrowIsBijective(t *testing.T) {
	for m, inv := range map[uint32]uint32{narrowMul1: narrowInv1, narrowMul2: narrowInv2} {
		if m*inv != 1 {
			t.Errorf("%#x is not the inverse of %#x", inv, m)
		}
	}
	check := func(t interface{ Fatalf(string, ...any) }, ref Ref, addr uint32) {
		first, second := ref.narrowSpots(addr)
		for i, s := range []spot{first, second} {
			if b := s.slot / narrowSlots; b < ref.Base() || b >= ref.Base()+ref.Buckets() {
				t.Fatalf("%d buckets from %d: choice %d of %#x is bucket %d", ref.Buckets(), ref.Base(), i, addr, b)
			}
			if got := ref.narrowAddr(s.slot, s.key|5<<narrowHop); got != addr {
				t.Fatalf("%d buckets: choice %d of %#x reads as %#x", ref.Buckets(), i, addr, got)
			}
		}
		if first.key == second.key {
			t.Fatalf("%#x has one key twice", addr)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		ref := narrowRef(rapid.Uint32Range(0, 9).Draw(t, "base"), rapid.Uint32Range(NarrowMin, 1<<21).Draw(t, "buckets"))
		for range 50 {
			check(t, ref, rapid.Uint32().Draw(t, "addr"))
		}
		// Around the limits of the buckets' ranges.
		b := uint64(rapid.Uint32Range(0, ref.Buckets()-1).Draw(t, "bucket"))
		x := uint32(b << 32 / uint64(ref.Buckets()))
		for d := range uint32(5) {
			y := (x + d - 2) * narrowInv2
			check(t, ref, (x+d-2)*narrowInv1)
			check(t, ref, y^y>>16)
		}
	})
}

// A crowded narrow table behaves like a map, also for addresses that share
// their tags with those that are there.
func TestNarrowTableIsMap(t *testing.T) {
	const base, crowded = 3, 4
	ref := narrowRef(base, NarrowMin+5)
	addrs := crowd(ref, crowded)
	if len(addrs) < 10*narrowSlots {
		t.Fatalf("crowd of %d", len(addrs))
	}
	var others []uint32
	for _, a := range addrs {
		x, y := a*narrowMul1+1<<18, ((a^a>>16)*narrowMul2+1<<18)*narrowInv2
		others = append(others, x*narrowInv1, y^y>>16)
	}
	arena := make([]uint64, (base+ref.Buckets()+1)*Slots)
	rapid.Check(t, func(t *rapid.T) {
		for i := range arena {
			arena[i] = ^uint64(0) // foreign: must stay
		}
		tab := NewTable(arena, ref)
		oracle := map[uint32]uint32{}
		addr := rapid.SampledFrom(addrs)
		full := 0
		set := func(t *rapid.T, a, nh uint32) {
			if tab.Set(a, nh) != nil {
				full++
				return
			}
			oracle[a] = nh
		}
		t.Repeat(map[string]func(*rapid.T){
			"set": func(t *rapid.T) { set(t, addr.Draw(t, "addr"), rapid.Uint32Range(1, 4095).Draw(t, "nexthop")) },
			"fill": func(t *rapid.T) {
				seed := rapid.Uint64().Draw(t, "seed")
				for _, i := range rand.New(rand.NewPCG(seed, 0)).Perm(len(addrs))[:40] {
					set(t, addrs[i], uint32(seed)%4095+1)
				}
			},
			"delete": func(t *rapid.T) {
				a := addr.Draw(t, "addr")
				_, want := oracle[a]
				if got := tab.Delete(a); got != want {
					t.Fatalf("delete %#x: %v, want %v", a, got, want)
				}
				delete(oracle, a)
			},
			"": func(t *rapid.T) {
				if tab.Len() != len(oracle) {
					t.Fatalf("len %d, want %d", tab.Len(), len(oracle))
				}
				if full > 0 && len(oracle) < narrowSlots {
					t.Fatalf("full with %d entries", len(oracle))
				}
				for _, list := range [][]uint32{addrs, others, {0}} {
					for _, a := range list {
						if got := Find(arena, ref, a); got != oracle[a] {
							t.Fatalf("find %#x: %d, want %d", a, got, oracle[a])
						}
					}
				}
			},
		})
		n := 0
		for a, nh := range tab.All() {
			if oracle[a] != nh {
				t.Fatalf("all: %#x -> %d, want %d", a, nh, oracle[a])
			}
			n++
		}
		if n != len(oracle) {
			t.Fatalf("all yields %d entries of %d", n, len(oracle))
		}
		for i, e := range arena {
			if b := uint32(i) / Slots; (b < base || b >= base+ref.Buckets()) && e != ^uint64(0) {
				t.Fatal("wrote outside the region")
			}
		}
	})
}

func TestNarrowRefuses(t *testing.T) {
	tab := NewTable(make([]uint64, NarrowMin*Slots), narrowRef(0, NarrowMin))
	for _, c := range [][2]uint32{{0, 1}, {1, 0}, {1, 4096}} {
		if tab.Set(c[0], c[1]) == nil {
			t.Errorf("took address %d, next hop %d", c[0], c[1])
		}
	}
	if n := SizeFor(narrowFrom); !n.Narrow || n.Buckets < NarrowMin {
		t.Errorf("the smallest narrow table has %+v", n)
	}
}
