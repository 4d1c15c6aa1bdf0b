package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/deploy/lab"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// labFile is a topology that the project ships.
func labFile(name string) string {
	return filepath.Join("..", "..", "..", "deploy", "lab", name+".toml")
}

// topology loads a shipped topology. Without programs only the hosts, links
// and layers are left, and tests bring their own.
func topology(t *testing.T, name string, programs bool) *lab.Topology {
	t.Helper()
	top, err := lab.Load(labFile(name))
	if err != nil {
		t.Fatal(err)
	}
	if !programs {
		top.Services, top.Runs, top.Checks = nil, nil, nil
	}
	return top
}

func parse(t *testing.T, text string) *lab.Topology {
	t.Helper()
	top, err := lab.Parse(t.Name(), []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return top
}

// network is a lab of one test.
type network struct {
	*lab.Lab
	t     *testing.T
	state string // directory of the lab's state
}

var labs atomic.Int32

// up builds a network that the test leaves nothing of.
func up(t *testing.T, top *lab.Topology) *network {
	t.Helper()
	n := prepare(t, top)
	if err := n.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

// prepare is up without building it.
func prepare(t *testing.T, top *lab.Topology) *network {
	t.Helper()
	needRoot(t)
	state := t.TempDir()
	l, err := lab.New(top, lab.Options{
		Binary: built, StateDir: state, Prefix: fmt.Sprintf("e2e%d_%d_", os.Getpid(), labs.Add(1)),
	})
	if err != nil {
		t.Fatal(err)
	}
	n := &network{Lab: l, t: t, state: state}
	t.Cleanup(func() {
		n.searchLogs()
		if t.Failed() {
			n.dumpLogs()
		}
		if err := l.Down(context.Background()); err != nil {
			t.Errorf("take down: %v", err)
		}
		n.nothingLeft()
	})
	return n
}

// searchLogs looks for what no process may write.
func (n *network) searchLogs() {
	n.t.Helper()
	for _, h := range n.Topology().Hosts {
		files, _ := filepath.Glob(filepath.Join(n.RunDir(h), "*.log"))
		for _, f := range files {
			b, _ := os.ReadFile(f)
			for _, bad := range []string{"DATA RACE", "panic: ", "fatal error: ", "goroutine 1 ["} {
				if i := bytes.Index(b, []byte(bad)); i >= 0 {
					n.t.Errorf("%s: %s:\n%s", h, filepath.Base(f), b[i:min(len(b), i+4000)])
				}
			}
		}
	}
}

func (n *network) dumpLogs() {
	for _, h := range n.Topology().Hosts {
		for _, what := range []string{"flows", "drops", "fastpath"} {
			cmd := exec.Command(built, "show", what)
			cmd.Env = append(os.Environ(), "O7S_RUN_DIR="+n.RunDir(h))
			out, _ := cmd.CombinedOutput()
			n.t.Logf("== %s show %s\n%s", h, what, out)
		}
		files, _ := filepath.Glob(filepath.Join(n.RunDir(h), "*.log"))
		for _, f := range files {
			b, _ := os.ReadFile(f)
			if len(b) > 6000 {
				b = append([]byte("..."), b[len(b)-6000:]...)
			}
			n.t.Logf("== %s %s\n%s", h, filepath.Base(f), b)
		}
	}
}

// nothingLeft checks that the machine is as before.
func (n *network) nothingLeft() {
	n.t.Helper()
	es, _ := os.ReadDir("/run/netns")
	for _, e := range es {
		if strings.HasPrefix(e.Name(), "o7s-"+n.Name()+"-") {
			n.t.Errorf("namespace %s is left", e.Name())
		}
	}
	for _, pid := range n.processes() {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		n.t.Errorf("process %d is left: %q", pid, bytes.ReplaceAll(b, []byte{0}, []byte(" ")))
	}
	b, _ := os.ReadFile("/proc/self/mountinfo")
	if bytes.Contains(b, []byte(n.state+"/")) || bytes.Contains(b, []byte("o7s-"+n.Name()+"-")) {
		n.t.Error("a mount is left")
	}
	if _, err := os.Stat(filepath.Join(n.state, n.Name())); !errors.Is(err, os.ErrNotExist) {
		n.t.Errorf("the lab's directory is left: %v", err)
	}
}

// processes are those that were started in this lab.
func (n *network) processes() []int {
	es, _ := os.ReadDir("/proc")
	var out []int
	for _, e := range es {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		b, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if bytes.Contains(b, []byte("O7S_LAB="+n.Name()+"\x00")) {
			out = append(out, pid)
		}
	}
	return out
}

// daemonPID is the process that listens on a host's socket.
func (n *network) daemonPID(host string) int {
	n.t.Helper()
	conn, err := net.Dial("unixpacket", ipc.SocketPath(n.RunDir(host)))
	if err != nil {
		n.t.Fatal(err)
	}
	defer conn.Close()
	rc, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		n.t.Fatal(err)
	}
	var pid int
	_ = rc.Control(func(fd uintptr) {
		var c *syscall.Ucred
		if c, err = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); err == nil {
			pid = int(c.Pid)
		}
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return pid
}

// call makes one request to a host's daemon.
func (n *network) call(host string, op ipc.Op, args, result any) error {
	ctx, cancel := context.WithTimeout(n.t.Context(), 25*time.Second)
	defer cancel()
	c, err := n.Client(ctx, host)
	if err != nil {
		return err
	}
	fds, err := c.Call(ctx, op, args, result)
	ipc.CloseFDs(fds)
	return err
}

func (n *network) must(host string, op ipc.Op, args any) {
	n.t.Helper()
	if err := n.call(host, op, args, nil); err != nil {
		n.t.Fatalf("%s: %s %+v: %v", host, op, args, err)
	}
}

// show returns one of a daemon's tables.
func show[T any](n *network, host, what string) T {
	n.t.Helper()
	var raw json.RawMessage
	if err := n.call(host, ipc.OpShow, ipc.ShowArgs{What: what}, &raw); err != nil {
		n.t.Fatalf("%s: show %s: %v", host, what, err)
	}
	var v T
	if err := json.Unmarshal(raw, &v); err != nil {
		n.t.Fatalf("%s: show %s: %v", host, what, err)
	}
	return v
}

// verdicts are the fast path's counters of a host, over all ports or those named.
func (n *network) verdicts(host string, ports ...string) map[string]uint64 {
	n.t.Helper()
	out := map[string]uint64{}
	for _, p := range show[irm.FastPathInfo](n, host, "fastpath").Ports {
		for _, v := range p.Verdicts {
			if len(ports) == 0 || p.Name == ports[0] {
				out[v.Reason] += v.Packets
			}
		}
	}
	return out
}

// counter adds up a counter of a host's layers; ipcp "" takes all.
func (n *network) counter(host, ipcp, name string) (sum uint64) {
	n.t.Helper()
	for _, l := range show[[]irm.LayerInfo](n, host, "layers") {
		if ipcp == "" || l.IPCP == ipcp {
			sum += l.Counters[name]
		}
	}
	return sum
}

// address is the address of a member.
func (n *network) address(host, layer string) uint64 {
	n.t.Helper()
	for _, l := range show[[]irm.LayerInfo](n, host, "layers") {
		if l.Layer == layer {
			return l.Address
		}
	}
	n.t.Fatalf("%s is not a member of %s", host, layer)
	return 0
}

func (n *network) route(host string, dst uint64) *ipcp.Route {
	n.t.Helper()
	for _, r := range show[[]ipcp.Route](n, host, "routes") {
		if r.Dst == dst {
			return &r
		}
	}
	return nil
}

// run runs a command line on a host.
func (n *network) run(host string, argv ...string) (stdout, stderr string, status int) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 30*time.Second)
	defer cancel()
	var out, errs bytes.Buffer
	err := n.Exec(ctx, host, lab.Streams{Out: &out, Err: &errs}, argv...)
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		status = exit.ExitCode()
	case err != nil:
		n.t.Fatalf("%s: %v: %v", host, argv, err)
	}
	return out.String(), errs.String(), status
}

// ok runs a command line that must succeed, and returns what it printed.
func (n *network) ok(host string, argv ...string) string {
	n.t.Helper()
	out, errs, status := n.run(host, argv...)
	if status != 0 {
		n.t.Fatalf("%s$ %s: exit status %d\n%s%s", host, strings.Join(argv, " "), status, out, errs)
	}
	return out
}

// client is an application of this process on a host.
func (n *network) client(host, prog string) *o7s.Client {
	n.t.Helper()
	c := o7s.New(o7s.Options{RunDir: n.RunDir(host), Prog: prog})
	n.t.Cleanup(func() { c.Close() })
	if err := c.Connect(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
	return c
}

// create makes a name known on hosts that do not serve it.
func (n *network) create(name string, hosts ...string) {
	n.t.Helper()
	for _, h := range hosts {
		n.must(h, ipc.OpNameCreate, ipc.NameArgs{Name: name})
	}
}

// alloc allocates a flow that must come about.
func (n *network) alloc(c *o7s.Client, name string) *o7s.Flow {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), slack*5*time.Second)
	defer cancel()
	f, err := c.Alloc(ctx, name, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	return f
}

// refused allocates a flow that must be refused, with the number e, in time. It
// tells how long that took.
func (n *network) refused(c *o7s.Client, name string, within time.Duration, e ...o7serr.Errno) (took time.Duration) {
	n.t.Helper()
	begin := time.Now()
	f, err := c.Alloc(n.t.Context(), name, nil)
	took = time.Since(begin)
	if err == nil {
		f.Close()
		n.t.Errorf("a flow to %s came about", name)
		return took
	}
	good := false
	for _, e := range e {
		good = good || errors.Is(err, e)
	}
	if !good {
		n.t.Errorf("flow to %s: %v, want %v", name, err, e)
	}
	if took > slack*within {
		n.t.Errorf("flow to %s was refused after %v, want %v", name, took, within)
	}
	return took
}

// slack is how much longer than on a machine of one's own something may take:
// tests run beside others. What must never happen takes far longer than that:
// a peer's time-out is two minutes.
const slack = 5

// eventually waits until f returns nil.
func eventually(t *testing.T, limit time.Duration, f func() error) {
	t.Helper()
	deadline := time.Now().Add(slack * limit)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not after %v: %v", limit, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// inside runs f with its thread in the namespace of a host. Sockets made there stay there.
func (n *network) inside(host string, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	if err != nil {
		return err
	}
	defer here.Close()
	there, err := netns.GetFromName(n.Namespace(host))
	if err != nil {
		return err
	}
	defer there.Close()
	if err := netns.Set(there); err != nil {
		return err
	}
	return errors.Join(f(), netns.Set(here))
}
