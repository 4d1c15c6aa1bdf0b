package eth_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/eth"
	"github.com/o7s/o7s-router/lib/qos"
)

// inNamespace runs the calling test again in a process of its own in a fresh
// network namespace, and reports whether this is that process.
func inNamespace(t *testing.T) bool {
	t.Helper()
	const env = "O7S_TEST_NAMESPACE"
	if os.Getenv(env) == t.Name() {
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), env+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	for line := range strings.Lines(string(out)) {
		t.Log(strings.TrimRight(line, "\n"))
	}
	if err != nil {
		t.Fatal(err)
	}
	return false
}

// veth is a real link with a data plane and a member of one layer at each end.
type veth struct {
	plane  [2]*fastpath.Plane
	member [2]ipcp.Layer
	flows  chan ipcp.Flow // what the second member accepted
}

func newVeth(t *testing.T, o fastpath.Options) *veth {
	t.Helper()
	l := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "e0", MTU: 1500}, PeerName: "e1"}
	if err := errors.Join(netlink.LinkAdd(l), setLink("e0", true), setLink("e1", true)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(l) })
	h, flows := accept("response")
	v := &veth{flows: flows}
	o.Log = slog.New(slog.DiscardHandler)
	for i, h := range []ipcp.Host{&host{}, h} {
		var err error
		if v.plane[i], err = fastpath.New(o); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = v.plane[i].Close() })
		v.member[i] = eth.New(fmt.Sprint("dix", i), h, v.plane[i], "", o.Log)
		cfg := config(0)
		cfg.Eth.Device = fmt.Sprint("e", i)
		if err := v.member[i].Bootstrap(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = v.member[i].Close() })
	}
	if err := v.member[1].Register(hash); err != nil {
		t.Fatal(err)
	}
	return v
}

func setLink(name string, up bool) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if up {
		return netlink.LinkSetUp(l)
	}
	return netlink.LinkSetDown(l)
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}

func (s *sink) has(pkts ...string) func() bool {
	return func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return strings.Join(s.pkts, "|") == strings.Join(pkts, "|")
	}
}

func (s *sink) saw(e ipcp.Event) func() bool {
	return func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.events) > 0 && s.events[len(s.events)-1] == e
	}
}

// A flow's life over a real link, with XDP and without.
func TestVeth(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	for name, o := range map[string]fastpath.Options{
		"xdp":    {MaxRoutes: 64},
		"packet": {MaxRoutes: 64, DisableXDP: true},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVeth(t, o)
			if err := v.member[0].Query(t.Context(), hash); err != nil {
				t.Fatal(err)
			}
			client, data, err := v.member[0].Alloc(t.Context(), ipcp.AllocRequest{Hash: hash, QoS: qos.Raw, Data: []byte("request")})
			if err != nil || string(data) != "response" {
				t.Fatalf("%q, %v", data, err)
			}
			server := <-v.flows
			var cs, ss sink
			client.SetSink(&cs)
			server.SetSink(&ss)
			long := strings.Repeat("x", 1496)
			send(t, client, "", "ping", long)
			eventually(t, "packets at the server", ss.has("", "ping", long))
			send(t, server, "pong")
			eventually(t, "packets at the client", cs.has("pong"))

			if err := setLink("e0", false); err != nil {
				t.Fatal(err)
			}
			eventually(t, "link down at the client", cs.saw(ipcp.EventDown))
			eventually(t, "carrier lost at the server", ss.saw(ipcp.EventDown))
			if err := setLink("e0", true); err != nil {
				t.Fatal(err)
			}
			eventually(t, "link up at the client", cs.saw(ipcp.EventUp))
			eventually(t, "link up at the server", ss.saw(ipcp.EventUp))

			send(t, client, "again")
			eventually(t, "packets after the link came back", ss.has("", "ping", long, "again"))
			if err := client.Close(); err != nil {
				t.Error(err)
			}
			eventually(t, "release", ss.saw(ipcp.EventDealloc))
			_ = server.Close()
		})
	}
}

// A program at each end exchanges packets through XDP alone.
func TestVethOffload(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	v := newVeth(t, fastpath.Options{MaxRoutes: 64})
	if ok, why := v.plane[0].Kernel(); !ok {
		t.Skipf("no kernel data path: %s", why)
	}
	client, _, err := v.member[0].Alloc(t.Context(), ipcp.AllocRequest{Hash: hash, QoS: qos.Raw})
	if err != nil {
		t.Fatal(err)
	}
	ends := [2]*eth.Flow{client.(*eth.Flow), (<-v.flows).(*eth.Flow)}
	var apps [2]*fastpath.App
	var handles [2]uint32
	var room [2]int
	for i, f := range ends {
		if apps[i], err = v.plane[i].NewApp("test"); err != nil {
			t.Fatal(err)
		}
		defer apps[i].Close()
		// The first port was opened before the other end had XDP.
		eventually(t, "a redirect target", func() bool {
			handles[i], room[i], err = f.OffloadApp(apps[i])
			return err == nil
		})
	}
	if _, _, err := ends[0].OffloadApp(apps[0]); err == nil {
		t.Error("a flow has two programs")
	}
	write := func(i int, payload string) {
		frame := make([]byte, room[i], room[i]+len(payload))
		binary.LittleEndian.PutUint32(frame, handles[i])
		if _, err := apps[i].File().Write(append(frame, payload...)); err != nil {
			t.Fatal(err)
		}
	}
	read := func(i int) string {
		var b [2048]byte
		for end := time.Now().Add(5 * time.Second); ; {
			n, err := apps[i].File().Read(b[:])
			if errors.Is(err, unix.EAGAIN) && time.Now().Before(end) {
				time.Sleep(100 * time.Microsecond)
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if n >= 8 && binary.LittleEndian.Uint32(b[:]) == handles[i] {
				at := int(binary.LittleEndian.Uint16(b[4:]))
				return string(b[at : at+int(binary.LittleEndian.Uint16(b[6:]))])
			}
		}
	}
	write(0, "ping")
	if got := read(1); got != "ping" {
		t.Errorf("server read %q", got)
	}
	write(1, "pong")
	if got := read(0); got != "pong" {
		t.Errorf("client read %q", got)
	}
	if s := ends[0].Stat(); s.TxPackets != 1 || s.RxPackets != 1 || s.TxBytes != 4 {
		t.Errorf("counted %+v", s)
	}
	// Taken back, packets pass through user space again.
	ends[1].UnloadApp(handles[1])
	var s sink
	ends[1].SetSink(&s)
	write(0, "user")
	eventually(t, "packets in user space", s.has("user"))
	for _, f := range ends {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}
