// Package daemon assembles the node: fast path, resource manager, the types of
// layers, the local socket and metrics.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/control/metrics"
	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/eth"
	"github.com/o7s/o7s-router/ipcp/local"
	"github.com/o7s/o7s-router/ipcp/unicast"
	"github.com/o7s/o7s-router/lib/ipc"
)

// Options configure a daemon. Zero values stand for the defaults.
type Options struct {
	// RunDir has the socket, its lock and the pinned maps; several daemons on
	// one machine need one each. Default: O7S_RUN_DIR, then /run/o7s.
	RunDir string
	// Group may manage the node, as root may. Default: ouroboros, else o7s, if
	// the system has such a group.
	Group string
	// Metrics is the address to serve Prometheus metrics on; "" serves none.
	Metrics string
	// NoXDP keeps all packets in user space.
	NoXDP bool
	// NoWithdraw switches withdrawals of links (spec 50 §1) off, for
	// measurements; it holds for all daemons of the process.
	NoWithdraw bool
	// Version of the build.
	Version string
	// Log gets everything; default: text on standard error from level info on.
	Log *slog.Logger
	// Ready is called once programs can connect. It may be nil.
	Ready func()
}

// minKernel is the oldest kernel that everything is tested on: that of Debian 12.
var minKernel = [2]int{6, 1}

// socketMode lets every program in; operations that manage the node look at
// the credentials of who asks (spec 45 §7).
const socketMode = 0o666

// NewLogger returns a logger on standard error. level is debug, info, warn or
// error; format is text or json.
func NewLogger(level, format string) (*slog.Logger, error) {
	var l slog.Level
	if level != "" {
		if err := l.UnmarshalText([]byte(level)); err != nil {
			return nil, fmt.Errorf("unknown log level %q (expected debug, info, warn or error)", level)
		}
	}
	o := &slog.HandlerOptions{Level: l}
	switch format {
	case "", "text":
		return slog.New(slog.NewTextHandler(os.Stderr, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, o)), nil
	}
	return nil, fmt.Errorf("unknown log format %q (expected text or json)", format)
}

// Run is the daemon. It returns when ctx ends, after it removed its socket,
// pins and links, with nil; or with the error that kept it from serving.
func Run(ctx context.Context, o Options) (err error) {
	if o.Log == nil {
		if o.Log, err = NewLogger("", ""); err != nil {
			return err
		}
	}
	if err := checkKernel(); err != nil {
		return err
	}
	groups, err := managers(o.Group)
	if err != nil {
		return err
	}
	o.RunDir, err = filepath.Abs(ipc.RunDir(o.RunDir))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.RunDir, 0o755); err != nil {
		return fmt.Errorf("run directory: %w", err)
	}
	// The listener holds the lock of the run directory: from here on, whatever
	// lies there is ours.
	_, left := os.Lstat(ipc.SocketPath(o.RunDir))
	listener, err := ipc.Listen(ipc.SocketPath(o.RunDir), socketMode)
	if err != nil {
		return err
	}
	defer listener.Close()
	if left == nil {
		o.Log.Warn("an earlier daemon here did not end by itself; what it left is removed, and layers and names have to be made again", "run_dir", o.RunDir)
	}
	pins := filepath.Join(o.RunDir, "bpf")
	if err := purge(pins); err != nil {
		return fmt.Errorf("remove what an earlier daemon left in %s: %w", pins, err)
	}
	plane, err := fastpath.New(fastpath.Options{PinDir: pins, DisableXDP: o.NoXDP, Log: o.Log})
	if err != nil {
		return fmt.Errorf("fast path: %w", err)
	}
	defer func() {
		err = errors.Join(err, plane.Close(), purge(pins))
	}()
	if o.NoWithdraw {
		unicast.NoWithdraw = true
	}
	m := irm.New(irm.Config{
		RunDir: o.RunDir, Groups: groups, Plane: plane, Factories: factories(plane, filepath.Join(o.RunDir, "flows")),
		Version: o.Version, Output: os.Stderr, Log: o.Log,
	})
	defer func() {
		err = errors.Join(err, m.Close())
		o.Log.Info("stopped")
	}()

	run, ctx := errgroup.WithContext(ctx)
	if o.Metrics != "" {
		l, err := net.Listen("tcp", o.Metrics)
		if err != nil {
			return fmt.Errorf("metrics: %w", err)
		}
		o.Log.Info("serving metrics", "address", l.Addr().String())
		h := metrics.Handler(metrics.NewCollector(m, plane, o.Version))
		run.Go(func() error { return metrics.Serve(ctx, l, h, o.Log) })
	}
	run.Go(func() error { return m.Serve(listener) })
	stop := context.AfterFunc(ctx, func() { _ = listener.Shut() })
	defer stop()
	kernel, reason := plane.Kernel()
	o.Log.Info("serving", "version", o.Version, "run_dir", o.RunDir, "xdp", kernel, "xdp_reason", reason)
	if o.Ready != nil {
		o.Ready()
	}
	return run.Wait()
}

// factories has the types of layers that this build knows. Ethernet layers keep
// their journals in the directory notes.
func factories(plane *fastpath.Plane, notes string) map[ipcp.Type]irm.Factory {
	return map[ipcp.Type]irm.Factory{
		ipcp.Local: func(name string, host ipcp.Host, log *slog.Logger) (ipcp.Layer, error) {
			return local.New(name, host, log), nil
		},
		ipcp.EthDIX: func(name string, host ipcp.Host, log *slog.Logger) (ipcp.Layer, error) {
			return eth.New(name, host, plane, notes, log), nil
		},
		ipcp.Unicast: func(name string, host ipcp.Host, log *slog.Logger) (ipcp.Layer, error) {
			return unicast.New(name, host, plane, log), nil
		},
	}
}

func checkKernel() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("kernel version: %w", err)
	}
	return kernelAtLeast(unix.ByteSliceToString(u.Release[:]), minKernel)
}

func kernelAtLeast(release string, want [2]int) error {
	var have [2]int
	if n, _ := fmt.Sscanf(release, "%d.%d", &have[0], &have[1]); n != 2 {
		return fmt.Errorf("kernel release %q cannot be read", release)
	}
	if have[0] < want[0] || have[0] == want[0] && have[1] < want[1] {
		return fmt.Errorf("kernel %s is too old: Linux %d.%d or newer is needed", release, want[0], want[1])
	}
	return nil
}

// managers returns the ids of the groups that may manage the node.
func managers(name string) ([]uint32, error) {
	candidates := []string{"ouroboros", "o7s"}
	if name != "" {
		candidates = []string{name}
	}
	for _, c := range candidates {
		g, err := user.LookupGroup(c)
		var unknown user.UnknownGroupError
		switch {
		case errors.As(err, &unknown):
			continue
		case err != nil:
			return nil, fmt.Errorf("group %q: %w", c, err)
		}
		id, err := strconv.ParseUint(g.Gid, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("group %q has id %q: %w", c, g.Gid, err)
		}
		return []uint32{uint32(id)}, nil
	}
	if name != "" {
		return nil, fmt.Errorf("unknown group %q", name)
	}
	return nil, nil
}

// bpffsMagic is the type of a BPF file system in statfs.
const bpffsMagic = 0xcafe4a11

// purge removes the pins of an earlier daemon and the file system they were in.
func purge(dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			return err
		}
		if st.Type != bpffsMagic {
			break
		}
		if mounted, err := mountPoint(dir); err != nil || !mounted {
			break // the run directory itself is on a BPF file system
		}
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// mountPoint reports whether something is mounted at dir.
func mountPoint(dir string) (bool, error) {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false, err
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && unescape(f[4]) == real {
			return true, nil
		}
	}
	return false, nil
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
