package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/o7s/o7s-router/lib/ipc"
)

const (
	// DefaultStateDir holds a directory per lab that is up.
	DefaultStateDir = "/run/o7s-lab"
	// binDir, in a lab's directory, is first in the PATH of what runs in it.
	binDir = "bin"
	// bootTimeout is how long a daemon may take until it answers.
	bootTimeout = 10 * time.Second
	// stepTimeout bounds one operation on a daemon; enrolment and connecting
	// take at most 20 s (spec 47 §4.1).
	stepTimeout = 25 * time.Second
)

// multicall are the names under which the binary serves as the reference's
// commands.
var multicall = []string{"o7s-router", "irmd", "irm", "oping"}

// Options say where and how a lab runs. The zero value is good for a command
// that is o7s-router itself.
type Options struct {
	// Binary is o7s-router; this program when empty.
	Binary string
	// Prefix goes in front of the lab's name, so that several labs of one file
	// run side by side. Letters, digits, '_' and '.'.
	Prefix string
	// StateDir is DefaultStateDir when empty. Run directories and logs are in
	// <StateDir>/<lab>/<host>.
	StateDir string
	// NoDaemons makes namespaces and links only.
	NoDaemons bool
	// Converge is how long Up waits for every member to have a route to every
	// other; 10 s when 0, not at all when negative.
	Converge time.Duration
	// Stdout gets the commands of checks and their output, nil for nowhere.
	Stdout io.Writer
	Log    *slog.Logger // nil: none
}

// Lab is a topology and where it runs. Its methods may be used by another
// process than the one that called Up. Up, Down and Run must not overlap.
type Lab struct {
	topo *Topology
	opt  Options
	log  *slog.Logger
	name string
	dir  string
	hold func() // gives the lock back; nil when not held

	mu      sync.Mutex             // guards what follows
	clients map[string]*ipc.Client // by host
	relays  []*relay
}

// New prepares a lab; nothing is made yet.
func New(t *Topology, opt Options) (*Lab, error) {
	if opt.Prefix != "" && !goodName.MatchString(opt.Prefix) {
		return nil, fmt.Errorf("bad lab prefix %q, expected letters, digits, '_' and '.'", opt.Prefix)
	}
	if opt.Binary == "" && !opt.NoDaemons {
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("find o7s-router: %w", err)
		}
		opt.Binary = self
	}
	if opt.Binary != "" {
		abs, err := filepath.Abs(opt.Binary)
		if err != nil {
			return nil, err
		}
		opt.Binary = abs
	}
	opt.StateDir = cmp.Or(opt.StateDir, DefaultStateDir)
	opt.Converge = cmp.Or(opt.Converge, 10*time.Second)
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	if opt.Stdout == nil {
		opt.Stdout = io.Discard
	}
	name := opt.Prefix + t.Name
	return &Lab{
		topo: t, opt: opt, name: name, dir: filepath.Join(opt.StateDir, name),
		log: opt.Log.With("lab", name), clients: map[string]*ipc.Client{},
	}, nil
}

// Name is the lab's name, with the prefix.
func (l *Lab) Name() string { return l.name }

// Topology is what the lab was made from.
func (l *Lab) Topology() *Topology { return l.topo }

// Namespace is the network namespace of a host.
func (l *Lab) Namespace(host string) string { return nsPrefix(l.name) + host }

func nsPrefix(name string) string { return "o7s-" + name + "-" }

// RunDir is the run directory of a host's daemon; its log is daemon.log there.
func (l *Lab) RunDir(host string) string { return filepath.Join(l.dir, host) }

func (l *Lab) lock(ctx context.Context) error {
	if l.hold != nil {
		return nil
	}
	give, err := lock(ctx, l.dir+".lock")
	if err != nil {
		return fmt.Errorf("lab %s: %w", l.name, err)
	}
	l.hold = give
	return nil
}

func (l *Lab) unlock() {
	if l.hold != nil {
		l.hold()
		l.hold = nil
		_ = os.Remove(l.opt.StateDir) // when this was the last
	}
}

// Up builds the lab and returns when it is ready: daemons, layers, names and
// programs are there, and routes where Converge asks for them. What an earlier
// lab of that name left is removed first. After an error nothing is left.
// Daemons and programs go on when this process ends.
func (l *Lab) Up(ctx context.Context) error {
	if err := l.lock(ctx); err != nil {
		return err
	}
	defer l.unlock()
	if err := l.up(ctx); err != nil {
		return errors.Join(err, l.down())
	}
	return nil
}

// Run builds the lab, does its checks and takes it down, whatever happens. When
// ctx ends (Ctrl-C) it cleans up and returns the context's error.
func (l *Lab) Run(ctx context.Context) error {
	if err := l.lock(ctx); err != nil {
		return err
	}
	defer l.unlock()
	err := l.up(ctx)
	if err == nil {
		_, err = l.Check(ctx)
	}
	return errors.Join(err, l.down())
}

// Down takes the lab down.
func (l *Lab) Down(ctx context.Context) error {
	if err := l.lock(ctx); err != nil {
		return err
	}
	defer l.unlock()
	return l.down()
}

// Down takes down the lab called name (with its prefix, if any) without its
// file. A lab that is not there is no error.
func Down(ctx context.Context, name string, opt Options) error {
	if !goodName.MatchString(name) {
		return fmt.Errorf("bad lab name %q", name)
	}
	opt.NoDaemons = true // no binary needed
	opt.Prefix = ""
	l, err := New(&Topology{Name: name}, opt)
	if err != nil {
		return err
	}
	return l.Down(ctx)
}

// down needs the lock. It takes no context: cleaning up is not given up.
func (l *Lab) down() error {
	l.mu.Lock()
	for _, c := range l.clients {
		_ = c.Close()
	}
	clear(l.clients)
	l.mu.Unlock()
	err := errors.Join(l.endRelays(), clean(l.dir, nsPrefix(l.name)))
	if err != nil {
		return fmt.Errorf("take lab %s down: %w", l.name, err)
	}
	return nil
}

func (l *Lab) up(ctx context.Context) error {
	began := time.Now()
	if left, err := os.ReadDir(l.dir); err == nil && len(left) > 0 {
		l.log.Info("lab_leftover_removed", "dir", l.dir)
	}
	if err := l.down(); err != nil {
		return err
	}
	if err := prepareNetnsDir(); err != nil {
		return err
	}
	if err := l.prepareDir(); err != nil {
		return err
	}
	if err := each(ctx, l.topo.Hosts, func(_ context.Context, h string) error {
		return addNetns(l.Namespace(h), l.topo.Defaults.IPv6)
	}); err != nil {
		return err
	}
	// The daemons start while the links are made.
	g, gctx := errgroup.WithContext(ctx)
	for i := range l.topo.Links {
		g.Go(func() error {
			return l.addLink(&l.topo.Links[i])
		})
	}
	if !l.opt.NoDaemons {
		for _, h := range l.topo.Hosts {
			g.Go(func() error { return l.startDaemon(gctx, h) })
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	l.log.Info("lab_hosts_up", "hosts", len(l.topo.Hosts), "links", len(l.topo.Links), "took", time.Since(began))
	if !l.opt.NoDaemons {
		if err := l.setup(ctx); err != nil {
			return l.explain(err)
		}
	}
	if err := each(ctx, l.topo.Runs, func(ctx context.Context, r Run) error {
		_, err := l.Start(ctx, r.Host, r.Command...)
		return err
	}); err != nil {
		return err
	}
	if !l.opt.NoDaemons && l.opt.Converge > 0 {
		if err := l.converge(ctx); err != nil {
			return l.explain(err)
		}
	}
	l.log.Info("lab_up", "took", time.Since(began))
	return ctx.Err()
}

func (l *Lab) prepareDir() error {
	bin := filepath.Join(l.dir, binDir)
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return err
	}
	if l.opt.Binary == "" {
		return nil
	}
	if _, err := os.Stat(l.opt.Binary); err != nil {
		return fmt.Errorf("o7s-router: %w", err)
	}
	for _, n := range multicall {
		if err := os.Symlink(l.opt.Binary, filepath.Join(bin, n)); err != nil {
			return err
		}
	}
	return nil
}

// each runs f for all of list at once.
func each[T any](ctx context.Context, list []T, f func(context.Context, T) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, x := range list {
		g.Go(func() error { return f(ctx, x) })
	}
	return g.Wait()
}

// command prepares a program of a host: the binary's links come first in PATH,
// and programs find the host's daemon.
func (l *Lab) command(ctx context.Context, host string, argv []string) (*exec.Cmd, error) {
	if !slices.Contains(l.topo.Hosts, host) {
		return nil, fmt.Errorf("unknown host %q (hosts: %s)", host, strings.Join(l.topo.Hosts, ", "))
	}
	if len(argv) == 0 {
		return nil, errors.New("no command given")
	}
	// First: the commands of a lab are there while it is up.
	if _, err := os.Stat(filepath.Join(netnsDir, l.Namespace(host))); err != nil {
		return nil, fmt.Errorf("lab %s is not up", l.name)
	}
	path, err := l.lookPath(argv[0])
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, argv[1:]...)
	cmd.Args[0] = argv[0]
	cmd.Env = append(os.Environ(),
		"PATH="+filepath.Join(l.dir, binDir)+":"+os.Getenv("PATH"),
		"O7S_RUN_DIR="+l.RunDir(host),
		"O7S_LAB="+l.name,
		"O7S_HOST="+host,
	)
	return cmd, nil
}

// lookPath finds a program as the hosts do.
func (l *Lab) lookPath(prog string) (string, error) {
	if !strings.Contains(prog, "/") {
		p := filepath.Join(l.dir, binDir, prog)
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	p, err := exec.LookPath(prog)
	if err != nil {
		return "", err
	}
	return filepath.Abs(p)
}

// start starts cmd in the host's namespace.
func (l *Lab) start(host string, cmd *exec.Cmd) error {
	return inNetns(l.Namespace(host), cmd.Start)
}

// background starts cmd in a session of its own with its output in a file, and
// writes it down. The channel gives its end.
func (l *Lab) background(host, log string, cmd *exec.Cmd) (<-chan error, error) {
	if err := os.MkdirAll(l.RunDir(host), 0o755); err != nil {
		return nil, err
	}
	out, err := os.OpenFile(filepath.Join(l.RunDir(host), log), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no Ctrl-C from our terminal
	if err := l.start(host, cmd); err != nil {
		return nil, fmt.Errorf("host %s: start %s: %w", host, cmd.Args[0], err)
	}
	// Not reaped yet, so the number is still its own.
	err = record(l.dir, process{PID: cmd.Process.Pid, Host: host, Argv: cmd.Args})
	end := make(chan error, 1)
	go func() { end <- cmd.Wait() }()
	if err != nil {
		_ = cmd.Process.Kill()
	}
	return end, err
}

// Start starts a program on a host of a lab that is up; it runs until the lab
// goes down. Its output is in the file <program>.log in the host's run
// directory. The channel gives its end.
func (l *Lab) Start(ctx context.Context, host string, argv ...string) (<-chan error, error) {
	cmd, err := l.command(context.WithoutCancel(ctx), host, argv)
	if err != nil {
		return nil, fmt.Errorf("host %s: %w", host, err)
	}
	return l.background(host, filepath.Base(argv[0])+".log", cmd)
}

// Streams are what a program in the foreground is connected to.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// Exec runs a program on a host of a lab that is up and waits for it. A program
// that fails gives an *exec.ExitError.
func (l *Lab) Exec(ctx context.Context, host string, s Streams, argv ...string) error {
	cmd, err := l.command(ctx, host, argv)
	if err != nil {
		return fmt.Errorf("host %s: %w", host, err)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = s.In, s.Out, s.Err
	cmd.WaitDelay = time.Second // for grandchildren that keep the output open
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	if err := l.start(host, cmd); err != nil {
		return fmt.Errorf("host %s: start %s: %w", host, argv[0], err)
	}
	return cmd.Wait()
}

// Result is how a check went.
type Result struct {
	Host   string
	Argv   []string
	Output string // of the last try
	Err    error
	Tries  int
	Took   time.Duration // until success, all tries
}

// Check does the checks of the topology in order. The error joins those of the
// checks that failed.
func (l *Lab) Check(ctx context.Context) ([]Result, error) {
	var out []Result
	var errs []error
	for i := range l.topo.Checks {
		r := l.check(ctx, &l.topo.Checks[i])
		out = append(out, r)
		_, _ = fmt.Fprintf(l.opt.Stdout, "%s$ %s\n%s", r.Host, strings.Join(r.Argv, " "), r.Output)
		if r.Err != nil {
			errs = append(errs, fmt.Errorf("check on %s: %s: %w", r.Host, strings.Join(r.Argv, " "), r.Err))
		}
		if err := ctx.Err(); err != nil {
			errs = append(errs, err)
			break
		}
	}
	return out, errors.Join(errs...)
}

func (l *Lab) check(ctx context.Context, k *Check) Result {
	r := Result{Host: k.Host, Argv: k.argv()}
	began := time.Now()
	if k.Ping != "" && !l.opt.NoDaemons {
		// A daemon reaches only names that it knows.
		if r.Err = l.ensureName(ctx, k.Host, k.Ping, ""); r.Err != nil {
			return r
		}
	}
	for {
		r.Tries++
		r.Output, r.Err = l.try(ctx, k)
		r.Took = time.Since(began)
		if r.Err == nil || r.Took >= time.Duration(k.Within) || ctx.Err() != nil {
			return r
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func (l *Lab) try(ctx context.Context, k *Check) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(k.Timeout))
	defer cancel()
	var buf strings.Builder
	err := l.Exec(ctx, k.Host, Streams{Out: &buf, Err: &buf}, k.argv()...)
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		err = fmt.Errorf("not done after %v", time.Duration(k.Timeout))
	case err == nil && k.Expect != "":
		re, rerr := regexp.Compile("(?m)" + k.Expect)
		if rerr != nil {
			err = rerr
		} else if !re.MatchString(buf.String()) {
			err = fmt.Errorf("output does not match %q", k.Expect)
		}
	}
	return buf.String(), err
}

// SetLink takes the first link between two hosts down, or up again, at the end
// of host a. Both ends lose the carrier.
func (l *Lab) SetLink(a, b string, up bool) error {
	for i := range l.topo.Links {
		k := &l.topo.Links[i]
		for e := range k.Ends {
			if k.Ends[e] == a && k.Ends[1-e] == b {
				return setLink(l.Namespace(a), k.Devices[e], up)
			}
		}
	}
	return fmt.Errorf("no link between %q and %q", a, b)
}

// explain adds the ends of the daemons' logs to an error.
func (l *Lab) explain(err error) error {
	var b strings.Builder
	for _, h := range l.topo.Hosts {
		data, rerr := os.ReadFile(filepath.Join(l.RunDir(h), daemonLog))
		if rerr != nil || len(data) == 0 {
			continue
		}
		lines := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
		for _, line := range lines[max(0, len(lines)-8):] {
			fmt.Fprintf(&b, "\n  %s: %s", h, line)
		}
	}
	if b.Len() == 0 {
		return err
	}
	return fmt.Errorf("%w\nthe daemons' last words:%s", err, b.String())
}
