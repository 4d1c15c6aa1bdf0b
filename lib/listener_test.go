package o7s

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

func (d *fake) listen(t *testing.T, c *Client, names ...string) *Listener {
	t.Helper()
	l, err := c.Listen(t.Context(), names...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// eventually waits until ok holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen", what)
		}
	}
}

func (d *fake) pending() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.wait)
}

func (d *fake) isBound(name string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.bound[name]
}

// greet writes a word to a stream, and hear reads one.
func greet(t *testing.T, c net.Conn, word string) {
	t.Helper()
	if _, err := io.WriteString(c, word); err != nil {
		t.Error(err)
	}
}

func hear(t *testing.T, c io.Reader, word string) {
	t.Helper()
	got := make([]byte, len(word))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != word {
		t.Errorf("read %q, %v, want %q", got, err, word)
	}
}

func TestListen(t *testing.T) {
	d := newFake(t)
	server, client := d.client(t), &Dialer{Client: d.client(t)}
	l := d.listen(t, server, "direct")
	if !d.isBound("direct") || l.Addr().String() != "direct" || l.Addr().Network() != "o7s" {
		t.Errorf("listens on %v, bound %v", l.Addr(), d.bound)
	}
	for i := range 20 {
		c, err := client.Dial("tcp", "direct")
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		greet(t, c, fmt.Sprint("hello ", i))
		hear(t, s, fmt.Sprint("hello ", i))
		if q := s.(*Conn).Flow().QoS(); q != qos.Data {
			t.Errorf("qos %+v", q)
		}
		if err := errors.Join(s.Close(), c.Close()); err != nil {
			t.Error(err)
		}
	}
	// Close wakes Accept up, and leaves nothing at the daemon.
	done := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		done <- err
	}()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: %v", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: %v", err)
	}
	if err := l.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second close: %v", err)
	}
	if err := l.SetDeadline(time.Now()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("deadline: %v", err)
	}
	eventually(t, "end of the accepts", func() bool { return d.pending() == 0 })
	if d.isBound("direct") {
		t.Error("the name is still bound")
	}
}

// The flows of a process come through one queue, whichever name they are for.
func TestListenMany(t *testing.T) {
	d := newFake(t)
	server, other, client := d.client(t), d.client(t), &Dialer{Client: d.client(t)}
	// Two listeners of one client, and one of another in the same process; the
	// fourth name is for Accept.
	d.mu.Lock()
	d.bound["direct"] = true // by somebody else
	d.mu.Unlock()
	one, both := d.listen(t, server, "direct2"), d.listen(t, other, "direct3")
	const n = 30
	var wg sync.WaitGroup
	serve := func(accept func() (io.ReadWriteCloser, error), name string) {
		wg.Go(func() {
			for i := range n {
				s, err := accept()
				if err != nil {
					t.Errorf("accept %d for %s: %v", i, name, err)
					return
				}
				wg.Go(func() {
					hear(t, s, name+";")
					if err := s.Close(); err != nil {
						t.Error(err)
					}
				})
			}
		})
	}
	serve(func() (io.ReadWriteCloser, error) { return one.Accept() }, "direct2")
	serve(func() (io.ReadWriteCloser, error) { return both.Accept() }, "direct3")
	serve(func() (io.ReadWriteCloser, error) { return server.Accept(t.Context()) }, "direct")
	for _, name := range []string{"direct", "direct2", "direct3"} {
		wg.Go(func() {
			for range n {
				c, err := client.DialContext(t.Context(), "o7s", name)
				if err != nil {
					t.Error(err)
					return
				}
				greet(t, c, name+";")
				wg.Go(func() {
					if k, err := c.Read(make([]byte, 1)); err != io.EOF {
						t.Errorf("%s: %d, %v", name, k, err)
					}
					c.Close()
				})
			}
		})
	}
	wg.Wait()
	if err := errors.Join(one.Close(), both.Close()); err != nil {
		t.Error(err)
	}
	eventually(t, "end of the accepts", func() bool { return d.pending() == 0 })
	if !d.isBound("direct") || d.isBound("direct2") || d.isBound("direct3") {
		t.Errorf("bound: %v", d.bound)
	}
}

func TestListenErrors(t *testing.T) {
	d := newFake(t)
	c := d.client(t)
	l := d.listen(t, c, "direct", "direct2", "direct")
	if n := l.Names(); len(n) != 2 || l.Addr().String() != "direct,direct2" {
		t.Errorf("names %v at %v", n, l.Addr())
	}
	if _, err := d.client(t).Listen(t.Context(), "direct2"); !errors.Is(err, o7serr.EEXIST) {
		t.Errorf("second listener: %v", err)
	}
	if _, err := c.Listen(t.Context()); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("no name: %v", err)
	}
	d.mu.Lock()
	d.deny = true
	d.bound["direct3"] = true
	d.mu.Unlock()
	d.listen(t, c, "direct3") // bound by an operator: no rights needed
	_, err := c.Listen(t.Context(), "secret")
	if !errors.Is(err, os.ErrPermission) || !errors.Is(err, o7serr.EPERM) || !strings.Contains(err.Error(), "irm bind program test name secret") {
		t.Errorf("no rights: %v", err)
	}
	d.mu.Lock()
	d.deny = false
	d.mu.Unlock()
	d.listen(t, c, "secret").Close() // nothing is left of the failure

	// Deadlines and contexts.
	if err := l.SetDeadline(time.Now().Add(-1)); err != nil {
		t.Error(err)
	}
	_, err = l.Accept()
	if !errors.Is(err, os.ErrDeadlineExceeded) || !err.(net.Error).Timeout() {
		t.Errorf("past deadline: %v", err)
	}
	l.SetDeadline(time.Time{})
	done := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		done <- err
	}()
	l.SetDeadline(time.Now().Add(time.Hour))
	l.SetDeadline(time.Now().Add(10 * time.Millisecond))
	if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
	l.SetDeadline(time.Time{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, err := l.AcceptConn(ctx)
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("context: %v", err)
	}
	// The client goes, and its listeners with it.
	go func() {
		_, err := l.Accept()
		done <- err
	}()
	c.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept of a closed client: %v", err)
	}
	if d.isBound("direct") || d.isBound("direct2") {
		t.Errorf("still bound: %v", d.bound)
	}
	if _, err := c.Listen(t.Context(), "direct"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("listen of a closed client: %v", err)
	}
}

// A backlog is bounded: what is more waits at the daemon.
func TestBacklog(t *testing.T) {
	d := newFake(t)
	l, err := ListenConfig{Client: d.client(t), Backlog: 2}.Listen(t.Context(), "direct")
	if err != nil {
		t.Fatal(err)
	}
	client := &Dialer{Client: d.client(t)}
	const n = 2 + listenerAccepts - 1 // with what was pending when it became full
	for i := range n {
		c, err := client.Dial("", "direct")
		if err != nil {
			t.Fatal(i, err)
		}
		greet(t, c, fmt.Sprint(i))
	}
	eventually(t, "full backlog", func() bool { return len(l.queue) == n && d.pending() == 0 })
	late := make(chan error, 1)
	go func() {
		c, err := client.Dial("", "direct")
		if err == nil {
			_, err = io.WriteString(c, "x")
		}
		late <- err
	}()
	heard := map[string]bool{}
	for range n + 1 {
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1)
		if _, err := s.Read(b); err != nil {
			t.Error(err)
		}
		heard[string(b)] = true
	}
	if err := <-late; err != nil || len(heard) != n+1 {
		t.Errorf("%v; heard %v", err, heard)
	}
	// Those that wait when the listener closes are closed, too.
	c, err := client.DialConn(t.Context(), "direct")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "arrival", func() bool { return len(l.queue) == 1 })
	l.Close()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, ErrDown) {
		t.Errorf("read from a stream that nobody accepted: %v", err)
	}
}

// A flow that cannot be a stream is not handed out; a flow for nobody neither.
func TestMisfits(t *testing.T) {
	d := newFake(t)
	client := d.client(t)
	f, h := d.flow1(t, client, &qos.BestEffort)
	if _, err := NewConn(f); !errors.Is(err, o7serr.ENOTSUP) || !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("stream over an unreliable flow: %v", err)
	}
	h.end.Close()
	f.Close()
	if _, err := (&Dialer{Client: client, QoS: &qos.Raw}).Dial("tcp", "held"); !errors.Is(err, o7serr.ENOTSUP) {
		t.Errorf("dial: %v", err)
	}
	(<-d.held).end.Close()

	d.listen(t, d.client(t), "direct2")
	c, err := (&Dialer{Client: client}).DialConn(t.Context(), "direct3") // nobody's name
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, ErrDown) {
		t.Errorf("read from a flow for nobody: %v", err)
	}
}

// Accept keeps its meaning while it shares the queue.
func TestAcceptBeside(t *testing.T) {
	d := newFake(t)
	server, client := d.client(t), d.client(t)
	// A call that waits when the listener comes.
	got := make(chan *Flow, 1)
	go func() {
		f, err := server.Accept(t.Context())
		if err != nil {
			t.Error(err)
		}
		got <- f
	}()
	eventually(t, "accept", func() bool { return d.pending() == 1 })
	l := d.listen(t, server, "direct2")
	if _, err := client.Alloc(t.Context(), "direct2", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Accept(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Alloc(t.Context(), "direct", nil); err != nil {
		t.Fatal(err)
	}
	if f := <-got; f == nil || f.Name() != "direct" {
		t.Errorf("accepted %v", f)
	}
	// A flow that comes between two calls waits for the next.
	if _, err := client.Alloc(t.Context(), "direct3", nil); err != nil {
		t.Fatal(err)
	}
	if f, err := server.Accept(t.Context()); err != nil || f.Name() != "direct3" {
		t.Errorf("accepted %v, %v", f, err)
	}
	l.Close()
	eventually(t, "end of the accepts", func() bool { return d.pending() == 0 })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := server.Accept(ctx); !errors.Is(err, o7serr.ETIMEDOUT) {
		t.Errorf("accept: %v", err)
	}
	eventually(t, "end of the accept", func() bool { return d.pending() == 0 })
}

// A daemon that goes away and comes back.
func TestListenRestart(t *testing.T) {
	d := newFake(t)
	l := d.listen(t, d.client(t), "direct")
	eventually(t, "accepts", func() bool { return d.pending() == listenerAccepts })
	d.stop()
	_, err := l.Accept()
	var ne net.Error
	if !errors.Is(err, o7serr.EIRMD) || !errors.As(err, &ne) || !ne.Temporary() || ne.Timeout() { //nolint:staticcheck // what http.Server asks
		t.Fatalf("accept without a daemon: %v", err)
	}
	d.mu.Lock()
	clear(d.bound)
	d.mu.Unlock()
	d.start()
	c := make(chan net.Conn, 1)
	go func() {
		s, err := l.Accept()
		for err != nil && err.(net.Error).Temporary() { //nolint:staticcheck // what http.Server asks
			s, err = l.Accept()
		}
		if err != nil {
			t.Error(err)
		}
		c <- s
	}()
	eventually(t, "binding", func() bool { return d.isBound("direct") })
	if _, err := (&Dialer{Client: d.client(t)}).Dial("o7s", "direct"); err != nil {
		t.Fatal(err)
	}
	if <-c == nil {
		t.Error("no stream")
	}
}

func TestDialer(t *testing.T) {
	d := newFake(t)
	dialer := &Dialer{Client: d.client(t)}
	d.listen(t, d.client(t), "direct")
	c, err := dialer.DialContext(t.Context(), "tcp", "direct:80")
	if err != nil {
		t.Fatal(err)
	}
	if c.RemoteAddr().String() != "direct" || c.LocalAddr().Network() != "o7s" {
		t.Errorf("%v to %v", c.LocalAddr(), c.RemoteAddr())
	}
	_, err = dialer.Dial("tcp", "nobody:80")
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "dial" || op.Addr.String() != "nobody:80" || !errors.Is(err, o7serr.ENAME) || op.Timeout() {
		t.Errorf("unknown name: %v", err)
	}
	if c, err := dialer.Dial("udp", "direct"); c != nil || !errors.As(err, new(net.UnknownNetworkError)) {
		t.Errorf("network: %v, %v", c, err)
	}
	for name, want := range map[string]string{"a:80": "a", "a:b": "", ":80": "", "a:": "", "a": "", "a:b:1": "a:b"} {
		if got, ok := withoutPort(name); got != want || ok != (want != "") {
			t.Errorf("%q without port: %q, %v", name, got, ok)
		}
	}
	lonely := newFake(t) // nobody accepts there
	dialer = &Dialer{Client: lonely.client(t), Timeout: 10 * time.Millisecond}
	_, err = dialer.Dial("o7s", "direct")
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, o7serr.ETIMEDOUT) || !err.(net.Error).Timeout() {
		t.Errorf("time-out: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(5*time.Millisecond, cancel)
	if _, err = (&Dialer{Client: lonely.client(t)}).DialContext(ctx, "o7s", "direct"); !errors.Is(err, context.Canceled) || err.(net.Error).Timeout() {
		t.Errorf("cancelled: %v", err)
	}
	away := New(Options{RunDir: t.TempDir(), Prog: "test"})
	if _, err := (&Dialer{Client: away}).Dial("o7s", "direct"); !errors.Is(err, o7serr.EIRMD) || !errors.Is(err, syscall.ENETDOWN) {
		t.Errorf("no daemon: %v", err)
	}
	if _, err := away.Listen(t.Context(), "direct"); !errors.Is(err, o7serr.EIRMD) {
		t.Errorf("no daemon: %v", err)
	}
}
