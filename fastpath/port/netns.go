package port

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNetNS runs f in another network namespace, on a thread of its own that ends
// with it: a thread that cannot be moved back must not be used again.
func inNetNS(fd int, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// findNetNS opens the network namespace that has the given id as seen from the
// handle's namespace. It looks where namespaces can be found: the ones with
// names, and those of processes, as far as it is permitted.
func findNetNS(h *netlink.Handle, nsid int) (fd int, path string, err error) {
	seen := map[uint64]bool{}
	for _, pattern := range []string{"/run/netns/*", "/proc/[0-9]*/ns/net"} {
		paths, _ := filepath.Glob(pattern) // the patterns are well-formed
		for _, path := range paths {
			var st unix.Stat_t
			if unix.Stat(path, &st) != nil || seen[st.Ino] {
				continue
			}
			seen[st.Ino] = true
			fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				continue
			}
			if id, err := h.GetNetNsIdByFd(fd); err == nil && id == nsid {
				return fd, path, nil
			}
			unix.Close(fd)
		}
	}
	return -1, "", fmt.Errorf("network namespace with id %d: %w", nsid, os.ErrNotExist)
}
