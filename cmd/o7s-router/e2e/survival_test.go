package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/qos"
)

// transfer is a reliable transfer in both directions that goes on until it is
// ended: numbered messages whose content follows from the number.
type transfer struct {
	t        *testing.T
	ends     [2]*o7s.Flow
	stop     atomic.Bool
	sent     [2]atomic.Int64 // by sending end
	received [2]atomic.Int64 // by receiving end
	done     chan error      // one result for each of four goroutines
}

// pace is between two messages of one direction.
const pace = 500 * time.Microsecond

// fill writes message i of an end into b, and returns as much of it as belongs
// to the message.
func fill(b []byte, end int, i int64) []byte {
	m := b[:16+int(i*7919%1300)]
	binary.BigEndian.PutUint64(m, uint64(i))
	m[8] = byte(end)
	for k := 9; k < len(m); k++ {
		m[k] = byte(int64(k) * (i + 1))
	}
	return m
}

// startTransfer begins one between a client on host a and a server on host b.
func startTransfer(t *testing.T, n *network, a, b, name, layer string) *transfer {
	t.Helper()
	n.must(b, ipc.OpBind, ipc.BindArgs{Name: name, Prog: "/sink"})
	server := n.client(b, "sink")
	n.must(b, ipc.OpNameRegister, ipc.RegisterArgs{Name: name, Layers: []string{layer}})
	n.create(name, a)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	type accepted struct {
		f   *o7s.Flow
		err error
	}
	got := make(chan accepted, 1)
	go func() {
		f, err := server.Accept(ctx)
		got <- accepted{f, err}
	}()
	n.accepting(b, name, 1)
	f, err := n.client(a, "source").Alloc(ctx, name, &qos.Data)
	if err != nil {
		t.Fatal(err)
	}
	g := <-got
	if g.err != nil {
		t.Fatal(g.err)
	}
	x := &transfer{t: t, ends: [2]*o7s.Flow{f, g.f}, done: make(chan error, 4)}
	for end := range x.ends {
		go func() { x.done <- x.send(end) }()
		go func() { x.done <- x.receive(end) }()
	}
	t.Cleanup(func() {
		x.stop.Store(true)
		for _, f := range x.ends {
			f.SetLinger(0)
			f.Close()
		}
	})
	return x
}

func (x *transfer) send(end int) error {
	buf := make([]byte, 2048)
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for i := int64(0); !x.stop.Load(); i++ {
		if _, err := x.ends[end].Write(fill(buf, end, i)); err != nil {
			return fmt.Errorf("end %d: write message %d: %w", end, i, err)
		}
		x.sent[end].Store(i + 1)
		<-tick.C
	}
	if err := x.ends[end].CloseWrite(); err != nil {
		return fmt.Errorf("end %d: close write: %w", end, err)
	}
	return nil
}

func (x *transfer) receive(end int) error {
	buf, want := make([]byte, 2048), make([]byte, 2048)
	for i := int64(0); ; i++ {
		n, err := x.ends[end].Read(buf)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("end %d: read message %d: %w", end, i, err)
		}
		if m := fill(want, 1-end, i); !slices.Equal(m, buf[:n]) {
			return fmt.Errorf("end %d: message %d is %x..., want %x...", end, i, buf[:min(n, 16)], m[:16])
		}
		x.received[end].Store(i + 1)
	}
}

// moves waits until what both ends write from now on arrives. It tells how long
// that took.
func (x *transfer) moves(limit time.Duration) time.Duration {
	x.t.Helper()
	begin := time.Now()
	const more = 100
	want := [2]int64{x.sent[1].Load() + more, x.sent[0].Load() + more}
	for deadline := begin.Add(slack * limit); ; {
		if x.received[0].Load() >= want[0] && x.received[1].Load() >= want[1] {
			return time.Since(begin)
		}
		select {
		case err := <-x.done:
			x.t.Fatalf("the transfer ended: %v", err)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			x.t.Fatalf("the transfer stands still: after %v sent %d and %d, received %d and %d; %+v", limit,
				x.sent[0].Load(), x.sent[1].Load(), x.received[1].Load(), x.received[0].Load(), x.ends[0].Stats())
		}
	}
}

// finish ends the transfer: all that was sent has arrived.
func (x *transfer) finish() {
	x.t.Helper()
	x.stop.Store(true)
	late := time.After(20 * time.Second)
	for range cap(x.done) {
		select {
		case err := <-x.done:
			if err != nil {
				x.t.Error(err)
			}
		case <-late:
			x.t.Fatal("the transfer does not end")
		}
	}
	for end := range x.ends {
		if s, r := x.sent[end].Load(), x.received[1-end].Load(); s != r || s == 0 {
			x.t.Errorf("end %d sent %d messages, %d arrived", end, s, r)
		}
	}
}

// setLink brings an interface of a host down or up.
func (n *network) setLink(host, dev string, up bool) {
	n.t.Helper()
	err := n.inside(host, func() error {
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		link, err := h.LinkByName(dev)
		if err != nil {
			return err
		}
		if up {
			return h.LinkSetUp(link)
		}
		return h.LinkSetDown(link)
	})
	if err != nil {
		n.t.Fatal(err)
	}
}

// router makes h2 of a line3 what it was, after its daemon was started anew.
func (n *network) router() {
	n.t.Helper()
	for _, d := range [][2]string{{"dix12", "e21"}, {"dix23", "e23"}} {
		n.must("h2", ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: d[0], Type: "eth-dix", Layer: d[0], Options: map[string]string{"dev": d[1]}})
	}
	n.create("uni.h1", "h2")
	n.member("uni.h2")
}

// member makes h2 of a line3 a member of its unicast layer.
func (n *network) member(name string) {
	n.t.Helper()
	n.must("h2", ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: name, Layer: "uni", Dst: "uni.h1", Autobind: true})
	n.must("h2", ipc.OpNameRegister, ipc.RegisterArgs{Name: name, Layers: []string{"dix12", "dix23"}})
	n.must("h2", ipc.OpIPCPConnect, ipc.ConnectArgs{Name: name, Dst: "uni.h1"})
}

// TestSurvival keeps one reliable transfer running from h1 to h3 while all
// sorts of things happen to the router and the links between them.
func TestSurvival(t *testing.T) {
	t.Parallel()
	for _, xdp := range []bool{true, false} {
		name := "xdp"
		if !xdp {
			name = "user"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			top := topology(t, "line3", false)
			if !xdp {
				top.Defaults.Daemon = []string{"--no-xdp"}
			}
			n := up(t, top)
			x := startTransfer(t, n, "h1", "h3", "stream", "uni")
			x.moves(5 * time.Second)
			step := func(what string, limit time.Duration, f func()) {
				t.Helper()
				f()
				t.Logf("%s: resumed after %v", what, x.moves(limit).Round(time.Millisecond))
			}
			pathIs := func() {
				t.Helper()
				flows := show[[]irm.FlowInfo](n, "h1", "flows")
				i := indexOf(flows, func(f irm.FlowInfo) bool { return f.Name == "stream" && f.State == "allocated" })
				if i < 0 {
					t.Fatalf("h1 does not show the flow: %+v", flows)
				}
				if got := flows[i].Path == "xdp"; got != xdp {
					t.Errorf("the flow's path is %s", flows[i].Path)
				}
			}
			pathIs()

			for _, end := range []struct{ host, dev string }{{"h1", "e12"}, {"h2", "e21"}, {"h3", "e32"}} {
				step("flap of "+end.dev, 10*time.Second, func() {
					n.setLink(end.host, end.dev, false)
					time.Sleep(300 * time.Millisecond)
					n.setLink(end.host, end.dev, true)
				})
			}
			step("router stopped", 15*time.Second, func() {
				n.endDaemon("h2", syscall.SIGTERM)
				n.restart("h2")
				n.router()
			})
			step("router killed", 15*time.Second, func() {
				n.endDaemon("h2", syscall.SIGKILL)
				n.restart("h2")
				n.router()
			})
			// As a reference node, which tells nobody.
			step("router killed, and its notes lost", 30*time.Second, func() {
				n.endDaemon("h2", syscall.SIGKILL)
				if err := os.RemoveAll(filepath.Join(n.RunDir("h2"), "flows")); err != nil {
					t.Fatal(err)
				}
				n.restart("h2")
				n.router()
			})
			step("ipcp below replaced", 15*time.Second, func() {
				n.must("h2", ipc.OpIPCPDestroy, ipc.IPCPArgs{Name: "dix12"})
				n.must("h2", ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "dix12", Type: "eth-dix", Layer: "dix12", Options: map[string]string{"dev": "e21"}})
				n.must("h2", ipc.OpNameRegister, ipc.RegisterArgs{Name: "uni.h2", Layers: []string{"dix12"}})
			})
			step("member of the layer replaced", 15*time.Second, func() {
				old := n.address("h2", "uni")
				n.must("h2", ipc.OpIPCPDestroy, ipc.IPCPArgs{Name: "uni.h2"})
				n.member("uni.h2")
				if n.address("h2", "uni") == old {
					t.Error("the new member has the address of the old one")
				}
			})
			pathIs()
			x.finish()
		})
	}
}

// TestSurvivalDirect is a reliable transfer over one link that goes down for a
// while, in an Ethernet layer without a unicast layer on top.
func TestSurvivalDirect(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	x := startTransfer(t, n, "h1", "h2", "stream", "dix12")
	x.moves(5 * time.Second)
	for i, end := range []struct{ host, dev string }{{"h1", "e12"}, {"h2", "e21"}, {"h2", "e21"}} {
		n.setLink(end.host, end.dev, false)
		time.Sleep(time.Duration(200+400*i) * time.Millisecond)
		n.setLink(end.host, end.dev, true)
		t.Logf("flap of %s: resumed after %v", end.dev, x.moves(10*time.Second).Round(time.Millisecond))
	}
	x.finish()
}

// TestConnectQoS connects a unicast layer over reliable flows, which the
// daemons' own end-to-end protocol makes: they are forwarded on in user space,
// and show fastpath says why.
func TestConnectQoS(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	crc := qos.Data
	crc.BER = 0
	for _, q := range []qos.Spec{qos.Data, crc, qos.Voice, qos.Raw} {
		n.must("h3", ipc.OpIPCPDisconnect, ipc.ConnectArgs{Name: "uni.h3", Dst: "uni.h2", Component: "dt"})
		n.must("h3", ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "uni.h3", Dst: "uni.h2", Component: "dt", QoS: q})
		addr := n.address("h3", "uni")
		eventually(t, 10*time.Second, func() error {
			if n.route("h1", addr) == nil {
				return errors.New("h1 has no route to h3")
			}
			return nil
		})
		for _, h := range []string{"h2", "h3"} {
			nb := show[[]ipcp.Neighbor](n, h, "neighbors")
			i := indexOf(nb, func(x ipcp.Neighbor) bool { return x.Component == "dt" && x.Via == "dix23" })
			if i < 0 {
				t.Fatalf("%s has no adjacency over dix23: %+v", h, nb)
			}
			if inUser := strings.Contains(nb[i].Path, "end-to-end"); inUser == q.IsRaw() {
				t.Errorf("%s: path of an adjacency with %+v is %q", h, q, nb[i].Path)
			}
			if out := n.ok(h, "o7s-router", "show", "fastpath"); strings.Contains(out, "end-to-end") == q.IsRaw() {
				t.Errorf("%s: show fastpath with %+v: %s", h, q, out)
			}
		}
		name := fmt.Sprintf("echo.%d%d", q.BER, q.Loss+q.Delay)
		n.serve("h3", name, "uni")
		n.create(name, "h1")
		pingPong(t, n.alloc(n.client("h1", "client"), name), 50)
	}
	x := startTransfer(t, n, "h1", "h3", "stream", "uni")
	x.moves(5 * time.Second)
	x.finish()
}
