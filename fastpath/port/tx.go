package port

import (
	"errors"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/packet"
)

const (
	// batchSize is how many frames go through one step: large enough that
	// system calls and ring updates do not show (measured flat from 32 on).
	batchSize = 64
	// txQueueLen is how many frames wait when the device is slower than the
	// senders; about 0.5 ms of what one core sends.
	txQueueLen = 1024
	// txRounds bounds how long one sender transmits for the others.
	txRounds = 4
)

// transmitter hands frames to the kernel. Its methods are called by one
// goroutine at a time.
type transmitter interface {
	// transmit takes the first n frames (copies them) and returns n. With an
	// error that retry says is temporary the rest may be offered again.
	transmit(frames []*packet.Buf, c *counters) (n int, err error)
	// unsent tells whether frames that were taken wait for another kick.
	unsent() bool
}

// temporary tells whether the device is busy rather than gone or down.
func temporary(err error) bool {
	return err == unix.EAGAIN || err == unix.ENOBUFS || err == unix.EBUSY
}

// txq is one transmit queue of a port. Senders put frames on a queue; whoever
// finds nobody transmitting transmits for all. So a lone sender sends at once,
// from its own goroutine, and competing ones make batches.
type txq struct {
	out transmitter
	q   *queue
	c   *counters

	busy atomic.Bool   // held by who transmits; guards what follows, and out
	head atomic.Uint64 // of q, written by who transmits
	held int           // frames at the start of batch that out has not taken
	all  [batchSize]*packet.Buf
}

type txState int

const (
	txIdle    txState = iota // nothing left
	txMore                   // left off with frames to send
	txBlocked                // the device takes nothing now
)

func newTxq(out transmitter, c *counters) *txq {
	return &txq{out: out, q: newQueue(txQueueLen), c: c}
}

// put queues a frame; false when the queue is full.
func (t *txq) put(b *packet.Buf) bool { return t.q.push(b) }

// flush transmits what is queued unless somebody else is doing that, who then
// sees what was queued before this call. Rounds bounds the work; 0 does not.
func (t *txq) flush(rounds int) (state txState, err error) {
	for t.busy.CompareAndSwap(false, true) {
		state, e := t.drain(rounds)
		t.head.Store(t.q.head)
		t.busy.Store(false)
		if err == nil {
			err = e
		}
		// Frames queued while we were leaving found us busy.
		if state != txIdle || !t.q.ready(t.head.Load()) {
			return state, err
		}
	}
	return txIdle, err
}

func (t *txq) drain(rounds int) (txState, error) {
	for round := 1; ; round++ {
		t.held += t.q.pop(t.all[t.held:])
		n, err := t.out.transmit(t.all[:t.held], t.c)
		t.take(n)
		switch {
		case err != nil && !temporary(err):
			t.c.txErrors.Add(1)
			t.drop()
			return txIdle, err
		case t.held > 0 && n == 0, t.held == 0 && t.out.unsent():
			t.c.txRetries.Add(1)
			return txBlocked, nil
		case t.held == 0 && !t.q.ready(t.q.head):
			return txIdle, nil
		case round == rounds:
			return txMore, nil
		}
	}
}

// take releases the first n frames.
func (t *txq) take(n int) {
	for _, b := range t.all[:n] {
		b.Release()
	}
	copy(t.all[:], t.all[n:t.held])
	clear(t.all[t.held-n : t.held])
	t.held -= n
}

// drop discards everything that waits.
func (t *txq) drop() {
	for {
		t.held += t.q.pop(t.all[t.held:])
		if t.held == 0 {
			return
		}
		t.c.txDropped.Add(uint64(t.held))
		t.take(t.held)
	}
}

// close ends transmitting for good: the queue stays busy.
func (t *txq) close() {
	for !t.busy.CompareAndSwap(false, true) {
		runtime.Gosched()
	}
	t.drop()
}

// txLoop continues for senders that stopped early, and tries again when the
// device was busy. It sleeps unless there is something to do.
func (p *Port) txLoop() {
	const minPause, maxPause = 50 * time.Microsecond, 2 * time.Millisecond
	defer p.wg.Done()
	timer := time.NewTimer(0)
	<-timer.C
	defer timer.Stop()
	for {
		select {
		case <-p.txWake:
		case <-p.done:
			return
		}
		for pause := minPause; p.flushAll() && p.up.Load(); pause = min(2*pause, maxPause) {
			timer.Reset(pause)
			select {
			case <-timer.C:
			case <-p.done:
				return
			}
		}
	}
}

// flushAll transmits what all queues hold and tells whether one is blocked.
func (p *Port) flushAll() (blocked bool) {
	for _, t := range p.txqs {
		for {
			state, _ := t.flush(txRounds) // errors are counted
			blocked = blocked || state == txBlocked
			if state != txMore || p.closed.Load() {
				break
			}
		}
	}
	return blocked
}

// Errors of Send. Others come from the kernel as they are.
var (
	ErrClosed  = errors.New("port is closed")
	ErrDown    = errors.New("link is down")
	ErrFull    = errors.New("transmit queue is full")
	ErrTooLong = errors.New("frame does not fit in the MTU")
)

// Send transmits one whole frame, MAC header first, and takes ownership of it,
// also on error. It does not block; a frame that must wait for the device waits
// in a queue. Errors: ErrDown, ErrClosed, ErrFull, ErrTooLong, or what the
// kernel says when the device goes away (ENETDOWN, ENXIO). Safe for concurrent
// use. Frames with the same addresses, EtherType and EID stay in order.
func (p *Port) Send(b *packet.Buf) error {
	t, err := p.enqueue(b)
	if err != nil {
		return err
	}
	return p.finish(t)
}

// SendBatch transmits frames as Send does, with fewer system calls. It takes
// ownership of all buffers, not of the slice, and returns the first error.
func (p *Port) SendBatch(frames []*packet.Buf) error {
	var first error
	for _, b := range frames {
		if _, err := p.enqueue(b); err != nil && first == nil {
			first = err
		}
	}
	for _, t := range p.txqs {
		if !t.q.ready(t.head.Load()) {
			continue
		}
		if err := p.finish(t); err != nil && first == nil {
			first = err
		}
	}
	return first
}

func (p *Port) finish(t *txq) error {
	state, err := t.flush(txRounds)
	if state != txIdle {
		p.wakeTx()
	}
	return err
}

func (p *Port) wakeTx() {
	select {
	case p.txWake <- struct{}{}:
	default:
	}
}

func (p *Port) enqueue(b *packet.Buf) (*txq, error) {
	var err error
	switch n := b.Len(); {
	case p.closed.Load():
		err = ErrClosed
	case !p.up.Load():
		err = ErrDown
	case n < ethHeader || n > int(p.mtu.Load())+ethHeader || n > p.maxFrame:
		err = ErrTooLong
	default:
		t := p.choose(b.Bytes())
		if t.put(b) {
			return t, nil
		}
		// Full: make room ourselves if nobody does.
		if _, err = t.flush(1); err == nil {
			if t.put(b) {
				return t, nil
			}
			p.wakeTx()
			err = ErrFull
		}
	}
	b.Release()
	p.c.txDropped.Add(1)
	return nil, err
}

// choose spreads flows over the transmit queues by the bytes that are the same
// in all frames of a flow: addresses, EtherType, and EID (spec 10 §2.1).
func (p *Port) choose(f []byte) *txq {
	if len(p.txqs) == 1 {
		return p.txqs[0]
	}
	h := uint32(2166136261) // FNV-1a
	for _, x := range f[:min(len(f), 16)] {
		h = (h ^ uint32(x)) * 16777619
	}
	return p.txqs[uint64(h)*uint64(len(p.txqs))>>32]
}
