package nodes

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/o7s/o7s-router/bench/row"
	"github.com/o7s/o7s-router/bench/worker"
	"github.com/o7s/o7s-router/deploy/lab"
)

// boot measures from nothing to the first ping that is back: namespaces, links,
// daemons, layers, names. The memory of the middle daemon is taken on the way.
func (c Config) boot(_ context.Context, names []string) ([]row.Row, func(), error) {
	mib := 0.0
	var rows []row.Row
	for _, n := range names {
		r := row.Row{Name: n, Unit: "s"}
		switch n {
		case boot:
			r.Measure = func(ctx context.Context) (took float64, err error) {
				took, mib, err = c.bootOnce(ctx)
				return took, err
			}
		case memory:
			r.Unit = "MiB"
			r.Measure = func(ctx context.Context) (float64, error) {
				var err error
				if mib == 0 {
					_, mib, err = c.bootOnce(ctx)
				}
				v := mib
				mib = 0 // each is used once
				return v, err
			}
		}
		rows = append(rows, r)
	}
	return rows, func() {}, nil
}

func (c Config) bootOnce(ctx context.Context) (seconds, mib float64, err error) {
	var down takeDown
	defer down.all()
	start := time.Now()
	l, err := c.line(ctx, &down, echoName)
	if err != nil {
		return 0, 0, err
	}
	if err := run(ctx, l, "h1", nil, "once", "-to", echoName); err != nil {
		return 0, 0, err
	}
	seconds = time.Since(start).Seconds()
	// Some traffic, so that buffers are there.
	if err := run(ctx, l, "h1", &worker.Ping{}, "ping", "-to", echoName, "-for", "100ms"); err != nil {
		return 0, 0, err
	}
	mib, err = resident(l, "h2")
	return seconds, mib, err
}

// resident is the memory of a host's daemon in MiB: pages that are resident,
// less those of BPF maps and of the rings of AF_XDP sockets. Packet memory
// (Umem) is anonymous memory like any other to the kernel and is counted, so
// this is more than the daemon needs by what the Umem has in use.
func resident(l *lab.Lab, host string) (float64, error) {
	pid, err := daemonOf(l, host)
	if err != nil {
		return 0, err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return 0, err
	}
	return sumResident(b)
}

// sumResident adds up the resident pages of /proc/PID/smaps, in MiB.
func sumResident(smaps []byte) (float64, error) {
	kib, skip := 0, false
	s := bufio.NewScanner(bytes.NewReader(smaps))
	for s.Scan() {
		f := strings.Fields(s.Text())
		if len(f) >= 5 && !strings.HasSuffix(f[0], ":") { // a mapping starts
			skip = len(f) > 5 && excluded(f[5])
		}
		if len(f) == 3 && f[0] == "Rss:" && !skip {
			n, err := strconv.Atoi(f[1])
			if err != nil {
				return 0, fmt.Errorf("smaps: %w", err)
			}
			kib += n
		}
	}
	return float64(kib) / 1024, s.Err()
}

// excluded tells whether a mapping is a BPF map or rings of an AF_XDP socket.
func excluded(name string) bool {
	return strings.HasPrefix(name, "anon_inode:bpf") || strings.HasPrefix(name, "socket:")
}

// daemonsCPU is the user and system time, in s, of all daemons of a lab so far.
func daemonsCPU(l *lab.Lab) (float64, error) {
	const ticks = 100 // a second; USER_HZ is the same on every Linux that Go runs on
	sum := 0
	for _, h := range l.Topology().Hosts {
		pid, err := daemonOf(l, h)
		if err != nil {
			return 0, err
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, err
		}
		// Fields 14 and 15; the second is a name in parentheses.
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(f) < 13 {
			return 0, fmt.Errorf("process %d: unreadable stat", pid)
		}
		for _, v := range f[11:13] {
			n, err := strconv.Atoi(v)
			if err != nil {
				return 0, fmt.Errorf("process %d: %w", pid, err)
			}
			sum += n
		}
	}
	return float64(sum) / ticks, nil
}

// daemonOf finds a host's daemon by its run directory.
func daemonOf(l *lab.Lab, host string) (int, error) {
	dir := l.RunDir(host)
	pid, err := processOf(func(argv []string) bool {
		i := slices.Index(argv, "--run-dir")
		return i >= 0 && i+1 < len(argv) && argv[i+1] == dir
	})
	if err != nil {
		return 0, fmt.Errorf("daemon of %s: %w", host, err)
	}
	return pid, nil
}

// processOf finds a process by its command line.
func processOf(match func(argv []string) bool) (int, error) {
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, p := range procs {
		b, err := os.ReadFile(p)
		if err != nil {
			continue // it has ended
		}
		if match(strings.Split(string(b), "\x00")) {
			return strconv.Atoi(filepath.Base(filepath.Dir(p)))
		}
	}
	return 0, errors.New("no such process")
}
