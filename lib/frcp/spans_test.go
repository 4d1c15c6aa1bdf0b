package frcp

import (
	"testing"

	"pgregory.net/rapid"
)

// A spanSet holds what a map holds, and tells of each new number once.
func TestSpanSet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base := rapid.Uint32().Draw(t, "base")
		var set spanSet
		have, told := map[uint32]bool{}, map[uint32]bool{}
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
				touches := false
				for n := from - 1; n != to+1; n++ {
					touches = touches || have[n] && from != to
				}
				apart := set.add(from, to, func(f, g uint32) {
					for n := f; n != g; n++ {
						if have[n] || told[n] {
							t.Fatalf("%d is told again", n-base)
						}
						told[n] = true
					}
				})
				if apart != (!touches && from != to) {
					t.Fatalf("add [%d, %d) apart %v, touches %v", from-base, to-base, apart, touches)
				}
				for n := from; n != to; n++ {
					if !have[n] && !told[n] {
						t.Fatalf("%d is not told", n-base)
					}
					have[n] = true
				}
				clear(told)
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
