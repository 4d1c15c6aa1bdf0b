package ipc

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/o7serr"
)

// MaxFDs is the largest number of descriptors one message carries.
const MaxFDs = 16

// ErrMalformed is wrapped by what Recv returns for a packet that is no message:
// too long, not JSON, too many descriptors. The connection itself is intact
// (packets keep their boundaries), so the receiver may answer and go on.
var ErrMalformed = errors.New("malformed message")

// errBusy is returned by TrySend when the peer does not read.
var errBusy = fmt.Errorf("peer does not read its messages: %w", o7serr.EAGAIN)

// Conn is one end of a connection. Send and Recv may be called concurrently
// with each other; concurrent Sends are fine, Recv belongs to one goroutine.
type Conn struct {
	uc   *net.UnixConn
	rc   syscall.RawConn
	peer Peer
	recv received // of the one goroutine in Recv
}

// received is what a receive returned. The buffer is lent by a pool: a
// connection that waits has none, and there may be many.
type received struct {
	buf            *[MaxMessage]byte
	oob            []byte
	n, oobn, flags int
	err            error
	receive        func(fd uintptr) bool // made once
}

var buffers = sync.Pool{New: func() any { return new([MaxMessage]byte) }}

// Peer is who is at the other end, from the socket's credentials at connect
// time. Never from a message.
type Peer struct {
	PID    int32
	UID    uint32
	GID    uint32
	Groups []uint32 // supplementary groups
}

// InGroup reports whether gid is the peer's primary or a supplementary group.
func (p Peer) InGroup(gid uint32) bool {
	if p.GID == gid {
		return true
	}
	for _, g := range p.Groups {
		if g == gid {
			return true
		}
	}
	return false
}

func newConn(uc *net.UnixConn) (*Conn, error) {
	rc, err := uc.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &Conn{uc: uc, rc: rc}
	c.recv.oob = make([]byte, unix.CmsgSpace(4*MaxFDs))
	c.recv.receive = c.recv.try
	// A packet longer than the send buffer is refused by the kernel.
	if err := uc.SetWriteBuffer(2 * MaxMessage); err != nil {
		return nil, err
	}
	if c.peer, err = peerOf(uc); err != nil {
		return nil, fmt.Errorf("peer credentials: %w", err)
	}
	return c, nil
}

func peerOf(uc *net.UnixConn) (p Peer, err error) {
	err = control(uc, func(fd int) error {
		cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return err
		}
		p.PID, p.UID, p.GID = cred.Pid, cred.Uid, cred.Gid
		p.Groups, err = peerGroups(fd)
		return err
	})
	return p, err
}

func control(uc *net.UnixConn, f func(fd int) error) error {
	rc, err := uc.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := rc.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// Peer tells who is at the other end.
func (c *Conn) Peer() Peer { return c.peer }

// PIDFD returns a descriptor of the peer process, which becomes readable when
// the process ends; the caller closes it. Where the kernel cannot take it from
// the socket (before 6.5) it is opened by number, which is safe as long as the
// connection was made a moment ago.
func (c *Conn) PIDFD() (int, error) {
	fd := -1
	err := control(c.uc, func(s int) (err error) {
		fd, err = unix.GetsockoptInt(s, unix.SOL_SOCKET, soPeerPIDFD)
		return err
	})
	if err == nil {
		unix.CloseOnExec(fd)
		return fd, nil
	}
	fd, err = unix.PidfdOpen(int(c.peer.PID), 0)
	if err != nil {
		return -1, fmt.Errorf("process %d: %w", c.peer.PID, err)
	}
	return fd, nil
}

// Close closes the connection; a blocked Recv returns net.ErrClosed.
func (c *Conn) Close() error { return c.uc.Close() }

// SetSendDeadline bounds every later Send. The zero time means none.
func (c *Conn) SetSendDeadline(t time.Time) error { return c.uc.SetWriteDeadline(t) }

// Send sends v as one message, with copies of the descriptors fds, which stay
// the caller's. It blocks while the peer's queue is full.
func (c *Conn) Send(v any, fds ...int) error {
	b, oob, err := encode(v, fds)
	if err != nil {
		return err
	}
	_, _, err = c.uc.WriteMsgUnix(b, oob, nil)
	return err
}

// TrySend is Send for callers that must not block: when the peer's queue is
// full it sends nothing and returns an error that is o7serr.EAGAIN.
func (c *Conn) TrySend(v any, fds ...int) error {
	b, oob, err := encode(v, fds)
	if err != nil {
		return err
	}
	err = control(c.uc, func(fd int) error {
		return unix.Sendmsg(fd, b, oob, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	})
	if errors.Is(err, unix.EAGAIN) {
		return errBusy
	}
	return err
}

func encode(v any, fds []int) (b, oob []byte, err error) {
	if b, err = json.Marshal(v); err != nil {
		return nil, nil, err
	}
	if len(b) > MaxMessage {
		return nil, nil, fmt.Errorf("message of %d bytes, at most %d: %w", len(b), MaxMessage, o7serr.EMSGSIZE)
	}
	if len(fds) > MaxFDs {
		return nil, nil, fmt.Errorf("%d descriptors in a message, at most %d", len(fds), MaxFDs)
	}
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	return b, oob, nil
}

// Recv receives one message into v and returns the descriptors that came with
// it (close-on-exec), which are the caller's to close. Errors: io.EOF when the
// peer closed, ErrMalformed (descriptors are closed already).
func (c *Conn) Recv(v any) ([]int, error) {
	r := &c.recv
	if err := c.rc.Read(r.receive); err != nil {
		return nil, err
	}
	if r.buf != nil {
		defer func() {
			buffers.Put(r.buf)
			r.buf = nil
		}()
	}
	if r.err != nil {
		return nil, os.NewSyscallError("recvmsg", r.err)
	}
	if r.n == 0 && r.oobn == 0 {
		return nil, io.EOF // an empty packet looks the same, and is no message either
	}
	fds, err := rights(r.oob[:r.oobn])
	switch {
	case err != nil:
	case r.flags&unix.MSG_CTRUNC != 0:
		err = fmt.Errorf("more than %d descriptors: %w", MaxFDs, ErrMalformed)
	case r.flags&unix.MSG_TRUNC != 0:
		err = fmt.Errorf("longer than %d bytes: %w", MaxMessage, ErrMalformed)
	default:
		if jerr := json.Unmarshal(r.buf[:r.n], v); jerr != nil {
			err = fmt.Errorf("%w: %w", ErrMalformed, jerr)
		}
	}
	if err != nil {
		CloseFDs(fds)
		return nil, err
	}
	return fds, nil
}

// try receives without blocking and reports whether that is a result.
func (r *received) try(fd uintptr) bool {
	r.buf = buffers.Get().(*[MaxMessage]byte)
	for {
		r.n, r.oobn, r.flags, _, r.err = unix.Recvmsg(int(fd), r.buf[:], r.oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		if r.err != unix.EINTR {
			break
		}
	}
	if r.err == unix.EAGAIN {
		buffers.Put(r.buf)
		r.buf = nil
		return false
	}
	return true
}

// rights returns every descriptor in the control data, also along with an error.
func rights(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		f, perr := unix.ParseUnixRights(&msgs[i])
		if perr != nil {
			err = fmt.Errorf("%w: %w", ErrMalformed, perr)
		}
		fds = append(fds, f...)
	}
	return fds, err
}

// CloseFDs closes descriptors that nobody wants.
func CloseFDs(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// RecvRequest receives a request and checks its form. Requests carry no
// descriptors; any that come are closed.
func (c *Conn) RecvRequest() (Request, error) {
	var r Request
	fds, err := c.Recv(&r)
	CloseFDs(fds)
	if err == nil && (r.ID == 0 || r.Op == "") {
		err = fmt.Errorf("%w: a request needs an id other than 0 and an op", ErrMalformed)
	}
	return r, err
}

// Reply answers request id: with result and descriptors when err is nil, else
// with the number and the text of err.
func (c *Conn) Reply(id uint64, result any, err error, fds ...int) error {
	r := Reply{ID: id}
	if err != nil {
		r.Code, r.Error = o7serr.Code(err), err.Error()
		return c.Send(&r)
	}
	if result != nil {
		b, merr := json.Marshal(result)
		if merr != nil {
			return c.Reply(id, nil, merr)
		}
		if len(b) > partSize {
			return c.replyParts(id, b, fds)
		}
		r.Result = b
	}
	serr := c.Send(&r, fds...)
	if errors.Is(serr, o7serr.EMSGSIZE) {
		return c.Reply(id, nil, serr)
	}
	return serr
}

// replyParts sends a long result; the descriptors come with the last part.
func (c *Conn) replyParts(id uint64, result []byte, fds []int) error {
	for len(result) > partSize {
		if err := c.Send(&Reply{ID: id, Part: result[:partSize], More: true}); err != nil {
			return err
		}
		result = result[partSize:]
	}
	return c.Send(&Reply{ID: id, Part: result}, fds...)
}

// Event tells the peer what happened to a flow. It never blocks.
func (c *Conn) Event(ev FlowEvent) error { return c.TrySend(&Reply{Event: &ev}) }

// Listener accepts the connections of programs.
type Listener struct {
	ul   *net.UnixListener
	path string
	lock *os.File
	shut sync.Once
	free sync.Once
}

// Listen makes the socket at path, with the permissions mode, and takes a lock
// beside it, so that a second daemon is refused and the socket that a killed
// daemon left behind is replaced.
func Listen(path string, mode os.FileMode) (*Listener, error) {
	lock, err := takeLock(path)
	if err != nil {
		return nil, err
	}
	l, err := listen(path, mode)
	if err != nil {
		dropLock(lock)
		return nil, err
	}
	l.lock = lock
	return l, nil
}

// takeLock takes the lock of the socket at path.
func takeLock(path string) (*os.File, error) {
	for {
		lock, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			lock.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("another daemon serves %s; choose another directory with --run-dir", path)
			}
			return nil, fmt.Errorf("lock %s: %w", lock.Name(), err)
		}
		// Its last owner may have removed the file after we opened it.
		ours, err1 := lock.Stat()
		there, err2 := os.Stat(lock.Name())
		if err1 == nil && err2 == nil && os.SameFile(ours, there) {
			return lock, nil
		}
		lock.Close()
	}
}

// dropLock removes the file while it is locked, and gives the lock up.
func dropLock(lock *os.File) {
	os.Remove(lock.Name())
	lock.Close()
}

func listen(path string, mode os.FileMode) (*Listener, error) {
	// We hold the lock: whatever is there belongs to nobody.
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("%s exists and is not a socket", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	short, done, err := shorten(path)
	if err != nil {
		return nil, err
	}
	defer done()
	ul, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: short, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	ul.SetUnlinkOnClose(false) // by us, under the real path
	if err := os.Chmod(path, mode); err != nil {
		ul.Close()
		os.Remove(path)
		return nil, err
	}
	return &Listener{ul: ul, path: path}, nil
}

// Path is where the socket is.
func (l *Listener) Path() string { return l.path }

// Accept waits for the next connection. A connection whose owner is gone again
// is skipped. It returns net.ErrClosed after Close.
func (l *Listener) Accept() (*Conn, error) {
	for {
		uc, err := l.ul.AcceptUnix()
		if err != nil {
			return nil, err
		}
		c, err := newConn(uc)
		if err != nil {
			uc.Close()
			continue
		}
		return c, nil
	}
}

// Shut removes the socket: nobody comes in any more, and Accept ends. The lock
// stays until Close, so that the next daemon begins when this one has ended.
func (l *Listener) Shut() (err error) {
	l.shut.Do(func() {
		err = l.ul.Close()
		os.Remove(l.path)
	})
	return err
}

// Close is Shut, and gives up the lock. Connections live on.
func (l *Listener) Close() error {
	err := l.Shut()
	l.free.Do(func() { dropLock(l.lock) })
	return err
}

// maxSun is the room for a path in a socket address, less the final NUL.
const maxSun = 107

// shorten returns a name of path that fits a socket address: path itself, or
// a way through an open directory. done releases it.
func shorten(path string) (short string, done func(), err error) {
	if len(path) <= maxSun {
		return path, func() {}, nil
	}
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, fmt.Errorf("%s: %w", filepath.Dir(path), err)
	}
	return "/proc/self/fd/" + strconv.Itoa(fd) + "/" + filepath.Base(path), func() { unix.Close(fd) }, nil
}

// dial connects to the socket at path.
func dial(path string) (*Conn, error) {
	short, done, err := shorten(path)
	if err != nil {
		return nil, err
	}
	defer done()
	uc, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: short, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	c, err := newConn(uc)
	if err != nil {
		uc.Close()
		return nil, err
	}
	return c, nil
}

// Pair returns two connected ends, for tests and for the daemon's own children.
func Pair() (a, b *Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	if a, err = fromFD(fds[0]); err != nil {
		unix.Close(fds[1])
		return nil, nil, err
	}
	if b, err = fromFD(fds[1]); err != nil {
		a.Close()
		return nil, nil, err
	}
	return a, b, nil
}

func fromFD(fd int) (*Conn, error) {
	f := os.NewFile(uintptr(fd), "socketpair")
	defer f.Close() // FileConn has a copy
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		nc.Close()
		return nil, fmt.Errorf("descriptor %d is not a unix socket", fd)
	}
	return newConn(uc)
}
