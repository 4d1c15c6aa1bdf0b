package proxy

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/testnode"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// lines is a log that a test reads.
type lines struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// running is a proxy of a test.
type running struct {
	*proxy
	log  *lines
	once sync.Once
}

func start(t *testing.T, runDir string, args ...string) *running {
	t.Helper()
	o, err := parse(append(args, "--run-dir", runDir))
	if err != nil {
		t.Fatal(err)
	}
	log := &lines{}
	r := &running{proxy: newProxy(o, slog.New(slog.NewTextHandler(log, nil))), log: log}
	t.Cleanup(r.end)
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *running) end() { r.once.Do(func() { r.stop(nil) }) }

// addr is what the proxy listens on, the i-th.
func (r *running) addr(i int) string { return r.listen[i].Addr().String() }

// echo is a TCP server that echoes, and ends its stream when the client does.
func echo(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
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
				_, _ = io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

func dial(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	return c.(*net.TCPConn)
}

// talk sends something over c and wants it back, and an end after its own.
func talk(t *testing.T, c *net.TCPConn, size int) {
	t.Helper()
	want := make([]byte, size)
	_, _ = rand.Read(want)
	done := make(chan error, 1)
	go func() {
		_, err := c.Write(want)
		done <- errors.Join(err, c.CloseWrite())
	}()
	got, err := io.ReadAll(c)
	if err := errors.Join(err, <-done); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d of %d bytes, %v", len(got), size, err)
	}
}

// socks asks for a connection as RFC 1928 says, and returns the reply's code.
func socks(t *testing.T, c net.Conn, host string, port uint16) byte {
	t.Helper()
	req := []byte{5, 1, 0, 5, 1, 0}
	if a, err := netip.ParseAddr(host); err != nil {
		req = append(req, 3, byte(len(host)))
		req = append(req, host...)
	} else {
		typ := byte(4)
		if a.Is4() {
			typ = 1
		}
		req = append(append(req, typ), a.AsSlice()...)
	}
	if _, err := c.Write(binary.BigEndian.AppendUint16(req, port)); err != nil {
		t.Fatal(err)
	}
	var b [12]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		t.Fatalf("reply: %v", err)
	}
	if !bytes.Equal(b[:3], []byte{5, 0, 5}) {
		t.Fatalf("reply % x", b)
	}
	return b[3]
}

// TCP to a name, the name to TCP, and SOCKS to names, several in one process.
func TestProxy(t *testing.T) {
	node := testnode.Start(t)
	server := start(t, node, "--serve", "echo:7="+echo(t), "--serve", "other="+echo(t))
	client := start(t, node, "--forward", "127.0.0.1:0=echo:7", "--forward", ":0=other", "--socks", "127.0.0.1:0",
		"--map", "alias:9=other", "--map", "192.0.2.1=other")
	for i := range 2 {
		for _, size := range []int{0, 1, 100000, 5 << 20} {
			talk(t, dial(t, client.addr(i)), size)
		}
	}
	for _, c := range []struct {
		host string
		port uint16
	}{{"echo", 7}, {"other", 7}, {"other", 80}, {"alias", 9}, {"192.0.2.1", 1}} {
		conn := dial(t, client.addr(2))
		if r := socks(t, conn, c.host, c.port); r != repOK {
			t.Errorf("%v: reply %d", c, r)
			continue
		}
		talk(t, conn, 100000)
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() { talk(t, dial(t, client.addr(0)), 20000) })
	}
	wg.Wait()
	for _, r := range []*running{client, server} {
		if s := r.log.String(); strings.Contains(s, "level=WARN") || strings.Contains(s, "level=ERROR") {
			t.Error(s)
		}
	}
}

// What a SOCKS client hears of flows that cannot be, one line in the log each.
func TestSOCKSErrors(t *testing.T) {
	node := testnode.Start(t)
	testnode.Call(t, node, ipc.OpNameCreate, ipc.NameArgs{Name: "idle"})
	p := start(t, node, "--socks", "127.0.0.1:0")
	for _, c := range []struct {
		host string
		want byte
	}{{"no-such-name", repHost}, {"192.0.2.7", repHost}, {"2001:db8::1", repHost}, {"idle", repRefused}} {
		conn := dial(t, p.addr(0))
		if r := socks(t, conn, c.host, 80); r != c.want {
			t.Errorf("%s: reply %d, want %d", c.host, r, c.want)
		}
		if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("%s: after the refusal: %v", c.host, err)
		}
	}
	for _, c := range []struct{ send, want string }{
		{"\x04\x01", ""},
		{"\x05\x01\x02", "\x05\xff"},
		{"\x05\x01\x00\x05\x02\x00\x01\x01\x02\x03\x04\x00\x50", "\x05\x00\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00"},
		{"\x05\x01\x00\x05\x01\x00\x09", "\x05\x00\x05\x08\x00\x01\x00\x00\x00\x00\x00\x00"},
		{"\x05\x01\x00\x05\x01\x00\x03\x00", "\x05\x00\x05\x01\x00\x01\x00\x00\x00\x00\x00\x00"},
	} {
		conn := dial(t, p.addr(0))
		if _, err := io.WriteString(conn, c.send); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(conn)
		if string(got) != c.want || err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("% x: % x, %v", c.send, got, err)
		}
	}
	p.end()
	if n := strings.Count(p.log.String(), "level=WARN"); n != 9 {
		t.Errorf("%d lines for 9 failures\n%s", n, p.log.String())
	}
}

func TestReplies(t *testing.T) {
	for err, want := range map[error]byte{
		o7serr.ENAME: repHost, o7serr.EIPCP: repRefused, o7serr.ETIMEDOUT: repTTL, context.DeadlineExceeded: repTTL,
		o7serr.EIRMD: repFailure, errors.New("x"): repFailure,
	} {
		if r := replyFor(fmt.Errorf("wrapped: %w", err)); r != want {
			t.Errorf("%v: %d, want %d", err, r, want)
		}
	}
}

// A connection that breaks at one end breaks at the other.
func TestReset(t *testing.T) {
	node := testnode.Start(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	start(t, node, "--serve", "srv="+l.Addr().String(), "--serve", "closed=127.0.0.1:1")
	p := start(t, node, "--forward", "127.0.0.1:0=srv", "--forward", "127.0.0.1:0=closed", "--forward", "127.0.0.1:0=nobody")
	for i := range 2 {
		c := dial(t, p.addr(0))
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		pair := []*net.TCPConn{c, s.(*net.TCPConn)}
		if _, err := pair[0].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := pair[1].Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		_ = pair[i].SetLinger(0)
		pair[i].Close()
		_ = pair[1-i].SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := pair[1-i].Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("end %d was reset: %v", i, err)
		}
		pair[1-i].Close()
	}
	// A server that is not there, and a name that is not.
	for i := 1; i <= 2; i++ {
		c, err := net.Dial("tcp", p.addr(i))
		if err == nil { // otherwise the reset was faster than this end's connect
			_, err = c.Read(make([]byte, 1))
			c.Close()
		}
		if !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("forward %d: %v", i, err)
		}
	}
}

// At the limit further clients wait, and are served when there is room.
func TestMax(t *testing.T) {
	node := testnode.Start(t)
	start(t, node, "--serve", "echo="+echo(t))
	p := start(t, node, "--forward", "127.0.0.1:0=echo", "--max", "1")
	a, b := dial(t, p.addr(0)), dial(t, p.addr(0))
	buf := make([]byte, 1)
	for _, c := range []*net.TCPConn{a, b} {
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.ReadFull(a, buf); err != nil {
		t.Fatal(err)
	}
	_ = b.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := b.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("beyond the limit: %v", err)
	}
	a.Close()
	_ = b.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.ReadFull(b, buf); err != nil {
		t.Error(err)
	}
}

// A signal lets connections end, a second one, or the grace time, ends them.
func TestStop(t *testing.T) {
	node := testnode.Start(t)
	start(t, node, "--serve", "echo="+echo(t))
	for _, how := range []string{"ends", "grace", "signal"} {
		args := []string{"--forward", "127.0.0.1:0=echo", "--grace", "20s"}
		if how == "grace" {
			args[3] = "100ms"
		}
		p := start(t, node, args...)
		c := dial(t, p.addr(0))
		buf := make([]byte, 1)
		exchange := func() error {
			if _, err := c.Write([]byte("x")); err != nil {
				return err
			}
			_, err := io.ReadFull(c, buf)
			return err
		}
		if err := exchange(); err != nil {
			t.Fatal(err)
		}
		signals := make(chan os.Signal)
		done := make(chan struct{})
		p.once.Do(func() {}) // not again
		go func() {
			defer close(done)
			p.stop(signals)
		}()
		if how != "grace" { // goes on
			if err := exchange(); err != nil {
				t.Errorf("%s: %v", how, err)
			}
		}
		switch how {
		case "ends":
			c.Close()
		case "signal":
			signals <- os.Interrupt
			fallthrough
		case "grace":
			if _, err := c.Read(buf); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s: %v", how, err)
			}
		}
		select {
		case <-done:
		case <-time.After(15 * time.Second):
			t.Fatalf("%s: does not stop", how)
		}
	}
}

// A program of the network talks to what --serve leads to.
func TestProgram(t *testing.T) {
	node := testnode.Start(t)
	start(t, node, "--serve", "echo="+echo(t))
	c := testnode.Client(t, node, "prog")
	q := qos.Data
	f, err := c.Alloc(t.Context(), "echo", &q)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if n, err := f.Read(b); err != nil || string(b[:n]) != "hello" {
		t.Fatal(string(b[:n]), err)
	}
	if err := f.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := f.Read(b); n != 0 || err != io.EOF {
		t.Fatal(n, err)
	}
	_ = f.Close()
	// One that gives up is not taken for one that has said everything.
	f, err = c.Alloc(t.Context(), "echo", &q)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Abort(); err != nil {
		t.Error(err)
	}
}

func TestParse(t *testing.T) {
	o, err := parse([]string{"--forward", "80=web", "--forward", "[::1]:8080=a=b", "--serve", "x=y=10.0.0.1:22", "--socks", ":1080",
		"--map", "h=n", "--idle", "5m", "--layer", "l1", "--layer", "l2", "--qos", "best"})
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(o.forward, o.serve, o.socks, o.layers) != "[{127.0.0.1:80 web} {[::1]:8080 a=b}] [{x=y 10.0.0.1:22}] [127.0.0.1:1080] [l1 l2]" ||
		o.idle != 5*time.Minute || o.qos != qos.BestEffort {
		t.Errorf("%+v", o)
	}
	if _, err := parse([]string{"--help"}); !errors.Is(err, flag.ErrHelp) {
		t.Error(err)
	}
	for _, args := range [][]string{
		{}, {"--forward", "x"}, {"--forward", "a:b:c=x"}, {"--forward", "80="}, {"--serve", "n"}, {"--serve", "n=a:1", "--serve", "n=a:2"},
		{"--socks", "a:b:c"}, {"--socks", "1", "extra"}, {"--socks", "1", "--qos", "raw"}, {"--socks", "1", "--qos", "odd"},
		{"--socks", "1", "--max", "0"}, {"--socks", "1", "--idle", "-1s"}, {"--socks", "1", "--connect-timeout", "0s"},
		{"--socks", "1", "--map", "x"}, {"--nonsense"},
	} {
		var out, stderr bytes.Buffer
		if s := Main(args, &out, &stderr); s != 1 || strings.Count(stderr.String(), "\n") != 1 || out.Len() > 0 {
			t.Errorf("%v: status %d, %q", args, s, stderr.String())
		}
	}
}

// Whatever a client of SOCKS sends, it is refused or understood.
func FuzzRequest(f *testing.F) {
	f.Add([]byte("\x05\x01\x00\x03\x03web\x00\x50"))
	f.Add([]byte("\x05\x01\x00\x01\x01\x02\x03\x04\x00\x50"))
	f.Add([]byte("\x05\x01\x00\x04aaaaaaaaaaaaaaaa\x00\x50"))
	f.Add([]byte("\x05\x02\x00\x05"))
	f.Fuzz(func(t *testing.T, b []byte) {
		host, _, err := readRequest(bytes.NewReader(b))
		if err == nil && (host == "" || b[0] != 5 || b[1] != 1) {
			t.Errorf("% x: host %q", b, host)
		}
	})
}
