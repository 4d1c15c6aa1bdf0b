package xsk

import (
	"testing"

	"pgregory.net/rapid"
)

// newRing is a ring in plain memory whose indexes start at first.
func newRing(size int, first uint32) (*ring[uint64], *ring[uint64]) {
	mem := make([]byte, 1)
	var producer, consumer, flags = new(uint32), new(uint32), new(uint32)
	*producer, *consumer = first, first
	r := ring[uint64]{
		mem: mem, producer: producer, consumer: consumer, flags: flags,
		entries: make([]uint64, size), mask: uint32(size - 1), mine: first, seen: first,
	}
	kernel := r
	return &r, &kernel
}

// A ring is a bounded queue, also where its indexes wrap around.
func TestRingIsQueue(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := 1 << rapid.IntRange(0, 4).Draw(t, "log size")
		first := rapid.SampledFrom([]uint32{0, 5, 1<<31 - 3, 1<<32 - 3}).Draw(t, "first index")
		in, out := newRing(size, first)
		var oracle []uint64
		next := uint64(0)
		t.Repeat(map[string]func(*rapid.T){
			"produce": func(t *rapid.T) {
				batch := make([]uint64, rapid.IntRange(0, 2*size).Draw(t, "n"))
				for i := range batch {
					batch[i] = next + uint64(i)
				}
				n := in.produce(batch)
				if want := min(len(batch), size-len(oracle)); n != want {
					t.Fatalf("took %d of %d, want %d", n, len(batch), want)
				}
				oracle = append(oracle, batch[:n]...)
				next += uint64(n)
			},
			"consume": func(t *rapid.T) {
				batch := make([]uint64, rapid.IntRange(0, 2*size).Draw(t, "n"))
				n := out.consume(batch)
				if want := min(len(batch), len(oracle)); n != want {
					t.Fatalf("gave %d, want %d", n, want)
				}
				for i, v := range batch[:n] {
					if v != oracle[i] {
						t.Fatalf("entry %d is %d, want %d", i, v, oracle[i])
					}
				}
				oracle = oracle[n:]
			},
			"": func(t *rapid.T) {
				if out.readable() != (len(oracle) > 0) || in.waiting() != len(oracle) {
					t.Fatalf("readable %v, waiting %d, have %d", out.readable(), in.waiting(), len(oracle))
				}
			},
		})
	})
}

// A socket without some ring behaves as if it were full and empty.
func TestNoRing(t *testing.T) {
	var r ring[Desc]
	if r.produce(make([]Desc, 1)) != 0 || r.consume(make([]Desc, 1)) != 0 || r.readable() || r.waiting() != 0 || r.munmap() != nil {
		t.Error("absent ring does something")
	}
}

func TestUmem(t *testing.T) {
	for _, c := range []struct{ frames, size int }{{0, 2048}, {8, 1024}, {8, 3000}, {8, 8192}} {
		if _, err := NewUmem(c.frames, c.size); err == nil {
			t.Errorf("%d frames of %d bytes accepted", c.frames, c.size)
		}
	}
	u, err := NewUmem(8, 2048)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]uint64, 10)
	if n := u.Alloc(got); n != 8 {
		t.Fatalf("Alloc gave %d", n)
	}
	seen := map[uint64]bool{}
	for _, a := range got[:8] {
		if a%2048 != 0 || a >= 8*2048 || seen[a] {
			t.Errorf("frame at %d", a)
		}
		seen[a] = true
		u.Frame(a)[2047] = 1
	}
	if u.Alloc(got) != 0 {
		t.Error("Alloc from an empty Umem")
	}
	u.Free([]uint64{2048 + 256}) // an address within the frame
	if n := u.Alloc(got); n != 1 || got[0] != 2048 {
		t.Errorf("freed frame came back as %d, %d", n, got[0])
	}
	if d := u.Bytes(Desc{Addr: 4096 + 256, Len: 5}); len(d) != 5 || cap(d) != 5 {
		t.Errorf("packet of %d, %d", len(d), cap(d))
	}
	if err := u.Close(); err != nil {
		t.Fatal(err)
	}
	if err := u.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := Open(u, Config{Ifindex: 1, Rx: 8, Fill: 8}); err == nil {
		t.Error("socket on a closed Umem")
	}
}
