package fib

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

// A table behaves like a map, at any load, whatever the order of changes.
func TestTableIsMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base := rapid.Uint32Range(0, 5).Draw(t, "base")
		buckets := rapid.Uint32Range(1, 12).Draw(t, "buckets")
		arena := make([]uint64, (base+buckets+3)*Slots)
		for i := range arena {
			arena[i] = ^uint64(0) // foreign: must stay
		}
		tab := NewTable(arena, MakeRef(base, buckets))
		oracle := map[uint32]uint32{}
		addr := rapid.Uint32Range(1, 150)
		t.Repeat(map[string]func(*rapid.T){
			"set": func(t *rapid.T) {
				a, nh := addr.Draw(t, "addr"), rapid.Uint32Range(1, 99).Draw(t, "nexthop")
				if err := tab.Set(a, nh); err != nil {
					if len(oracle) < int(buckets)*Slots/2 && buckets > 4 {
						t.Fatalf("full with %d of %d", len(oracle), buckets*Slots)
					}
					return
				}
				oracle[a] = nh
			},
			"delete": func(t *rapid.T) {
				a := addr.Draw(t, "addr")
				_, want := oracle[a]
				if got := tab.Delete(a); got != want {
					t.Fatalf("delete %d: %v, want %v", a, got, want)
				}
				delete(oracle, a)
			},
			"": func(t *rapid.T) {
				if tab.Len() != len(oracle) {
					t.Fatalf("len %d, want %d", tab.Len(), len(oracle))
				}
				for a := uint32(0); a <= 150; a++ {
					if got := Find(arena, tab.Ref(), a); got != oracle[a] {
						t.Fatalf("find %d: %d, want %d", a, got, oracle[a])
					}
				}
				n := 0
				for a, nh := range tab.All() {
					if oracle[a] != nh {
						t.Fatalf("all: %d -> %d, want %d", a, nh, oracle[a])
					}
					n++
				}
				if n != len(oracle) {
					t.Fatalf("all yields %d entries of %d", n, len(oracle))
				}
				for i, e := range arena {
					if w := uint32(i) / Slots; (w < base || w >= base+buckets) && e != ^uint64(0) {
						t.Fatal("wrote outside the region")
					}
				}
			},
		})
	})
}

// What can be placed, by pattern of the addresses: the intended load always,
// with nearly all entries in their first bucket.
func TestLoad(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	patterns := map[string]func(i int) uint32{
		"consecutive": func(i int) uint32 { return uint32(i) + 1 },
		"stride256":   func(i int) uint32 { return uint32(i+1) << 8 },
		"stride4096":  func(i int) uint32 { return uint32(i+1) << 12 },
		"random":      func(int) uint32 { return rng.Uint32() | 1 },
	}
	for _, n := range []int{60_000, narrowFrom} {
		for name, pattern := range patterns {
			t.Run(fmt.Sprintf("%d/%s", n, name), func(t *testing.T) {
				size := SizeFor(n)
				tab := NewTable(make([]uint64, size.Buckets*Slots), size.Ref(MakeRef(0, size.Buckets)))
				for i := range n {
					if err := tab.Set(pattern(i), 1); err != nil {
						t.Fatalf("after %d entries: %v", i, err)
					}
				}
				place := uint32(narrowSlots / 2)
				if !size.Narrow {
					place = 1
				}
				second, preferred := 0, 0
				for a := range tab.All() {
					f, _ := tab.Ref().spots(a)
					if slot := tab.find(f); slot == none {
						second++
					} else if slot/place == f.slot/place {
						preferred++
					}
				}
				if share := float64(second) / float64(n); share > 0.1 {
					t.Errorf("%.1f %% in the second bucket", 100*share)
				}
				for i := 0; ; i++ {
					if err := tab.Set(pattern(n+i), 1); err != nil {
						break
					}
				}
				load := float64(tab.Len()) / float64(size.Buckets*tab.slots)
				t.Logf("preferred place %.1f %%, second bucket %.2f %%, full at load %.3f", 100*float64(preferred)/float64(n), 100*float64(second)/float64(n), load)
				if load < 0.9 {
					t.Errorf("full at load %.3f", load)
				}
			})
		}
	}
}

// A reader never misses a stable entry and never sees a wrong one while the
// writer moves, changes and deletes others around it.
func TestConcurrentReader(t *testing.T) {
	const buckets = 40
	consecutive := make([]uint32, 2000)
	for i := range consecutive {
		consecutive[i] = uint32(i) + 1
	}
	narrow := narrowRef(0, NarrowMin)
	for _, c := range []struct {
		name  string
		ref   Ref
		addrs []uint32
		room  int
	}{
		{"wide", MakeRef(0, buckets), consecutive, buckets * Slots},
		{"narrow", narrow, crowd(narrow, buckets)[:2000], buckets * narrowSlots},
	} {
		t.Run(c.name, func(t *testing.T) { testConcurrentReader(t, c.ref, c.addrs, c.room) })
	}
}

// testConcurrentReader works on a table in which addrs find room entries.
func testConcurrentReader(t *testing.T, ref Ref, addrs []uint32, room int) {
	stable, others := addrs[:room/3], addrs[1000:]
	hop := func(i uint32) uint32 { return i%400 + 1 } // of the stable ones; of the others ten times that and more
	arena := make([]uint64, ref.Buckets()*Slots)
	tab := NewTable(arena, ref)
	for i, a := range stable {
		if err := tab.Set(a, hop(uint32(i))); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	errs := make(chan error, 2)
	for range 2 {
		wg.Go(func() {
			for n := uint32(0); ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				i := n % uint32(len(stable))
				if nh := Find(arena, ref, stable[i]); nh != hop(i) {
					errs <- fmt.Errorf("address %#x: next hop %d", stable[i], nh)
					return
				}
				i = n % uint32(len(others))
				if nh := Find(arena, ref, others[i]); nh != 0 && nh/10 != hop(i) {
					errs <- fmt.Errorf("address %#x: next hop %d", others[i], nh)
					return
				}
			}
		})
	}
	rng := rand.New(rand.NewPCG(3, 4))
	for n := range uint32(200000) {
		i := rng.Uint32N(uint32(len(others)))
		if tab.Len() > room*9/10 || n%3 == 0 {
			tab.Delete(others[i])
		} else {
			_ = tab.Set(others[i], hop(i)*10+n%10) // full is fine here
		}
	}
	close(stop)
	wg.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
}

func TestArena(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const size = 100
		a := NewArena(size)
		used := [size]bool{}
		var refs []Ref
		t.Repeat(map[string]func(*rapid.T){
			"alloc": func(t *rapid.T) {
				n := rapid.Uint32Range(0, 40).Draw(t, "n")
				largest := a.Largest()
				r, ok := a.Alloc(n)
				if ok != (n > 0 && n <= largest) {
					t.Fatalf("alloc %d of largest %d: %v", n, largest, ok)
				}
				if !ok {
					return
				}
				for i := r.Base(); i < r.Base()+r.Buckets(); i++ {
					if used[i] {
						t.Fatal("overlap")
					}
					used[i] = true
				}
				refs = append(refs, r)
			},
			"free": func(t *rapid.T) {
				if len(refs) == 0 {
					t.Skip()
				}
				i := rapid.IntRange(0, len(refs)-1).Draw(t, "i")
				r := refs[i]
				refs = append(refs[:i], refs[i+1:]...)
				a.Free(r)
				for i := r.Base(); i < r.Base()+r.Buckets(); i++ {
					used[i] = false
				}
			},
			"": func(t *rapid.T) {
				best, run := 0, 0
				for _, u := range used {
					if run++; u {
						run = 0
					}
					best = max(best, run)
				}
				if int(a.Largest()) != best {
					t.Fatalf("largest %d, want %d", a.Largest(), best)
				}
			},
		})
	})
}

func BenchmarkBuild(b *testing.B) {
	for _, n := range []int{100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			size := SizeFor(n)
			arena := make([]uint64, size.Buckets*Slots)
			rng := rand.New(rand.NewPCG(1, 2))
			addrs := make([]uint32, n)
			for i := range addrs {
				addrs[i] = rng.Uint32() | 1
			}
			for b.Loop() {
				tab := NewTable(arena, size.Ref(MakeRef(0, size.Buckets)))
				for _, a := range addrs {
					if err := tab.Set(a, 1); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

func BenchmarkFind(b *testing.B) {
	for _, n := range []int{1000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			size := SizeFor(n)
			arena := make([]uint64, size.Buckets*Slots)
			tab := NewTable(arena, size.Ref(MakeRef(0, size.Buckets)))
			for a := range n {
				_ = tab.Set(uint32(a)+1, 1)
			}
			x := uint64(1)
			for b.Loop() {
				x = x*6364136223846793005 + 1442695040888963407
				Find(arena, tab.Ref(), uint32((x>>32)*uint64(n)>>32)+1)
			}
		})
	}
}
