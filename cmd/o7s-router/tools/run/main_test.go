package run

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/testnode"
)

// runArg makes the test binary what `o7s-router run` is: it waits for all of its
// children, so it has to be a process of its own.
const runArg = "o7s-test-run"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == runArg {
		os.Exit(Main(os.Args[2:], os.Stdout, os.Stderr))
	}
	status := m.Run()
	if built.dir != "" {
		_ = os.RemoveAll(built.dir)
	}
	os.Exit(status)
}

// lacks skips the test for something that the machine does not have, unless
// nothing may be skipped.
func lacks(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("O7S_TEST_NO_SKIP") == "1" {
		t.Fatal("needs " + what)
	}
	t.Skip("needs " + what)
}

// tool looks a program up.
func tool(t *testing.T, name string) string {
	t.Helper()
	for _, p := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if path, err := exec.LookPath(p); err == nil {
			return path
		}
	}
	lacks(t, "the program "+name)
	return ""
}

var built struct {
	once sync.Once
	dir  string
	err  error
	out  []byte
}

// program is testdata/program.c, compiled.
func program(t *testing.T) string {
	t.Helper()
	cc := tool(t, "cc")
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "o7s-test-"); built.err != nil {
			return
		}
		built.out, built.err = exec.Command(cc, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread",
			"-o", filepath.Join(built.dir, "program"), "testdata/program.c").CombinedOutput()
	})
	if built.err != nil {
		t.Fatalf("%v: %s", built.err, built.out)
	}
	return filepath.Join(built.dir, "program")
}

// node is a daemon and what runs on it.
type node struct {
	t   *testing.T
	dir string // of the daemon
	tmp string // where runs keep their files
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, dir: testnode.Start(t)}
	// Short: the names of sockets are in it.
	tmp, err := os.MkdirTemp("/tmp", "o7s-t")
	if err != nil {
		t.Fatal(err)
	}
	n.tmp = tmp
	t.Cleanup(func() {
		list, _ := filepath.Glob(filepath.Join(tmp, "*"))
		if len(list) > 0 {
			what, _ := exec.Command("ls", "-lR", "--full-time", tmp).Output()
			t.Errorf("left behind: %v\n%s", list, what)
		}
		_ = os.RemoveAll(tmp)
	})
	return n
}

func (n *node) command(ctx context.Context, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, os.Args[0], append([]string{runArg, "--run-dir", n.dir}, args...)...)
	// The race detector waits a second at the end of each process otherwise.
	c.Env = append(os.Environ(), "TMPDIR="+n.tmp, "GORACE=atexit_sleep_ms=0")
	c.WaitDelay = 5 * time.Second
	return c
}

// limit is how long any command of the tests may take: far more than it does.
const limit = 60 * time.Second

// run runs a command to its end and returns its output.
func (n *node) run(args ...string) (string, error) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), limit)
	defer cancel()
	out, err := n.command(ctx, args...).CombinedOutput()
	if ctx.Err() != nil {
		err = errors.Join(err, ctx.Err())
	}
	return string(out), err
}

// want runs a command that has to end well.
func (n *node) want(args ...string) string {
	n.t.Helper()
	out, err := n.run(args...)
	if err != nil {
		n.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return out
}

// clean lets a run remove what one that was killed left: it does when that is old.
func (n *node) clean() {
	n.t.Helper()
	old := time.Now().Add(-2 * staleAfter)
	left, _ := filepath.Glob(filepath.Join(n.tmp, dirPrefix+"*"))
	if len(left) == 0 {
		n.t.Error("the killed run left nothing")
	}
	for _, d := range left {
		if err := os.Chtimes(d, old, old); err != nil {
			n.t.Fatal(err)
		}
	}
	n.want("--", "true")
}

// server is a command that goes on.
type server struct {
	n    *node
	cmd  *exec.Cmd
	out  syncBuffer
	done chan struct{}
	err  error // of its end
}

// syncBuffer is a buffer that a process writes and a test reads.
type syncBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// start starts a command and waits until it has written word times times.
func (n *node) start(word string, times int, args ...string) *server {
	n.t.Helper()
	s := &server{n: n, done: make(chan struct{}), cmd: n.command(context.Background(), args...)}
	r, w, err := os.Pipe()
	if err != nil {
		n.t.Fatal(err)
	}
	s.cmd.Stdout, s.cmd.Stderr = w, w
	s.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	err = s.cmd.Start()
	_ = w.Close()
	if err != nil {
		n.t.Fatal(err)
	}
	ready := make(chan struct{})
	go func() {
		defer r.Close()
		b := bufio.NewScanner(r)
		for seen := 0; b.Scan(); {
			_, _ = s.out.Write(append(b.Bytes(), '\n'))
			if strings.Contains(b.Text(), word) {
				if seen++; seen == times {
					close(ready)
				}
			}
		}
	}()
	go func() {
		s.err = s.cmd.Wait()
		close(s.done)
	}()
	n.t.Cleanup(s.stop)
	select {
	case <-ready:
	case <-s.done:
		n.t.Fatalf("%v ended: %v\n%s", args, s.err, s.out.String())
	case <-time.After(limit):
		n.t.Fatalf("%v does not start\n%s", args, s.out.String())
	}
	return s
}

// stop ends it as an operator does.
func (s *server) stop() { s.signal(unix.SIGTERM) }

func (s *server) signal(sig unix.Signal) {
	_ = unix.Kill(s.cmd.Process.Pid, sig)
	select {
	case <-s.done:
	case <-time.After(20 * time.Second):
		s.n.t.Errorf("%v does not end\n%s", s.cmd.Args, s.out.String())
		_ = s.cmd.Process.Kill()
		<-s.done
	}
}

// kill kills it, and its program, which would stay.
func (s *server) kill() {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", s.cmd.Process.Pid))
	var kids []string
	for _, t := range threads {
		b, _ := os.ReadFile(t)
		kids = append(kids, strings.Fields(string(b))...)
	}
	if len(kids) == 0 {
		s.n.t.Error("no program to kill")
	}
	s.signal(unix.SIGKILL)
	for _, k := range kids {
		child, _ := strconv.Atoi(k)
		_ = unix.Kill(child, unix.SIGKILL)
	}
}

// await waits until it has written word.
func (s *server) await(word string) {
	s.n.t.Helper()
	for end := time.Now().Add(limit); !strings.Contains(s.out.String(), word); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			s.n.t.Fatalf("%v: no %q\n%s", s.cmd.Args, word, s.out.String())
		}
	}
}
