package xsk

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ring is one single-producer, single-consumer ring shared with the kernel.
// The indexes run freely through 32 bits; the kernel owns one of them and reads
// the other. Each side writes entries before it moves its index and reads the
// other's index before it reads entries, so both are atomic (sequentially
// consistent in Go, more than the acquire and release that is needed).
type ring[T Desc | uint64] struct {
	mem      []byte // the mapping; nil: the socket has no such ring
	producer *uint32
	consumer *uint32
	flags    *uint32
	entries  []T
	mask     uint32
	mine     uint32 // copy of the index that user space moves
	seen     uint32 // the kernel's index when last looked at
}

func (r *ring[T]) mmap(fd int, pgoff int64, off unix.XDPRingOffset, size int) error {
	if size == 0 {
		return nil
	}
	var entry T
	mem, err := unix.Mmap(fd, pgoff, int(off.Desc)+size*int(unsafe.Sizeof(entry)),
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("map ring: %w", err)
	}
	r.mem = mem
	r.producer = (*uint32)(unsafe.Pointer(&mem[off.Producer]))
	r.consumer = (*uint32)(unsafe.Pointer(&mem[off.Consumer]))
	r.flags = (*uint32)(unsafe.Pointer(&mem[off.Flags]))
	r.entries = unsafe.Slice((*T)(unsafe.Pointer(&mem[off.Desc])), size)
	r.mask = uint32(size - 1)
	return nil
}

func (r *ring[T]) munmap() error {
	if r.mem == nil {
		return nil
	}
	mem := r.mem
	*r = ring[T]{}
	return unix.Munmap(mem)
}

// needWakeup tells whether the kernel waits for a system call.
func (r *ring[T]) needWakeup() bool {
	return atomic.LoadUint32(r.flags)&unix.XDP_RING_NEED_WAKEUP != 0
}

// produce appends as many of in as there is room for.
func (r *ring[T]) produce(in []T) int {
	size := uint32(len(r.entries))
	if size == 0 {
		return 0
	}
	room := size - (r.mine - r.seen)
	if room < uint32(len(in)) {
		r.seen = atomic.LoadUint32(r.consumer)
		room = size - (r.mine - r.seen)
	}
	n := min(uint32(len(in)), room)
	if n == 0 {
		return 0
	}
	for i, e := range in[:n] {
		r.entries[(r.mine+uint32(i))&r.mask] = e
	}
	r.mine += n
	atomic.StoreUint32(r.producer, r.mine)
	return int(n)
}

// waiting is the number of produced entries that the kernel has not consumed.
func (r *ring[T]) waiting() int {
	if r.mem == nil {
		return 0
	}
	r.seen = atomic.LoadUint32(r.consumer)
	return int(r.mine - r.seen)
}

// consume takes as many entries as there are and out has room for.
func (r *ring[T]) consume(out []T) int {
	if r.mem == nil {
		return 0
	}
	if r.seen-r.mine < uint32(len(out)) {
		r.seen = atomic.LoadUint32(r.producer)
	}
	n := min(uint32(len(out)), r.seen-r.mine)
	if n == 0 {
		return 0
	}
	for i := range out[:n] {
		out[i] = r.entries[(r.mine+uint32(i))&r.mask]
	}
	r.mine += n
	atomic.StoreUint32(r.consumer, r.mine)
	return int(n)
}

// readable tells whether consume would return something.
func (r *ring[T]) readable() bool {
	return r.mem != nil && atomic.LoadUint32(r.producer) != atomic.LoadUint32(r.consumer)
}
