// Package run runs programs unchanged over the network: their TCP sockets are
// traded for sockets that lead to flows.
//
// A small C library (shim) is preloaded into the program and what it starts. It
// asks the agent, in this process, when a host is looked up, a socket connected
// or bound to a port. What is no name of the network is served by the real one,
// unless --only is given.
package run

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/names"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/run/shim"
	"github.com/o7s/o7s-router/lib/qos"
)

const usage = `Usage: o7s-router run [OPTION]... [--] PROGRAM [ARGUMENT]...
Runs a program unchanged over the network: what it connects to by a name of the
network is a flow, and what it listens on can be served under a name.

  --listen PORT=NAME        flows to NAME arrive at what listens on PORT (again for more)
  --name HOST               flows to HOST:PORT arrive at what listens on any other PORT
  --map HOST[:PORT]=NAME    what HOST stands for (again for more)
  --only                    the network of names only: other hosts and ports fail
  --qos QOS                 of flows to names: data (default), best
  --layer LAYER             register served names with LAYER, too (again for more)
  --bound                   served names are bound to the program already: do not bind them
  --verbose                 log connections, and why they failed
  --run-dir DIR             run directory of the daemon (default: $O7S_RUN_DIR)
  --help                    print this text

A host that the program connects to stands for: what a --map says; else the name
HOST:PORT, if there is one; else the name HOST. What is none is looked up and
connected to as ever. Addresses stand for themselves unless a --map is about them.

The exit status is the program's, 128 and the signal's number when one ended it,
125 when run itself failed, 126 when the program cannot be run like this, 127
when it was not found. run stays until the last process that the program
started has ended, too.
`

type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

type options struct {
	agentOptions
	verbose bool
	command []string
}

func parse(args []string) (options, error) {
	o := options{agentOptions: agentOptions{listen: map[uint16]string{}}}
	var listen, layers list
	q := "data"
	fs := flag.NewFlagSet("run", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Var(&listen, "listen", "")
	fs.StringVar(&o.host, "name", "", "")
	fs.Var(&o.rule, "map", "")
	fs.BoolVar(&o.only, "only", false, "")
	fs.StringVar(&q, "qos", q, "")
	fs.Var(&layers, "layer", "")
	fs.BoolVar(&o.bound, "bound", false, "")
	fs.BoolVar(&o.verbose, "verbose", false, "")
	fs.StringVar(&o.runDir, "run-dir", "", "")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	o.layers, o.command = layers, fs.Args()
	if len(o.command) == 0 {
		return o, errors.New("expected a program to run")
	}
	for _, s := range listen {
		p, name, ok := strings.Cut(s, "=")
		if !ok || name == "" {
			return o, fmt.Errorf("--listen %s: expected PORT=NAME", s)
		}
		port, err := names.Port(p)
		if err != nil {
			return o, fmt.Errorf("--listen %s: %w", s, err)
		}
		if o.listen[port] != "" {
			return o, fmt.Errorf("--listen %s: the port has a name already", s)
		}
		o.listen[port] = name
	}
	var err error
	if o.qos, err = qos.ByName(q); err != nil || o.qos.InOrder == 0 {
		return o, fmt.Errorf("--qos %s: expected data or best, a byte stream needs order", q)
	}
	return o, nil
}

// Exit statuses of run's own failures, as env(1) and others have them.
const (
	exitFailed   = 125
	exitCannot   = 126
	exitNotFound = 127
)

// Main runs the tool with the arguments after its name and returns its exit status.
func Main(args []string, stdout, stderr io.Writer) int {
	o, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stdout, usage)
		return 0
	}
	if err != nil {
		fmt.Fprintf(stderr, "run: %v (see o7s-router run --help)\n", err)
		return exitFailed
	}
	path, err := find(o.command[0])
	if err != nil {
		fmt.Fprintf(stderr, "run: %v\n", err)
		if path == "" {
			return exitNotFound
		}
		return exitCannot
	}
	status, err := run(o, path, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "run: %v\n", err)
	}
	return status
}

func run(o options, path string, stderr io.Writer) (status int, err error) {
	level := slog.LevelWarn
	if o.verbose {
		level = slog.LevelDebug
	}
	o.log = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	// Until everything is removed again.
	signals := make(chan os.Signal, 16)
	defer signal.Stop(signals)
	for _, s := range []os.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2} {
		if !signal.Ignored(s) { // nohup: the program inherits that
			signal.Notify(signals, s)
		}
	}
	dir, err := newDirectory()
	if err != nil {
		return exitFailed, err
	}
	defer dir.remove()
	o.dir, o.prog, o.args = dir.path, filepath.Base(path), o.command
	// Orphans of the program become our children, so that we know of the last.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return exitFailed, fmt.Errorf("become the parent of orphans: %w", err)
	}
	a, err := newAgent(o.agentOptions)
	if err != nil {
		return exitFailed, err
	}
	defer a.close()

	p, err := os.StartProcess(path, o.command, &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Env:   environment(os.Environ(), dir.shim(), a.environment()),
	})
	if err != nil {
		return exitCannot, fmt.Errorf("%s: %w", path, cause(err))
	}
	pid := p.Pid
	_ = p.Release() // waited for below, with all others

	var ended atomic.Bool // the program itself
	done := make(chan struct{})
	status = exitFailed
	go func() {
		defer close(done)
		for {
			var ws unix.WaitStatus
			switch n, err := unix.Wait4(-1, &ws, 0, nil); {
			case errors.Is(err, unix.EINTR):
			case err != nil:
				return // no children left
			case n == pid:
				if status = ws.ExitStatus(); ws.Signaled() {
					status = 128 + int(ws.Signal())
				}
				ended.Store(true)
			}
		}
	}()
	told := false
	for {
		select {
		case <-done:
			stop := make(chan struct{})
			drained := make(chan struct{})
			go func() {
				defer close(drained)
				a.drain(stop)
			}()
			select {
			case <-drained:
			case <-signals:
				close(stop)
				<-drained
			}
			return status, nil
		case s := <-signals:
			sig := s.(syscall.Signal)
			if !ended.Load() {
				if !fromTerminal(sig) {
					_ = unix.Kill(pid, sig)
				}
				continue
			}
			// What the program left behind is asked to end, once.
			if told {
				return status, nil
			}
			told = true
			for _, c := range children() {
				_ = unix.Kill(c, sig)
			}
		}
	}
}

// fromTerminal reports whether a signal is one that the terminal sends to the
// program, too: it is in the same process group.
func fromTerminal(sig syscall.Signal) bool {
	switch sig {
	case syscall.SIGINT, syscall.SIGQUIT, syscall.SIGHUP:
	default:
		return false
	}
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// children lists the children of this process.
func children() (out []int) {
	threads, _ := filepath.Glob("/proc/self/task/*/children")
	for _, t := range threads {
		b, _ := os.ReadFile(t)
		for _, w := range strings.Fields(string(b)) {
			var n int
			if _, err := fmt.Sscan(w, &n); err == nil {
				out = append(out, n)
			}
		}
	}
	return out
}

// environment is that of the program.
func environment(env []string, shim, agent string) []string {
	out := make([]string, 0, len(env)+2)
	preload := shim
	for _, e := range env {
		k, v, _ := strings.Cut(e, "=")
		switch k {
		case "O7S_RUN":
		case "LD_PRELOAD":
			// What a run around this one preloaded would do the same once more.
			for _, p := range strings.FieldsFunc(v, func(r rune) bool { return r == ':' || r == ' ' }) {
				if !strings.HasPrefix(filepath.Base(filepath.Dir(p)), dirPrefix) {
					preload += ":" + p
				}
			}
		default:
			out = append(out, e)
		}
	}
	return append(out, "LD_PRELOAD="+preload, "O7S_RUN="+agent)
}

// directory is where the shim and listening sockets are while a program runs.
type directory struct {
	path string
	lock *os.File // held by its owner
}

const (
	dirPrefix = "o7s-run-"
	// staleAfter is the age from which a directory that nobody holds is left
	// over; younger ones may not be held yet.
	staleAfter = time.Minute
)

// newDirectory makes one with the shim in it, where code may be loaded from, and
// removes what killed runs left.
func newDirectory() (*directory, error) {
	var errs []error
	for _, base := range []string{os.TempDir(), "/tmp", "/dev/shm", "/var/tmp"} {
		if err := suits(base); err != nil {
			errs = append(errs, err)
			continue
		}
		clean(base)
		d, err := makeDirectory(base)
		if err == nil {
			return d, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("no place for the shim: %w", errors.Join(errs...))
}

// suits reports why the loader would not load from base.
func suits(base string) error {
	if strings.ContainsAny(base, ": \t") {
		return fmt.Errorf("%q has a colon or a space", base)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(base, &st); err != nil {
		return fmt.Errorf("%s: %w", base, err)
	}
	if st.Flags&unix.ST_NOEXEC != 0 {
		return fmt.Errorf("%s is mounted noexec", base)
	}
	return nil
}

func makeDirectory(base string) (*directory, error) {
	path, err := os.MkdirTemp(base, dirPrefix)
	if err != nil {
		return nil, err
	}
	d := &directory{path: path}
	// Processes with other rights load the shim, too; nobody lists the rest.
	err = errors.Join(os.Chmod(path, 0o711), os.WriteFile(d.shim(), shim.Object, 0o644), os.Chmod(d.shim(), 0o644))
	if err == nil {
		if d.lock, err = os.Open(path); err == nil {
			err = unix.Flock(int(d.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		}
	}
	if err != nil {
		d.remove()
		return nil, err
	}
	return d, nil
}

func (d *directory) shim() string { return filepath.Join(d.path, "shim.so") }

func (d *directory) remove() {
	_ = os.RemoveAll(d.path)
	if d.lock != nil {
		_ = d.lock.Close()
	}
}

// clean removes directories of ours that nobody holds.
func clean(base string) {
	all, _ := filepath.Glob(filepath.Join(base, dirPrefix+"*"))
	for _, path := range all {
		var st unix.Stat_t
		if unix.Lstat(path, &st) != nil || int(st.Uid) != os.Geteuid() || st.Mode&unix.S_IFMT != unix.S_IFDIR ||
			time.Since(time.Unix(st.Mtim.Unix())) < staleAfter {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = os.RemoveAll(path)
		}
		_ = f.Close()
	}
}
