package frcp

import (
	"testing"

	"pgregory.net/rapid"
)

// A spanSet holds what a map holds.
func TestSpanSet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base := rapid.Uint32().Draw(t, "base")
		var set spanSet
		have := map[uint32]bool{}
		low := base
		for range rapid.IntRange(1, 40).Draw(t, "ops") {
			if rapid.IntRange(0, 4).Draw(t, "op") == 0 {
				low += rapid.Uint32Range(0, 20).Draw(t, "trim")
				set.trim(low)
				for n := range have {
					if before(n, low) {
						delete(have, n)
					}
				}
			} else {
				from := low + rapid.Uint32Range(0, 100).Draw(t, "from")
				to := from + rapid.Uint32Range(0, 30).Draw(t, "len")
				if from == to {
					continue
				}
				set.add(from, to)
				for n := from; n != to; n++ {
					have[n] = true
				}
			}
			n := 0
			for i, s := range set.s {
				if !before(s.from, s.to) || i > 0 && !before(set.s[i-1].to, s.from) {
					t.Fatalf("spans %v", set.s)
				}
				for m := s.from; m != s.to; m++ {
					n++
					if !have[m] {
						t.Fatalf("%d is not in it", m-base)
					}
				}
			}
			if n != len(have) {
				t.Fatalf("%d numbers, want %d", n, len(have))
			}
		}
	})
}
