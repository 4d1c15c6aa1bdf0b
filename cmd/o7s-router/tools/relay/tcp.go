package relay

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// TCP is a TCP connection as a Stream.
type TCP struct {
	*net.TCPConn
	rc    syscall.RawConn
	ready func(fd uintptr) bool // made once: a closure for each wait would be an allocation
}

// NewTCP makes a stream of c.
func NewTCP(c *net.TCPConn) (*TCP, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &TCP{TCPConn: c, rc: rc, ready: readable}, nil
}

// readable reports whether a read would not block. Errors are left to the read.
func readable(fd uintptr) bool {
	p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}
	n, err := unix.Poll(p[:], 0)
	return err != nil || n > 0
}

// WaitRead implements Stream.
func (t *TCP) WaitRead() error { return t.rc.Read(t.ready) }

// Abort implements Stream: the peer gets a reset.
func (t *TCP) Abort() {
	_ = t.SetLinger(0)
	_ = t.Close()
}
