package frcp

import "github.com/o7s/o7s-router/lib/packet"

// firstSlots is how many slots a queue begins with: small, because most of ten
// thousand flows are idle. Queues double up to what the window bounds.
const firstSlots = 16

// slot is one packet of the sender, from Write to its acknowledgement.
type slot struct {
	buf   *packet.Buf // payload; nil for an end of stream
	first int64       // when first sent
	sent  int64       // when last sent
	flags Flags       // Data, DRF and fragment bits
	again bool        // sent more than once
	vague bool        // an acknowledgement may be for any of them: no RTT sample (Karn)

	// Between our own ends, see loss.go and rate.go.
	limited     bool // sent while the program was the limit
	fate        fate
	tries       uint8  // times that it was sent again, whole
	size        uint32 // bytes of the packet
	prev, next  uint32 // in the chain of its fate
	delivered   uint64 // what the peer had when it was sent, bytes
	deliveredAt int64  // and since when
	firstSent   int64  // of the packet delivered then
	due         int64  // to be sent again, with Config.Spec
}

// arrival is one packet of the receiver that waits for those before it.
type arrival struct {
	buf   *packet.Buf
	flags Flags
	full  bool
	mask  uint64 // pieces that are there, see piece.go
}

// message is one message that waits for its reader.
type message struct {
	buf  *packet.Buf
	pkts uint32 // packets it came in: what it takes of the window
}

// ring is a queue of consecutive numbers modulo 2^32, with random access.
type ring[T any] struct{ s []T }

// at is the element with number n. It is valid until the next reserve.
func (r *ring[T]) at(n uint32) *T { return &r.s[n&uint32(len(r.s)-1)] }

// reserve makes room for the numbers [from, from+n) and keeps what the first
// `used` of them hold.
func (r *ring[T]) reserve(from, n, used uint32) {
	if n <= uint32(len(r.s)) {
		return
	}
	size := uint32(max(len(r.s), firstSlots))
	for size < n {
		size *= 2
	}
	s := make([]T, size)
	for i := range used {
		s[(from+i)&(size-1)] = *r.at(from + i)
	}
	r.s = s
}

// trim drops the memory of an empty queue, if that is much.
func (r *ring[T]) trim() {
	if len(r.s) > 4*firstSlots {
		r.s = nil
	}
}
