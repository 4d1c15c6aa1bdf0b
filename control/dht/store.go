package dht

import (
	"math/rand/v2"
	"time"
)

// Limits on what other members may make us keep. A layer of thousands of
// members with a hundred names each stays far below them.
const (
	maxKeys         = 16384
	maxValuesPerKey = 32
	maxValueLen     = 64             // an address is 8 bytes; room for what may come
	clockSlack      = 24 * time.Hour // how far beyond our own t_expire an expiry time may lie
)

// value is a value stored on behalf of another member.
type value struct {
	val  string
	exp  uint32    // UTC seconds, as published
	repl time.Time // when it was last replicated, by us or somebody else
}

// entry is a key with the values of others, in order of arrival.
type entry struct {
	key  id
	vals []value
}

// store holds values on behalf of others. Entries are in a slice beside the
// index, so that iteration has a fixed order.
type store struct {
	self    id
	index   map[id]int
	entries []*entry
	maxKeys int
}

func newStore(self id) *store {
	return &store{self: self, index: make(map[id]int), maxKeys: maxKeys}
}

func (s *store) get(key id) *entry {
	if n, ok := s.index[key]; ok {
		return s.entries[n]
	}
	return nil
}

// put adds a value or prolongs it (the later expiry wins). It reports whether
// the value is new, and false for stored when there was no room.
func (s *store) put(key id, val string, exp uint32, now time.Time, rnd *rand.Rand) (fresh, stored bool) {
	e := s.get(key)
	if e == nil {
		if len(s.entries) >= s.maxKeys && !s.evict(key, rnd) {
			return false, false
		}
		e = &entry{key: key}
		s.index[key] = len(s.entries)
		s.entries = append(s.entries, e)
	}
	for i := range e.vals {
		if v := &e.vals[i]; v.val == val {
			v.exp = max(v.exp, exp)
			v.repl = now // somebody has just replicated it
			return false, true
		}
	}
	if len(e.vals) == maxValuesPerKey {
		old := 0
		for i := range e.vals {
			if e.vals[i].exp < e.vals[old].exp {
				old = i
			}
		}
		if e.vals[old].exp >= exp {
			return false, false
		}
		e.vals = append(e.vals[:old], e.vals[old+1:]...)
	}
	e.vals = append(e.vals, value{val: val, exp: exp, repl: now})
	return true, true
}

// evict makes room for key: of a few keys picked at random the one farthest
// from our id goes, unless key is farther still. Keys near our id are those
// that lookups ask us for.
func (s *store) evict(key id, rnd *rand.Rand) bool {
	victim := rnd.IntN(len(s.entries))
	for range 7 {
		if n := rnd.IntN(len(s.entries)); closer(s.self, s.entries[victim].key, s.entries[n].key) {
			victim = n
		}
	}
	if closer(s.self, s.entries[victim].key, key) {
		return false
	}
	s.remove(victim)
	return true
}

func (s *store) remove(n int) {
	last := len(s.entries) - 1
	delete(s.index, s.entries[n].key)
	if n != last {
		s.entries[n] = s.entries[last]
		s.index[s.entries[n].key] = n
	}
	s.entries[last] = nil
	s.entries = s.entries[:last]
}

// drop removes one value of a key.
func (s *store) drop(key id, val string) {
	n, ok := s.index[key]
	if !ok {
		return
	}
	e := s.entries[n]
	for i := range e.vals {
		if e.vals[i].val == val {
			e.vals = append(e.vals[:i], e.vals[i+1:]...)
			break
		}
	}
	if len(e.vals) == 0 {
		s.remove(n)
	}
}

// expire removes what is past its time.
func (s *store) expire(wall int64) {
	for n := 0; n < len(s.entries); {
		e := s.entries[n]
		kept := e.vals[:0]
		for _, v := range e.vals {
			if int64(v.exp) >= wall {
				kept = append(kept, v)
			}
		}
		clear(e.vals[len(kept):])
		if e.vals = kept; len(kept) == 0 {
			s.remove(n) // moves another entry to n
			continue
		}
		n++
	}
}
