package port

import (
	"sync/atomic"

	"github.com/o7s/o7s-router/lib/packet"
)

// queue is a bounded queue of buffers with many producers and one consumer,
// without locks: a cell's sequence number says whose turn it is
// (D. Vyukov's bounded queue).
type queue struct {
	cells []cell
	mask  uint64
	_     [48]byte // the ends are on lines of their own: different cores write them
	tail  atomic.Uint64
	_     [56]byte
	head  uint64 // the consumer's
}

type cell struct {
	seq atomic.Uint64 // position that may be written; position+1: may be read
	buf *packet.Buf
}

// newQueue returns a queue for size buffers, a power of two.
func newQueue(size int) *queue {
	q := &queue{cells: make([]cell, size), mask: uint64(size - 1)}
	for i := range q.cells {
		q.cells[i].seq.Store(uint64(i))
	}
	return q
}

// push appends b; false when the queue is full. Any goroutine.
func (q *queue) push(b *packet.Buf) bool {
	pos := q.tail.Load()
	for {
		c := &q.cells[pos&q.mask]
		switch diff := int64(c.seq.Load() - pos); {
		case diff == 0:
			if q.tail.CompareAndSwap(pos, pos+1) {
				c.buf = b
				c.seq.Store(pos + 1)
				return true
			}
			pos = q.tail.Load()
		case diff < 0:
			return false
		default:
			pos = q.tail.Load()
		}
	}
}

// pop takes up to len(out) buffers, in order, and returns how many. One
// goroutine at a time.
func (q *queue) pop(out []*packet.Buf) (n int) {
	for n < len(out) {
		c := &q.cells[q.head&q.mask]
		if c.seq.Load() != q.head+1 {
			break
		}
		out[n], c.buf = c.buf, nil
		c.seq.Store(q.head + uint64(len(q.cells)))
		q.head++
		n++
	}
	return n
}

// ready tells whether the entry at head can be popped. A push that is not
// complete does not count: its sender looks after it.
func (q *queue) ready(head uint64) bool { return q.cells[head&q.mask].seq.Load() == head+1 }
