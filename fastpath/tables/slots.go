package tables

// Slots hands out the slots 1..n-1 of a table, lowest free first; slot 0 means
// "none" everywhere. It is not safe for concurrent use.
type Slots struct {
	free []uint32 // given back, used last in first out
	next uint32
	n    uint32
}

// NewSlots returns an allocator for a table of n records.
func NewSlots(n int) *Slots { return &Slots{next: 1, n: uint32(n)} }

// Alloc returns a free slot; false when there is none.
func (s *Slots) Alloc() (uint32, bool) {
	if k := len(s.free); k > 0 {
		slot := s.free[k-1]
		s.free = s.free[:k-1]
		return slot, true
	}
	if s.next >= s.n {
		return 0, false
	}
	s.next++
	return s.next - 1, true
}

// Free gives a slot back.
func (s *Slots) Free(slot uint32) { s.free = append(s.free, slot) }

// Used is the number of slots handed out.
func (s *Slots) Used() int { return int(s.next) - 1 - len(s.free) }
