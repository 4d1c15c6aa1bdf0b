package capi_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/o7s/o7s-router/lib/ipc"
)

// The tests install the library as a user would, compile the programs of
// testdata with what pkg-config says and run them with a daemon of their own.

// patience bounds every program that a test runs. It is no measure of speed.
const patience = 2 * time.Minute

// built is what all tests share, made by the first that needs it.
var built struct {
	once sync.Once
	err  error
	dir  string // o7s-router and the programs
	lib  string // where the library was installed
}

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(status int) {
		if built.dir != "" {
			os.RemoveAll(built.dir)
		}
		os.Exit(status)
	}))
}

// build builds everything, or skips the test where that is not possible.
func build(t *testing.T) {
	t.Helper()
	for _, tool := range []string{"cc", "c++", "make", "pkg-config"} {
		if _, err := exec.LookPath(tool); err != nil {
			why := "needs a C and C++ compiler, make and pkg-config: " + err.Error()
			if os.Getenv("O7S_TEST_NO_SKIP") == "1" {
				t.Fatal(why)
			}
			t.Skip(why)
		}
	}
	built.once.Do(func() { built.err = buildAll() })
	if built.err != nil {
		t.Fatal(built.err)
	}
}

func buildAll() error {
	var err error
	if built.dir, err = os.MkdirTemp("", "o7s-capi-"); err != nil {
		return err
	}
	prefix := filepath.Join(built.dir, "usr")
	built.lib = filepath.Join(prefix, "lib")
	if err := command(nil, "make", "-s", "-C", "../..", "install-capi", "PREFIX="+prefix); err != nil {
		return err
	}
	if err := command([]string{"CGO_ENABLED=0"}, "go", "build", "-o", filepath.Join(built.dir, "o7s-router"), "../../cmd/o7s-router"); err != nil {
		return err
	}
	for _, std := range []string{"c99", "gnu11"} {
		list, err := filepath.Glob("testdata/*.c")
		if err != nil {
			return err
		}
		for _, src := range list {
			if err := compile("cc", src, "-std="+std, "-D_DEFAULT_SOURCE"); err != nil {
				return err
			}
		}
	}
	return compile("c++", "testdata/plus.cpp", "-std=c++11")
}

// compile makes a program of a file, the strict way.
func compile(cc, src string, args ...string) error {
	out, err := exec.Command("sh", "-c", "PKG_CONFIG_PATH="+filepath.Join(built.lib, "pkgconfig")+" pkg-config --cflags --libs ouroboros-dev").Output()
	if err != nil {
		return fmt.Errorf("pkg-config: %w", err)
	}
	name := strings.TrimSuffix(filepath.Base(src), filepath.Ext(src))
	args = append(args, "-Wall", "-Wextra", "-pedantic", "-Werror", "-O2", "-pthread", "-o", filepath.Join(built.dir, name), src)
	return command(nil, cc, append(args, strings.Fields(string(out))...)...)
}

func command(env []string, name string, args ...string) error {
	c := exec.Command(name, args...)
	c.Env = append(os.Environ(), env...)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// node is a daemon.
type node struct {
	t   *testing.T
	dir string
}

// newNode gives a run directory, without a daemon yet.
func newNode(t *testing.T) *node {
	build(t)
	return &node{t: t, dir: t.TempDir()}
}

// start starts the daemon, until the test ends.
func (n *node) start() {
	n.t.Helper()
	n.spawn("o7s-router", "daemon", "--run-dir", n.dir, "--no-xdp", "--log-level", "error")
	for end := time.Now().Add(patience); ; {
		c, err := ipc.Dial(context.Background(), n.dir)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(end) {
			n.t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// serve starts a program that serves a name, and waits until it is about to
// accept: a flow that comes first waits for it.
func (n *node) serve(name, program string) {
	n.t.Helper()
	n.irm("name", "create", name)
	n.irm("bind", "program", filepath.Join(built.dir, program), name)
	n.spawn(program).line("ready")
}

func (n *node) irm(args ...string) {
	n.t.Helper()
	if err := command(n.env(), filepath.Join(built.dir, "o7s-router"), args...); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) env() []string {
	return []string{"O7S_RUN_DIR=" + n.dir, "LD_LIBRARY_PATH=" + built.lib}
}

// child is a program under way.
type child struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Scanner
	err   bytes.Buffer
	ended func() error
}

// spawn starts a program that ends with the test at the latest.
func (n *node) spawn(program string, args ...string) *child {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	cmd := exec.CommandContext(ctx, filepath.Join(built.dir, program), args...)
	cmd.Env = append(os.Environ(), n.env()...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c := &child{t: n.t, cmd: cmd}
	cmd.Stderr = &c.err
	var err error
	if c.in, err = cmd.StdinPipe(); err == nil {
		var out io.ReadCloser
		out, err = cmd.StdoutPipe()
		c.out = bufio.NewScanner(out)
	}
	if err = errors.Join(err, cmd.Start()); err != nil {
		cancel()
		n.t.Fatal(err)
	}
	c.ended = sync.OnceValue(cmd.Wait)
	n.t.Cleanup(func() {
		cancel()
		_ = c.ended()
		if c.err.Len() > 0 {
			n.t.Logf("%s: %s", program, c.err.String())
		}
	})
	return c
}

// line waits for a line.
func (c *child) line(want string) {
	c.t.Helper()
	for c.out.Scan() {
		if c.out.Text() == want {
			return
		}
		if strings.HasPrefix(c.out.Text(), "FAIL") {
			c.t.Error(c.out.Text())
		}
	}
	c.t.Fatalf("%s ended without a line %q: %v\n%s", c.cmd.Path, want, c.ended(), c.err.String())
}

// finish waits for the end. Every check of the program must have passed.
func (c *child) finish() {
	c.t.Helper()
	checks := 0
	for c.out.Scan() {
		switch line := c.out.Text(); {
		case strings.HasPrefix(line, "ok"):
			checks++
		default:
			c.t.Log(line)
		}
	}
	if err := c.ended(); err != nil {
		c.t.Errorf("%s %s: %v after %d checks that passed\n%s", c.cmd.Path, strings.Join(c.cmd.Args[1:], " "), err, checks, c.err.String())
	}
}

func (n *node) run(program string, args ...string) {
	n.t.Helper()
	n.spawn(program, args...).finish()
}

// programs that talk to the server.
func TestPrograms(t *testing.T) {
	n := newNode(t)
	n.start()
	n.serve("c.server", "server")
	for _, test := range [][]string{
		{"calls"}, {"threads"}, {"events"}, {"cancel"}, {"signals"}, {"sigwait"}, {"plus"},
		{"process", "talk", "c.server"}, {"process", "fork", "c.server"}, {"process", "exec", "c.server"},
	} {
		t.Run(strings.Join(test, "_"), func(t *testing.T) {
			(&node{t: t, dir: n.dir}).run(test[0], test[1:]...)
		})
	}
}

// A program is known before its main runs.
func TestAnnounced(t *testing.T) {
	n := newNode(t)
	n.start()
	p := n.spawn("process", "announced")
	p.line("ready")
	n.irm("name", "create", "early")
	n.irm("bind", "process", fmt.Sprint(p.cmd.Process.Pid), "early") // refused for a process that is not known
	fmt.Fprintln(p.in)
	p.finish()
}

// Without a daemon a program starts and is told; one that comes later is found.
func TestAlone(t *testing.T) {
	n := newNode(t)
	p := n.spawn("process", "alone")
	p.line("ready")
	n.start()
	fmt.Fprintln(p.in)
	p.finish()
}

// What is built for the reference asks for a version of it.
func TestVersion(t *testing.T) {
	build(t)
	env := []string{"PKG_CONFIG_PATH=" + filepath.Join(built.lib, "pkgconfig")}
	for _, v := range []string{"0.0.1", "0.18.0", "0.23.0"} {
		if err := command(env, "pkg-config", "--print-errors", "--atleast-version="+v, "ouroboros-dev"); err != nil {
			t.Error(err)
		}
	}
	if command(env, "pkg-config", "--atleast-version=0.24", "ouroboros-dev") == nil {
		t.Error("is a version to come")
	}
}

// The library exports the interface, and what it must put in front of the C
// library's, and needs nothing that is not on every machine.
func TestExports(t *testing.T) {
	build(t)
	out, err := exec.Command("nm", "-D", "--defined-only", filepath.Join(built.lib, "libouroboros-dev.so")).Output()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		got = append(got, f[len(f)-1])
	}
	const want = "__sysv_signal bsd_signal fccntl fevent flow_accept flow_alloc flow_dealloc flow_join flow_read flow_write " +
		"fqueue_create fqueue_destroy fqueue_next fqueue_type fset_add fset_create fset_del fset_destroy fset_has fset_zero " +
		"pthread_cancel sigaction signal"
	if s := strings.Join(got, " "); s != want {
		t.Errorf("exports %s\nwant    %s", s, want)
	}
}
