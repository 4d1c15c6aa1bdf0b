package frcp

import "slices"

// span is the sequence numbers [from, to).
type span struct{ from, to uint32 }

// spanSet is a set of sequence numbers, as spans that neither overlap nor touch,
// in order. All of them are within half the number space of each other, as the
// windows see to it.
type spanSet struct{ s []span }

// find is the index of the first span that ends behind n: the only one that may
// contain it.
func (t *spanSet) find(n uint32) int {
	lo, hi := 0, len(t.s)
	for lo < hi {
		m := int(uint(lo+hi) / 2)
		if before(n, t.s[m].to) {
			hi = m
		} else {
			lo = m + 1
		}
	}
	return lo
}

// add adds [from, to), which must not be empty.
func (t *spanSet) add(from, to uint32) {
	i := t.find(from)
	if i > 0 && t.s[i-1].to == from {
		i--
	}
	j := i
	for ; j < len(t.s) && !before(to, t.s[j].from); j++ {
		if before(t.s[j].from, from) {
			from = t.s[j].from
		}
		if before(to, t.s[j].to) {
			to = t.s[j].to
		}
	}
	if i == j {
		t.s = slices.Insert(t.s, i, span{from, to})
		return
	}
	t.s[i] = span{from, to}
	if j > i+1 {
		t.s = slices.Delete(t.s, i+1, j)
	}
}

// trim removes everything before n.
func (t *spanSet) trim(n uint32) {
	if i := t.find(n); i > 0 {
		t.s = slices.Delete(t.s, 0, i)
	}
	if len(t.s) > 0 && before(t.s[0].from, n) {
		t.s[0].from = n
	}
}

// end is the number behind the last; ok is false when the set is empty.
func (t *spanSet) end() (n uint32, ok bool) {
	if len(t.s) == 0 {
		return 0, false
	}
	return t.s[len(t.s)-1].to, true
}

func (t *spanSet) clear() { t.s = t.s[:0] }
