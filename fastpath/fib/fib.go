// Package fib is the forwarding table of 4-byte addresses: buckets of one
// cache line. Every address has two buckets and is in the first of them when
// it fits, so a lookup reads one line, seldom two, at any size.
//
// There are two layouts. Wide buckets have eight entries of 8 bytes {address,
// next hop}. Narrow ones have sixteen of 4 bytes: a large table costs what its
// cache and TLB misses cost, so it is worth a few instructions to halve it.
// There the buckets are chosen by invertible functions of the address, and the
// entry has only what the bucket does not tell: the match is exact all the
// same. The reference of a table names its layout.
//
// A table is a region of consecutive buckets in an arena: memory that XDP
// programs read at the same moment (or plain memory). There is one writer;
// readers use no lock. An entry is changed with one store of the 8-byte word
// that it is (in). A reader looks at the first bucket, then at the second; the
// writer moves an entry only from its first to its second bucket and writes the
// new place before it reuses the old one. So a reader never misses an entry
// that is there and never sees half of one.
package fib

import (
	"errors"
	"fmt"
	"iter"
	"sync/atomic"
)

// Slots is the number of words of a bucket: 8 of 8 bytes fill a cache line. It
// is also the number of entries of a wide bucket.
const Slots = 8

// multiplier is 2^64 / phi: the halves of the product are the two bucket
// choices of a wide table, and consecutive addresses are spread evenly
// (pipeline.h has it too).
const multiplier = 0x9e3779b97f4a7c15

// ErrFull means that an entry finds no place: the table needs more buckets.
var ErrFull = errors.New("forwarding table is full")

// Ref says where a table is, in one word that readers load atomically: the
// first bucket in the low half, the number of buckets in the high half, whose
// top bit says that the table is narrow. The zero Ref is an empty table.
type Ref uint64

const narrowFlag Ref = 1 << 63

// MakeRef returns the reference of the buckets [base, base+buckets), wide.
func MakeRef(base, buckets uint32) Ref { return Ref(base) | Ref(buckets)<<32 }

// Base is the first bucket.
func (r Ref) Base() uint32 { return uint32(r) }

// Buckets is the number of buckets.
func (r Ref) Buckets() uint32 { return uint32((r &^ narrowFlag) >> 32) }

// Narrow tells whether entries have 4 bytes.
func (r Ref) Narrow() bool { return r&narrowFlag != 0 }

// layout is how the entries of a table look: the bits under keyMask say whose
// entry it is, those above are the next hop. 0 is an empty entry.
type layout struct {
	slots   uint32 // entries of a bucket
	keyMask uint64
	hop     uint   // lowest bit of the next hop
	maxHop  uint32 // largest next hop
}

var (
	wide   = layout{slots: Slots, keyMask: 1<<32 - 1, hop: 32, maxHop: 1<<32 - 1}
	narrow = layout{slots: narrowSlots, keyMask: 1<<narrowHop - 1, hop: narrowHop, maxHop: 1<<(32-narrowHop) - 1}
)

// spot is one of the two places of an address: an entry of the bucket around
// slot whose key is key. Slots count from the start of the arena.
type spot struct {
	slot uint32
	key  uint64
}

// spots returns the places of an address. The slot is the preferred one of its
// bucket: the program looks there, or in a narrow table in the half bucket that
// starts there, before it compares all, and most entries are there.
func (r Ref) spots(addr uint32) (first, second spot) {
	if r.Narrow() {
		return r.narrowSpots(addr)
	}
	h := uint64(addr) * multiplier
	n := uint64(r.Buckets()) * Slots
	base := r.Base() * Slots
	return spot{base + uint32((h>>32)*n>>32), uint64(addr)}, spot{base + uint32((h&0xffffffff)*n>>32), uint64(addr)}
}

// Find returns the next hop of addr in the table at ref, 0 when there is none.
// It is safe beside the writer.
func Find(arena []uint64, ref Ref, addr uint32) uint32 {
	if ref.Buckets() == 0 || addr == 0 {
		return 0
	}
	find := findWide
	if ref.Narrow() {
		find = findNarrow
	}
	first, second := ref.spots(addr)
	if nh := find(arena, first); nh != 0 {
		return nh
	}
	return find(arena, second)
}

func findWide(arena []uint64, s spot) uint32 {
	if e := atomic.LoadUint64(&arena[s.slot]); e&wide.keyMask == s.key {
		return uint32(e >> wide.hop)
	}
	w := s.slot &^ (Slots - 1)
	b := arena[w : w+Slots]
	for i := range b {
		if e := atomic.LoadUint64(&b[i]); e&wide.keyMask == s.key {
			return uint32(e >> wide.hop)
		}
	}
	return 0
}

// Size is what a table of some number of entries should have.
type Size struct {
	Buckets uint32
	Narrow  bool
}

// narrowFrom is the number of entries from which on a table is narrow. Wide ones
// of this size (2.7 MB) no longer fit a core's second-level cache; narrow ones
// of much fewer entries would be below NarrowMin.
const narrowFrom = 250_000

// SizeFor returns the size of a table for n entries, at which nearly every
// entry is in its first bucket and some can be added in place. Wide tables are
// three quarters full (100 000 entries take 1.07 MB), narrow ones, whose
// buckets have more entries, 85 .
func SizeFor(n int) Size {
	if n >= narrowFrom {
		return Size{Buckets: uint32(n/14 + 8), Narrow: true}
	}
	return WideSizeFor(n)
}

// WideSizeFor is SizeFor without narrow tables.
func WideSizeFor(n int) Size { return Size{Buckets: uint32(n/6 + 8)} }

// Retry is the size to try when n entries, the addresses being unlucky, found
// no room in this one.
func (s Size) Retry(n int) Size {
	if s.Narrow {
		return WideSizeFor(n)
	}
	return Size{Buckets: s.Buckets + s.Buckets/4 + 1}
}

// Ref gives a region of the size's number of buckets its layout.
func (s Size) Ref(region Ref) Ref {
	if s.Narrow {
		region |= narrowFlag
	}
	return region
}

// Table is the writer's view of a region. It is not safe for concurrent use
// (readers use Find).
type Table struct {
	layout
	arena []uint64
	ref   Ref
	n     int
}

// NewTable returns an empty table at ref, which it clears: no reader may know
// of the region yet (or any more). A narrow table has at least NarrowMin
// buckets.
func NewTable(arena []uint64, ref Ref) *Table {
	t := &Table{layout: wide, arena: arena, ref: ref}
	if ref.Narrow() {
		if ref.Buckets() < NarrowMin {
			panic("narrow forwarding table is too small")
		}
		t.layout = narrow
	}
	clear(arena[ref.Base()*Slots : (ref.Base()+ref.Buckets())*Slots])
	return t
}

// Ref is the table's reference.
func (t *Table) Ref() Ref { return t.ref }

// Len is the number of entries.
func (t *Table) Len() int { return t.n }

func (t *Table) load(slot uint32) uint64 {
	if t.slots == narrowSlots {
		return t.arena[slot/2] >> (slot % 2 * 32) & (1<<32 - 1)
	}
	return t.arena[slot]
}

// store writes the whole word, also where the entry is half of it: there is no
// other writer.
func (t *Table) store(slot uint32, e uint64) {
	if t.slots == narrowSlots {
		shift := slot % 2 * 32
		slot /= 2
		e = t.arena[slot]&^((1<<32-1)<<shift) | e<<shift
	}
	atomic.StoreUint64(&t.arena[slot], e)
}

// bucket returns the first slot of the bucket around a slot.
func (t *Table) bucket(slot uint32) uint32 { return slot &^ (t.slots - 1) }

const none = ^uint32(0)

// find returns the slot of the entry of a place, none when it is not there.
func (t *Table) find(s spot) uint32 {
	if t.load(s.slot)&t.keyMask == s.key {
		return s.slot
	}
	b := t.bucket(s.slot)
	for i := b; i < b+t.slots; i++ {
		if t.load(i)&t.keyMask == s.key {
			return i
		}
	}
	return none
}

// free returns a free slot of the bucket around slot, the first one from slot
// on, none when the bucket is full.
func (t *Table) free(slot uint32) uint32 {
	b := t.bucket(slot)
	for i := range t.slots {
		if s := b + (slot+i)%t.slots; t.load(s) == 0 {
			return s
		}
	}
	return none
}

// addr returns whose entry e in a slot is.
func (t *Table) addr(slot uint32, e uint64) uint32 {
	if t.ref.Narrow() {
		return t.ref.narrowAddr(slot, e)
	}
	return uint32(e)
}

// Set inserts or changes the entry of addr; neither may be 0, and a next hop
// in a narrow table is less than 4096. ErrFull leaves the table as it was.
func (t *Table) Set(addr, nexthop uint32) error {
	if addr == 0 || nexthop == 0 || nexthop > t.maxHop {
		return fmt.Errorf("address %#x, next hop %d: must not be 0, next hop at most %d", addr, nexthop, t.maxHop)
	}
	if t.ref.Buckets() == 0 {
		return ErrFull
	}
	first, second := t.ref.spots(addr)
	key := first.key
	slot := t.find(first)
	if slot == none {
		if slot = t.find(second); slot != none {
			key = second.key
		}
	}
	if slot == none {
		if slot = t.free(first.slot); slot == none {
			if slot = t.free(second.slot); slot == none {
				slot = t.makeRoom(first.slot, second.slot)
			}
			if slot == none {
				return ErrFull
			}
			if t.bucket(slot) != t.bucket(first.slot) {
				key = second.key
			}
		}
		t.n++
	}
	t.store(slot, key|uint64(nexthop)<<t.hop)
	return nil
}

// searched limits the buckets that makeRoom looks at. At the intended load the
// first ones have room; the limit bounds the time of a hopeless insert.
const searched = 64

// step is an entry that could move to its second bucket to make room.
type step struct {
	from   uint32 // slot of the entry
	to     spot   // its second place
	parent int    // the step that wants this entry's place; -1: the new entry does
}

// makeRoom moves entries from their first to their second bucket until a slot
// of one of the two buckets can be overwritten, and returns that slot, none
// when there is no way. It is a breadth-first search, so it moves as few as it
// can.
func (t *Table) makeRoom(first, second uint32) uint32 {
	var steps [searched * narrowSlots]step
	var seen [searched]uint32 // a bucket is left once: a path never crosses itself
	n, buckets := 0, 0
	expand := func(slot uint32, parent int) {
		b := t.bucket(slot)
		for _, s := range seen[:buckets] {
			if s == b {
				return
			}
		}
		seen[buckets] = b
		buckets++
		for i := b; i < b+t.slots; i++ {
			f, s := t.ref.spots(t.addr(i, t.load(i)))
			if t.bucket(f.slot) == b && t.bucket(s.slot) != b {
				steps[n] = step{i, s, parent}
				n++
			}
		}
	}
	expand(first, -1)
	expand(second, -1)
	for k := 0; k < n; k++ {
		hole := t.free(steps[k].to.slot)
		if hole == none {
			if buckets < searched {
				expand(steps[k].to.slot, k)
			}
			continue
		}
		for i := k; i >= 0; i = steps[i].parent {
			s := &steps[i]
			t.store(hole, t.load(s.from)&^t.keyMask|s.to.key)
			hole = s.from
		}
		return hole
	}
	return none
}

// Delete removes the entry of addr and tells whether there was one.
func (t *Table) Delete(addr uint32) bool {
	if addr == 0 || t.ref.Buckets() == 0 {
		return false
	}
	first, second := t.ref.spots(addr)
	slot := t.find(first)
	if slot == none {
		slot = t.find(second)
	}
	if slot == none {
		return false
	}
	t.store(slot, 0)
	t.n--
	return true
}

// All yields address and next hop of every entry, in no order. The table must
// not be changed meanwhile.
func (t *Table) All() iter.Seq2[uint32, uint32] {
	return func(yield func(uint32, uint32) bool) {
		end := (t.ref.Base() + t.ref.Buckets()) * t.slots
		for i := t.ref.Base() * t.slots; i < end; i++ {
			if e := t.load(i); e != 0 && !yield(t.addr(i, e), uint32(e>>t.hop)) {
				return
			}
		}
	}
}
