// Command bench measures the router: forwarding next to a bare redirect and to
// kernel IPv4 forwarding, AF_XDP sockets next to another library's, round trips
// next to UDP, flows within a machine next to a unix socket, reliable flows next
// to quic-go and TCP, and what the control plane takes. Rows that are compared
// are measured in turns within one run.
//
// It needs root and works in network namespaces of its own, so it leaves the
// machine's network alone. The exit status is 0 only when every bar that the
// measured rows belong to was reached.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/bench/afxdp"
	"github.com/o7s/o7s-router/bench/nodes"
	"github.com/o7s/o7s-router/bench/plot"
	"github.com/o7s/o7s-router/bench/progrun"
	"github.com/o7s/o7s-router/bench/routes"
	"github.com/o7s/o7s-router/bench/row"
	"github.com/o7s/o7s-router/bench/transit"
	"github.com/o7s/o7s-router/bench/worker"
)

// inside is set in the environment of the process that runs in the namespace.
const inside = "O7S_BENCH_INSIDE"

func main() {
	if len(os.Args) > 1 && os.Args[1] == worker.Command {
		fail(worker.Main(os.Args[2:]))
		return
	}
	var o options
	flag.StringVar(&o.rows, "rows", "", "measure only rows whose name starts with this")
	flag.StringVar(&o.out, "out", "bench/results/latest.json", "file for the results")
	flag.StringVar(&o.plot, "plot", "bench/results/latest.png", "file for the plot")
	flag.IntVar(&o.rounds, "rounds", 0, "rounds of every group; 0: as each group has it")
	flag.StringVar(&o.nodes.Router, "router", "bin/o7s-router", "the router, for rows that need daemons")
	flag.StringVar(&o.nodes.Topologies, "lab", "deploy/lab", "directory of the topologies")
	flag.Parse()
	if flag.NArg() > 0 {
		fail(fmt.Errorf("unexpected argument %q (expected only flags, see -h)", flag.Arg(0)))
	}
	if os.Geteuid() != 0 {
		fail(errors.New("the benchmarks need root: they make network namespaces and load XDP programs"))
	}
	if os.Getenv(inside) == "" {
		os.Exit(reexec())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ok, err := o.run(ctx)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	if err != nil {
		fail(err)
	}
	if !ok {
		os.Exit(1)
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// reexec runs this program in a fresh network namespace, which disappears with
// it whatever happens, and returns its exit status.
func reexec() int {
	runtime.LockOSThread() // the parent-death signal is bound to the thread
	self, err := os.Executable()
	fail(err)
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGTERM}
	// The child cleans up and ends. A terminal's Ctrl-C reaches it twice, which
	// does no harm.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	fail(cmd.Start())
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s) // it may have ended
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fail(err)
	}
	return cmp.Or(cmd.ProcessState.ExitCode(), 0)
}

type options struct {
	rows, out, plot string
	rounds          int
	nodes           nodes.Config
}

// run measures, prints and writes down. It reports whether all bars were reached.
func (o *options) run(ctx context.Context) (bool, error) {
	groups := []row.Group{transit.Group(), progrun.Group(), afxdp.Group(), routes.Group()}
	groups = append(groups, nodes.Groups(o.nodes)...)
	bars := slices.Concat(transit.Bars(), progrun.Bars(), routes.Bars(), nodes.Bars())
	if o.rounds > 0 {
		for i := range groups {
			groups[i].Rounds = o.rounds
		}
	}
	began := time.Now()
	res, runErr := row.Run(ctx, groups, o.rows, os.Stderr)
	if len(res) == 0 {
		if runErr == nil {
			runErr = fmt.Errorf("no row's name starts with %q", o.rows)
		}
		return false, runErr
	}
	fmt.Println()
	row.Table(os.Stdout, res)
	fmt.Println()
	ok := row.Check(os.Stdout, res, bars)
	fmt.Printf("\n%d rows in %s\n", len(res), time.Since(began).Round(time.Second))
	for _, f := range []string{o.out, o.plot} {
		if err := os.MkdirAll(filepath.Dir(f), 0o755); err != nil {
			return false, errors.Join(runErr, err)
		}
	}
	all, err := row.Save(o.out, res, groups)
	if err == nil {
		err = plot.Save(o.plot, all, compared)
	}
	return ok, errors.Join(runErr, err)
}

// compared are the rows that are there to be compared with.
func compared(name string) bool {
	switch name {
	case "seqpacket/rtt", "seqpacket/64B", "seqpacket/1500B", "quic/goodput", "tcp/goodput", "quic/cpu", "tcp/cpu",
		"quic/loss-1", "tcp/loss-1", "frcp-spec/loss-1", "quic/loss-5", "tcp/loss-5", "frcp-spec/loss-5":
		return true
	case "transit/base", "transit/bare", "transit/array-1M", "transit/kernel-ipv4", "progrun/empty", "asavie/rx", "asavie/tx", "rtt/udp-3node", "rtt/udp-3node-idle":
		return true
	}
	return false
}
