package o7s

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/lib/frcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/ring"
)

// Conn is a stream of bytes on a flow, as TCP is one: message boundaries mean
// nothing, Read returns io.EOF exactly at the end of the peer's direction, and
// errors are *net.OpError. All methods are safe for concurrent use; a Write is
// not mixed with others.
//
// What is written is sent at once, in messages as large as the flow takes; a
// small Write is one message and one packet. A program that reads or writes
// the flow beside the Conn gets its own share of the stream.
type Conn struct {
	f *Flow

	// Deadlines in ns of nanotime; 0: none. The flow's own are set, too, but
	// its reads and writes look at them only when they wait.
	rdl, wdl atomic.Int64

	closed  atomic.Bool
	rclosed atomic.Bool  // by CloseRead
	linger  atomic.Int64 // how long Close waits, ns
}

var (
	_ net.Conn      = (*Conn)(nil)
	_ io.ReaderFrom = (*Conn)(nil)
	_ io.WriterTo   = (*Conn)(nil)
)

// netName is what net.OpError and Addr call it.
const netName = "o7s"

// closeLinger is how long Close waits for the peer to acknowledge what was
// written, unless SetLinger says otherwise: many round trips, and not long for
// a program that closes streams under a lock.
const closeLinger = time.Second

// NewConn makes a stream of a flow that carries every byte in order: one with
// in_order and loss 0 (qos.Data), or any within the machine. Other flows are
// refused with o7serr.ENOTSUP. The flow belongs to the Conn, unless it was
// refused.
func NewConn(f *Flow) (*Conn, error) {
	if !f.Direct() && frcp.ModeOf(f.QoS()) != frcp.Reliable {
		return nil, fmt.Errorf("stream over flow to %s: its qos lets the network lose or reorder packets, "+
			"allocate it with qos data (in_order, loss 0): %w", f.Name(), o7serr.ENOTSUP)
	}
	c := &Conn{f: f}
	c.linger.Store(int64(closeLinger))
	return c, nil
}

// Flow is the flow under the stream.
func (c *Conn) Flow() *Flow { return c.f }

// LocalAddr is the name the flow was allocated to, an Addr.
func (c *Conn) LocalAddr() net.Addr { return c.f.LocalAddr() }

// RemoteAddr is that name, too: ends of a flow have no names of their own.
func (c *Conn) RemoteAddr() net.Addr { return c.f.RemoteAddr() }

// opError puts an error into the words of package net; io.EOF and nil stay.
func (c *Conn) opError(op string, err error) error {
	if err == nil || err == io.EOF { //nolint:errorlint // as readers compare it
		return err
	}
	return opError(op, c.f.Name(), err)
}

func opError(op, name string, err error) error {
	if e := (*net.OpError)(nil); errors.As(err, &e) {
		return err
	}
	// OpError finds Timeout only at the error itself.
	if t, ok := err.(interface{ Timeout() bool }); (!ok || !t.Timeout()) && isTimeout(err) { //nolint:errorlint // as OpError does
		err = expired{err}
	}
	return &net.OpError{Op: op, Net: netName, Addr: Addr(name), Err: err}
}

func isTimeout(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, o7serr.ETIMEDOUT)
}

// expired makes an error with a time-out in its chain one for package net.
type expired struct{ error }

func (expired) Timeout() bool        { return true }
func (expired) Temporary() bool      { return true }
func (e expired) Unwrap() error      { return e.error }
func (expired) Is(target error) bool { return target == os.ErrDeadlineExceeded } //nolint:errorlint // sentinel

// passed reports whether a deadline is over.
func passed(dl *atomic.Int64) bool {
	t := dl.Load()
	return t != 0 && t <= nanotime()
}

// Read reads up to len(p) bytes: what is there, waiting for the first. It does
// not return 0 without an error, unless p is empty.
func (c *Conn) Read(p []byte) (int, error) {
	c.f.rmu.Lock()
	n, err := c.read(p)
	c.f.rmu.Unlock()
	return n, c.opError("read", err)
}

// read is Read with Flow.rmu held.
func (c *Conn) read(p []byte) (n int, err error) {
	f := c.f
	switch {
	case c.closed.Load():
		return 0, errClosed
	case c.rclosed.Load():
		return 0, io.EOF
	case len(p) == 0:
		return 0, nil
	case passed(&c.rdl):
		return 0, errTimedOut
	}
	f.mark = false // streams have no marks
	m, err := f.next()
	if err != nil {
		return 0, c.ended(err)
	}
	for {
		k := copy(p[n:], m[f.rest:])
		n += k
		if f.rest += k; f.rest < len(m) {
			break // p is full
		}
		f.rest = 0
		f.path.Skip()
		if n == len(p) {
			break
		}
		// More, if it is there. An error is found again by the next Read.
		if m, err = f.path.Next(); err != nil {
			break
		}
	}
	f.path.Release()
	return n, nil
}

// ended translates the error of a read: where it is the regular end of the
// stream it is io.EOF. Flow.rmu is held.
func (c *Conn) ended(err error) error {
	switch {
	case c.closed.Load():
		return errClosed
	case err == errTimedOut && c.rclosed.Load(): //nolint:errorlint // our own
		return io.EOF // CloseRead woke us
	case err == errDealloc && c.f.info.Direct && c.f.path.Peer()&(ring.Closed|ring.Down) == ring.Closed: //nolint:errorlint // our own
		// A raw flow within the machine whose other end was closed, not lost:
		// nothing is missing.
		return io.EOF
	}
	return err
}

// Write writes p. On an error n bytes of it were taken.
func (c *Conn) Write(p []byte) (int, error) {
	c.f.wmu.Lock()
	n, err := c.write(p)
	c.f.wmu.Unlock()
	return n, c.opError("write", err)
}

// chunk is the largest message that large writes are cut into, in bytes. Within
// the machine the other end shall read one while the next is written, and both
// shall find it in the cache; over a layer a message costs one look at window,
// clock and timer, however many packets it is cut into, but is read only once
// it is complete. Both were fastest between 64 and 128 KiB.
const chunk = 64 << 10

// largest is the size of the messages that a large write is cut into.
func (c *Conn) largest() int {
	return min(chunk, c.f.MaxMessage())
}

// write is Write with Flow.wmu held.
func (c *Conn) write(p []byte) (n int, err error) {
	f := c.f
	if c.closed.Load() {
		return 0, errClosed
	}
	for n < len(p) {
		if passed(&c.wdl) {
			return n, errTimedOut
		}
		k := len(p) - n
		if k > chunk || k > f.MTU() {
			k = min(k, c.largest())
		}
		if err = f.put(p[n : n+k]); err != nil {
			break
		}
		f.path.Flush()
		n += k
	}
	if err != nil && c.closed.Load() {
		err = errClosed
	}
	return n, err
}

// copyBuffer is the size of the buffers of ReadFrom, WriteTo and WriteBuffers:
// a message, or what is there of several.
const copyBuffer = chunk

var copyBuffers = sync.Pool{New: func() any { return new([copyBuffer]byte) }}

// ReadFrom writes what r has until its end; io.Copy uses it. What one Read of r
// returns is sent before the next.
func (c *Conn) ReadFrom(r io.Reader) (n int64, err error) {
	buf := copyBuffers.Get().(*[copyBuffer]byte)
	defer copyBuffers.Put(buf)
	for {
		k, rerr := r.Read(buf[:])
		if k > 0 {
			w, err := c.Write(buf[:k])
			n += int64(w)
			if err != nil {
				return n, err
			}
		}
		switch {
		case rerr == io.EOF: //nolint:errorlint // the contract of Reader
			return n, nil
		case rerr != nil:
			return n, rerr
		}
	}
}

// WriteTo reads until the end of the stream and writes that to w; io.Copy uses
// it.
func (c *Conn) WriteTo(w io.Writer) (n int64, err error) {
	buf := copyBuffers.Get().(*[copyBuffer]byte)
	defer copyBuffers.Put(buf)
	for {
		k, rerr := c.Read(buf[:])
		if k > 0 {
			m, err := w.Write(buf[:k])
			n += int64(max(m, 0))
			if err == nil && m < k {
				err = io.ErrShortWrite
			}
			if err != nil {
				return n, err
			}
		}
		switch {
		case rerr == io.EOF: //nolint:errorlint // as Read returns it
			return n, nil
		case rerr != nil:
			return n, rerr
		}
	}
}

// WriteBuffers writes the contents of v, many small buffers in one message, as
// writev does for a socket, and consumes v as net.Buffers.WriteTo does. It is
// for those who want that; net.Buffers.WriteTo itself, which knows package
// net's own streams only, makes a Write of each.
func (c *Conn) WriteBuffers(v *net.Buffers) (n int64, err error) {
	buf := copyBuffers.Get().(*[copyBuffer]byte)
	defer copyBuffers.Put(buf)
	c.f.wmu.Lock()
	for err == nil && len(*v) > 0 {
		p := (*v)[0]
		if len(*v) > 1 && len(p) < chunk {
			k := 0
			for _, b := range *v {
				if k += copy(buf[k:], b); k == len(buf) {
					break
				}
			}
			p = buf[:k]
		}
		var k int
		k, err = c.write(p)
		n += int64(k)
		consume(v, k)
	}
	c.f.wmu.Unlock()
	return n, c.opError("writev", err)
}

// consume removes n bytes from v, and what is empty in front.
func consume(v *net.Buffers, n int) {
	for len(*v) > 0 {
		if b := (*v)[0]; len(b) > n {
			(*v)[0] = b[n:]
			return
		}
		n -= len((*v)[0])
		(*v)[0] = nil
		*v = (*v)[1:]
	}
}

// CloseWrite ends this end's direction: the peer reads io.EOF after all that
// was written, and may go on writing. It waits for a Write under way. Towards a
// reference peer, which knows no end of stream, it has no effect there.
func (c *Conn) CloseWrite() error {
	if c.closed.Load() {
		return c.opError("close", errClosed)
	}
	return c.opError("close", c.f.CloseWrite())
}

// CloseRead makes reads, present and later ones, return io.EOF. The peer learns
// nothing; it is blocked once it has filled the flow.
func (c *Conn) CloseRead() error {
	if c.closed.Load() {
		return c.opError("close", errClosed)
	}
	c.f.rto.mu.Lock() // SetReadDeadline does not undo it
	defer c.f.rto.mu.Unlock()
	c.rclosed.Store(true)
	return c.opError("close", waitError(c.f.path.SetDeadline(ring.DirRead, epoch)))
}

// SetLinger bounds how long Close waits until the peer has acknowledged what
// was written; 0: not at all, negative: as long as the flow tries. The default
// is a second. Nothing is thrown away when the time is over: the flow goes on
// trying while the process lives.
func (c *Conn) SetLinger(d time.Duration) {
	if d < 0 {
		d = 1<<63 - 1
	}
	c.linger.Store(int64(d))
}

// Close ends both directions and releases the flow. Calls under way return
// net.ErrClosed at once. What was written is still delivered, see SetLinger.
func (c *Conn) Close() error {
	if c.closed.Swap(true) {
		return c.opError("close", errClosed)
	}
	f := c.f
	if f.Direct() {
		return c.opError("close", c.lost(f.Close())) // the peer has everything
	}
	done := make(chan error, 1)
	go func() { done <- f.Close() }()
	wait := time.NewTimer(time.Duration(c.linger.Load()))
	defer wait.Stop()
	select {
	case err := <-done:
		return c.opError("close", c.lost(err))
	case <-wait.C:
		return nil // it goes on
	}
}

// Abort ends the stream as after a failure: the peer's Read returns ErrDown, not
// io.EOF, and what was written may be lost. It is for those who relay a stream
// that broke, so that the rest of it is not taken for the whole.
func (c *Conn) Abort() error {
	if c.closed.Swap(true) {
		return c.opError("close", errClosed)
	}
	return c.opError("close", c.lost(c.f.Abort()))
}

// lost drops the error of closing a flow that somebody closed beside the Conn,
// or whose client did.
func (c *Conn) lost(err error) error {
	if err == errClosed { //nolint:errorlint // our own
		return nil
	}
	return err
}

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline makes reads, present and later ones, fail after t, also when
// there is something to read; zero: never. The error is os.ErrDeadlineExceeded
// and o7serr.ETIMEDOUT.
func (c *Conn) SetReadDeadline(t time.Time) error {
	if c.closed.Load() {
		return c.opError("set", errClosed)
	}
	c.f.rto.mu.Lock()
	defer c.f.rto.mu.Unlock()
	c.rdl.Store(mono(t))
	if c.rclosed.Load() {
		return nil
	}
	c.f.rto.deadline = t
	return c.opError("set", waitError(c.f.path.SetDeadline(ring.DirRead, t)))
}

// SetWriteDeadline does so for writes. A Write that fails so may have written
// a part, which it tells.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	if c.closed.Load() {
		return c.opError("set", errClosed)
	}
	c.wdl.Store(mono(t))
	return c.opError("set", c.f.SetWriteDeadline(t))
}

// mono is a deadline in ns of nanotime, 0 for none.
func mono(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	if d := int64(t.Sub(epoch)); d != 0 {
		return d
	}
	return 1
}
