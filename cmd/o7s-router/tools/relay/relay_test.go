package relay

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/lib/o7serr"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeFlow is one end of a flow in memory, with a flow's way with messages.
type fakeFlow struct {
	max    int
	direct bool
	in     *mailbox
	out    *mailbox

	rest []byte
	mark bool
}

// mailbox is one direction.
type mailbox struct {
	mu     sync.Mutex // guards what follows
	cond   *sync.Cond
	msgs   [][]byte
	spare  [][]byte
	ended  bool
	failed bool
}

func newMailbox() *mailbox {
	b := &mailbox{}
	b.cond = sync.NewCond(&b.mu)
	return b
}

const mailboxLimit = 16

func newFlows(max int) (a, b *fakeFlow) {
	x, y := newMailbox(), newMailbox()
	return &fakeFlow{max: max, in: x, out: y}, &fakeFlow{max: max, in: y, out: x}
}

func (f *fakeFlow) Read(p []byte) (int, error) {
	if f.mark {
		f.mark = false
		return 0, nil
	}
	b := f.in
	b.mu.Lock()
	defer b.mu.Unlock()
	if f.rest == nil {
		for len(b.msgs) == 0 && !b.ended && !b.failed {
			b.cond.Wait()
		}
		switch {
		case b.failed:
			return 0, o7serr.EFLOWDOWN
		case len(b.msgs) == 0:
			return 0, io.EOF
		}
		f.rest = b.msgs[0]
		b.msgs = append(b.msgs[:0], b.msgs[1:]...)
		b.cond.Broadcast()
	}
	n := copy(p, f.rest)
	if n == len(f.rest) {
		f.mark = n == len(p)
		b.spare = append(b.spare, f.rest[:0])
		f.rest = nil
	} else {
		f.rest = f.rest[n:]
	}
	return n, nil
}

func (f *fakeFlow) WriteBatch(msgs [][]byte) (int, error) {
	b := f.out
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, m := range msgs {
		if len(m) > f.max {
			return i, o7serr.EMSGSIZE
		}
		for len(b.msgs) >= mailboxLimit && !b.failed {
			b.cond.Wait()
		}
		if b.failed {
			return i, o7serr.EFLOWDOWN
		}
		var c []byte
		if n := len(b.spare); n > 0 {
			c, b.spare = b.spare[n-1], b.spare[:n-1]
		}
		b.msgs = append(b.msgs, append(c, m...))
		b.cond.Broadcast()
	}
	return len(msgs), nil
}

func (f *fakeFlow) MaxMessage() int { return f.max }
func (f *fakeFlow) Direct() bool    { return f.direct }

func (f *fakeFlow) RxLen() int {
	f.in.mu.Lock()
	defer f.in.mu.Unlock()
	return len(f.in.msgs)
}

func (f *fakeFlow) CloseWrite() error {
	f.out.mu.Lock()
	defer f.out.mu.Unlock()
	f.out.ended = true
	f.out.cond.Broadcast()
	return nil
}

func (f *fakeFlow) Close() error { return f.CloseWrite() }

func (f *fakeFlow) Abort() error {
	for _, b := range []*mailbox{f.in, f.out} {
		b.mu.Lock()
		b.failed = true
		b.cond.Broadcast()
		b.mu.Unlock()
	}
	return nil
}

// tcpPair is a connection over loopback.
func tcpPair(t testing.TB) (*net.TCPConn, *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

func unixPair(t testing.TB) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var c [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		conn, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		c[i] = conn.(*net.UnixConn)
		t.Cleanup(func() { conn.Close() })
	}
	return c[0], c[1]
}

// conn is what a program holds.
type conn interface {
	net.Conn
	CloseWrite() error
}

// chain is two relays with a flow between: program - stream - flow - stream - program.
func chain(t testing.TB, max int, kind string, o Options) (a, b conn, wait func() (error, error)) {
	t.Helper()
	fa, fb := newFlows(max)
	stream := func() (conn, Stream) {
		if kind == "tcp" {
			x, y := tcpPair(t)
			s, err := NewTCP(y)
			if err != nil {
				t.Fatal(err)
			}
			return x, s
		}
		x, y := unixPair(t)
		s, err := NewUnix(y, false)
		if err != nil {
			t.Fatal(err)
		}
		return x, s
	}
	a, sa := stream()
	b, sb := stream()
	errs := [2]chan error{make(chan error, 1), make(chan error, 1)}
	go func() { errs[0] <- New(fa, sa, o).Run() }()
	go func() { errs[1] <- New(fb, sb, o).Run() }()
	return a, b, func() (error, error) {
		var e [2]error
		for i, c := range errs {
			select {
			case e[i] = <-c:
			case <-time.After(20 * time.Second):
				t.Fatal("a relay does not end")
			}
		}
		return e[0], e[1]
	}
}

func each(t *testing.T, f func(t *testing.T, kind string)) {
	for _, k := range []string{"tcp", "unix"} {
		t.Run(k, func(t *testing.T) { f(t, k) })
	}
}

// Both directions carry everything, whatever the sizes, and end one by one.
func TestBothWays(t *testing.T) {
	each(t, func(t *testing.T, kind string) {
		for _, max := range []int{1, 100, 1400, waitSize, bufferSize, 1 << 20} {
			a, b, wait := chain(t, max, kind, Options{})
			size := min(3<<20, max*3000)
			send := func(c conn, seed uint64) {
				r := rand.New(rand.NewPCG(seed, 0))
				buf := make([]byte, 200000)
				for left := size; left > 0; {
					n := min(1+r.IntN(len(buf)), left)
					for i := range buf[:n] {
						buf[i] = byte(r.Uint32())
					}
					if _, err := c.Write(buf[:n]); err != nil {
						t.Error(err)
						return
					}
					left -= n
				}
				if err := c.CloseWrite(); err != nil {
					t.Error(err)
				}
			}
			receive := func(c conn, seed uint64) {
				got, err := io.ReadAll(c)
				if err != nil || len(got) != size {
					t.Errorf("max %d: %d bytes, %v", max, len(got), err)
					return
				}
				r := rand.New(rand.NewPCG(seed, 0))
				for left := size; left > 0; {
					n := min(1+r.IntN(200000), left)
					for _, x := range got[size-left : size-left+n] {
						if byte(r.Uint32()) != x {
							t.Errorf("max %d: bytes differ", max)
							return
						}
					}
					left -= n
				}
			}
			var wg sync.WaitGroup
			wg.Go(func() { send(a, 1) })
			wg.Go(func() { send(b, 2) })
			wg.Go(func() { receive(a, 2) })
			wg.Go(func() { receive(b, 1) })
			wg.Wait()
			if x, y := wait(); x != nil || y != nil {
				t.Errorf("max %d: %v, %v", max, x, y)
			}
		}
	})
}

// After one direction has ended the other goes on.
func TestHalfClose(t *testing.T) {
	each(t, func(t *testing.T, kind string) {
		a, b, wait := chain(t, 1400, kind, Options{})
		if err := a.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if n, err := b.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Fatal(n, err)
		}
		for range 3 {
			if _, err := b.Write([]byte("more")); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 4)
			if _, err := io.ReadFull(a, got); err != nil || string(got) != "more" {
				t.Fatal(string(got), err)
			}
		}
		b.Close()
		if n, err := a.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Fatal(n, err)
		}
		if x, y := wait(); x != nil || y != nil {
			t.Error(x, y)
		}
	})
}

// A connection that breaks on one side is reset on the other.
func TestReset(t *testing.T) {
	each(t, func(t *testing.T, kind string) {
		a, b, wait := chain(t, 1400, kind, Options{})
		got := make([]byte, 4)
		for _, c := range [][2]conn{{a, b}, {b, a}} {
			if _, err := c[0].Write([]byte("data")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c[1], got); err != nil {
				t.Fatal(err)
			}
		}
		if kind == "tcp" {
			_ = a.(*net.TCPConn).SetLinger(0)
		} else { // with a byte unread
			if _, err := b.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			p := []unix.PollFd{{Events: unix.POLLIN}}
			rc, _ := a.(*net.UnixConn).SyscallConn()
			_ = rc.Control(func(fd uintptr) {
				p[0].Fd = int32(fd)
				_, _ = unix.Poll(p, 5000)
			})
		}
		a.Close()
		if _, err := b.Read(got); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("read: %v", err)
		}
		if x, y := wait(); x == nil || y == nil {
			t.Error(x, y)
		}
	})
}

// A program that does not read stops the one that writes: nothing piles up.
func TestBounded(t *testing.T) {
	each(t, func(t *testing.T, kind string) {
		a, b, wait := chain(t, 1400, kind, Options{})
		buf := make([]byte, 64<<10)
		total := 0
		for {
			// The system's buffers fill, then ours.
			_ = a.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
			n, err := a.Write(buf)
			total += n
			if err != nil {
				break
			}
			if total > 64<<20 {
				t.Fatal("no end of buffers")
			}
		}
		_ = a.CloseWrite()
		if n, err := io.Copy(io.Discard, b); err != nil || int(n) != total {
			t.Errorf("%d of %d bytes, %v", n, total, err)
		}
		b.Close()
		if x, y := wait(); x != nil || y != nil {
			t.Error(x, y)
		}
	})
}

func TestIdle(t *testing.T) {
	each(t, func(t *testing.T, kind string) {
		a, b, wait := chain(t, 1400, kind, Options{Idle: 100 * time.Millisecond})
		got := make([]byte, 1)
		for range 8 { // longer than the time-out, but not idle
			if _, err := a.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(b, got); err != nil {
				t.Fatal(err)
			}
			if _, err := b.Write(got); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(a, got); err != nil {
				t.Fatal(err)
			}
			time.Sleep(30 * time.Millisecond)
		}
		if x, y := wait(); !errors.Is(x, ErrIdle) && !errors.Is(y, ErrIdle) {
			t.Error(x, y)
		}
		if _, err := b.Read(got); err == nil || err == io.EOF {
			t.Errorf("read: %v", err)
		}
	})
}

// Steady traffic allocates nothing.
func TestAllocations(t *testing.T) {
	each(t, func(t *testing.T, kind string) {
		a, b, wait := chain(t, 1<<20, kind, Options{})
		buf := make([]byte, 32<<10)
		round := func() {
			if _, err := a.Write(buf); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(b, buf); err != nil {
				t.Fatal(err)
			}
		}
		for range 50 {
			round()
		}
		// The garbage collector may empty the pool of buffers now and then.
		if n := testing.AllocsPerRun(500, round); n >= 1 {
			t.Errorf("%v allocations for each round", n)
		}
		a.Close()
		b.Close()
		wait()
	})
}

// However bytes are written and read, the same come out, the last one included;
// a close is an end and an abort is a reset.
func TestUnixStream(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		prog, mine := unixPair(t)
		defer prog.Close()
		held, marked := rapid.Bool().Draw(rt, "held"), rapid.Bool().Draw(rt, "marked")
		switch {
		case held:
			_, _ = prog.Write([]byte{'m'})
		case marked:
			if _, _, err := prog.WriteMsgUnix([]byte{'m'}, unix.UnixRights(0), nil); err != nil {
				rt.Fatal(err)
			}
		}
		s, err := NewUnix(mine, held)
		if err != nil {
			rt.Fatal(err)
		}
		var sent, got []byte
		for range rapid.IntRange(0, 20).Draw(rt, "steps") {
			p := rapid.SliceOfN(rapid.Byte(), 1, 3000).Draw(rt, "write")
			if _, err := prog.Write(p); err != nil {
				rt.Fatal(err)
			}
			sent = append(sent, p...)
			for len(got) < len(sent) && rapid.Bool().Draw(rt, "read on") {
				b := make([]byte, rapid.IntRange(1, 4000).Draw(rt, "size"))
				if err := s.WaitRead(); err != nil {
					rt.Fatal(err)
				}
				n, err := s.Read(b)
				if err != nil || n == 0 {
					rt.Fatal(n, err)
				}
				got = append(got, b[:n]...)
			}
		}
		end := rapid.SampledFrom([]string{"end", "close", "abort"}).Draw(rt, "end")
		if end == "end" {
			_ = prog.CloseWrite()
			rest, err := io.ReadAll(s)
			if err != nil {
				rt.Fatal(err)
			}
			if got = append(got, rest...); !bytes.Equal(got, sent) {
				rt.Fatalf("%d bytes came out of %d", len(got), len(sent))
			}
			if n, err := s.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				rt.Fatal(n, err)
			}
		}
		all := len(got) == len(sent)
		if !bytes.Equal(got, sent[:len(got)]) {
			rt.Fatal("bytes differ")
		}
		if end == "abort" {
			s.Abort()
		} else {
			_ = s.Close()
		}
		want := error(io.EOF)
		if end == "abort" && (held || marked || len(sent) > 0) || !all {
			want = unix.ECONNRESET
		}
		if _, err := prog.Read(make([]byte, 1)); !errors.Is(err, want) {
			rt.Fatalf("%s, all %v: %v, want %v", end, all, err, want)
		}
	})
}

// An abort ends a relay whose last close waits.
func TestAbort(t *testing.T) {
	fa, _ := newFlows(100)
	x, y := tcpPair(t)
	s, err := NewTCP(y)
	if err != nil {
		t.Fatal(err)
	}
	slow := &slowFlow{fakeFlow: fa, aborted: make(chan struct{}), closing: make(chan struct{})}
	r := New(slow, s, Options{})
	done := make(chan error, 1)
	go func() { done <- r.Run() }()
	fa.in.mu.Lock()
	fa.in.ended = true
	fa.in.cond.Broadcast()
	fa.in.mu.Unlock()
	x.Close()
	<-slow.closing
	r.Abort()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("Abort does not end it")
	}
}

// slowFlow waits for its peer when it closes.
type slowFlow struct {
	*fakeFlow
	once             sync.Once
	aborted, closing chan struct{}
}

func (f *slowFlow) Close() error {
	close(f.closing)
	<-f.aborted
	return nil
}

func (f *slowFlow) Abort() error {
	f.once.Do(func() { close(f.aborted) })
	return f.fakeFlow.Abort()
}
