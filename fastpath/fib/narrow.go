package fib

import "sync/atomic"

// A narrow entry, from bit 0: 1 (in use), 18 bits of tag, 1 bit that says
// which of the address's two buckets this is, 12 bits of next hop.
//
// Two bijections of the 32-bit numbers, one for each choice, turn an address
// into a number x; the table's n buckets divide the numbers into n ranges in
// order, and the tag is the low bits of x. From 2^14 buckets on no range is
// longer than 2^18, so bucket and tag together are x, and x is the address.
const (
	narrowSlots  = 16
	narrowUsed   = 1
	narrowTag    = 1<<18 - 1
	narrowSecond = 1 << 19
	narrowHop    = 20

	// NarrowMin is the least number of buckets of a narrow table.
	NarrowMin = 1 << 14

	// The factors of the bijections (pipeline.h has them too), 2^32 / phi, which
	// spreads consecutive addresses evenly, and one of MurmurHash3's, and their
	// inverses modulo 2^32.
	narrowMul1 = 0x9e3779b1
	narrowMul2 = 0x85ebca6b
	narrowInv1 = 0x0e8b2f51
	narrowInv2 = 0xa5cb9243
)

// narrowSpots is Ref.spots for a narrow table: the slot is the start of the half
// bucket where the program looks first.
func (r Ref) narrowSpots(addr uint32) (first, second spot) {
	x, y := addr*narrowMul1, (addr^addr>>16)*narrowMul2
	return r.narrowSpot(x, narrowUsed), r.narrowSpot(y, narrowUsed|narrowSecond)
}

func (r Ref) narrowSpot(x uint32, flags uint64) spot {
	half := uint32(uint64(x) * (2 * uint64(r.Buckets())) >> 32)
	return spot{r.Base()*narrowSlots + half*(narrowSlots/2), uint64(x&narrowTag)<<1 | flags}
}

// narrowAddr returns the address whose entry e in a slot is.
func (r Ref) narrowAddr(slot uint32, e uint64) uint32 {
	b, n := uint64(slot/narrowSlots-r.Base()), uint64(r.Buckets())
	// The least number of the bucket's range, and from there on the first one
	// with this tag.
	low := uint32((b<<32 + n - 1) / n)
	x := low + (uint32(e>>1)-low)&narrowTag
	if e&narrowSecond == 0 {
		return x * narrowInv1
	}
	x *= narrowInv2
	return x ^ x>>16
}

func findNarrow(arena []uint64, s spot) uint32 {
	w, key := s.slot/narrowSlots*Slots, uint32(s.key)
	b := arena[w : w+Slots]
	for i := range b {
		e := atomic.LoadUint64(&b[i])
		if uint32(e)&(1<<narrowHop-1) == key {
			return uint32(e) >> narrowHop
		}
		if uint32(e>>32)&(1<<narrowHop-1) == key {
			return uint32(e>>32) >> narrowHop
		}
	}
	return 0
}
