package o7s

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/ring"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(withDaemon{m}) }

// withDaemon runs tests and examples; for the examples the package's client has
// a daemon.
type withDaemon struct{ m *testing.M }

func (w withDaemon) Run() int {
	dir, err := os.MkdirTemp("", "o7s")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	os.Setenv("O7S_RUN_DIR", dir)
	d := makeFake(nil, dir)
	defer d.leave()
	defer std.Close()
	return w.m.Run()
}

// fake is a daemon with just enough of one. What a flow is depends on its name:
// "held" leaves the other end to the test, those of direct lead to whoever accepts,
// "app" uses a device (a socket here), every other name is refused.
type fake struct {
	t    testing.TB
	dir  string
	l    *ipc.Listener
	wg   sync.WaitGroup
	held chan *held
	tap  chan *os.File // the network's side of a program's device

	mu      sync.Mutex // guards what follows
	ahead   string     // what the rings of an "app" have before its reply
	hello   ipc.HelloArgs
	conns   []*ipc.Conn
	flow    uint32
	taps    map[*ipc.Conn]bool
	wait    []acceptor
	came    *sync.Cond // wait or stopped has changed
	stopped bool
	bound   map[string]bool // names that the process is bound to
	deny    bool            // binding is refused
	freed   []uint32
	ends    map[uint32][2]*ipc.Conn // of direct flows
	peers   map[uint32]*held        // who is told when a flow is released
	// Rings: what is shared by whom, and the fake's own ends.
	waits  map[*ipc.Conn]int
	shares map[[2]*ipc.Conn]*ring.Share
	desk   ring.Desk
}

type held struct {
	end    *ring.End
	flow   uint32
	conn   *ipc.Conn
	handle uint32
}

type acceptor struct {
	conn *ipc.Conn
	id   uint64
}

func newFake(t testing.TB) *fake {
	d := makeFake(t, t.TempDir())
	t.Cleanup(d.leave)
	return d
}

func makeFake(t testing.TB, dir string) *fake {
	d := &fake{t: t, dir: dir, held: make(chan *held, 100), tap: make(chan *os.File, 1),
		taps: map[*ipc.Conn]bool{}, ends: map[uint32][2]*ipc.Conn{}, bound: map[string]bool{}, peers: map[uint32]*held{},
		waits: map[*ipc.Conn]int{}, shares: map[[2]*ipc.Conn]*ring.Share{}}
	d.came = sync.NewCond(&d.mu)
	d.start()
	return d
}

// fakePID is what the fake takes every process for.
const fakePID = 4711

func (d *fake) start() {
	d.stopped = false
	l, err := ipc.Listen(ipc.SocketPath(d.dir), 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	d.l = l
	d.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			d.mu.Lock()
			d.conns = append(d.conns, c)
			d.mu.Unlock()
			d.wg.Go(func() { d.serve(c) })
		}
	})
}

func (d *fake) stop() {
	d.l.Close()
	d.mu.Lock()
	for _, c := range d.conns {
		c.Close()
	}
	d.conns, d.wait = nil, nil
	d.stopped = true
	d.came.Broadcast()
	d.mu.Unlock()
	d.wg.Wait()
}

// leave gives up what the fake has of rings.
func (d *fake) leave() {
	d.stop()
	d.desk.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.shares {
		s.Abandon()
	}
	for _, fd := range d.waits {
		unix.Close(fd)
	}
}

// rings makes rings between the programs behind two connections; nil is the
// fake itself. The descriptors stay the fake's.
func (d *fake) rings(a, b *ipc.Conn) (g [2]ring.Grant, fds [2][]int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	var waits [2]int
	for i, c := range []*ipc.Conn{a, b} {
		if _, ok := d.waits[c]; !ok {
			fd, err := ring.NewWaitFD()
			must(err)
			d.waits[c] = fd
		}
		waits[i] = d.waits[c]
	}
	key := [2]*ipc.Conn{a, b}
	s := d.shares[key]
	if s == nil {
		var err error
		s, err = ring.NewShare(uint32(len(d.shares)), ring.DefaultCapacity, waits)
		must(err)
		d.shares[key] = s
	}
	slot, err := s.Take()
	must(err)
	for side := range g {
		g[side] = ring.Grant{Slab: s.ID, Slot: slot, Side: side, NewSlab: true, NewWait: true}
		own := s.FDs(side)
		fds[side] = append([]int{waits[side]}, own[:]...)
	}
	return g, fds
}

// open opens an end in the fake itself.
func (d *fake) open(g ring.Grant, fds []int) *ring.End {
	own := make([]int, len(fds))
	for i, fd := range fds {
		var err error
		if own[i], err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			panic(err)
		}
	}
	e, _, err := d.desk.Open(g, own, ring.Config{})
	if err != nil {
		panic(err)
	}
	return e
}

func (d *fake) serve(c *ipc.Conn) {
	defer c.Close()
	for {
		r, err := c.RecvRequest()
		if err != nil {
			return
		}
		switch r.Op {
		case ipc.OpHello:
			d.mu.Lock()
			json.Unmarshal(r.Args, &d.hello)
			d.mu.Unlock()
			c.Reply(r.ID, ipc.HelloResult{PID: fakePID}, nil)
		case ipc.OpAlloc:
			var a ipc.AllocArgs
			json.Unmarshal(r.Args, &a)
			if direct(a.Name) { // it may wait for an accept, which may come the same way
				d.wg.Go(func() { d.alloc(c, r) })
				break
			}
			d.alloc(c, r)
		case ipc.OpAccept:
			var a ipc.AcceptArgs
			json.Unmarshal(r.Args, &a)
			if a.TimeoutMS == 1 {
				c.Reply(r.ID, nil, o7serr.ETIMEDOUT)
				break
			}
			d.mu.Lock()
			d.wait = append(d.wait, acceptor{c, r.ID})
			d.came.Broadcast()
			d.mu.Unlock()
		case ipc.OpCancel:
			var a ipc.CancelArgs
			json.Unmarshal(r.Args, &a)
			d.mu.Lock()
			n := len(d.wait)
			d.wait = slices.DeleteFunc(d.wait, func(w acceptor) bool { return w == acceptor{c, a.ID} })
			found := len(d.wait) < n
			d.mu.Unlock()
			if found {
				c.Reply(a.ID, nil, o7serr.EPIPE)
			}
			c.Reply(r.ID, struct{}{}, nil)
		case ipc.OpList:
			var a ipc.ListArgs
			json.Unmarshal(r.Args, &a)
			var list ipc.ListResult
			d.mu.Lock()
			if d.bound[a.Prefix] {
				list.Names = []ipc.NameInfo{{Name: a.Prefix, Processes: []int32{fakePID}}}
			}
			d.mu.Unlock()
			c.Reply(r.ID, list, nil)
		case ipc.OpBind, ipc.OpUnbind:
			var a ipc.BindArgs
			json.Unmarshal(r.Args, &a)
			d.mu.Lock()
			var err error
			switch on := r.Op == ipc.OpBind; {
			case d.deny:
				err = o7serr.EPERM
			case a.PID != fakePID || on == d.bound[a.Name]:
				err = o7serr.EINVAL
			default:
				d.bound[a.Name] = on
			}
			d.mu.Unlock()
			c.Reply(r.ID, struct{}{}, err)
		case ipc.OpDealloc:
			var a ipc.DeallocArgs
			json.Unmarshal(r.Args, &a)
			d.mu.Lock()
			d.freed = append(d.freed, a.Flow)
			ends, peer := d.ends[a.Flow], d.peers[a.Flow]
			delete(d.ends, a.Flow)
			d.mu.Unlock()
			c.Reply(r.ID, struct{}{}, nil)
			if peer != nil {
				peer.conn.Event(ipc.FlowEvent{Flow: peer.flow, Type: "dealloc"})
			}
			for _, e := range ends {
				if e != nil && e != c {
					e.Event(ipc.FlowEvent{Flow: a.Flow, Type: "dealloc"})
				}
			}
		default:
			c.Reply(r.ID, nil, o7serr.Wrap(o7serr.EIPCP, "no broadcast layer"))
		}
	}
}

func direct(name string) bool {
	return slices.Contains([]string{"direct", "direct2", "direct3"}, name) || strings.HasSuffix(name, ".example")
}

func (d *fake) alloc(c *ipc.Conn, r ipc.Request) {
	var a ipc.AllocArgs
	json.Unmarshal(r.Args, &a)
	d.mu.Lock()
	d.flow++
	id := d.flow
	d.mu.Unlock()
	res := ipc.FlowResult{Flow: id, Name: a.Name, QoS: a.QoS, MTU: 1500}
	switch {
	case a.Name == "held":
		g, fds := d.rings(c, nil)
		res.Ring = g[0]
		c.Reply(r.ID, res, nil, fds[0]...)
		d.held <- &held{end: d.open(g[1], fds[1]), flow: id, conn: c}
	case direct(a.Name):
		res.Direct = true
		d.mu.Lock()
		for len(d.wait) == 0 && !d.stopped {
			d.came.Wait()
		}
		if d.stopped {
			d.mu.Unlock()
			return
		}
		acc := d.wait[0]
		d.wait = d.wait[1:]
		d.ends[id] = [2]*ipc.Conn{c, acc.conn}
		d.mu.Unlock()
		g, fds := d.rings(c, acc.conn)
		res.Ring = g[0]
		c.Reply(r.ID, res, nil, fds[0]...)
		res.Ring = g[1]
		acc.conn.Reply(acc.id, res, nil, fds[1]...)
	case a.Name == "app":
		res.App = &ipc.AppPort{Handle: id<<16 | 5, Headroom: 32}
		g, fds := d.rings(c, nil)
		res.Ring = g[0]
		d.mu.Lock()
		has, ahead := d.taps[c], d.ahead
		d.taps[c] = true
		d.mu.Unlock()
		if !has {
			s, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				panic(err)
			}
			defer unix.Close(s[1])
			d.tap <- os.NewFile(uintptr(s[0]), "network")
			res.App.NewFD = true
			fds[0] = append(fds[0], s[1])
		}
		end := d.open(g[1], fds[1])
		if ahead != "" { // came before the device had the flow
			_ = end.Write([]byte(ahead))
		}
		c.Reply(r.ID, res, nil, fds[0]...)
		d.held <- &held{end: end, flow: id, conn: c, handle: res.App.Handle}
	default:
		c.Reply(r.ID, nil, o7serr.Wrap(o7serr.ENAME, "name %s", a.Name))
	}
}

func (d *fake) client(t testing.TB) *Client {
	c := New(Options{RunDir: d.dir, Prog: "test"})
	t.Cleanup(func() { c.Close() })
	return c
}

// flow allocates a flow whose other end the test has.
func (d *fake) flow1(t *testing.T, c *Client, q *qos.Spec) (*Flow, *held) {
	t.Helper()
	f, err := c.Alloc(t.Context(), "held", q)
	if err != nil {
		t.Fatal(err)
	}
	h := <-d.held
	t.Cleanup(func() { h.end.Close() })
	return f, h
}

// pair allocates a flow between two clients.
func (d *fake) pair(t *testing.T, a, b *Client) (x, y *Flow) {
	t.Helper()
	return d.pairQoS(t, a, b, nil)
}

func (d *fake) pairQoS(t testing.TB, a, b *Client, q *qos.Spec) (x, y *Flow) {
	t.Helper()
	done := make(chan error)
	go func() {
		var err error
		y, err = b.Accept(t.Context())
		done <- err
	}()
	x, err := a.Alloc(t.Context(), "direct", q)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return x, y
}

func TestAlloc(t *testing.T) {
	d := newFake(t)
	c := d.client(t)
	f, _ := d.flow1(t, c, &qos.Spec{Loss: 1, BER: 1, Timeout: 1000})
	if f.FD() != 64 || f.QoS().Timeout != 1000 || f.Name() != "held" || f.MTU() != 1500 {
		t.Errorf("flow %d: %+v", f.FD(), f.info)
	}
	if d.hello.Prog != "test" {
		t.Errorf("announced as %q", d.hello.Prog)
	}
	g, _ := d.flow1(t, c, nil)
	if g.FD() != 65 || g.QoS() != qos.Raw {
		t.Errorf("flow %d: %+v", g.FD(), g.QoS())
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	d.mu.Lock()
	if len(d.freed) != 1 || d.freed[0] != f.ID() {
		t.Errorf("daemon was told to free %v", d.freed)
	}
	d.mu.Unlock()
	if h, _ := d.flow1(t, c, nil); h.FD() != 64 {
		t.Errorf("lowest free descriptor is not used again: %d", h.FD())
	}
	if _, err := c.Alloc(t.Context(), "nobody", nil); !errors.Is(err, o7serr.ENAME) {
		t.Errorf("refusal: %v", err)
	}
	if _, err := c.Join(t.Context(), "layer"); !errors.Is(err, o7serr.EIPCP) {
		t.Errorf("join: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := c.Accept(ctx); !errors.Is(err, o7serr.ETIMEDOUT) {
		t.Errorf("accept: %v", err)
	}
	ctx2, cancel2 := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel2()
	if _, err := c.Accept(ctx2); !errors.Is(err, o7serr.ETIMEDOUT) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("accept: %v", err)
	}
	c.Close()
	if _, err := g.Write([]byte("x")); !errors.Is(err, net.ErrClosed) || !errors.Is(err, o7serr.ENOTALLOC) {
		t.Errorf("write after the client was closed: %v", err)
	}
	if _, err := c.Alloc(t.Context(), "held", nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("alloc after close: %v", err)
	}
}

func TestProgName(t *testing.T) {
	for want, args := range map[string][]string{
		"oping":  {"/usr/bin/oping", "-l"},
		"srv.py": {"/usr/bin/python3.11", "-u", "/opt/srv.py", "x"},
		"python": {"python"},
		"":       nil,
	} {
		if got := progName(args); got != want {
			t.Errorf("%q: %q, want %q", args, got, want)
		}
	}
}

func TestReadSemantics(t *testing.T) {
	d := newFake(t)
	f, h := d.flow1(t, d.client(t), nil)
	read := func(size int, want string) {
		t.Helper()
		p := make([]byte, size)
		n, err := f.Read(p)
		if err != nil || string(p[:n]) != want {
			t.Errorf("read %q, %v, want %q", p[:n], err, want)
		}
	}
	send := func(s string) {
		t.Helper()
		if err := h.end.Write([]byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	send("")
	send("abc")
	if f.RxLen() != 2 {
		t.Errorf("%d in the queue", f.RxLen())
	}
	read(10, "abc") // the keep-alive is not seen
	send("abc")
	send("def")
	read(3, "abc") // exactly filled: the end is marked
	read(3, "")
	read(2, "de") // partial
	read(2, "f")
	send("abcdef")
	read(3, "abc")
	read(3, "def")
	read(3, "")
	f.SetFlags(RDWR | RNOPART | RNOBLOCK)
	send("abcdef")
	if _, err := f.Read(make([]byte, 3)); !errors.Is(err, o7serr.EMSGSIZE) {
		t.Errorf("long message without partial reads: %v", err)
	}
	if _, err := f.Read(make([]byte, 3)); !errors.Is(err, o7serr.EAGAIN) {
		t.Errorf("empty queue without blocking: %v", err)
	}
	send("abc")
	read(3, "abc")
	send("d")
	read(3, "d")
	for i := range 5 {
		send(strings.Repeat("x", i)) // the first is a keep-alive
	}
	bufs, sizes := [][]byte{make([]byte, 2), make([]byte, 2), make([]byte, 2), make([]byte, 2), nil}, make([]int, 5)
	if n, err := f.ReadBatch(bufs, sizes); n != 4 || err != nil || sizes[3] != 4 || sizes[0] != 1 {
		t.Errorf("batch: %d, %v, %v", n, sizes, err)
	}
	if err := f.SetFlags(3); !errors.Is(err, o7serr.EINVAL) {
		t.Errorf("access mode 3: %v", err)
	}
	f.SetFlags(RDONLY)
	if _, err := f.Write(nil); !errors.Is(err, o7serr.EPERM) {
		t.Errorf("write to a read-only flow: %v", err)
	}
	f.SetFlags(WRONLY | DOWN)
	if _, err := f.Read(make([]byte, 1)); !errors.Is(err, o7serr.EPERM) {
		t.Errorf("read from a write-only flow: %v", err)
	}
	if h.end.Peer() != ring.Down || f.Flags() != WRONLY|DOWN {
		t.Errorf("the other end sees %v, flags %o", h.end.Peer(), f.Flags())
	}
	f.SetFlags(Default)
	if _, err := f.Write(make([]byte, 1501)); !errors.Is(err, o7serr.EMSGSIZE) {
		t.Errorf("message over the MTU: %v", err)
	}
}

func TestDeadlines(t *testing.T) {
	d := newFake(t)
	f, _ := d.flow1(t, d.client(t), nil)
	p := make([]byte, 1500)
	expired := func(err error) {
		t.Helper()
		var ne net.Error
		if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, o7serr.ETIMEDOUT) || !errors.As(err, &ne) || !ne.Timeout() {
			t.Errorf("got %v", err)
		}
	}
	f.SetReadDeadline(time.Now().Add(2 * time.Millisecond))
	_, err := f.Read(p)
	expired(err)
	f.SetReadDeadline(time.Time{})
	f.SetReadTimeout(2 * time.Millisecond)
	for range 3 {
		_, err = f.Read(p)
		expired(err)
	}
	f.SetReadTimeout(0)
	go func() {
		time.Sleep(2 * time.Millisecond)
		f.SetReadDeadline(time.Now())
	}()
	_, err = f.Read(p)
	expired(err)
	f.SetWriteTimeout(2 * time.Millisecond)
	for err = nil; err == nil; {
		_, err = f.Write(p)
	}
	expired(err)
	f.SetWriteTimeout(0)
	f.SetFlags(RDWR | WNOBLOCK)
	if _, err = f.Write(p); !errors.Is(err, o7serr.EAGAIN) {
		t.Errorf("full queue without blocking: %v", err)
	}
	if n := f.TxLen(); n < 100 {
		t.Errorf("%d messages in the full queue", n)
	}
	f.SetFlags(Default)
	go func() {
		time.Sleep(2 * time.Millisecond)
		f.SetDeadline(past)
	}()
	_, err = f.Write(p)
	expired(err)
}

// Whatever ends a flow, messages that came before are read, then the reason is
// told, also to a reader that is blocked already.
func TestEnds(t *testing.T) {
	d := newFake(t)
	for name, c := range map[string]struct {
		end   func(*Flow, *held)
		want  o7serr.Errno
		event Event
		write error
	}{
		"daemon reports down":    {func(f *Flow, h *held) { h.conn.Event(ipc.FlowEvent{Flow: h.flow, Type: "down"}) }, o7serr.EFLOWDOWN, EventDown, o7serr.EFLOWDOWN},
		"daemon reports dealloc": {func(f *Flow, h *held) { h.conn.Event(ipc.FlowEvent{Flow: h.flow, Type: "dealloc"}) }, o7serr.EFLOWDOWN, EventDealloc, o7serr.EFLOWDOWN},
		"daemon reports peer":    {func(f *Flow, h *held) { h.conn.Event(ipc.FlowEvent{Flow: h.flow, Type: "peer"}) }, o7serr.EFLOWPEER, EventPeer, nil},
		"other end closed":       {func(f *Flow, h *held) { h.end.Shut() }, o7serr.EFLOWDOWN, 0, o7serr.EFLOWDOWN},
		"other end down":         {func(f *Flow, h *held) { h.end.SetState(ring.Down) }, o7serr.EFLOWDOWN, 0, o7serr.EFLOWDOWN},
		"closed":                 {func(f *Flow, h *held) { f.Close() }, o7serr.ENOTALLOC, 0, net.ErrClosed},
		"daemon dies":            {func(f *Flow, h *held) { h.conn.Close() }, o7serr.EIRMD, EventDown, o7serr.EIRMD},
	} {
		t.Run(name, func(t *testing.T) {
			cl := d.client(t)
			f, h := d.flow1(t, cl, nil)
			h.end.Write([]byte("last"))
			got := make(chan error, 1)
			first := make(chan bool)
			go func() {
				p := make([]byte, 100)
				if n, err := f.Read(p); string(p[:n]) != "last" {
					t.Errorf("read %q, %v", p[:n], err)
				}
				close(first)
				_, err := f.Read(p)
				got <- err
			}()
			<-first
			time.Sleep(time.Millisecond) // most likely asleep; it must not matter
			c.end(f, h)
			if err := <-got; !errors.Is(err, c.want) {
				t.Errorf("reader got %v", err)
			}
			if _, err := f.Read(make([]byte, 1)); !errors.Is(err, c.want) {
				t.Errorf("later reader got %v", err)
			}
			if _, err := f.Write([]byte("x")); !errors.Is(err, c.write) {
				t.Errorf("writer got %v", err)
			}
			if c.event != 0 {
				if e := <-f.Events(); e != c.event {
					t.Errorf("event %v", e)
				}
			}
			if name == "daemon reports down" {
				h.conn.Event(ipc.FlowEvent{Flow: h.flow, Type: "up"})
				if e := <-f.Events(); e != EventUp {
					t.Errorf("event %v", e)
				}
				if _, err := f.Write([]byte("x")); err != nil {
					t.Errorf("write to a flow that is up again: %v", err)
				}
			}
			f.Close()
			for range f.Events() { // ends
			}
		})
	}
}

// A flow between two programs outlives the daemon, and the client finds a new one.
func TestDaemonRestart(t *testing.T) {
	d := newFake(t)
	a, b := d.client(t), d.client(t)
	x, y := d.pair(t, a, b)
	d.stop()
	if _, err := a.Alloc(t.Context(), "held", nil); !errors.Is(err, o7serr.EIRMD) {
		t.Errorf("without a daemon: %v", err)
	}
	p := make([]byte, 10)
	for range 3 {
		if _, err := x.Write([]byte("still")); err != nil {
			t.Fatal(err)
		}
		if n, err := y.Read(p); err != nil || string(p[:n]) != "still" {
			t.Fatalf("%q, %v", p[:n], err)
		}
	}
	d.start()
	if f, _ := d.flow1(t, a, nil); f.FD() != 64 {
		t.Errorf("descriptor %d", f.FD())
	}
	if err := x.Close(); err != nil {
		t.Error(err)
	}
	if _, err := y.Read(p); !errors.Is(err, o7serr.EFLOWDOWN) {
		t.Errorf("after the other end closed: %v", err)
	}
	y.Close()
}

// Keep-alives every T/4; a peer that is silent for T is reported, to a blocked
// reader too; one that sends keep-alives is not.
func TestKeepAlive(t *testing.T) {
	d := newFake(t)
	q := qos.Raw
	q.Timeout = 200
	f, h := d.flow1(t, d.client(t), &q)
	start := time.Now()
	go func() {
		for range 3 { // alive until 150 ms
			time.Sleep(50 * time.Millisecond)
			h.end.Write(nil)
		}
	}()
	if _, err := f.Read(make([]byte, 1)); !errors.Is(err, o7serr.EFLOWPEER) {
		t.Errorf("read: %v", err)
	}
	if took := time.Since(start); took < 340*time.Millisecond {
		t.Errorf("peer declared dead after %v", took)
	}
	if e := <-f.Events(); e != EventPeer {
		t.Errorf("event %v", e)
	}
	if n := h.end.RxLen(100); n < 4 || n > 7 {
		t.Errorf("%d keep-alives in 350 ms", n)
	}
	// Written messages do for keep-alives.
	f, h2 := d.flow1(t, d.client(t), &q)
	for range 10 {
		f.Write([]byte("x"))
		time.Sleep(10 * time.Millisecond)
	}
	if n := h2.end.RxLen(100); n != 10 {
		t.Errorf("%d packets where 10 messages were written", n)
	}
}

func TestNoAllocation(t *testing.T) {
	d := newFake(t)
	x, y := d.pair(t, d.client(t), d.client(t))
	msg, p := make([]byte, 1000), make([]byte, 1500)
	batch, bufs, sizes := [][]byte{msg, msg}, [][]byte{p, p}, make([]int, 2)
	go func() { // blocked reads, too
		q := make([]byte, 1500)
		for {
			n, err := y.Read(q)
			if err != nil {
				return
			}
			y.Write(q[:n])
		}
	}()
	x.SetReadTimeout(time.Minute)
	n := testing.AllocsPerRun(500, func() {
		x.SetReadDeadline(time.Now().Add(time.Minute))
		x.Write(msg)
		x.Read(p)
		x.WriteBatch(batch)
		for got := 0; got < 2; {
			n, _ := x.ReadBatch(bufs, sizes)
			got += n
		}
	})
	if n > 0 {
		t.Errorf("%v allocations", n)
	}
	y.Close()
}

func TestConcurrent(t *testing.T) {
	d := newFake(t)
	x, y := d.pair(t, d.client(t), d.client(t))
	var wg sync.WaitGroup
	const writers, each = 4, 2000
	for w := range writers {
		wg.Go(func() {
			m := make([]byte, 300)
			for i := range each {
				binary.NativeEndian.PutUint64(m, uint64(w*each+i))
				if _, err := x.Write(m[:8+i%200]); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	var mu sync.Mutex
	seen := map[uint64]bool{}
	for range 2 {
		wg.Go(func() {
			p := make([]byte, 1000)
			for {
				n, err := y.Read(p)
				if errors.Is(err, os.ErrDeadlineExceeded) {
					return
				}
				v := binary.NativeEndian.Uint64(p)
				mu.Lock()
				if err != nil || n != 8+int(v%each)%200 || seen[v] {
					t.Errorf("message %d of %d bytes: %v", v, n, err)
				}
				seen[v] = true
				if len(seen) == writers*each {
					y.SetReadDeadline(past)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(seen) != writers*each {
		t.Errorf("%d of %d messages", len(seen), writers*each)
	}
}

var past = time.Unix(1, 0)

// 1000 flows leave nothing behind.
func TestNothingLeft(t *testing.T) {
	d := newFake(t)
	a, b := d.client(t), d.client(t)
	x, y := d.pair(t, a, b)
	x.Close()
	y.Close()
	count := func() (fds, maps int) {
		e, _ := os.ReadDir("/proc/self/fd")
		m, _ := os.ReadFile("/proc/self/maps")
		return len(e), bytes.Count(m, []byte("o7s-ring"))
	}
	fds, before := count()
	for range 1000 {
		x, y := d.pair(t, a, b)
		x.Write([]byte("x"))
		y.Read(make([]byte, 10))
		x.Close()
		y.Close()
	}
	eventually(t, "the end of descriptors and mappings", func() bool { // the daemon closes its own in its own time
		now, maps := count()
		return now <= fds && maps <= before
	})
}

// network plays XDP behind a device: it sends frames of a flow and checks what
// comes out of it.
func network(handle uint32, offset int, payload string) []byte {
	b := make([]byte, max(offset+len(payload), 60)) // padded, as Ethernet does
	binary.LittleEndian.PutUint32(b, handle)
	binary.LittleEndian.PutUint16(b[4:], uint16(offset))
	binary.LittleEndian.PutUint16(b[6:], uint16(len(payload)))
	copy(b[offset:], payload)
	return b
}

// A device on which packets of others never end keeps nobody.
func TestFloodedDevice(t *testing.T) {
	zero, err := os.Open("/dev/zero") // frames without end, none of them ours
	if err != nil {
		t.Fatal(err)
	}
	defer zero.Close()
	tap := &tap{fd: int(zero.Fd())}
	if !tap.drain(true, func() bool { return false }) {
		t.Error("the device was found empty")
	}
}

func TestApp(t *testing.T) {
	d := newFake(t)
	c := d.client(t)
	var flows [3]*Flow
	var ends [3]*held
	for i := range flows {
		var err error
		if flows[i], err = c.Alloc(t.Context(), "app", nil); err != nil {
			t.Fatal(err)
		}
		ends[i] = <-d.held
		defer ends[i].end.Close()
	}
	tap := <-d.tap
	defer tap.Close()
	p := make([]byte, 1500)
	if _, err := flows[1].Write([]byte("out")); err != nil {
		t.Fatal(err)
	}
	n, err := tap.Read(p)
	if err != nil || n != 32+3 || binary.LittleEndian.Uint32(p) != ends[1].handle || string(p[32:n]) != "out" {
		t.Errorf("frame % x, %v", p[:n], err)
	}
	// Everything that is not a packet of one of our flows is ignored.
	for _, b := range [][]byte{
		{1}, make([]byte, 60), network(99, 40, "no such flow"), network(ends[0].handle, 2, "bad offset"),
		network(ends[0].handle, 40, ""), append(network(ends[0].handle, 40, ""), 1),
		{byte(ends[0].handle), 0, byte(ends[0].handle >> 16), 0, 40, 0, 100, 0, 1, 2, 3},
	} {
		tap.Write(b)
	}
	// Three readers: one leads, the others follow; then each leads in turn.
	for round := range 50 {
		var wg sync.WaitGroup
		for i := range flows {
			wg.Go(func() {
				q := make([]byte, 100)
				n, err := flows[i].Read(q)
				if want := fmt.Sprintf("round %d flow %d", round, i); err != nil || string(q[:n]) != want {
					t.Errorf("read %q, %v, want %q", q[:n], err, want)
				}
			})
		}
		if round%10 == 0 {
			time.Sleep(time.Millisecond) // all asleep
		}
		for i := range flows {
			i = (i + round) % 3
			m := fmt.Sprintf("round %d flow %d", round, i)
			if (round+i)%5 == 0 { // by way of the daemon
				ends[i].end.Write([]byte(m))
			} else {
				tap.Write(network(ends[i].handle, 40, m))
			}
		}
		wg.Wait()
	}
	// Deadlines of a leader and of a follower.
	var wg sync.WaitGroup
	for _, f := range flows[:2] {
		f.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
		wg.Go(func() {
			if _, err := f.Read(make([]byte, 10)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("deadline: %v", err)
			}
			f.SetReadDeadline(time.Time{})
		})
	}
	wg.Wait()
	// Without a reader packets wait; nobody blocks.
	flows[2].SetFlags(RDWR | NONBLOCK)
	if _, err := flows[2].Read(p); !errors.Is(err, o7serr.EAGAIN) {
		t.Errorf("nothing there: %v", err)
	}
	ends[2].conn.Event(ipc.FlowEvent{Flow: ends[2].flow, Type: "up"})
	<-flows[2].Events() // an event wakes a reader, also one that does not block
	for i := range 100 {
		tap.Write(network(ends[2].handle, 40, fmt.Sprint(i)))
	}
	// The other two wait: who of them leads may be reading the device just now.
	eventually(t, "100 messages are seen to wait", func() bool { return flows[2].RxLen() == 100 })
	// Keep-alives are noticed behind packets that nobody reads.
	before, _, _ := flows[2].path.Progress()
	tap.Write(network(ends[2].handle, 40, ""))
	eventually(t, "a keep-alive is noticed", func() bool { after, _, _ := flows[2].path.Progress(); return after == before+1 })
	for i := range 100 {
		if n, err := flows[2].Read(p); err != nil || string(p[:n]) != fmt.Sprint(i) {
			t.Fatalf("message %d: %q, %v", i, p[:n], err)
		}
	}
	// Closing wakes the leader and the follower.
	for _, f := range flows[:2] {
		wg.Go(func() {
			if _, err := f.Read(make([]byte, 10)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("closed: %v", err)
			}
		})
	}
	time.Sleep(time.Millisecond)
	flows[0].Close()
	flows[1].Close()
	wg.Wait()
	// A packet that is here before its flow is known waits for it, when
	// another flow reads the device meanwhile.
	tap.Write(network(4<<16|5, 40, "early"))
	tap.Write(network(ends[2].handle, 40, "mine"))
	if n, err := flows[2].Read(p); err != nil || string(p[:n]) != "mine" {
		t.Errorf("%q, %v", p[:n], err)
	}
	d.mu.Lock()
	d.ahead = "ahead"
	d.mu.Unlock()
	f, err := c.Alloc(t.Context(), "app", nil)
	if err != nil {
		t.Fatal(err)
	}
	e := <-d.held
	defer e.end.Close()
	for _, want := range []string{"ahead", "early"} {
		if n, err := f.Read(p); err != nil || string(p[:n]) != want {
			t.Errorf("%q, %v, want %q", p[:n], err, want)
		}
	}
	// The daemon's rings say how the flow is.
	e.end.SetState(ring.Down)
	if _, err := f.Read(p); !errors.Is(err, o7serr.EFLOWDOWN) {
		t.Errorf("down: %v", err)
	}
	e.end.Shut()
	if _, err := f.Read(p); !errors.Is(err, o7serr.EFLOWDOWN) {
		t.Errorf("closed: %v", err)
	}
}

func TestAppNoAllocation(t *testing.T) {
	d := newFake(t)
	f, err := d.client(t).Alloc(t.Context(), "app", nil)
	if err != nil {
		t.Fatal(err)
	}
	e := <-d.held
	defer e.end.Close()
	tap := <-d.tap
	defer tap.Close()
	p, out := make([]byte, 1500), network(e.handle, 40, "reply")
	go func() {
		q := make([]byte, 1500)
		for {
			if _, err := tap.Read(q); errors.Is(err, io.EOF) || errors.Is(err, os.ErrClosed) {
				return
			}
			tap.Write(out)
		}
	}()
	f.SetReadTimeout(time.Minute)
	msg := []byte("request")
	if n := testing.AllocsPerRun(500, func() {
		f.Write(msg)
		if n, err := f.Read(p); n != 5 || err != nil {
			t.Fatal(n, err)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// event makes the daemon tell of something that happened to the flow.
func (h *held) event(t *testing.T, typ string) {
	t.Helper()
	if err := h.conn.Event(ipc.FlowEvent{Flow: h.flow, Type: typ}); err != nil {
		t.Fatal(err)
	}
}
