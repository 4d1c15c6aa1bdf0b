package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/lib/ipc"
)

// TestRecursion puts a unicast layer over a unicast layer, in which h2 is no
// member, and one more over that.
func TestRecursion(t *testing.T) {
	t.Parallel()
	n := up(t, parse(t, `
name = "recursion"
hosts = ["h1", "h2", "h3"]
[[link]]
ends = ["h1", "h2"]
layer = "dix12"
[[link]]
ends = ["h2", "h3"]
layer = "dix23"
[[layer]]
name = "uni"
member = [{ host = "h1" }, { host = "h2", enroll = "h1" }, { host = "h3", enroll = "h2" }]
[[layer]]
name = "top"
over = ["uni"]
member = [{ host = "h1" }, { host = "h3", enroll = "h1" }]
[[layer]]
name = "tip"
over = ["top"]
member = [{ host = "h3" }, { host = "h1", enroll = "h3" }]
`))
	for _, layer := range []string{"top", "tip"} {
		n.serve("h3", "echo."+layer, layer)
		n.create("echo."+layer, "h1")
		f := n.alloc(n.client("h1", "client."+layer), "echo."+layer)
		if f.Layer() != layer {
			t.Errorf("the flow is in layer %q, want %s", f.Layer(), layer)
		}
		before := n.verdicts("h2")
		pingPong(t, f, 100)
		if got := n.verdicts("h2")["forward"] - before["forward"]; got < 200 {
			t.Errorf("%s: h2 forwarded %d packets in XDP, want 200", layer, got)
		}
		// The longest message that the flow says it takes.
		msg := string(make([]byte, f.MTU()))
		if got, err := ask(f, msg); err != nil || got != msg {
			t.Errorf("%s: message of %d bytes: %d came back: %v", layer, f.MTU(), len(got), err)
		}
	}
	if got := n.counter("h2", "", "dt_user_transit"); got != 0 {
		t.Errorf("user space forwarded %d packets at h2", got)
	}
}

// TestOneHost connects programs of one machine: the daemon is not on the path.
func TestOneHost(t *testing.T) {
	t.Parallel()
	n := up(t, parse(t, `
name = "one"
hosts = ["h1"]
[[layer]]
name = "loc"
type = "local"
member = [{ host = "h1" }]
`))
	n.serve("h1", "plain")
	n.serve("h1", "registered", "loc")
	c := n.client("h1", "client")
	for _, name := range []string{"plain", "registered"} {
		f := n.alloc(c, name)
		if !f.Direct() {
			t.Errorf("the flow to %s is not direct", name)
		}
		pingPong(t, f, 100)
		flows := show[[]irm.FlowInfo](n, "h1", "flows")
		if i := indexOf(flows, func(i irm.FlowInfo) bool { return i.Name == name && i.Path == "direct" }); i < 0 {
			t.Errorf("no direct flow to %s: %+v", name, flows)
		}
		f.Close()
	}
}

// TestEtherTypes has three layers on one port, which do not hear each other.
func TestEtherTypes(t *testing.T) {
	t.Parallel()
	n := up(t, parse(t, `
name = "types"
hosts = ["h1", "h2"]
[[link]]
ends = ["h1", "h2"]
layer = "a000"
`))
	for _, h := range []string{"h1", "h2"} {
		dev := map[string]string{"h1": "e12", "h2": "e21"}[h]
		for _, typ := range []string{"b001", "c002"} {
			n.must(h, ipc.OpIPCPBootstrap, ipc.BootstrapArgs{
				Name: typ, Type: "eth-dix", Layer: typ, Options: map[string]string{"dev": dev, "ethertype": typ},
			})
		}
	}
	c := n.client("h1", "client")
	layers := []string{"a000", "b001", "c002"}
	for _, l := range layers {
		n.serve("h2", "echo."+l, l)
		n.create("echo."+l, "h1")
	}
	for i, l := range layers {
		f := n.alloc(c, "echo."+l)
		if f.Layer() != l {
			t.Errorf("flow to echo.%s is in layer %s", l, f.Layer())
		}
		pingPong(t, f, 20)
		for j, m := range layers {
			if got := n.counter("h2", m, "flows"); (got != 0) != (j <= i) {
				t.Errorf("after flow %d layer %s has %d flows", i, m, got)
			}
		}
	}
	// One leaves: the others stay.
	n.must("h1", ipc.OpIPCPDestroy, ipc.IPCPArgs{Name: "b001"})
	eventually(t, 2*time.Second, func() error {
		if got := n.counter("h2", "b001", "flows"); got != 0 {
			return fmt.Errorf("h2 still has %d flows in b001", got)
		}
		return nil
	})
	pingPong(t, n.alloc(c, "echo.a000"), 20)
	pingPong(t, n.alloc(c, "echo.c002"), 20)
}
