// Package o7serr gives the error numbers of the O7s application interface
// (spec 33 §2) as Go errors that work with errors.Is: with each other, and
// with the errors that programs for other networks look for (see Errno.Is).
package o7serr

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// Errno is a positive O7s or POSIX error number. On the wire and in the
// application interface it appears negated.
type Errno int32

// Numbers beyond POSIX.
const (
	ENOTALLOC  Errno = 1000 // descriptor is not an allocated flow
	EIPCPTYPE  Errno = 1001 // unknown IPCP type
	EIRMD      Errno = 1002 // cannot talk to the resource manager
	EIPCP      Errno = 1003 // IPCP problem, or no layer can reach the name
	EIPCPSTATE Errno = 1004 // IPCP in wrong state
	EFLOWDOWN  Errno = 1005 // flow is down
	EFLOWPEER  Errno = 1006 // peer timed out
	ENAME      Errno = 1007 // naming error
	ECRYPT     Errno = 1008 // encryption or key exchange error
	EAUTH      Errno = 1009 // authentication error
)

// POSIX numbers that the interface names (Linux values).
const (
	EPERM     = Errno(syscall.EPERM)
	EBADF     = Errno(syscall.EBADF)
	EAGAIN    = Errno(syscall.EAGAIN)
	EEXIST    = Errno(syscall.EEXIST)
	EINVAL    = Errno(syscall.EINVAL)
	EPIPE     = Errno(syscall.EPIPE)
	EMSGSIZE  = Errno(syscall.EMSGSIZE)
	ENOTSUP   = Errno(syscall.EOPNOTSUPP)
	ETIMEDOUT = Errno(syscall.ETIMEDOUT)
)

var text = map[Errno]string{
	ENOTALLOC: "flow is not allocated", EIPCPTYPE: "unknown ipcp type",
	EIRMD: "cannot talk to the resource manager", EIPCP: "no layer can reach the name",
	EIPCPSTATE: "ipcp is in the wrong state", EFLOWDOWN: "flow is down",
	EFLOWPEER: "flow peer timed out", ENAME: "unknown name",
	ECRYPT: "encryption or key exchange error", EAUTH: "authentication error",
}

func (e Errno) Error() string {
	if t, ok := text[e]; ok {
		return t
	}
	return syscall.Errno(e).Error()
}

// like are the errors of sockets that come closest to the numbers beyond
// POSIX: what a program sees that was written for those.
var like = map[Errno]syscall.Errno{
	ENOTALLOC: syscall.EBADF,        // no such flow
	EIRMD:     syscall.ENETDOWN,     // the network as a whole is not there
	EIPCP:     syscall.EHOSTUNREACH, // no way to the name
	EFLOWDOWN: syscall.ECONNRESET,   // for writers also EPIPE
	EFLOWPEER: syscall.ETIMEDOUT,    // as of a TCP connection whose keep-alives fail
	ENAME:     syscall.ENOENT,       // no such name
	EAUTH:     syscall.EACCES,
}

// posix is the number of POSIX for e, or the nearest.
func (e Errno) posix() syscall.Errno {
	if n, ok := like[e]; ok {
		return n
	}
	return syscall.Errno(e)
}

// Is makes errors.Is find the equivalents of e in other packages: the
// syscall.Errno of the same number or, beyond POSIX, the nearest; what that is
// in package os (os.ErrNotExist, os.ErrPermission, errors.ErrUnsupported, ...);
// and os.ErrDeadlineExceeded for ETIMEDOUT, which means the caller's own
// time-out here, never the peer's.
func (e Errno) Is(target error) bool {
	n := e.posix()
	switch t := target.(type) { //nolint:errorlint // a target, not a chain
	case Errno:
		return e == t
	case syscall.Errno:
		return t == n || e == EFLOWDOWN && t == syscall.EPIPE
	}
	return n.Is(target) || e == ETIMEDOUT && target == os.ErrDeadlineExceeded //nolint:errorlint // sentinel
}

// Timeout reports whether the error is one of time, as of a net.Error.
func (e Errno) Timeout() bool { return e.posix().Timeout() }

// Temporary reports what syscall.Errno does.
func (e Errno) Temporary() bool { return e.posix().Temporary() }

// Code returns the negated number that the interface and the wire use.
func (e Errno) Code() int32 { return -int32(e) }

// Code returns the negative number for err: 0 for nil, the number of the
// first Errno in its chain, else -EIPCP.
func Code(err error) int32 {
	var e Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return -int32(e)
	}
	return -int32(EIPCP)
}

// FromCode turns a negative number and the message that came with it into an
// error that wraps the Errno; 0 gives nil.
func FromCode(code int32, msg string) error {
	if code == 0 {
		return nil
	}
	if code > 0 {
		code = -code
	}
	e := Errno(-code)
	if msg == "" || msg == e.Error() {
		return e
	}
	return &remote{e, msg}
}

type remote struct {
	e   Errno
	msg string
}

func (r *remote) Error() string { return r.msg }
func (r *remote) Unwrap() error { return r.e }

// Wrap prefixes e with what was being done: Wrap(ENAME, "name %q", n).
func Wrap(e Errno, format string, a ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), e)
}
