package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/deploy/lab"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/ipc"
)

// flows counts the flows of a host that are allocated.
func (n *network) flows(host string) (count int) {
	n.t.Helper()
	for _, f := range show[[]irm.FlowInfo](n, host, "flows") {
		if f.State == "allocated" {
			count++
		}
	}
	return count
}

// TestKilledPrograms kills a client, then a server: nothing stays behind, and
// the other end is told.
func TestKilledPrograms(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	n.must("h3", ipc.OpBind, ipc.BindArgs{Name: "echo", Prog: peerPath()})
	n.must("h3", ipc.OpNameRegister, ipc.RegisterArgs{Name: "echo", Layers: []string{"uni"}})
	n.create("echo", "h1")
	s := n.start("h3", "echo")
	s.expect(5*time.Second, "ready")
	none := func(hosts ...string) {
		t.Helper()
		for _, h := range hosts {
			eventually(t, 2*time.Second, func() error {
				if c := n.flows(h); c != 0 {
					return fmt.Errorf("%s has %d flows", h, c)
				}
				return nil
			})
		}
	}
	a, b := n.start("h1", "hold", "echo"), n.start("h1", "hold", "echo")
	a.expect(5*time.Second, "up")
	b.expect(5*time.Second, "up")
	if c := n.flows("h3"); c != 2 {
		t.Errorf("h3 has %d flows, want 2", c)
	}
	a.kill()
	for _, h := range []string{"h1", "h3"} {
		eventually(t, 2*time.Second, func() error {
			if c := n.flows(h); c != 1 {
				return fmt.Errorf("%s has %d flows, want 1", h, c)
			}
			return nil
		})
	}
	s.kill()
	if end := b.expect(2*time.Second, "end:"); !strings.HasPrefix(end, "end: -1005 ") {
		t.Errorf("the client of a killed server got %q, want -1005", end)
	}
	none("h1", "h3")
	for _, h := range []string{"h1", "h3"} {
		for _, p := range show[irm.FastPathInfo](n, h, "fastpath").Ports {
			if p.PID != 0 {
				t.Errorf("%s: port %s of process %d is left", h, p.Name, p.PID)
			}
		}
	}

	// Both on one machine, without the daemon between them.
	s = n.start("h3", "echo")
	s.expect(5*time.Second, "ready")
	a = n.start("h3", "hold", "echo")
	a.expect(5*time.Second, "up")
	s.kill()
	if end := a.expect(2*time.Second, "end:"); !strings.HasPrefix(end, "end: -1005 ") {
		t.Errorf("the client of a killed server on its machine got %q, want -1005", end)
	}
	none("h3")
}

// endDaemon sends a signal to a host's daemon and waits until it is gone.
func (n *network) endDaemon(host string, sig syscall.Signal) {
	n.t.Helper()
	pid := n.daemonPID(host)
	if err := syscall.Kill(pid, sig); err != nil {
		n.t.Fatal(err)
	}
	eventually(n.t, 5*time.Second, func() error {
		if err := syscall.Kill(pid, 0); err == nil {
			return fmt.Errorf("daemon %d of %s does not end", pid, host)
		}
		return nil
	})
}

// restart starts a daemon where the lab's was killed.
func (n *network) restart(host string) <-chan error {
	n.t.Helper()
	end, err := n.Start(n.t.Context(), host, "o7s-router", "daemon", "--run-dir", n.RunDir(host))
	if err != nil {
		n.t.Fatal(err)
	}
	eventually(n.t, 5*time.Second, func() error {
		return n.call(host, ipc.OpShow, ipc.ShowArgs{What: "layers"}, nil)
	})
	return end
}

// TestKilledDaemon kills the daemon of h3, and starts another in its place.
func TestKilledDaemon(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	serve := func() *program {
		n.must("h3", ipc.OpBind, ipc.BindArgs{Name: "echo", Prog: peerPath()})
		n.must("h3", ipc.OpNameRegister, ipc.RegisterArgs{Name: "echo", Layers: []string{"uni"}})
		s := n.start("h3", "echo")
		s.expect(5*time.Second, "ready")
		return s
	}
	s := serve()
	n.create("echo", "h1")
	c := n.start("h1", "hold", "echo")
	c.expect(5*time.Second, "up")
	old := n.address("h3", "uni")

	n.endDaemon("h3", syscall.SIGKILL)
	if end := s.expect(2*time.Second, "end:"); !strings.HasPrefix(end, "end: -1002 ") {
		t.Errorf("the program of a killed daemon got %q, want -1002", end)
	}
	if out, errs, status := n.run("h3", "o7s-router", "show", "layers"); status != 1 || out != "" || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "daemon") {
		t.Errorf("show without a daemon: exit status %d, %q %q", status, out, errs)
	}

	// Its state is gone, what it left behind does not disturb, and the network takes it in again.
	n.restart("h3")
	log, err := os.ReadFile(filepath.Join(n.RunDir("h3"), "o7s-router.log"))
	if err != nil || !strings.Contains(string(log), "an earlier daemon") {
		t.Errorf("the new daemon does not say what it found: %v\n%s", err, log)
	}
	if l := show[[]irm.LayerInfo](n, "h3", "layers"); len(l) != 0 {
		t.Errorf("the new daemon has layers %+v", l)
	}
	n.must("h3", ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "dix23", Type: "eth-dix", Layer: "dix23", Options: map[string]string{"dev": "e32"}})
	n.create("uni.h2", "h3")
	n.must("h3", ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: "uni.h3", Layer: "uni", Dst: "uni.h2", Autobind: true})
	n.must("h3", ipc.OpNameRegister, ipc.RegisterArgs{Name: "uni.h3", Layers: []string{"dix23"}})
	n.must("h3", ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "uni.h3", Dst: "uni.h2"})
	addr := n.address("h3", "uni")
	eventually(t, 3*time.Second, func() error {
		if r := n.route("h1", addr); r == nil {
			return fmt.Errorf("h1 has no route to the new h3")
		}
		if r := n.route("h1", old); r != nil {
			return fmt.Errorf("h1 still has a route to the old h3: %+v", r)
		}
		return nil
	})
	for _, nb := range show[[]ipcp.Neighbor](n, "h2", "neighbors") {
		if nb.Address == old {
			t.Errorf("h2 still has the old h3 as a neighbour: %+v", nb)
		}
	}
	serve()
	pingPong(t, n.alloc(n.client("h1", "client"), "echo"), 20)
}

// TestKilledTransit kills the daemon that others connected to: they come back
// by themselves once it is there again.
func TestKilledTransit(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	n.endDaemon("h1", syscall.SIGKILL)
	n.restart("h1")
	// h1 bootstraps the same layer again, under the same names.
	n.must("h1", ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "dix12", Type: "eth-dix", Layer: "dix12", Options: map[string]string{"dev": "e12"}})
	n.must("h1", ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "uni.h1", Type: "unicast", Layer: "uni", Autobind: true})
	n.must("h1", ipc.OpNameRegister, ipc.RegisterArgs{Name: "uni.h1", Layers: []string{"dix12"}})
	// Whoever does not want to wait for the peer time-out says so.
	n.must("h2", ipc.OpIPCPDisconnect, ipc.ConnectArgs{Name: "uni.h2", Dst: "uni.h1"})
	n.must("h2", ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "uni.h2", Dst: "uni.h1"})
	addr := n.address("h1", "uni")
	eventually(t, 3*time.Second, func() error {
		if n.route("h3", addr) == nil {
			return fmt.Errorf("h3 has no route to the new h1")
		}
		return nil
	})
}

// TestReconnect stops a daemon that others connected to and starts it again:
// those who connected come back by themselves.
func TestReconnect(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	n.endDaemon("h1", syscall.SIGTERM)
	eventually(t, 2*time.Second, func() error {
		if nb := show[[]ipcp.Neighbor](n, "h2", "neighbors"); len(nb) != 2 {
			return fmt.Errorf("h2 has adjacencies %+v", nb)
		}
		return nil
	})
	n.restart("h1")
	n.must("h1", ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "dix12", Type: "eth-dix", Layer: "dix12", Options: map[string]string{"dev": "e12"}})
	n.must("h1", ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "uni.h1", Type: "unicast", Layer: "uni", Autobind: true})
	n.must("h1", ipc.OpNameRegister, ipc.RegisterArgs{Name: "uni.h1", Layers: []string{"dix12"}})
	addr := n.address("h1", "uni")
	eventually(t, 10*time.Second, func() error {
		if n.route("h3", addr) == nil {
			return fmt.Errorf("h3 has no route to the new h1")
		}
		return nil
	})
	n.serve("h1", "echo", "uni")
	n.create("echo", "h3")
	pingPong(t, n.alloc(n.client("h3", "client"), "echo"), 20)
}

// TestStop ends a daemon in the ordinary way: nothing is left of it.
func TestStop(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	n.must("h3", ipc.OpBind, ipc.BindArgs{Name: "auto", Prog: peerPath(), Auto: true, Args: []string{"echo"}})
	n.must("h3", ipc.OpNameRegister, ipc.RegisterArgs{Name: "auto", Layers: []string{"uni"}})
	n.create("auto", "h1")
	c := n.start("h1", "hold", "auto")
	c.expect(5*time.Second, "up")

	// A second daemon in the same run directory is told who has it.
	for _, argv := range [][]string{{"o7s-router", "daemon"}, {"irmd", "--stdout"}} {
		out, errs, status := n.run("h3", argv...)
		if all := out + errs; status != 1 || !strings.Contains(all, "another daemon") || !strings.Contains(all, n.RunDir("h3")) {
			t.Errorf("second daemon %v: exit status %d\n%s", argv, status, all)
		}
	}

	n.endDaemon("h3", syscall.SIGTERM)
	if end := c.expect(2*time.Second, "end:"); !strings.HasPrefix(end, "end: -1005 ") {
		t.Errorf("the client of a node that stopped got %q, want -1005", end)
	}
	// The network knows at once: its adjacencies were released and withdrawn.
	eventually(t, 2*time.Second, func() error {
		if r := show[[]ipcp.Route](n, "h1", "routes"); len(r) != 1 {
			return fmt.Errorf("h1 has routes %+v", r)
		}
		return nil
	})
	var left []string
	_ = filepath.WalkDir(n.RunDir("h3"), func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Ext(p) != ".log" {
			left = append(left, p)
		}
		return nil
	})
	if len(left) > 0 {
		t.Errorf("left in the run directory: %v", left)
	}
	if b, _ := os.ReadFile("/proc/self/mountinfo"); strings.Contains(string(b), n.RunDir("h3")+"/") {
		t.Error("a mount is left")
	}
	err := n.inside("h3", func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if x := l.Attrs().Xdp; x != nil && x.Attached {
				t.Errorf("an XDP program is left on %s", l.Attrs().Name)
			}
			if l.Type() != "veth" && l.Type() != "loopback" && l.Type() != "device" {
				t.Errorf("device %s is left", l.Attrs().Name)
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	for _, p := range n.processes() {
		if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p)); strings.Contains(string(b), "echo") {
			t.Errorf("the started program is left: %q", b)
		}
	}
}

// TestKilledLab takes a lab down of which every process was killed.
func TestKilledLab(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	for _, h := range n.Topology().Hosts {
		_ = syscall.Kill(n.daemonPID(h), syscall.SIGKILL)
	}
	// Up again, over what is left.
	again, err := lab.New(n.Topology(), lab.Options{
		Binary: built, StateDir: n.state, Prefix: strings.TrimSuffix(n.Name(), n.Topology().Name),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
}
