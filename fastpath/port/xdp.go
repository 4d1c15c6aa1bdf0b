package port

import (
	"errors"
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/fastpath/xsk"
	"github.com/o7s/o7s-router/lib/packet"
)

const (
	// umemFrames is the memory of a port: 4 MiB with frames of 2048 bytes.
	umemFrames = 2048
	// sendBuffer lets every transmit frame be under way in a device that
	// completes late; the kernel accounts about a page for each.
	sendBuffer = 8 << 20
	// kickTries bounds the system calls for one batch when the device takes a
	// little each time.
	kickTries = 64
)

// xskQueue is an AF_XDP socket on one queue: half of its frames receive, the
// other half transmit.
type xskQueue struct {
	sock *xsk.Socket
	umem *xsk.Umem

	rxDescs [batchSize]xsk.Desc // of the receive goroutine
	rxAddrs [batchSize]uint64

	txDescs [batchSize]xsk.Desc // of who transmits
	txFree  []uint64
	txTotal int
}

// xdpReceiver receives from all queues of a port.
type xdpReceiver struct {
	umem   *xsk.Umem
	queues []*xskQueue
	next   int // where the next round starts, so that no queue starves
}

// openXDP opens a socket on every receive queue.
func openXDP(d Device, frameSize int) (*xdpReceiver, error) {
	umem, err := xsk.NewUmem(umemFrames, frameSize)
	if err != nil {
		return nil, err
	}
	r := &xdpReceiver{umem: umem}
	half := umemFrames / d.RxQueues / 2
	half = 1 << (bits.Len(uint(half)) - 1) // rings are powers of two
	for q := range d.RxQueues {
		c := xsk.Config{
			Ifindex: d.Index, Queue: q, Rx: half, Fill: half,
			SendBuffer: sendBuffer, Batch: 4 * batchSize,
		}
		if q < d.TxQueues {
			c.Tx, c.Completion = half, half
		}
		sock, err := xsk.Open(umem, c)
		if err != nil {
			return nil, errors.Join(err, r.close())
		}
		x := &xskQueue{sock: sock, umem: umem}
		r.queues = append(r.queues, x)
		rx := make([]uint64, half)
		umem.Alloc(rx)
		sock.Fill(rx)
		if c.Tx > 0 {
			x.txFree = make([]uint64, half)
			umem.Alloc(x.txFree)
			x.txTotal = half
		}
	}
	return r, nil
}

// receive takes up to len(out) frames.
func (r *xdpReceiver) receive(out []*packet.Buf, c *counters) (n int) {
	for range r.queues {
		q := r.queues[r.next%len(r.queues)]
		r.next++
		n += q.receive(out[n:], c)
		if n == len(out) {
			break
		}
	}
	return n
}

func (q *xskQueue) receive(out []*packet.Buf, c *counters) int {
	n := q.sock.Receive(q.rxDescs[:min(len(out), batchSize)])
	if n == 0 {
		return 0
	}
	bytes := 0
	for i, d := range q.rxDescs[:n] {
		b := packet.Get(int(d.Len))
		copy(b.Bytes(), q.umem.Bytes(d))
		out[i] = b
		bytes += int(d.Len)
		q.rxAddrs[i] = q.umem.Base(d.Addr)
	}
	q.sock.Fill(q.rxAddrs[:n]) // has room: these frames came from it
	c.rxFrames.Add(uint64(n))
	c.rxBytes.Add(uint64(bytes))
	return n
}

func (r *xdpReceiver) pending() bool {
	for _, q := range r.queues {
		if q.sock.Pending() {
			return true
		}
	}
	return false
}

// dropped adds up what the kernel could not deliver.
func (r *xdpReceiver) dropped() (n uint64) {
	for _, q := range r.queues {
		if st, err := q.sock.Stats(); err == nil {
			n += st.RxDropped + st.RxRingFull // an empty fill ring counts as dropped
		}
	}
	return n
}

func (r *xdpReceiver) watch(p *xsk.Poller) error {
	for _, q := range r.queues {
		if err := p.Add(q.sock.FD()); err != nil {
			return err
		}
	}
	return nil
}

// close ends everything; nobody may be receiving or transmitting.
func (r *xdpReceiver) close() error {
	var errs []error
	for _, q := range r.queues {
		errs = append(errs, q.sock.Close())
	}
	return errors.Join(append(errs, r.umem.Close())...)
}

func (q *xskQueue) transmit(frames []*packet.Buf, c *counters) (int, error) {
	q.reap()
	n := min(len(frames), len(q.txFree))
	rest := len(q.txFree) - n
	bytes := 0
	for i, b := range frames[:n] {
		base := q.txFree[rest+i]
		length := copy(q.umem.Frame(base), b.Bytes())
		q.txDescs[i] = xsk.Desc{Addr: base, Len: uint32(length)}
		bytes += length
	}
	if sent := q.sock.Transmit(q.txDescs[:n]); sent != n {
		// The ring is as large as the number of frames.
		panic(fmt.Sprintf("port: tx ring took %d of %d frames", sent, n))
	}
	q.txFree = q.txFree[:rest]
	c.txFrames.Add(uint64(n))
	c.txBytes.Add(uint64(bytes))
	return n, q.kick(c)
}

// kick makes the kernel transmit until the ring is empty or it takes no more.
func (q *xskQueue) kick(c *counters) error {
	waiting := q.sock.Unsent()
	for try := 0; waiting > 0; try++ {
		err := q.sock.Kick()
		switch {
		case err == unix.EBUSY: // the device dropped one frame
			c.txLost.Add(1)
		case err != nil && !temporary(err):
			return err
		}
		before := waiting
		if waiting = q.sock.Unsent(); waiting == before && err != nil || try == kickTries {
			return unix.EAGAIN
		}
	}
	return nil
}

func (q *xskQueue) unsent() bool { return q.sock.Unsent() > 0 }

// reap takes back transmitted frames.
func (q *xskQueue) reap() {
	free := len(q.txFree)
	n := q.sock.Complete(q.txFree[free:q.txTotal])
	q.txFree = q.txFree[:free+n]
}
