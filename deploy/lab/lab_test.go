package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// The test binary plays the daemon, the ping program and a lab that is killed.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv("O7S_LAB") == "" && os.Getenv("LAB_TEST_UP") != "":
		upAndHang()
	case os.Getenv("O7S_LAB") == "":
		os.Exit(m.Run())
	case filepath.Base(os.Args[0]) == "oping":
		fakePing()
	default:
		fakeDaemon(os.Args[3])
	}
}

// fakeDaemon answers like a daemon of which every operation succeeds, and
// writes down the requests.
func fakeDaemon(dir string) {
	if os.Getenv("O7S_HOST") == os.Getenv("LAB_TEST_BROKEN") {
		fmt.Println("no luck today")
		os.Exit(3)
	}
	l, err := ipc.Listen(ipc.SocketPath(dir), 0o666)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	go func() {
		<-term
		l.Close()
		os.Exit(0)
	}()
	fmt.Println("daemon of", os.Getenv("O7S_HOST"))
	var mu sync.Mutex
	var names []ipc.NameInfo
	enrols := 0
	for {
		c, err := l.Accept()
		if err != nil {
			time.Sleep(time.Second) // the signal handler exits
			return
		}
		go func() {
			for {
				r, err := c.RecvRequest()
				if err != nil {
					return
				}
				mu.Lock()
				f, _ := os.OpenFile(filepath.Join(dir, "ops"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
				fmt.Fprintf(f, "%s %s\n", r.Op, r.Args)
				f.Close()
				var res any = struct{}{}
				var fail error
				switch r.Op {
				case ipc.OpList:
					res = ipc.ListResult{Names: names}
				case ipc.OpNameCreate:
					var a ipc.NameArgs
					_ = json.Unmarshal(r.Args, &a)
					names = append(names, ipc.NameInfo{Name: a.Name})
				case ipc.OpIPCPEnroll:
					if enrols++; enrols == 1 {
						fail = o7serr.Wrap(o7serr.ETIMEDOUT, "frame lost")
					}
				case ipc.OpShow:
					res = []map[string]any{{"layer": "uni", "dst": 1}, {"layer": "uni", "dst": 2}}
				}
				_ = c.Reply(r.ID, res, fail)
				mu.Unlock()
			}
		}()
	}
}

func fakePing() {
	if slices.Contains(os.Args, "-l") {
		time.Sleep(time.Minute)
		return
	}
	f := filepath.Join(os.Getenv("O7S_RUN_DIR"), "tries")
	b, _ := os.ReadFile(f)
	_ = os.WriteFile(f, append(b, '.'), 0o644)
	if len(b) == 0 {
		fmt.Println("3 packets transmitted, 0 received, 100% packet loss")
		return
	}
	fmt.Println("3 packets transmitted, 3 received, 0% packet loss")
}

// upAndHang is a lab that does not get to clean up.
func upAndHang() {
	topo, err := Parse("good", []byte(good))
	if err == nil {
		var l *Lab
		if l, err = New(topo, Options{Binary: self(), StateDir: os.Getenv("LAB_TEST_UP"), Prefix: os.Getenv("LAB_TEST_PREFIX")}); err == nil {
			if err = l.lock(context.Background()); err == nil {
				err = l.up(context.Background())
			}
		}
	}
	fmt.Println("up", err)
	time.Sleep(time.Minute)
}

func self() string {
	p, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return p
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	if err := onThread(func() error { return unix.Unshare(unix.CLONE_NEWNET) }); err != nil {
		t.Skipf("needs network namespaces: %v", err)
	}
}

// newLab returns a lab with a name of its own that the test leaves nothing of.
func newLab(t *testing.T, text string, opt Options) *Lab {
	t.Helper()
	needRoot(t)
	topo, err := Parse("test", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	opt.Prefix = fmt.Sprintf("test%d_%s_", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "_"))
	opt.StateDir = t.TempDir()
	l, err := New(topo, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
		nothingLeft(t, l)
	})
	return l
}

func nothingLeft(t *testing.T, l *Lab) {
	t.Helper()
	if names, err := listNetns(nsPrefix(l.name)); err != nil || len(names) != 0 {
		t.Errorf("namespaces left: %v %v", names, err)
	}
	for _, p := range []string{l.dir, l.dir + ".lock"} {
		if _, err := os.Stat(p); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s left: %v", p, err)
		}
	}
	es, _ := os.ReadDir("/proc")
	for _, e := range es {
		b, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if bytes.Contains(b, []byte("O7S_LAB="+l.name+"\x00")) {
			t.Errorf("process %s left", e.Name())
		}
	}
}

func TestLinks(t *testing.T) {
	l := newLab(t, `
name = "t"
hosts = ["h1", "h2", "h3"]
defaults = { mtu = 1600 }
[[link]]
ends = ["h1", "h2"]
gro = true
gso = false
tx_checksum = false
addresses = ["10.1.2.1/24", "10.1.2.2/24"]
[[link]]
ends = ["h2", "h3"]
devices = ["left", "right"]
mtu = 3000
[[link]]
ends = ["h2", "h1"]
devices = ["x", "y"]
`, Options{NoDaemons: true})
	ctx := context.Background()
	if err := l.Up(ctx); err != nil {
		t.Fatal(err)
	}
	link := func(host, dev string) netlink.Link {
		t.Helper()
		var out netlink.Link
		err := at(l.Namespace(host), func(h *netlink.Handle) (err error) {
			out, err = h.LinkByName(dev)
			return err
		})
		if err != nil {
			t.Fatalf("%s on %s: %v", dev, host, err)
		}
		return out
	}
	for _, tc := range []struct {
		host, dev, mac string
		mtu            int
	}{
		{"h1", "e12", "02:00:00:00:01:02", 1600},
		{"h2", "e21", "02:00:00:00:02:01", 1600},
		{"h2", "left", "02:00:00:00:02:03", 3000},
		{"h3", "right", "02:00:00:00:03:02", 3000},
		{"h1", "y", "02:01:00:00:01:02", 1600},
	} {
		a := link(tc.host, tc.dev).Attrs()
		if a.MTU != tc.mtu || a.HardwareAddr.String() != tc.mac || a.OperState != netlink.OperUp {
			t.Errorf("%s on %s: mtu %d, address %v, state %v", tc.dev, tc.host, a.MTU, a.HardwareAddr, a.OperState)
		}
	}
	for host, want := range map[string][3]uint32{"h1": {1, 0, 0}, "h2": {1, 0, 0}, "h3": {0, 1, 1}} {
		dev := map[string]string{"h1": "e12", "h2": "e21", "h3": "right"}[host]
		err := inNetns(l.Namespace(host), func() error {
			for i, cmd := range []uint32{unix.ETHTOOL_GGRO, unix.ETHTOOL_GTXCSUM, unix.ETHTOOL_GGSO} {
				got, err := getFeature(dev, cmd)
				if err != nil {
					return err
				}
				if got != want[i] {
					t.Errorf("%s on %s: feature %#x is %d, want %d", dev, host, cmd, got, want[i])
				}
			}
			b, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + dev + "/disable_ipv6")
			if err == nil && string(b) != "1\n" {
				t.Errorf("IPv6 is on")
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}

	// A link that is taken down loses its carrier at both ends.
	if err := l.SetLink("h2", "h3", false); err != nil {
		t.Fatal(err)
	}
	if a := link("h3", "right").Attrs(); a.OperState == netlink.OperUp {
		t.Error("still up")
	}
	if err := l.SetLink("h2", "h3", true); err != nil {
		t.Fatal(err)
	}
	if a := link("h3", "right").Attrs(); a.RawFlags&unix.IFF_LOWER_UP == 0 {
		t.Error("not up again")
	}
	if err := l.SetLink("h1", "h3", false); err == nil {
		t.Error("no error for a link that is not there")
	}

	// A program runs in the host's namespace and environment.
	var out bytes.Buffer
	err := l.Exec(ctx, "h1", Streams{Out: &out}, "sh", "-c", "readlink /proc/self/ns/net; echo $O7S_RUN_DIR; exit 7")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("error %v, want exit status 7", err)
	}
	id, _ := statNS(filepath.Join(netnsDir, l.Namespace("h1")))
	if want := fmt.Sprintf("net:[%d]\n%s\n", id.ino, l.RunDir("h1")); out.String() != want {
		t.Errorf("output %q, want %q", out.String(), want)
	}
	if err := l.Exec(ctx, "h9", Streams{}, "true"); err == nil {
		t.Error("no error for an unknown host")
	}
	if err := l.Exec(ctx, "h1", Streams{}, "no-such-program"); err == nil {
		t.Error("no error for an unknown program")
	}

	// Up again replaces it; by another name it can be taken down without its file.
	if err := l.Up(ctx); err != nil {
		t.Fatal(err)
	}
	if err := Down(ctx, l.Name(), Options{StateDir: l.opt.StateDir}); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, l)
	for _, prog := range []string{"true", "oping"} { // oping is only there while the lab is
		if err := l.Exec(ctx, "h1", Streams{}, prog); err == nil || !strings.Contains(err.Error(), "not up") {
			t.Errorf("error %v", err)
		}
	}
}

func getFeature(dev string, cmd uint32) (uint32, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	return ethtoolValue(fd, dev, cmd, 0)
}

func TestRun(t *testing.T) {
	var out bytes.Buffer
	l := newLab(t, good+"[[run]]\nhost = 'h3'\ncommand = ['oping', '-l']\n"+
		"[[check]]\nhost = 'h2'\ncommand = ['cat', '/proc/self/comm']\nexpect = '^cat$'\n", Options{Binary: self(), Stdout: &out})
	ops := map[string][]string{}
	// The requests are gone with the lab, so take them before it goes.
	l.topo.Checks = append(l.topo.Checks, Check{Host: "h1", Timeout: Duration(time.Second), Command: []string{
		"sh", "-c", "for h in h1 h2 h3; do sed \"s/^/$h /\" $O7S_RUN_DIR/../$h/ops; done",
	}})
	if err := l.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, l)
	for line := range strings.Lines(out.String()) {
		if h, op, ok := strings.Cut(strings.TrimSpace(line), " "); ok && slices.Contains(l.topo.Hosts, h) && !strings.HasPrefix(op, "list") && !strings.HasPrefix(op, "show") {
			ops[h] = append(ops[h], op)
		}
	}
	find := func(host string, parts ...string) int {
		t.Helper()
		for i, op := range ops[host] {
			if !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(op, p) }) {
				return i
			}
		}
		t.Errorf("host %s did not do %v, but\n%s", host, parts, strings.Join(ops[host], "\n"))
		return -1
	}
	order := func(host string, steps ...[]string) {
		t.Helper()
		last := -1
		for _, s := range steps {
			i := find(host, s...)
			if i <= last {
				t.Errorf("host %s: %v out of order in\n%s", host, s, strings.Join(ops[host], "\n"))
			}
			last = i
		}
	}
	order("h1",
		[]string{"ipcp-bootstrap", `"dix12"`, `"eth-dix"`, `"dev":"e12"`},
		[]string{"ipcp-bootstrap", `"uni.h1"`, `"autobind":true`, `"routing":"lfa"`, `"ls_t_update":"5"`, `"hash":"SHA3_256"`},
		[]string{"name-register", `"uni.h1"`, `["dix12"]`},
		[]string{"name-register", `"uni"`, `["dix12"]`},
	)
	order("h2",
		[]string{"ipcp-bootstrap", `"dix12"`, `"dev":"e21"`},
		[]string{"name-create", `"uni.h1"`},
		[]string{"ipcp-enroll", `"uni.h2"`, `"layer":"uni"`, `"dst":"uni.h1"`},
		[]string{"name-register", `"uni.h2"`, `["dix12","dix23"]`},
		[]string{"ipcp-connect", `"uni.h2"`, `"dst":"uni.h1"`, `"component":"*"`, `"timeout_ms":120000`},
	)
	order("h3",
		[]string{"ipcp-enroll", `"dst":"uni.h2"`},
		[]string{"ipcp-connect", `"dst":"uni.h2"`},
		[]string{"name-register", `"oping"`, `["uni"]`},
	)
	find("h3", "bind", `"oping"`, filepath.Join(l.dir, "bin", "oping"))
	if n := strings.Count(strings.Join(ops["h2"], "\n"), "ipcp-enroll"); n != 2 {
		t.Errorf("enrolled %d times; a lost frame is retried", n)
	}
	if !strings.Contains(out.String(), "h1$ oping -n oping -c 3 -i 10ms\n3 packets transmitted, 3 received, 0% packet loss") {
		t.Errorf("output\n%s", out.String())
	}
}

func TestDaemonFails(t *testing.T) {
	t.Setenv("LAB_TEST_BROKEN", "h2")
	l := newLab(t, good, Options{Binary: self()})
	err := l.Up(context.Background())
	if err == nil || !strings.Contains(err.Error(), "host h2: the daemon ended: exit status 3") || !strings.Contains(err.Error(), "h2: no luck today") {
		t.Errorf("error %v", err)
	}
	nothingLeft(t, l)
	if _, err := New(l.topo, Options{Prefix: "a/b"}); err == nil {
		t.Error("no error for a bad prefix")
	}
}

func TestCheckFails(t *testing.T) {
	l := newLab(t, "name = 't'\nhosts = ['h1']\n"+
		"[[check]]\nhost = 'h1'\ncommand = ['false']\nwithin = '50ms'\n"+
		"[[check]]\nhost = 'h1'\ncommand = ['echo', 'abc']\nexpect = 'b$'\n"+
		"[[check]]\nhost = 'h1'\ncommand = ['sleep', '10']\ntimeout = '50ms'\n"+
		"[[check]]\nhost = 'h1'\ncommand = ['true']\n", Options{NoDaemons: true})
	if err := l.Up(context.Background()); err != nil {
		t.Fatal(err)
	}
	rs, err := l.Check(context.Background())
	if len(rs) != 4 || err == nil || strings.Count(err.Error(), "check on h1") != 3 {
		t.Fatalf("results %+v, error %v", rs, err)
	}
	if rs[0].Tries < 2 || rs[1].Tries != 1 || rs[3].Err != nil {
		t.Errorf("results %+v", rs)
	}
}

// Ctrl-C in the middle of a run cleans up.
func TestRunCancelled(t *testing.T) {
	l := newLab(t, good+"[[check]]\nhost = 'h1'\ncommand = ['sleep', '60']\ntimeout = '60s'\n", Options{Binary: self()})
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer cancel()
		for { // until the check runs
			if b, _ := os.ReadFile(filepath.Join(l.RunDir("h1"), "tries")); len(b) >= 2 {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	began := time.Now()
	if err := l.Run(ctx); err == nil {
		t.Error("no error")
	}
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("took %v", d)
	}
	nothingLeft(t, l)
}

// What a killed lab leaves is removed by the next one of the same name, and a
// lab that is in use is not touched.
func TestKilled(t *testing.T) {
	l := newLab(t, good, Options{Binary: self()})
	other := exec.Command(self())
	other.Env = append(os.Environ(), "LAB_TEST_UP="+l.opt.StateDir, "LAB_TEST_PREFIX="+l.opt.Prefix)
	out, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = other.Process.Kill()
		_ = other.Wait()
	}()
	line := make([]byte, 100)
	n, _ := out.Read(line)
	if got := strings.TrimSpace(string(line[:n])); got != "up <nil>" {
		t.Fatalf("the other lab said %q", got)
	}
	if err := l.Up(context.Background()); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("in use by process %d", other.Process.Pid)) {
		t.Fatalf("error %v", err)
	}
	// A process that nobody wrote down, and a mount below the state directory.
	var stray bytes.Buffer
	if err := l.Exec(context.Background(), "h1", Streams{Out: &stray}, "sh", "-c", "setsid sleep 60 >/dev/null 2>&1 & echo $!"); err != nil {
		t.Fatal(err)
	}
	mnt := filepath.Join(l.RunDir("h1"), "mnt dir")
	if err := os.MkdirAll(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", mnt, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	_ = other.Process.Kill()
	_ = other.Wait()
	ps, err := recorded(l.dir)
	if err != nil || len(ps) != 3 {
		t.Fatalf("recorded %v %v", ps, err)
	}
	// A number that belongs to another process now must not be killed.
	victim := exec.Command("sleep", "60")
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = victim.Process.Kill()
		_ = victim.Wait()
	}()
	f, err := os.OpenFile(filepath.Join(l.dir, processFile), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(f, `{"pid":%d,"start":1,"host":"h1"}`+"\n"+`{"pid":`, victim.Process.Pid)
	f.Close()

	if err := l.Down(context.Background()); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, l)
	if err := victim.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("a process that is not ours was killed: %v", err)
	}
	// It may wait for init to reap it.
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", atoi(t, stray.String()))); err == nil && !bytes.Contains(b, []byte(") Z ")) {
		t.Errorf("the stray process lives: %s", b)
	}
	if err := l.Up(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func atoi(t *testing.T, s string) int {
	var n int
	if _, err := fmt.Sscan(s, &n); err != nil {
		t.Fatal(err)
	}
	return n
}
