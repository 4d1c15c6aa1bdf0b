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
	first  bool // nothing was read yet: a marker may come first
	held   bool // the first byte in the queue was passed on already, or is not to be
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
// that is not to be passed on. If there is none, the other end may send such a
// byte first, marked by a descriptor with it.
func NewUnix(c *net.UnixConn, held bool) (*Unix, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	u := &Unix{UnixConn: c, rc: rc, held: held, first: !held}
	u.read = u.tryRead
	u.ready = func(fd uintptr) bool { return u.state(int(fd)) != 0 }
	return u, nil
}

// WaitRead implements Stream.
func (u *Unix) WaitRead() error { return u.rc.Read(u.ready) }

// WaitGone returns nil when the other end is closed altogether, and an error
// when this one is.
func (u *Unix) WaitGone() error {
	return u.rc.Read(func(fd uintptr) bool {
		p := [1]unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(p[:], 0)
		return err == nil && n > 0 && p[0].Revents&unix.POLLHUP != 0
	})
}

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
		case n > h && u.first:
			u.first = false
			if u.held = marked(fd); u.held {
				h = 1
				continue
			}
			return n
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
	for {
		n := u.state(int(fd))
		if n == 0 {
			return false
		}
		if n < 0 {
			u.err = io.EOF
			if e, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && e != 0 {
				u.err = syscall.Errno(e)
			}
			return true
		}
		// All but the last byte are taken, and the one that was held.
		n = min(n, len(u.p))
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
			if u.n = got - h; u.n < n-1 { // the kernel stops behind a byte with a descriptor
				if u.n == 0 {
					continue
				}
				return true
			}
		}
		_, _, e := unix.Syscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&u.p[n-1])), 1, unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0)
		if e == 0 {
			u.held = true
			u.n = n
		} else if u.n == 0 {
			u.err = e
		}
		return true
	}
}

// marked reports whether a descriptor came with the first byte in the queue.
// It is only looked at: the byte stays, and the copy of the descriptor goes.
func marked(fd int) bool {
	var b [1]byte
	var oob [64]byte
	_, n, _, _, err := unix.Recvmsg(fd, b[:], oob[:], unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	if err != nil || n == 0 {
		return false
	}
	list, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return false
	}
	any := false
	for _, m := range list {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, x := range fds {
			unix.Close(x)
			any = true
		}
	}
	return any
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
		_ = u.rc.Control(func(fd uintptr) {
			if u.state(int(fd)); u.held {
				_, _ = unix.Read(int(fd), u.spare[:])
			}
		})
	})
	return u.UnixConn.Close()
}

// Abort implements Stream: the other end reads ECONNRESET, if it has ever
// written a byte, one that is not passed on included.
func (u *Unix) Abort() {
	u.closed.Do(func() {})
	_ = u.UnixConn.Close()
}
