package dht

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestCommonBits(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{
		{"\x00\x00", "\x80\x00", 0}, {"\x00\x00", "\x01\x00", 7}, {"\x00\x00", "\x00\x80", 8},
		{"\x00\x00", "\x00\x01", 15}, {"\x12\x34", "\x12\x34", 16},
	} {
		if got := commonBits(id(c.a), id(c.b)); got != c.want {
			t.Errorf("%x %x: %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

func TestIDNear(t *testing.T) {
	n := twin(t, 1, 0, unhex(t, hexB), epoch)
	for i := range 256 {
		for range 8 {
			if got := commonBits(n.self, n.idNear(i)); got != i {
				t.Fatalf("idNear(%d) shares %d bits", i, got)
			}
		}
	}
}

// closest agrees with sorting everything by the distance as a number.
func TestClosest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ids := rapid.SliceOfNDistinct(rapid.SliceOfN(rapid.Byte(), 4, 4), 1, 60, func(b []byte) string { return string(b) }).Draw(t, "ids")
		tab := newTable(id(ids[0]), 100)
		for i, b := range ids[1:] {
			tab.observe(id(b), uint64(i+1), epoch)
		}
		target := id(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "target"))
		max := rapid.IntRange(1, 20).Draw(t, "max")
		num := func(s id) (v uint64) {
			for i := range len(s) {
				v = v<<8 | uint64(s[i]^target[i])
			}
			return
		}
		want := []id{}
		for _, b := range ids[1:] {
			want = append(want, id(b))
		}
		slices.SortFunc(want, func(a, b id) int { return int(int64(num(a)) - int64(num(b))) })
		want = want[:min(max, len(want))]
		got := tab.closest(target, max, nil)
		for i := range got {
			if len(got) != len(want) || got[i].id != want[i] {
				t.Fatalf("got %d, want %d", len(got), len(want))
			}
		}
	})
}

// Old contacts that answer are kept, dead and invented ones give way.
func TestReplacement(t *testing.T) {
	self := id("\x00\x00")
	mk := func(b byte) id { return id([]byte{0x80, b}) }
	tab := newTable(self, 2)
	tab.hear(mk(1), 1)
	tab.observe(mk(2), 2, epoch)
	tab.observe(mk(3), 3, epoch) // instead of the hearsay
	live := func() (out []uint64) {
		for _, c := range tab.buckets[0].live {
			out = append(out, c.addr)
		}
		slices.Sort(out)
		return
	}
	if got := live(); !slices.Equal(got, []uint64{2, 3}) {
		t.Fatalf("live %v", got)
	}
	tab.observe(mk(4), 4, epoch)
	tab.hear(mk(5), 5)
	if got := live(); !slices.Equal(got, []uint64{2, 3}) {
		t.Fatalf("a newcomer displaced a good contact: %v", got)
	}
	for range deadAfter {
		tab.failed(tab.byAddr[2])
	}
	if got := live(); !slices.Equal(got, []uint64{3, 4}) {
		t.Fatalf("live %v after 2 died", got)
	}
	// A restart: new id, same address. A redraw: same id, new address.
	tab.observe(mk(9), 3, epoch)
	tab.observe(mk(4), 40, epoch.Add(time.Second))
	if tab.byAddr[3].id != mk(9) || tab.byAddr[4] != nil || tab.byAddr[40].id != mk(4) {
		t.Fatalf("%+v", tab.byAddr)
	}
	// Hearsay changes neither.
	tab.hear(mk(77), 40)
	tab.hear(mk(4), 41)
	if tab.byAddr[40].id != mk(4) || tab.byAddr[41] != nil {
		t.Fatal("hearsay was believed")
	}
}
