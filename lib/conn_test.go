package o7s

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/net/nettest"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// streams makes the two ends of a stream within the machine.
func (d *fake) streams(t testing.TB, q *qos.Spec) (a, b *Conn) {
	t.Helper()
	x, y := d.pairQoS(t, d.client(t), d.client(t), q)
	var err error
	if a, err = NewConn(x); err != nil {
		t.Fatal(err)
	}
	if b, err = NewConn(y); err != nil {
		t.Fatal(err)
	}
	return a, b
}

func TestNetConn(t *testing.T) {
	for name, q := range map[string]*qos.Spec{"data": &qos.Data, "raw": &qos.Raw} {
		t.Run(name, func(t *testing.T) {
			d := newFake(t)
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				a, b := d.streams(t, q)
				return a, b, func() { a.Close(); b.Close() }, nil
			})
		})
	}
}

// The same over a network that loses and reorders: packets of the end-to-end
// protocol.
func TestNetConnNetwork(t *testing.T) {
	for name, rate := range map[string]float64{"clean": 0, "lossy": 0.02} {
		t.Run(name, func(t *testing.T) {
			d := newFake(t)
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				x, y, hx, hy := d.wired(t, qos.Data, &wire{loss: rate, swap: rate})
				d.mu.Lock()
				d.peers[x.ID()], d.peers[y.ID()] = hy, hx
				d.mu.Unlock()
				a, err := NewConn(x)
				if err != nil {
					return nil, nil, nil, err
				}
				b, err := NewConn(y)
				if err != nil {
					return nil, nil, nil, err
				}
				return a, b, func() { b.Close(); a.Close() }, nil // b never waits
			})
		})
	}
}

// stream is one end of a stream whose other end, a program of messages, the
// test has.
func (d *fake) stream(t *testing.T, q *qos.Spec) (*Conn, *Flow) {
	t.Helper()
	x, y := d.pairQoS(t, d.client(t), d.client(t), q)
	c, err := NewConn(x)
	if err != nil {
		t.Fatal(err)
	}
	return c, y
}

func TestStreamReads(t *testing.T) {
	d := newFake(t)
	c, f := d.stream(t, &qos.Data)
	if c.Flow().Name() != "direct" || c.LocalAddr() != Addr("direct") || c.RemoteAddr() != Addr("direct") {
		t.Errorf("%v, %v", c.LocalAddr(), c.RemoteAddr())
	}
	read := func(size int, want string) {
		t.Helper()
		p := make([]byte, size)
		if n, err := c.Read(p); err != nil || string(p[:n]) != want {
			t.Errorf("read %q, %v, want %q", p[:n], err, want)
		}
	}
	for _, m := range []string{"abc", "", "def", "", "ghijkl"} {
		if _, err := f.Write([]byte(m)); err != nil {
			t.Fatal(err)
		}
	}
	read(0, "")
	read(3, "abc") // exactly filled: no mark follows
	read(2, "de")
	read(5, "fghij") // the end of one message and the start of the next
	read(100, "kl")
	if _, err := c.Write(nil); err != nil || f.RxLen() != 0 {
		t.Errorf("empty write: %v, %d messages", err, f.RxLen())
	}
	// The end, while a read waits and for ever after; the other direction goes
	// on.
	done := make(chan error)
	go func() {
		_, err := c.Read(make([]byte, 1))
		done <- err
	}()
	if err := f.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != io.EOF {
		t.Errorf("end: %v", err)
	}
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("end: %d, %v", n, err)
	}
	greet(t, c, "still here")
	hear(t, f, "still here")
}

func TestHalfClose(t *testing.T) {
	for name, q := range map[string]*qos.Spec{"data": &qos.Data, "raw": &qos.Raw} {
		t.Run(name, func(t *testing.T) {
			d := newFake(t)
			a, b := d.streams(t, q)
			greet(t, a, "question")
			if err := errors.Join(a.CloseWrite(), a.CloseWrite()); err != nil {
				t.Error(err)
			}
			if _, err := a.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
				t.Errorf("write after the end: %v", err)
			}
			if got, err := io.ReadAll(b); err != nil || string(got) != "question" {
				t.Errorf("%q, %v", got, err)
			}
			greet(t, b, "answer")
			if err := b.Close(); err != nil {
				t.Error(err)
			}
			if got, err := io.ReadAll(a); err != nil || string(got) != "answer" {
				t.Errorf("%q, %v", got, err)
			}
			if err := a.Close(); err != nil {
				t.Error(err)
			}
			for what, err := range map[string]error{
				"close": a.Close(), "close write": a.CloseWrite(), "close read": a.CloseRead(), "deadline": a.SetDeadline(time.Time{}),
				"read": second(a.Read(nil)), "write": second(a.Write([]byte("x"))),
			} {
				var op *net.OpError
				if !errors.Is(err, net.ErrClosed) || !errors.As(err, &op) || op.Net != "o7s" || op.Timeout() {
					t.Errorf("%s after close: %v", what, err)
				}
			}
		})
	}
}

func second(_ int, err error) error { return err }

func TestCloseRead(t *testing.T) {
	d := newFake(t)
	a, b := d.streams(t, &qos.Data)
	done := make(chan error)
	go func() {
		_, err := a.Read(make([]byte, 1))
		done <- err
	}()
	time.Sleep(time.Millisecond)
	if err := a.CloseRead(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != io.EOF {
		t.Errorf("read: %v", err)
	}
	a.SetReadDeadline(time.Now().Add(time.Hour))
	if _, err := a.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read: %v", err)
	}
	greet(t, a, "writes go on")
	hear(t, b, "writes go on")
}

// What the flow suffers from, in the words of package net.
func TestStreamErrors(t *testing.T) {
	d := newFake(t)
	check := func(what string, err error, timeout bool, is ...error) {
		t.Helper()
		ne, ok := err.(*net.OpError)
		if !ok || ne.Timeout() != timeout || ne.Addr == nil {
			t.Errorf("%s: %T %v", what, err, err)
		}
		for _, target := range is {
			if !errors.Is(err, target) {
				t.Errorf("%s: %v is not %v", what, err, target)
			}
		}
	}
	buf := make([]byte, 10)
	open := func() (*Conn, *held) {
		f, h := d.flow1(t, d.client(t), &qos.Data)
		c, err := NewConn(f)
		if err != nil {
			t.Fatal(err)
		}
		c.SetLinger(0)
		t.Cleanup(func() { c.Flow().SetLinger(0); c.Close() })
		return c, h
	}
	c, h := open()
	c.SetDeadline(time.Now().Add(5 * time.Millisecond))
	check("read deadline", second(c.Read(buf)), true, os.ErrDeadlineExceeded, o7serr.ETIMEDOUT, syscall.ETIMEDOUT)
	check("write deadline", second(c.Write(buf)), true, os.ErrDeadlineExceeded, o7serr.ETIMEDOUT)
	c.SetDeadline(time.Time{})
	h.event(t, "dealloc")
	check("released", second(c.Read(buf)), false, ErrDown, o7serr.EFLOWDOWN, syscall.ECONNRESET)
	check("released", second(c.Write(buf)), false, ErrDown, syscall.EPIPE)

	c, h = open()
	h.event(t, "peer")
	check("peer", second(c.Read(buf)), true, ErrPeer, o7serr.EFLOWPEER, syscall.ETIMEDOUT)
	if _, err := c.Read(buf); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a silent peer is no deadline: %v", err)
	}

	// A program within the machine that died, where Close is the end.
	a, b := d.streams(t, &qos.Data)
	f := b.Flow()
	if err := f.session.ipc.Close(); err != nil {
		t.Error(err)
	}
	d.mu.Lock()
	ends := d.ends[f.ID()]
	d.mu.Unlock()
	for _, e := range ends {
		_ = e.Event(ipc.FlowEvent{Flow: f.ID(), Type: "dealloc"}) // one is gone
	}
	check("peer died", second(a.Read(buf)), false, ErrDown, syscall.ECONNRESET)

	// One that says that it failed.
	for _, q := range []*qos.Spec{&qos.Data, &qos.Raw} {
		a, b := d.streams(t, q)
		greet(t, b, "half of i")
		if err := b.Abort(); err != nil {
			t.Error(err)
		}
		hear(t, a, "half of i")
		check("aborted", second(a.Read(buf)), false, ErrDown, syscall.ECONNRESET)
		check("aborted here", second(b.Read(buf)), false, net.ErrClosed)
		check("aborted here", b.Close(), false, net.ErrClosed)
	}

	c, _ = open()
	d.stop()
	check("daemon gone", second(c.Read(buf)), false, ErrNoDaemon, o7serr.EIRMD)
	d.start()
}

// Streams are copied whole, whatever the sizes.
func TestCopy(t *testing.T) {
	d := newFake(t)
	data := make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	for _, q := range []*qos.Spec{&qos.Data, nil} {
		var a, b *Conn
		if q != nil {
			a, b = d.streams(t, q)
		} else { // over the network
			x, y, hx, hy := d.wired(t, qos.Data, &wire{})
			d.mu.Lock()
			d.peers[x.ID()], d.peers[y.ID()] = hy, hx
			d.mu.Unlock()
			a, _ = NewConn(x)
			b, _ = NewConn(y)
		}
		sent := make(chan error, 1)
		go func() {
			n, err := io.Copy(a, bytes.NewReader(data[:1<<20])) // ReadFrom
			if err == nil && n != 1<<20 {
				err = fmt.Errorf("copied %d", n)
			}
			if err == nil {
				_, err = a.Write(data[1<<20 : 2<<20])
			}
			var list net.Buffers
			for rest := data[2<<20:]; len(rest) > 0; {
				k := min(len(rest), 1+len(list)*37%5000)
				list = append(list, rest[:k], nil)
				rest = rest[k:]
			}
			if err == nil {
				_, err = a.WriteBuffers(&list)
			}
			if err == nil && len(list) > 0 {
				err = fmt.Errorf("%d buffers left", len(list))
			}
			sent <- errors.Join(err, a.CloseWrite())
		}()
		var got bytes.Buffer
		if n, err := io.Copy(&got, b); err != nil || n != int64(len(data)) || !bytes.Equal(got.Bytes(), data) { // WriteTo
			t.Errorf("copied %d, %v", n, err)
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
		b.Close()
		a.Close()
	}
	// Errors of the other side of a copy are its own.
	a, b := d.streams(t, &qos.Data)
	if n, err := a.ReadFrom(iotest.TimeoutReader(bytes.NewReader(make([]byte, 200000)))); n != copyBuffer || err != iotest.ErrTimeout {
		t.Errorf("copied %d, %v", n, err)
	}
	if n, err := b.WriteTo(brokenWriter{}); n != 0 || err != io.ErrShortWrite {
		t.Errorf("copied %d, %v", n, err)
	}
}

// Whatever the sizes of writes and reads: the bytes that come out are those
// that went in.
func TestStreamProperty(t *testing.T) {
	d := newFake(t)
	c1, c2 := d.client(t), d.client(t)
	rapid.Check(t, func(rt *rapid.T) {
		q := rapid.SampledFrom([]*qos.Spec{&qos.Raw, &qos.Data}).Draw(rt, "qos")
		x, y := d.pairQoS(t, c1, c2, q)
		a, err := NewConn(x)
		if err != nil {
			rt.Fatal(err)
		}
		b, err := NewConn(y)
		if err != nil {
			rt.Fatal(err)
		}
		size := rapid.OneOf(rapid.IntRange(0, 20), rapid.IntRange(0, 3000), rapid.IntRange(0, 600000))
		writes := rapid.SliceOfN(size, 0, 12).Draw(rt, "writes")
		reads := rapid.SliceOfN(rapid.OneOf(rapid.IntRange(1, 20), rapid.IntRange(1, 100000)), 1, 5).Draw(rt, "reads")
		how := rapid.SliceOfN(rapid.IntRange(0, 3), 1, 5).Draw(rt, "how")
		var want []byte
		for i, n := range writes {
			for k := range n {
				want = append(want, byte(k*7+i))
			}
		}
		sent := make(chan error, 1)
		go func() {
			rest := want
			var list net.Buffers
			for i, n := range writes {
				p := rest[:n]
				rest = rest[n:]
				var err error
				switch how[i%len(how)] {
				case 0:
					_, err = a.Write(p)
				case 1:
					_, err = a.ReadFrom(iotest.HalfReader(bytes.NewReader(p)))
				case 2: // with the next
					list = append(list, p)
					if i+1 < len(writes) && how[(i+1)%len(how)] == 2 {
						continue
					}
					_, err = a.WriteBuffers(&list)
				case 3: // a program of messages at the other end
					for err == nil && len(p) > 0 {
						k := min(len(p), x.MaxMessage())
						_, err = x.Write(p[:k])
						p = p[k:]
					}
				}
				if err != nil {
					sent <- err
					return
				}
			}
			sent <- a.Close()
		}()
		var got []byte
		for i := 0; ; i++ {
			buf := make([]byte, reads[i%len(reads)])
			n, err := b.Read(buf)
			got = append(got, buf[:n]...)
			if err == io.EOF {
				break
			}
			if err != nil || n == 0 {
				rt.Fatalf("read %d, %v", n, err)
			}
		}
		if err := errors.Join(<-sent, b.Close()); err != nil || !bytes.Equal(got, want) {
			rt.Fatalf("%d bytes of %d, %v", len(got), len(want), err)
		}
	})
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, nil }

// Close of a stream whose peer does not answer does not keep its caller, and
// the flow goes on trying.
func TestCloseLingers(t *testing.T) {
	d := newFake(t)
	f, h := d.flow1(t, d.client(t), &qos.Data)
	c, err := NewConn(f)
	if err != nil {
		t.Fatal(err)
	}
	greet(t, c, "is anybody there?")
	c.SetLinger(5 * time.Millisecond)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	d.mu.Lock()
	freed := slices.Contains(d.freed, f.ID())
	d.mu.Unlock()
	if freed {
		t.Error("the flow was released although its data is not acknowledged")
	}
	h.event(t, "dealloc") // ends it
	eventually(t, "release", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return slices.Contains(d.freed, f.ID())
	})
}

func TestConnAllocatesNothing(t *testing.T) {
	d := newFake(t)
	a, b := d.streams(t, &qos.Data)
	a.SetDeadline(time.Now().Add(time.Hour))
	buf := make([]byte, 3000)
	if n := testing.AllocsPerRun(1000, func() {
		for range 4 {
			if _, err := a.Write(buf[:1000]); err != nil {
				t.Fatal(err)
			}
		}
		for k := 0; k < 4000; {
			n, err := b.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			k += n
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
