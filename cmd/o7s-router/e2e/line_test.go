package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/ipcp"
)

var shows = []string{"layers", "flows", "names", "neighbors", "lsdb", "routes", "directory", "fastpath", "drops"}

// TestLine3 has data cross the middle node in XDP, and looks at everything that
// show tells meanwhile.
func TestLine3(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	n.serve("h3", "echo.h3", "uni")
	n.serve("h1", "echo.h1", "uni")
	n.create("echo.h3", "h1")
	n.create("echo.h1", "h3")
	east := n.alloc(n.client("h1", "client"), "echo.h3")
	west := n.alloc(n.client("h3", "client"), "echo.h1")
	pingPong(t, east, 1)
	pingPong(t, west, 1)

	const count = 200
	before, user := n.verdicts("h2"), n.counter("h2", "", "dt_user_transit")
	pingPong(t, east, count)
	pingPong(t, west, count)
	after := n.verdicts("h2")
	// Directory and routing may have something to say in the meantime.
	if got := after["forward"] - before["forward"]; got < 4*count || got > 4*count+20 {
		t.Errorf("h2 forwarded %d packets in XDP, want %d", got, 4*count)
	}
	if got := after["user_punt"] - before["user_punt"]; got != 0 {
		t.Errorf("%d transit packets were handed to user space", got)
	}
	if got := n.counter("h2", "", "dt_user_transit"); got != 0 || user != 0 {
		t.Errorf("user space forwarded %d transit packets", got)
	}
	for r, v := range after {
		if (strings.HasPrefix(r, "drop") || r == "aborted") && v != before[r] {
			t.Errorf("h2 has %d of %s, %d before", v, r, before[r])
		}
	}

	for _, h := range n.Topology().Hosts {
		for _, what := range shows {
			table := n.ok(h, "o7s-router", "show", what)
			if lines := strings.Split(strings.TrimSpace(table), "\n"); len(lines) == 0 || lines[0] == "" {
				t.Errorf("%s: show %s prints nothing", h, what)
			}
			var v any
			js := n.ok(h, "o7s-router", "show", what, "-o", "json")
			if err := json.Unmarshal([]byte(js), &v); err != nil || v == nil {
				t.Errorf("%s: show %s -o json: %v\n%s", h, what, err, js)
			}
		}
		if r := show[[]ipcp.Route](n, h, "routes"); len(r) != 2 {
			t.Errorf("%s has routes %+v, want 2", h, r)
		}
		if l := show[[]ipcp.LSA](n, h, "lsdb"); len(l) != 4 {
			t.Errorf("%s has link states %+v, want 4", h, l)
		}
		for _, p := range show[irm.FastPathInfo](n, h, "fastpath").Ports {
			if p.Mode != "native" {
				t.Errorf("%s: port %s is %s: %v", h, p.Name, p.Mode, p.Reasons)
			}
		}
	}
	flows := show[[]irm.FlowInfo](n, "h1", "flows")
	if i := indexOf(flows, func(f irm.FlowInfo) bool { return f.Name == "echo.h3" && f.State == "allocated" }); i < 0 {
		t.Errorf("h1 does not show the flow: %+v", flows)
	} else if f := flows[i]; f.Layer != "uni" || f.Path != "xdp" || f.TxPackets < count || f.RxPackets < count {
		t.Errorf("flow to echo.h3: %+v", f)
	}
	if d := show[[]ipcp.DirEntry](n, "h3", "directory"); indexOf(d, func(e ipcp.DirEntry) bool { return e.Layer == "uni" && e.Name == "echo.h3" }) < 0 {
		t.Errorf("h3's directory lacks echo.h3: %+v", d)
	}
	east.Close()
	west.Close()
	for _, h := range []string{"h1", "h3"} {
		eventually(t, 2*time.Second, func() error {
			for _, f := range show[[]irm.FlowInfo](n, h, "flows") {
				if f.State == "allocated" && f.Prog == "client" {
					return fmt.Errorf("%s still has flow %+v", h, f)
				}
			}
			return nil
		})
	}
}

func indexOf[T any](l []T, f func(T) bool) int {
	for i, x := range l {
		if f(x) {
			return i
		}
	}
	return -1
}

// TestLine3UserSpace is the same without XDP.
func TestLine3UserSpace(t *testing.T) {
	t.Parallel()
	top := topology(t, "line3", false)
	top.Defaults.Daemon = []string{"--no-xdp"}
	n := up(t, top)
	n.serve("h3", "echo", "uni")
	n.create("echo", "h1")
	f := n.alloc(n.client("h1", "client"), "echo")
	pingPong(t, f, 1)
	const count = 200
	before := n.counter("h2", "uni.h2", "dt_user_transit")
	pingPong(t, f, count)
	if got := n.counter("h2", "uni.h2", "dt_user_transit") - before; got < 2*count {
		t.Errorf("h2 forwarded %d packets, want %d", got, 2*count)
	}
	fp := show[irm.FastPathInfo](n, "h2", "fastpath")
	if fp.Kernel || fp.Reason == "" {
		t.Errorf("fast path: %+v", fp)
	}
	for _, p := range fp.Ports {
		if p.Mode != "packet" {
			t.Errorf("port %s is %s", p.Name, p.Mode)
		}
	}
	if out := n.ok("h2", "o7s-router", "show", "fastpath"); !strings.Contains(out, fp.Reason) {
		t.Errorf("show fastpath does not say why: %s", out)
	}
}
