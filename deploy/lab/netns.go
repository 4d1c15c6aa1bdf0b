package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// netnsDir is where iproute2 looks for named namespaces.
const netnsDir = "/run/netns"

// onThread runs f on an OS thread that f may take to another namespace, and
// brings the thread back. A thread that cannot come back ends with f.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer home.Close()
		err = f()
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// inNetns runs f inside the named namespace. Sockets that f opens stay there,
// and processes that it starts live there.
func inNetns(name string, f func() error) error {
	return onThread(func() error {
		h, err := netns.GetFromName(name)
		if err != nil {
			return fmt.Errorf("namespace %s: %w", name, err)
		}
		defer h.Close()
		if err := netns.Set(h); err != nil {
			return fmt.Errorf("enter namespace %s: %w", name, err)
		}
		return f()
	})
}

// prepareNetnsDir makes the directory as `ip netns` does: a shared mount, so
// that a namespace can be removed although other mount namespaces see it.
func prepareNetnsDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	lock, err := os.Open(netnsDir) // against another lab that does the same
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", netnsDir, err)
	}
	err = unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if errors.Is(err, unix.EINVAL) { // no mount point yet
		if err = unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err == nil {
			err = unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
		}
	}
	if err != nil {
		return fmt.Errorf("share %s: %w", netnsDir, err)
	}
	return nil
}

// addNetns makes a named namespace with its loopback device up.
func addNetns(name string, ipv6 bool) error {
	return onThread(func() error {
		h, err := netns.NewNamed(name)
		if err != nil {
			if errors.Is(err, os.ErrPermission) {
				return fmt.Errorf("make namespace %s: %w (a lab needs root)", name, err)
			}
			return fmt.Errorf("make namespace %s: %w", name, err)
		}
		defer h.Close()
		if !ipv6 {
			// Files below /proc/sys/net are those of the reader's namespace. A
			// kernel without IPv6 has none.
			for _, f := range []string{"all", "default"} {
				err := os.WriteFile("/proc/sys/net/ipv6/conf/"+f+"/disable_ipv6", []byte("1"), 0)
				if err != nil && !errors.Is(err, os.ErrNotExist) {
					return fmt.Errorf("switch IPv6 off in %s: %w", name, err)
				}
			}
		}
		return loopbackUp()
	})
}

// delNetns removes a named namespace; one that is not there is no error.
func delNetns(name string) error {
	path := filepath.Join(netnsDir, name)
	// A killed run may have left the file without the mount.
	err := unix.Unmount(path, unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount namespace %s: %w", name, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove namespace %s: %w", name, err)
	}
	return nil
}

// listNetns returns the named namespaces with the given prefix.
func listNetns(prefix string) ([]string, error) {
	es, err := os.ReadDir(netnsDir)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	var out []string
	for _, e := range es {
		if strings.HasPrefix(e.Name(), prefix) {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// nsID identifies a namespace by its inode.
type nsID struct{ dev, ino uint64 }

func statNS(path string) (nsID, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nsID{}, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return nsID{}, fmt.Errorf("stat %s: no inode", path)
	}
	return nsID{st.Dev, st.Ino}, nil
}
