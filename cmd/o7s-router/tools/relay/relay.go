// Package relay carries bytes between a flow and a stream of the local system,
// a TCP connection or a UNIX socket, in both directions at once.
//
// The end of one direction is passed on as such (half-close), a failure of
// either side resets the other: nobody takes a broken transfer for a complete
// one. While nothing happens a connection holds no buffer but a small one.
package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// bufferSize is the size of pooled buffers: what one system call moves at
	// most. Larger ones no longer pay, they leave the second-level cache.
	bufferSize = 128 << 10
	// waitSize is what a direction waits with that waits for the flow.
	waitSize = 2 << 10
	// batch is how many messages are written with one wake-up where the flow
	// carries small ones only.
	batch = 64
)

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// Flow is what is needed of one; *o7s.Flow is one.
type Flow interface {
	Read([]byte) (int, error)
	WriteBatch([][]byte) (int, error)
	MaxMessage() int
	Direct() bool
	RxLen() int
	CloseWrite() error
	Close() error
	// Abort releases the flow so that the peer reads an error, no end of stream.
	Abort() error
}

// Stream is the local side.
type Stream interface {
	io.ReadWriteCloser
	// WaitRead returns when Read does not block any more.
	WaitRead() error
	CloseWrite() error
	// Abort closes the stream so that its user reads an error (ECONNRESET).
	Abort()
}

// Options of a relay.
type Options struct {
	// Idle ends a connection on which nothing moved in either direction for
	// that long; 0: never.
	Idle time.Duration
}

// ErrIdle is the error of a connection that was ended for being idle.
var ErrIdle = errors.New("nothing was sent or received for the idle time-out")

// errAborted is the error of one that Abort ended.
var errAborted = errors.New("aborted")

// Relay is a pair of a flow and a stream.
type Relay struct {
	flow   Flow
	stream Stream
	idle   time.Duration
	gather bool // more than one message of the flow may be written at once

	moved atomic.Uint64 // bytes, both directions

	mu       sync.Mutex // guards what follows
	ended    bool       // both directions have ended, or something failed
	err      error      // what failed first
	said     bool       // the stream has ended, and all of it was written to the flow
	draining bool       // nobody reads the stream any more

	out, in uint64 // bytes, by Run's two halves; valid after Run
}

// New makes a relay, which owns both sides.
func New(f Flow, s Stream, o Options) *Relay {
	// Over a layer messages are small. Within the machine they are as large as
	// their sender makes them, and the queue's length costs a walk over them.
	return &Relay{flow: f, stream: s, idle: o.Idle, gather: !f.Direct()}
}

// Abort ends the connection at once, also one that Run closes and that waits
// for the peer. Both sides learn that it failed.
func (r *Relay) Abort() {
	r.mu.Lock()
	if !r.ended {
		r.ended, r.err = true, errAborted
	}
	r.mu.Unlock()
	r.abort()
}

func (r *Relay) abort() {
	r.stream.Abort()
	_ = r.flow.Abort()
}

// fail ends the connection for what one direction met.
func (r *Relay) fail(err error) {
	r.mu.Lock()
	late := r.ended
	if !late {
		r.ended, r.err = true, err
	}
	r.mu.Unlock()
	if !late {
		r.abort()
	}
}

// Drain says that the user of the stream has gone: what it sent is still
// delivered, what comes back is not waited for.
func (r *Relay) Drain() {
	r.mu.Lock()
	r.draining = true
	now := r.said && !r.ended
	r.ended = r.ended || now
	r.mu.Unlock()
	if now {
		r.finish()
	}
}

// finish closes both sides in order, once r.ended was set for that.
func (r *Relay) finish() {
	if err := r.flow.Close(); err != nil { // waits until the peer has everything
		r.mu.Lock()
		if r.err == nil && !errors.Is(err, net.ErrClosed) {
			r.err = fmt.Errorf("close flow: %w", err)
		}
		r.mu.Unlock()
	}
	_ = r.stream.Close()
}

// Run relays until both directions have ended or something failed, and closes
// both sides. The error says what failed, and on which side.
func (r *Relay) Run() error {
	if r.idle > 0 {
		stop := r.watch()
		defer stop()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := r.receive(); err != nil {
			r.fail(err)
		}
	}()
	if err := r.send(); err != nil {
		r.fail(err)
	} else {
		stop := r.sent()
		defer stop()
	}
	<-done
	r.mu.Lock()
	both := !r.ended
	r.ended = true
	r.mu.Unlock()
	if both {
		r.finish()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// finWait is how long a peer has to end its direction when the user of the
// stream has gone, as TCP has it (tcp_fin_timeout).
const finWait = 60 * time.Second

// sent notes that the stream has ended.
func (r *Relay) sent() (stop func()) {
	r.mu.Lock()
	r.said = true
	now := r.draining && !r.ended
	r.ended = r.ended || now
	r.mu.Unlock()
	if now {
		r.finish()
	}
	g, ok := r.stream.(interface{ WaitGone() error })
	if !ok {
		return func() {}
	}
	var mu sync.Mutex // guards what follows
	var timer *time.Timer
	stopped := false
	go func() { // ends with the stream
		if g.WaitGone() != nil {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if !stopped {
			timer = time.AfterFunc(finWait, r.Drain)
		}
	}()
	return func() {
		mu.Lock()
		defer mu.Unlock()
		if stopped = true; timer != nil {
			timer.Stop()
		}
	}
}

// Bytes tells how much was carried from the stream to the flow, and back. Only
// after Run.
func (r *Relay) Bytes() (sent, received uint64) { return r.out, r.in }

// watch looks now and then whether anything moves.
func (r *Relay) watch() (stop func()) {
	quit := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		t := time.NewTicker(r.idle)
		defer t.Stop()
		last, since := r.moved.Load(), time.Now()
		for {
			select {
			case <-quit:
				return
			case <-t.C:
			}
			now := r.moved.Load()
			if now != last {
				last, since = now, time.Now()
				t.Reset(r.idle)
				continue
			}
			// The ticker counts from its own start, so a first look may be early.
			if left := r.idle - time.Since(since); left > 0 {
				t.Reset(left)
				continue
			}
			r.fail(ErrIdle)
			return
		}
	})
	return func() {
		close(quit)
		wg.Wait()
	}
}

// send carries from the stream to the flow. Its end is nil.
func (r *Relay) send() error {
	var msgs [batch][]byte
	for {
		if err := r.stream.WaitRead(); err != nil {
			return fmt.Errorf("read: %w", err)
		}
		b := buffers.Get().(*[bufferSize]byte)
		n, err := r.stream.Read(b[:])
		werr := r.put(b[:n], &msgs)
		clear(msgs[:])
		buffers.Put(b)
		r.out += uint64(n)
		r.moved.Add(uint64(n))
		switch {
		case werr != nil:
			return fmt.Errorf("flow: %w", werr)
		case err == io.EOF: //nolint:errorlint // as io.Reader says
			if err := r.flow.CloseWrite(); err != nil && !errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("flow: end of stream: %w", err)
			}
			return nil
		case err != nil:
			return fmt.Errorf("read: %w", err)
		}
	}
}

// put writes p, cut into messages that the flow carries.
func (r *Relay) put(p []byte, msgs *[batch][]byte) error {
	for len(p) > 0 {
		size := r.flow.MaxMessage()
		n := 0
		for ; n < batch && len(p) > 0; n++ {
			k := min(size, len(p))
			msgs[n], p = p[:k], p[k:]
		}
		if _, err := r.flow.WriteBatch(msgs[:n]); err != nil {
			return err
		}
	}
	return nil
}

// receive carries from the flow to the stream. Its end is nil.
func (r *Relay) receive() error {
	small := make([]byte, waitSize)
	for {
		n, err := r.flow.Read(small)
		if err == nil && n > 0 {
			var werr error
			n, err, werr = r.forward(small, n)
			r.in += uint64(n)
			r.moved.Add(uint64(n))
			if werr != nil {
				return fmt.Errorf("write: %w", werr)
			}
		}
		switch {
		case err == io.EOF: //nolint:errorlint // as io.Reader says
			if err := r.stream.CloseWrite(); err != nil && !errors.Is(err, unix.ENOTCONN) {
				return fmt.Errorf("end of stream: %w", err)
			}
			return nil
		case err != nil:
			return fmt.Errorf("flow: %w", err)
		}
	}
}

// forward writes n bytes of small and what else the flow has ready. A Read that
// fills its buffer is followed by the rest of the message, or a mark of its end.
func (r *Relay) forward(small []byte, n int) (total int, err, werr error) {
	if n < len(small) && (!r.gather || r.flow.RxLen() == 0) {
		_, werr = r.stream.Write(small[:n])
		return n, nil, werr
	}
	b := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(b)
	copy(b[:], small[:n])
	room := len(small)
	total = n
	for err == nil && total < len(b) && (n == room || r.gather && r.flow.RxLen() > 0) {
		room = len(b) - total
		n, err = r.flow.Read(b[total:])
		total += n
		if n == 0 {
			break
		}
	}
	_, werr = r.stream.Write(b[:total])
	return total, err, werr
}
