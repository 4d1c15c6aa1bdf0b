package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// processFile is in the lab's directory and has one JSON line per process
// that the lab started.
const processFile = "processes"

// grace is how long a process may take to end before it is killed.
const grace = 3 * time.Second

// process is a process that the lab started. The start time tells it from
// another one that got its number later.
type process struct {
	PID   int      `json:"pid"`
	Start uint64   `json:"start"` // clock ticks after boot
	Host  string   `json:"host"`
	Argv  []string `json:"argv"`
}

// startTime returns when a process started, field 22 of its stat file.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is the name in parentheses, which may contain anything.
	i := bytes.LastIndexByte(b, ')')
	f := bytes.Fields(b[i+1:])
	if i < 0 || len(f) < 20 {
		return 0, fmt.Errorf("process %d: unreadable stat", pid)
	}
	return strconv.ParseUint(string(f[19]), 10, 64)
}

// record appends a process to the file in dir.
func record(dir string, p process) error {
	var err error
	if p.Start, err = startTime(p.PID); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil // it has ended and been reaped
		}
		return err
	}
	line, err := json.Marshal(p)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, processFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(line, '\n'))
	return errors.Join(err, f.Close())
}

// recorded reads the file; a torn last line is skipped.
func recorded(dir string) ([]process, error) {
	f, err := os.Open(filepath.Join(dir, processFile))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	defer f.Close()
	var out []process
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		var p process
		if json.Unmarshal(sc.Bytes(), &p) == nil && p.PID > 1 {
			out = append(out, p)
		}
	}
	return out, sc.Err()
}

// stop ends a process: asks, waits, kills. same says whether the process that
// has the number now is the one that is meant; it is asked after the number is
// pinned by a descriptor.
func stop(pid int, same func() bool) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if !same() {
		return nil
	}
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil {
			if errors.Is(err, unix.ESRCH) {
				return nil
			}
			return fmt.Errorf("signal process %d: %w", pid, err)
		}
		if ended(fd, grace) {
			return nil
		}
	}
	return fmt.Errorf("process %d does not end", pid)
}

func ended(pidfd int, d time.Duration) bool {
	deadline := time.Now().Add(d)
	for {
		left := time.Until(deadline)
		if left < 0 {
			return false
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(left/time.Millisecond)+1)
		if err == nil || !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}

// inhabitants returns the processes whose network namespace is one of ns.
func inhabitants(ns map[nsID]bool) []int {
	es, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var out []int
	for _, e := range es {
		pid, err := strconv.Atoi(e.Name())
		if err == nil && pid != os.Getpid() && lives(pid, ns) {
			out = append(out, pid)
		}
	}
	return out
}

func lives(pid int, ns map[nsID]bool) bool {
	id, err := statNS(fmt.Sprintf("/proc/%d/ns/net", pid))
	return err == nil && ns[id]
}

// mountsBelow returns the mount points under dir, deepest first.
func mountsBelow(dir string) ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		if p := unescape(f[4]); strings.HasPrefix(p, dir+"/") {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b string) int { return len(b) - len(a) })
	return out, nil
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// clean removes everything that a lab left: its processes, those that anybody
// started inside it, mounts, devices, namespaces and its directory. It goes on
// after an error.
func clean(dir, nsPrefix string) error {
	var mu sync.Mutex
	var errs []error
	fail := func(err error) {
		if err != nil {
			mu.Lock()
			errs = append(errs, err)
			mu.Unlock()
		}
	}
	names, err := listNetns(nsPrefix)
	fail(err)
	ids := map[nsID]bool{}
	for _, n := range names {
		id, err := statNS(filepath.Join(netnsDir, n))
		// A file that is not mounted is on the file system of the directory.
		if parent, perr := statNS(netnsDir); err == nil && perr == nil && id.dev != parent.dev {
			ids[id] = true
		}
	}
	ps, err := recorded(dir)
	fail(err)
	var wg sync.WaitGroup
	for _, p := range ps {
		wg.Go(func() {
			fail(stop(p.PID, func() bool {
				t, err := startTime(p.PID)
				return err == nil && t == p.Start
			}))
		})
	}
	wg.Wait()
	// What is left in the namespaces: started there by hand, or by a run that
	// was killed before it could write down its process.
	for _, pid := range inhabitants(ids) {
		wg.Go(func() { fail(stop(pid, func() bool { return lives(pid, ids) })) })
	}
	wg.Wait()
	mounts, err := mountsBelow(dir)
	fail(err)
	for _, m := range mounts {
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			fail(fmt.Errorf("unmount %s: %w", m, err))
		}
	}
	for _, n := range names {
		wg.Go(func() {
			if id, err := statNS(filepath.Join(netnsDir, n)); err == nil && ids[id] {
				fail(delLinks(n))
			}
			fail(delNetns(n))
		})
	}
	wg.Wait()
	fail(os.RemoveAll(dir))
	return errors.Join(errs...)
}

// lock takes the lab for this process; the kernel releases it when the process
// dies. The returned function gives it back and removes the file.
func lock(ctx context.Context, path string) (func(), error) {
	for {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
		if errors.Is(err, os.ErrNotExist) && ctx.Err() == nil {
			continue // the last lab took the directory with it
		}
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			owner, _ := os.ReadFile(path)
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("lab is in use by process %s", strings.TrimSpace(string(owner)))
			}
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		// Its last owner may have removed the file after we opened it.
		a, err1 := f.Stat()
		b, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(a, b) {
			_ = f.Truncate(0)
			_, _ = fmt.Fprintln(f, os.Getpid())
			return func() {
				_ = os.Remove(path)
				_ = f.Close()
			}, nil
		}
		f.Close()
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
}
