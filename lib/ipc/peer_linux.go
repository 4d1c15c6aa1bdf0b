package ipc

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// soPeerPIDFD is SO_PEERPIDFD, since Linux 6.5.
const soPeerPIDFD = 77

// peerGroups returns the supplementary groups the peer had when it connected
// (SO_PEERGROUPS, since Linux 4.13).
func peerGroups(fd int) ([]uint32, error) {
	groups := make([]uint32, 64)
	for {
		size := uint32(4 * len(groups))
		_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(unsafe.SliceData(groups))), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case e == 0:
			return groups[:size/4], nil
		case e == unix.ERANGE && int(size/4) > len(groups): // size tells how many there are
			groups = make([]uint32, size/4)
		case e == unix.ENOPROTOOPT:
			return nil, nil
		default:
			return nil, e
		}
	}
}
