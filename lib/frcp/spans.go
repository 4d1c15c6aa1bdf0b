package frcp

import "slices"

// span is the sequence numbers [from, to).
type span struct{ from, to uint32 }

// spanSet is a set of sequence numbers, as spans that neither overlap nor touch,
// in order. All of them are within half the number space of each other, as the
// windows see to it.
type spanSet struct{ s []span }

// add adds [from, to) and calls fresh for each part of it that was not there.
// It reports whether a span was added that touches none of those that were.
func (t *spanSet) add(from, to uint32, fresh func(from, to uint32)) (apart bool) {
	if from == to {
		return false
	}
	// The last span is where most of it happens.
	i := len(t.s)
	for i > 0 && before(from, t.s[i-1].from) {
		i--
	}
	if i > 0 && !before(t.s[i-1].to, from) { // the one before reaches or touches it
		i--
	}
	j, at := i, from
	lo, hi := from, to
	for ; j < len(t.s) && !before(to, t.s[j].from); j++ {
		s := t.s[j]
		if before(at, s.from) && fresh != nil {
			fresh(at, s.from)
		}
		if before(at, s.to) {
			at = s.to
		}
		if before(s.from, lo) {
			lo = s.from
		}
		if before(hi, s.to) {
			hi = s.to
		}
	}
	if before(at, to) && fresh != nil {
		fresh(at, to)
	}
	if i == j {
		t.s = slices.Insert(t.s, i, span{lo, hi})
		return true
	}
	t.s[i] = span{lo, hi}
	t.s = slices.Delete(t.s, i+1, j)
	return false
}

// trim removes everything before n.
func (t *spanSet) trim(n uint32) {
	i := 0
	for i < len(t.s) && !before(n, t.s[i].to) {
		i++
	}
	if i > 0 {
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
