package relay

import (
	"io"
	"net"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Unix is one end of a UNIX stream connection as a Stream whose Abort is seen
// at the other end. A UNIX socket has no reset, but the kernel makes one when a
// socket is closed with bytes unread: so the last byte that arrived is passed
// on but stays in the socket's queue, until the next comes, or the end.
type Unix struct {
	*net.UnixConn
	rc syscall.RawConn

	// Of the reader.
	held   bool // the first byte in the queue was passed on already
	p      []byte
	n      int
	err    error
	iov    [2]unix.Iovec
	spare  [1]byte
	read   func(fd uintptr) bool // made once
	ready  func(fd uintptr) bool
	closed sync.Once
}

// NewUnix makes a stream of c. held says that there is one byte in the queue
// that is not to be passed on.
func NewUnix(c *net.UnixConn, held bool) (*Unix, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	u := &Unix{UnixConn: c, rc: rc, held: held}
	u.read = u.tryRead
	u.ready = func(fd uintptr) bool { return u.state(int(fd)) != 0 }
	return u, nil
}

// WaitRead implements Stream.
func (u *Unix) WaitRead() error { return u.rc.Read(u.ready) }

// Read reads; see Unix. One goroutine at a time.
func (u *Unix) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	u.p, u.n, u.err = p, 0, nil
	if err := u.rc.Read(u.read); err != nil {
		return 0, err
	}
	u.p = nil
	return u.n, u.err
}

// state is how many bytes there are beyond the held one, 0 for none yet and -1
// for the end or an error.
func (u *Unix) state(fd int) int {
	h := 0
	if u.held {
		h = 1
	}
	ended := false
	for {
		n, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
		switch {
		case err != nil:
			return -1
		case n > h:
			return n - h
		case ended:
			return -1
		}
		// Bytes come before the end, so they are counted after it is seen.
		p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		if k, err := unix.Poll(p[:], 0); err != nil || k == 0 {
			return 0
		}
		ended = true
	}
}

func (u *Unix) tryRead(fd uintptr) bool {
	n := u.state(int(fd))
	if n == 0 {
		return false
	}
	if n < 0 {
		if e, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && e != 0 {
			u.err = syscall.Errno(e)
		} else {
			u.err = io.EOF
		}
		return true
	}
	n = min(n, len(u.p))
	// All but the last byte are taken, and the one that was held.
	h := 0
	if u.held {
		h = 1
	}
	if take := h + n - 1; take > 0 {
		got, err := u.readv(fd, h, n-1)
		if err != nil {
			u.err = err
			return true
		}
		u.held = false
		if got < take {
			u.n = got - h
			return u.n > 0
		}
		u.n = n - 1
	}
	var e syscall.Errno
	_, _, e = unix.Syscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&u.p[n-1])), 1, unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0)
	switch {
	case e == 0:
		u.held = true
		u.n = n
	case u.n == 0:
		u.err = e
	}
	return true
}

// readv reads the held byte, if h is 1, and n more.
func (u *Unix) readv(fd uintptr, h, n int) (int, error) {
	k := 0
	if h > 0 {
		u.iov[0].Base = &u.spare[0]
		u.iov[0].SetLen(1)
		k++
	}
	if n > 0 {
		u.iov[k].Base = &u.p[0]
		u.iov[k].SetLen(n)
		k++
	}
	got, _, e := unix.Syscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&u.iov)), uintptr(k))
	u.iov = [2]unix.Iovec{}
	if e != 0 {
		return 0, e
	}
	return int(got), nil
}

// Close closes the connection in order. Nobody reads any more.
func (u *Unix) Close() error {
	u.closed.Do(func() {
		if u.held {
			_ = u.rc.Read(func(fd uintptr) bool {
				_, _ = unix.Read(int(fd), u.spare[:])
				return true
			})
		}
	})
	return u.UnixConn.Close()
}

// Abort implements Stream: the other end reads ECONNRESET, if it has ever
// written a byte, or NewUnix was given one.
func (u *Unix) Abort() {
	u.closed.Do(func() {})
	_ = u.UnixConn.Close()
}
