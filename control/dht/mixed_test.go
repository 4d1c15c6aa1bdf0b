package dht

import (
	"slices"
	"testing"
	"time"
)

// hits lets everybody register a name and returns how many of 100 queries each
// by our members and by reference members found what they asked for.
func hits(t *testing.T, seed uint64, size int, isRef func(i int) bool) (our, ref int) {
	n := layer(t, seed, size, func(n *network, i int, addr, via uint64) {
		if isRef(i) {
			n.add(addr, newReference(addr, via, newRand(n.rnd.Uint64()), n.now))
		} else {
			n.join(addr, via)
		}
	})
	for i := range size {
		n.do(address(i), func(p peer) { p.Register(n.now, nameKey(name(i))) })
		n.run(20 * time.Millisecond)
	}
	n.run(3 * time.Second)
	ask := func(want bool) (found, asked int) {
		for range 100 {
			who, what := n.rnd.IntN(size), n.rnd.IntN(size)
			if isRef(who) != want || who == what {
				continue
			}
			asked++
			got, _ := n.query(address(who), nameKey(name(what)))
			if slices.Contains(got, address(what)) {
				found++
			}
		}
		if asked > 0 {
			found = found * 100 / asked
		}
		return
	}
	our, _ = ask(false)
	ref, _ = ask(true)
	return
}

func TestMixedLayer(t *testing.T) {
	all := func(int) bool { return true }
	for _, size := range []int{4, 9, 20, 60} {
		_, pure := hits(t, 20, size, all)
		for _, share := range []int{2, 3} {
			our, ref := hits(t, 20, size, func(i int) bool { return i%share == 0 })
			t.Logf("%d members, one of %d reference: we find %d%%, they find %d%% (%d%% among themselves)", size, share, our, ref, pure)
			if our < 97 {
				t.Errorf("size %d, share %d: our members find only %d%%", size, share, our)
			}
			if ref < pure-5 {
				t.Errorf("size %d, share %d: reference members find %d%%, among themselves %d%%", size, share, ref, pure)
			}
		}
	}
}

// One of ours in a layer of reference members, in each position of a line.
func TestAmongReferences(t *testing.T) {
	for pos := range 5 {
		our, _ := hits(t, 30+uint64(pos), 5, func(i int) bool { return i != pos })
		if our != 100 {
			t.Errorf("as member %d we find %d%%", pos, our)
		}
	}
}
