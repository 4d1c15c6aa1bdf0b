package ovpn

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit/kittest"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/testnode"
	"github.com/o7s/o7s-router/lib/ipc"
)

func needTUN(t *testing.T) {
	t.Helper()
	why := ""
	if os.Geteuid() != 0 {
		why = "needs root: makes network namespaces and TUN devices"
	} else if _, err := os.Stat(tunPath); err != nil {
		why = "needs " + tunPath
	}
	switch {
	case why == "":
	case os.Getenv("O7S_TEST_NO_SKIP") == "1":
		t.Fatal(why)
	default:
		t.Skip(why)
	}
}

// inside runs f on a thread of its own in a new network namespace; the thread,
// and with it the namespace, ends with f.
func inside(f func()) (wait func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked
		h, err := netns.New()
		if err != nil {
			panic(err)
		}
		defer h.Close()
		f()
	}()
	return func() { <-done }
}

// host is a machine with an ovpn in a namespace of its own.
type host struct {
	t      *testing.T
	out    kittest.Buffer
	stop   func() int
	do     chan func()
	ended  func()
	status chan int
}

// startHost runs an ovpn until stop or the end of the test.
func startHost(t *testing.T, runDir, line string) *host {
	t.Helper()
	o, err := parseArgs(strings.Fields(line))
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, do: make(chan func()), status: make(chan int, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	n, done := kit.Library(runDir, "ovpn", nil)
	h.ended = inside(func() {
		var wg sync.WaitGroup
		ns, err := netns.Get()
		if err != nil {
			panic(err)
		}
		defer ns.Close()
		wg.Go(func() {
			runtime.LockOSThread()
			if err := netns.Set(ns); err != nil {
				panic(err)
			}
			h.status <- run(ctx, n, o, &h.out, &h.out)
		})
		for f := range h.do {
			f()
		}
		wg.Wait()
	})
	h.stop = sync.OnceValue(func() int {
		cancel()
		s := <-h.status
		done()
		close(h.do)
		h.ended()
		return s
	})
	t.Cleanup(func() { h.stop() })
	return h
}

// in runs f in the host's namespace.
func (h *host) in(f func() error) error {
	done := make(chan error)
	h.do <- func() { done <- f() }
	return <-done
}

func (h *host) expect(what string) {
	h.t.Helper()
	h.out.Await(h.t, func(s string) bool { return strings.Contains(s, what) })
}

// start runs a daemon with the name vpn, and hosts, the first a server.
func start(t *testing.T, lines ...string) []*host {
	t.Helper()
	needTUN(t)
	dir := testnode.Start(t)
	testnode.Call(t, dir, ipc.OpBind, ipc.BindArgs{Name: "vpn", Prog: "/bin/ovpn"})
	var hosts []*host
	for i, l := range lines {
		h := startHost(t, dir, l)
		hosts = append(hosts, h)
		h.expect("is up")
		if i > 0 {
			h.expect("New flow")
		}
	}
	return hosts
}

// transfer sends bytes over TCP from one host to another and checks them.
func transfer(t *testing.T, from, to *host, addr string, size int) {
	t.Helper()
	var l net.Listener
	err := to.in(func() (err error) {
		// The device may have just got its address.
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			if l, err = net.Listen("tcp", net.JoinHostPort(addr, "0")); err == nil || time.Now().After(end) {
				return err
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	sums := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			sums <- err.Error()
			return
		}
		defer c.Close()
		hash := sha256.New()
		n, err := io.Copy(hash, c)
		sums <- fmt.Sprint(n, err, hash.Sum(nil))
	}()
	var c net.Conn
	err = from.in(func() (err error) {
		d := net.Dialer{Timeout: 10 * time.Second}
		c, err = d.Dial("tcp", l.Addr().String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i * i >> 8)
	}
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	begin := time.Now()
	if _, err := c.Write(data); err != nil {
		t.Fatal(err)
	}
	c.Close()
	sum := sha256.Sum256(data)
	if got, want := <-sums, fmt.Sprint(size, nil, sum[:]); got != want {
		t.Errorf("arrived %s, want %s", got, want)
	}
	t.Logf("%d bytes in %v", size, time.Since(begin))
}

func mtu(t *testing.T, h *host, dev string) (mtu int) {
	t.Helper()
	if err := h.in(func() error {
		l, err := netlink.LinkByName(dev)
		if err == nil {
			mtu = l.Attrs().MTU
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return mtu
}

// A server and two clients, and what there is between any two of them.
func TestTunnel(t *testing.T) {
	for name, c := range map[string]struct{ flags, v4, v6 string }{
		"tun":  {"-i 10.9.0.%d -m 255.255.255.0", "10.9.0.%d", ""},
		"tun6": {"-i fd09::%d -m 64 -q data", "", "fd09::%d"},
		"tap":  {"-i 10.9.0.%d -m 24 --tap", "10.9.0.%d", ""},
	} {
		t.Run(name, func(t *testing.T) {
			addr := func(i int) string { return fmt.Sprintf(c.v4+c.v6, i) }
			flags := func(i int) string { return fmt.Sprintf(c.flags, i) }
			h := start(t, flags(1), flags(2)+" -n vpn", flags(3)+" -n vpn --mtu 1300")
			h[0].expect("New flow 65")
			transfer(t, h[1], h[0], addr(1), 2<<20)
			transfer(t, h[0], h[1], addr(2), 2<<20)
			transfer(t, h[1], h[2], addr(3), 1<<20)
			transfer(t, h[2], h[1], addr(2), 1<<20)
			if s := h[2].stop(); s != 0 {
				t.Errorf("status %d: %s", s, h[2].out.String())
			}
			h[0].expect("Flow 65 closed")
			transfer(t, h[1], h[0], addr(1), 1<<10)
			if s := h[0].stop(); s != 0 {
				t.Errorf("status %d: %s", s, h[0].out.String())
			}
			h[1].expect("Flow 64 closed")
			if s := h[1].stop(); s != 1 {
				t.Errorf("status %d: %s", s, h[1].out.String())
			}
			for i := range h {
				if strings.Contains(h[i].out.String(), "ovpn: ") {
					t.Error(h[i].out.String())
				}
			}
		})
	}
}

// The device goes with the tool, and a second one starts.
func TestDevice(t *testing.T) {
	h := start(t, "-i 10.9.0.1/24 --dev o7stest", "-i 10.9.0.2/24 -n vpn --mtu 1280 --retry")
	if m := mtu(t, h[0], "o7stest"); m != 1500 {
		t.Errorf("MTU %d", m)
	}
	if m := mtu(t, h[1], "ovpn0"); m != 1280 {
		t.Errorf("MTU %d", m)
	}
	var ns netns.NsHandle
	if err := h[0].in(func() (err error) { ns, err = netns.Get(); return err }); err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	h[0].stop()
	nl, err := netlink.NewHandleAt(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	var gone netlink.LinkNotFoundError
	if _, err := nl.LinkByName("o7stest"); !errors.As(err, &gone) {
		t.Errorf("the device is still there: %v", err)
	}
	h[1].expect("Failed to allocate flow") // and tries again
}

// Names that are taken, and no rights.
func TestDeviceErrors(t *testing.T) {
	needTUN(t)
	inside(func() {
		a, err := openTUN("o7sdup", false)
		if err != nil {
			t.Error(err)
			return
		}
		defer a.Close()
		if err := a.up(netip.MustParsePrefix("10.9.0.1/24")); err != nil {
			t.Error(err)
		}
		if _, err := openTUN("o7sdup", true); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("second device: %v", err)
		}
		if _, err := openTUN("lo", false); err == nil {
			t.Error("lo")
		}
		if err := a.SetMTU(1 << 20); err == nil {
			t.Error("MTU accepted")
		}
	})()
}
