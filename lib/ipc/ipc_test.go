package ipc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/o7serr"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// daemon runs serve for every connection to a socket in a fresh directory.
func daemon(t *testing.T, serve func(*Conn)) string {
	t.Helper()
	dir := t.TempDir()
	l, err := Listen(SocketPath(dir), 0o666)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return dir
}

func client(t *testing.T, d Dialer) *Client {
	t.Helper()
	c, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func openFDs(t *testing.T) int {
	t.Helper()
	e, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(e)
}

func TestCall(t *testing.T) {
	before := openFDs(t)
	dir := daemon(t, func(c *Conn) {
		for {
			r, err := c.RecvRequest()
			if err != nil {
				return
			}
			switch r.Op {
			case OpHello:
				c.Reply(r.ID, HelloResult{Version: "x", PID: c.Peer().PID}, nil)
			case OpAlloc:
				rd, wr, _ := os.Pipe()
				wr.WriteString("through a passed descriptor")
				c.Reply(r.ID, FlowResult{Flow: 7}, nil, int(rd.Fd()))
				rd.Close()
				wr.Close()
			default:
				c.Reply(r.ID, nil, o7serr.Wrap(o7serr.ENAME, "name %q", "n"))
			}
		}
	})
	c := client(t, Dialer{RunDir: dir})
	var h HelloResult
	if _, err := c.Call(t.Context(), OpHello, HelloArgs{Prog: "test"}, &h); err != nil {
		t.Fatal(err)
	}
	if h.Version != "x" || int(h.PID) != os.Getpid() {
		t.Errorf("hello: %+v", h)
	}
	var f FlowResult
	fds, err := c.Call(t.Context(), OpAlloc, AllocArgs{Name: "n"}, &f)
	if err != nil || len(fds) != 1 || f.Flow != 7 {
		t.Fatalf("alloc: %v, %v, %+v", fds, err, f)
	}
	if flags, err := unix.FcntlInt(uintptr(fds[0]), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Error("descriptor is not close-on-exec")
	}
	file := os.NewFile(uintptr(fds[0]), "pipe")
	b, _ := io.ReadAll(file)
	file.Close()
	if string(b) != "through a passed descriptor" {
		t.Errorf("read %q", b)
	}
	_, err = c.Call(t.Context(), OpBind, BindArgs{}, nil)
	if !errors.Is(err, o7serr.ENAME) || !strings.Contains(err.Error(), `name "n"`) {
		t.Errorf("refusal: %v", err)
	}
	c.Close()
	if n := openFDs(t); n > before+3 { // listener, its lock, the server's end
		t.Errorf("%d descriptors open, %d before", n, before)
	}
}

// Results longer than a message arrive whole, also side by side and with
// descriptors, and one that nobody waits for any more disturbs nobody.
func TestLongResults(t *testing.T) {
	var wg sync.WaitGroup
	defer wg.Wait()
	dir := daemon(t, func(c *Conn) {
		defer wg.Wait()
		for {
			r, err := c.RecvRequest()
			if err != nil {
				return
			}
			var a DeallocArgs
			json.Unmarshal(r.Args, &a)
			wg.Go(func() { c.Reply(r.ID, strings.Repeat(string(rune('a'+a.Flow%26)), int(a.Flow)), nil, 0) })
		}
	})
	c := client(t, Dialer{RunDir: dir})
	var calls sync.WaitGroup
	for _, n := range []uint32{0, 1, partSize - 2, partSize - 1, partSize, MaxMessage, 3 * MaxMessage, 4<<20 + 3} {
		calls.Go(func() {
			var got string
			fds, err := c.Call(t.Context(), OpShow, DeallocArgs{Flow: n}, &got)
			if err != nil || len(got) != int(n) || strings.Trim(got, string(rune('a'+n%26))) != "" || len(fds) != 1 {
				t.Errorf("%d bytes: got %d, %v, %v", n, len(got), fds, err)
			}
			CloseFDs(fds)
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	calls.Go(func() {
		_, err := c.Call(ctx, OpShow, DeallocArgs{Flow: 4 << 20}, nil)
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	cancel()
	calls.Wait()
}

func TestConcurrentCallsAndOrder(t *testing.T) {
	dir := daemon(t, func(c *Conn) {
		var held []Request
		for {
			r, err := c.RecvRequest()
			if err != nil {
				return
			}
			if held = append(held, r); len(held) < 50 {
				continue
			}
			for i := len(held) - 1; i >= 0; i-- { // out of order
				c.Reply(held[i].ID, json.RawMessage(held[i].Args), nil)
				c.Event(FlowEvent{Flow: uint32(held[i].ID), Type: "up"})
			}
			held = nil
		}
	})
	var seen sync.Map
	c := client(t, Dialer{RunDir: dir, OnEvent: func(e FlowEvent) {
		if _, ok := seen.Load(uint64(e.Flow)); !ok {
			t.Errorf("event of request %d before its reply was handled", e.Flow)
		}
	}})
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			err := c.Do(t.Context(), OpDealloc, DeallocArgs{Flow: uint32(i)}, func(r Reply, _ []int) error {
				var a DeallocArgs
				json.Unmarshal(r.Result, &a)
				if a.Flow != uint32(i) {
					t.Errorf("request %d got the reply of %d", i, a.Flow)
				}
				seen.Store(r.ID, true)
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// A cancelled alloc tells the daemon, and when the flow comes all the same its
// descriptors are closed and it is released.
func TestCancel(t *testing.T) {
	got := make(chan Request, 10)
	release := make(chan struct{})
	dir := daemon(t, func(c *Conn) {
		alloc, err := c.RecvRequest()
		if err != nil {
			return
		}
		got <- alloc
		r, _ := c.RecvRequest()
		got <- r
		<-release
		c.Reply(alloc.ID, FlowResult{Flow: 99}, nil, 0)
		r, _ = c.RecvRequest()
		got <- r
		c.RecvRequest()
	})
	c := client(t, Dialer{RunDir: dir})
	ctx, cancel := context.WithCancel(t.Context())
	var before int
	go func() {
		<-got // the connection is accepted
		before = openFDs(t)
		cancel()
	}()
	if _, err := c.Call(ctx, OpAlloc, AllocArgs{}, nil); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if r := <-got; r.Op != OpCancel || string(r.Args) != `{"id":1}` {
		t.Errorf("after cancel the daemon got %s %s", r.Op, r.Args)
	}
	close(release)
	if r := <-got; r.Op != OpDealloc || string(r.Args) != `{"flow":99}` {
		t.Errorf("after the late reply the daemon got %s %s", r.Op, r.Args)
	}
	if n := openFDs(t); n != before {
		t.Errorf("%d descriptors open, %d before", n, before)
	}
}

// What comes for a caller that has given up goes to OnLate; DoAll does not give
// up, but gets what the daemon says.
func TestLate(t *testing.T) {
	got := make(chan Request, 10)
	dir := daemon(t, func(c *Conn) {
		for {
			first, err := c.RecvRequest()
			if err != nil {
				return
			}
			cancel, err := c.RecvRequest()
			if err != nil {
				return
			}
			got <- cancel
			c.Reply(first.ID, FlowResult{Flow: 7}, nil, 0)
		}
	})
	late := make(chan int, 1)
	c := client(t, Dialer{RunDir: dir, OnLate: func(r Reply, fds []int) error {
		CloseFDs(fds)
		late <- len(fds)
		return nil
	}})
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := c.Call(ctx, OpAlloc, AllocArgs{}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	if n := <-late; n != 1 {
		t.Errorf("%d descriptors", n)
	}
	if r := <-got; r.Op != OpCancel {
		t.Errorf("the daemon got %s", r.Op)
	}
	ctx2, cancel2 := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel2()
	var flow string
	err := c.DoAll(ctx2, OpAccept, AcceptArgs{}, func(r Reply, fds []int) error {
		CloseFDs(fds)
		flow = string(r.Result)
		return nil
	})
	if err != nil || !strings.Contains(flow, `"flow":7`) {
		t.Errorf("%q, %v", flow, err)
	}
	if r := <-got; r.Op != OpCancel {
		t.Errorf("the daemon got %s", r.Op)
	}
}

func TestDaemonDies(t *testing.T) {
	dir := daemon(t, func(c *Conn) { c.RecvRequest() }) // closes after the first request
	down := make(chan error, 1)
	c := client(t, Dialer{RunDir: dir, OnDown: func(err error) { down <- err }})
	_, err := c.Call(t.Context(), OpAccept, AcceptArgs{}, nil)
	if !errors.Is(err, o7serr.EIRMD) || !strings.Contains(err.Error(), dir) {
		t.Errorf("pending call: %v", err)
	}
	if err := <-down; !errors.Is(err, o7serr.EIRMD) {
		t.Errorf("OnDown: %v", err)
	}
	if _, err := c.Call(t.Context(), OpAccept, AcceptArgs{}, nil); !errors.Is(err, o7serr.EIRMD) {
		t.Errorf("later call: %v", err)
	}
}

func TestNoDaemon(t *testing.T) {
	dir := t.TempDir()
	_, err := Dial(t.Context(), dir)
	want := "cannot talk to the resource manager at " + dir + "/irm.sock: is `o7s-router daemon` running? (no such file or directory)"
	if !errors.Is(err, o7serr.EIRMD) || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestListen(t *testing.T) {
	// Longer than a socket address has room for.
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := SocketPath(dir)
	l, err := Listen(path, 0o660)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("socket: %v, %v", fi, err)
	}
	if _, err := Listen(path, 0o660); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("second daemon: %v", err)
	}
	c, err := Dial(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if p := srv.Peer(); int(p.PID) != os.Getpid() || int(p.UID) != os.Getuid() || !p.InGroup(uint32(os.Getgid())) {
		t.Errorf("peer %+v", p)
	}
	fd, err := srv.PIDFD()
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.PidfdSendSignal(fd, 0, nil, 0); err != nil {
		t.Errorf("pidfd: %v", err)
	}
	unix.Close(fd)
	srv.Close()
	c.Close()
	l.Close()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket is left: %v", err)
	}
	// What a killed daemon leaves is replaced; what is no socket is not.
	ul, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	stale := ul.Addr().String()
	ul.SetUnlinkOnClose(false)
	ul.Close()
	if l, err = Listen(stale, 0o600); err != nil {
		t.Fatalf("over a stale socket: %v", err)
	}
	l.Close()
	os.WriteFile(stale, nil, 0o600)
	if _, err := Listen(stale, 0o600); err == nil {
		t.Error("replaced a file that is not a socket")
	}
}

func TestMalformed(t *testing.T) {
	a, b, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer b.Close()
	raw := func(p []byte, fds ...int) {
		t.Helper()
		var oob []byte
		if len(fds) > 0 {
			oob = unix.UnixRights(fds...)
		}
		if _, _, err := a.uc.WriteMsgUnix(p, oob, nil); err != nil {
			t.Fatal(err)
		}
	}
	many := make([]int, MaxFDs+1)
	for i := range many {
		many[i] = 1
	}
	before := openFDs(t)
	raw([]byte("{"), 1, 1)
	raw([]byte(`{"id":"x"}`), 1)
	raw([]byte(`{"id":1}`))
	raw([]byte(`{"op":"hello"}`))
	raw(bytes.Repeat([]byte(" "), MaxMessage+1), 1)
	raw([]byte(`{"id":1,"op":"x"}`), many...)
	for i := range 6 {
		if _, err := b.RecvRequest(); !errors.Is(err, ErrMalformed) {
			t.Errorf("packet %d: %v", i, err)
		}
	}
	raw([]byte(`{"id":1,"op":"hello","unknown":[]}`), 1)
	if r, err := b.RecvRequest(); err != nil || r.Op != OpHello {
		t.Errorf("connection is spoilt: %+v, %v", r, err)
	}
	if n := openFDs(t); n != before {
		t.Errorf("%d descriptors open, %d before", n, before)
	}
	if err := a.Send(strings.Repeat("x", MaxMessage)); !errors.Is(err, o7serr.EMSGSIZE) {
		t.Errorf("sending a long message: %v", err)
	}
}

func TestSlowReader(t *testing.T) {
	a, b, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer b.Close()
	for err == nil {
		err = a.Event(FlowEvent{Flow: 1, Type: "up"})
	}
	if !errors.Is(err, o7serr.EAGAIN) {
		t.Errorf("full queue: %v", err)
	}
	a.SetSendDeadline(time.Now().Add(-1))
	if err := a.Send(Reply{}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("send deadline: %v", err)
	}
}

func FuzzRecv(f *testing.F) {
	f.Add([]byte(`{"id":1,"op":"alloc","args":{"name":"n","qos":{"loss":1}}}`))
	f.Add([]byte(`{"id":18446744073709551616,"op":1}`))
	f.Add([]byte("\x00"))
	a, b, err := Pair()
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { a.Close(); b.Close() })
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) == 0 || len(p) > 2*MaxMessage-4096 {
			return
		}
		if _, _, err := a.uc.WriteMsgUnix(p, nil, nil); err != nil {
			t.Skip(err)
		}
		if r, err := b.RecvRequest(); err == nil && (r.ID == 0 || r.Op == "") {
			t.Errorf("accepted %+v", r)
		} else if err != nil && !errors.Is(err, ErrMalformed) {
			t.Errorf("connection error %v", err)
		}
	})
}
