package fib

import "slices"

// Arena hands out regions of buckets: first fit, neighbours merged. The zero
// value has no buckets. It is not safe for concurrent use.
type Arena struct {
	free []span // by base, never adjacent
}

type span struct{ base, n uint32 }

// NewArena returns an arena of n free buckets.
func NewArena(n uint32) *Arena {
	if n == 0 {
		return &Arena{}
	}
	return &Arena{free: []span{{0, n}}}
}

// Alloc reserves n consecutive buckets.
func (a *Arena) Alloc(n uint32) (Ref, bool) {
	for i, s := range a.free {
		if s.n < n || n == 0 {
			continue
		}
		if s.n == n {
			a.free = slices.Delete(a.free, i, i+1)
		} else {
			a.free[i] = span{s.base + n, s.n - n}
		}
		return MakeRef(s.base, n), true
	}
	return 0, false
}

// Free gives a region back. No reader may use it any more.
func (a *Arena) Free(r Ref) {
	s := span{r.Base(), r.Buckets()}
	if s.n == 0 {
		return
	}
	i, _ := slices.BinarySearchFunc(a.free, s, func(x, y span) int { return int(int64(x.base) - int64(y.base)) })
	a.free = slices.Insert(a.free, i, s)
	if i+1 < len(a.free) && s.base+s.n == a.free[i+1].base {
		a.free[i].n += a.free[i+1].n
		a.free = slices.Delete(a.free, i+1, i+2)
	}
	if i > 0 && a.free[i-1].base+a.free[i-1].n == s.base {
		a.free[i-1].n += a.free[i].n
		a.free = slices.Delete(a.free, i, i+1)
	}
}

// Largest is the size of the largest free region, buckets.
func (a *Arena) Largest() (n uint32) {
	for _, s := range a.free {
		n = max(n, s.n)
	}
	return n
}
