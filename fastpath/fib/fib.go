// Package fib is the forwarding table of 4-byte addresses: buckets of one
// cache line with eight entries of 8 bytes {address, next hop}. Every address
// has two buckets and is in the first of them when it fits, so a lookup reads
// one line, seldom two, at any size.
//
// A table is a region of consecutive buckets in an arena: memory that XDP
// programs read at the same moment (or plain memory). There is one writer;
// readers use no lock. An entry is changed with one 8-byte store. A reader
// looks at the first bucket, then at the second; the writer moves an entry
// only from its first to its second bucket and writes the new place before it
// reuses the old one. So a reader never misses an entry that is there and
// never sees half of one.
package fib

import (
	"errors"
	"iter"
	"sync/atomic"
)

// Slots is the number of entries of a bucket: 8 of 8 bytes fill a cache line.
const Slots = 8

// multiplier is 2^64 / phi: the halves of the product are the two bucket
// choices, and consecutive addresses are spread evenly (pipeline.h has it too).
const multiplier = 0x9e3779b97f4a7c15

// ErrFull means that an entry finds no place: the table needs more buckets.
var ErrFull = errors.New("forwarding table is full")

// Ref says where a table is, in one word that readers load atomically: the
// first bucket in the low half, the number of buckets in the high half. The
// zero Ref is an empty table.
type Ref uint64

// MakeRef returns the reference of the buckets [base, base+buckets).
func MakeRef(base, buckets uint32) Ref { return Ref(base) | Ref(buckets)<<32 }

// Base is the first bucket.
func (r Ref) Base() uint32 { return uint32(r) }

// Buckets is the number of buckets.
func (r Ref) Buckets() uint32 { return uint32(r >> 32) }

// choices returns the preferred word of an address in its first and second
// bucket. Most entries are in the preferred place of the first: the program
// looks there before it compares all eight.
func (r Ref) choices(addr uint32) (first, second uint32) {
	h := uint64(addr) * multiplier
	n := uint64(r.Buckets()) * Slots
	base := r.Base() * Slots
	return base + uint32((h>>32)*n>>32), base + uint32((h&0xffffffff)*n>>32)
}

// find returns the next hop of addr in the bucket around word w.
func find(arena []uint64, w, addr uint32) uint32 {
	if e := atomic.LoadUint64(&arena[w]); uint32(e) == addr {
		return uint32(e >> 32)
	}
	w &^= Slots - 1
	b := arena[w : w+Slots]
	for i := range b {
		if e := atomic.LoadUint64(&b[i]); uint32(e) == addr {
			return uint32(e >> 32)
		}
	}
	return 0
}

// Find returns the next hop of addr in the table at ref, 0 when there is none.
// It is safe beside the writer.
func Find(arena []uint64, ref Ref, addr uint32) uint32 {
	if ref.Buckets() == 0 || addr == 0 {
		return 0
	}
	first, second := ref.choices(addr)
	if nh := find(arena, first, addr); nh != 0 {
		return nh
	}
	return find(arena, second, addr)
}

// BucketsFor returns how many buckets a table of n entries should have: three
// quarters full, so that nearly every entry is in its first bucket and some
// can be added in place (1 000 000 entries take 10.7 MB).
func BucketsFor(n int) uint32 { return uint32(n/6 + 8) }

// Table is the writer's view of a region. It is not safe for concurrent use
// (readers use Find).
type Table struct {
	arena []uint64
	ref   Ref
	n     int
}

// NewTable returns an empty table at ref, which it clears: no reader may know
// of the region yet (or any more).
func NewTable(arena []uint64, ref Ref) *Table {
	clear(arena[ref.Base()*Slots : (ref.Base()+ref.Buckets())*Slots])
	return &Table{arena: arena, ref: ref}
}

// Ref is the table's reference.
func (t *Table) Ref() Ref { return t.ref }

// Len is the number of entries.
func (t *Table) Len() int { return t.n }

// slot returns the word of addr's entry, -1 when there is none.
func (t *Table) slot(addr uint32) int {
	first, second := t.ref.choices(addr)
	for _, w := range [2]uint32{first, second} {
		if uint32(t.arena[w]) == addr {
			return int(w)
		}
		w &^= Slots - 1
		for i, e := range t.arena[w : w+Slots] {
			if uint32(e) == addr {
				return int(w) + i
			}
		}
	}
	return -1
}

// free returns a free word of the bucket around w, best w itself, -1 when the
// bucket is full.
func (t *Table) free(w uint32) int {
	if t.arena[w] == 0 {
		return int(w)
	}
	w &^= Slots - 1
	for i, e := range t.arena[w : w+Slots] {
		if e == 0 {
			return int(w) + i
		}
	}
	return -1
}

func (t *Table) store(i int, e uint64) { atomic.StoreUint64(&t.arena[i], e) }

// Set inserts or changes the entry of addr; neither may be 0. ErrFull leaves
// the table as it was.
func (t *Table) Set(addr, nexthop uint32) error {
	if addr == 0 || nexthop == 0 {
		return errors.New("address and next hop must not be 0")
	}
	if t.ref.Buckets() == 0 {
		return ErrFull
	}
	e := uint64(addr) | uint64(nexthop)<<32
	first, second := t.ref.choices(addr)
	i := t.slot(addr)
	if i < 0 {
		i = t.free(first)
		if i < 0 {
			i = t.free(second)
		}
		if i < 0 {
			i = t.makeRoom(first, second)
		}
		if i < 0 {
			return ErrFull
		}
		t.n++
	}
	t.store(i, e)
	return nil
}

// searched limits the buckets that makeRoom looks at. At the intended load the
// first ones have room; the limit bounds the time of a hopeless insert.
const searched = 64

// step is an entry that could move to its second bucket to make room.
type step struct {
	from   int    // word of the entry
	to     uint32 // preferred word in its second bucket
	parent int    // the step that wants this entry's place; -1: the new entry does
}

// makeRoom moves entries from their first to their second bucket until a word
// of one of the two buckets can be overwritten, and returns that word, -1 when
// there is no way. It is a breadth-first search, so it moves as few as it can.
func (t *Table) makeRoom(first, second uint32) int {
	var steps [searched * Slots]step
	var seen [searched]uint32 // a bucket is left once: a path never crosses itself
	n, buckets := 0, 0
	expand := func(w uint32, parent int) {
		w &^= Slots - 1
		for _, b := range seen[:buckets] {
			if b == w {
				return
			}
		}
		seen[buckets] = w
		buckets++
		for i, e := range t.arena[w : w+Slots] {
			f, s := t.ref.choices(uint32(e))
			if f&^(Slots-1) == w && s&^(Slots-1) != w {
				steps[n] = step{int(w) + i, s, parent}
				n++
			}
		}
	}
	expand(first, -1)
	expand(second, -1)
	for k := 0; k < n; k++ {
		hole := t.free(steps[k].to)
		if hole < 0 {
			if buckets < searched {
				expand(steps[k].to, k)
			}
			continue
		}
		for s := k; s >= 0; s = steps[s].parent {
			t.store(hole, t.arena[steps[s].from])
			hole = steps[s].from
		}
		return hole
	}
	return -1
}

// Delete removes the entry of addr and tells whether there was one.
func (t *Table) Delete(addr uint32) bool {
	if addr == 0 || t.ref.Buckets() == 0 {
		return false
	}
	i := t.slot(addr)
	if i < 0 {
		return false
	}
	t.store(i, 0)
	t.n--
	return true
}

// All yields address and next hop of every entry, in no order. The table must
// not be changed meanwhile.
func (t *Table) All() iter.Seq2[uint32, uint32] {
	return func(yield func(uint32, uint32) bool) {
		for _, e := range t.arena[t.ref.Base()*Slots : (t.ref.Base()+t.ref.Buckets())*Slots] {
			if e != 0 && !yield(uint32(e), uint32(e>>32)) {
				return
			}
		}
	}
}
