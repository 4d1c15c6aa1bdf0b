// Package packet holds the buffers in which packets move between the layers
// of one daemon. A buffer has head room, so that each layer on the way down
// prepends its header in place.
package packet

import "sync"

// Headroom is the space for headers of stacked layers, as in the reference
// (spec 20 §8): enough for a dozen layers.
const Headroom = 256

// Size classes: one Ethernet frame, a jumbo frame, what programs write at a
// time, the largest local message.
var classes = [...]int{2048, 16384, 65536, 1 << 20}

var pools [len(classes)]sync.Pool

// Buf is one packet. Whoever holds it owns it: functions that take a *Buf
// take the ownership and release it, unless they say otherwise.
type Buf struct {
	store    []byte
	off, end int
	class    int8
}

// Get returns a buffer with n bytes of undefined content and Headroom in front.
// It allocates only while the pool warms up.
func Get(n int) *Buf {
	for c, size := range classes {
		if n <= size {
			b, _ := pools[c].Get().(*Buf)
			if b == nil {
				b = &Buf{store: make([]byte, Headroom+size), class: int8(c)}
			}
			b.off, b.end = Headroom, Headroom+n
			return b
		}
	}
	return &Buf{store: make([]byte, Headroom+n), off: Headroom, end: Headroom + n, class: -1}
}

// From returns a buffer that holds a copy of p.
func From(p []byte) *Buf {
	b := Get(len(p))
	copy(b.Bytes(), p)
	return b
}

// Bytes is the packet. The slice is valid until the buffer is changed or released.
func (b *Buf) Bytes() []byte { return b.store[b.off:b.end] }

// Len is the length of the packet in bytes.
func (b *Buf) Len() int { return b.end - b.off }

// Push prepends n bytes of undefined content and returns them; nil when the
// head room is used up.
func (b *Buf) Push(n int) []byte {
	if n > b.off {
		return nil
	}
	b.off -= n
	return b.store[b.off : b.off+n]
}

// Pull removes and returns the first n bytes; nil when the packet is shorter.
func (b *Buf) Pull(n int) []byte {
	if n > b.end-b.off {
		return nil
	}
	b.off += n
	return b.store[b.off-n : b.off]
}

// Trim cuts the packet to its first n bytes. n must not exceed Len.
func (b *Buf) Trim(n int) { b.end = b.off + n }

// Release gives the buffer back. The caller must not touch it afterwards.
func (b *Buf) Release() {
	if b.class >= 0 {
		pools[b.class].Put(b)
	}
}
