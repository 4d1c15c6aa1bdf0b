package o7serr

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"testing"
)

// Numbers and equivalents, as the documentation says.
func TestIs(t *testing.T) {
	for _, c := range []struct {
		e       Errno
		number  int32
		is      []error
		not     []error
		timeout bool
	}{
		{EPERM, 1, []error{syscall.EPERM, os.ErrPermission, fs.ErrPermission}, []error{os.ErrNotExist}, false},
		{EBADF, 9, []error{syscall.EBADF}, nil, false},
		{EAGAIN, 11, []error{syscall.EAGAIN, syscall.EWOULDBLOCK}, []error{os.ErrDeadlineExceeded}, true},
		{EEXIST, 17, []error{syscall.EEXIST, os.ErrExist}, nil, false},
		{EINVAL, 22, []error{syscall.EINVAL}, nil, false},
		{EPIPE, 32, []error{syscall.EPIPE}, []error{EFLOWDOWN}, false},
		{EMSGSIZE, 90, []error{syscall.EMSGSIZE}, nil, false},
		{ENOTSUP, 95, []error{syscall.ENOTSUP, errors.ErrUnsupported}, nil, false},
		{ETIMEDOUT, 110, []error{syscall.ETIMEDOUT, os.ErrDeadlineExceeded}, []error{EFLOWPEER}, true},
		{ENOTALLOC, 1000, []error{syscall.EBADF}, []error{EBADF}, false},
		{EIPCPTYPE, 1001, nil, []error{syscall.EINVAL}, false},
		{EIRMD, 1002, []error{syscall.ENETDOWN}, nil, false},
		{EIPCP, 1003, []error{syscall.EHOSTUNREACH}, nil, false},
		{EIPCPSTATE, 1004, nil, nil, false},
		{EFLOWDOWN, 1005, []error{syscall.ECONNRESET, syscall.EPIPE}, []error{EPIPE, net.ErrClosed}, false},
		{EFLOWPEER, 1006, []error{syscall.ETIMEDOUT}, []error{ETIMEDOUT, os.ErrDeadlineExceeded}, true},
		{ENAME, 1007, []error{syscall.ENOENT, os.ErrNotExist}, nil, false},
		{ECRYPT, 1008, nil, nil, false},
		{EAUTH, 1009, []error{syscall.EACCES, os.ErrPermission}, nil, false},
	} {
		err := fmt.Errorf("doing something: %w", FromCode(c.e.Code(), "told by the daemon"))
		if Code(err) != -c.number || !errors.Is(err, c.e) {
			t.Errorf("%v: code %d", c.e, Code(err))
		}
		for _, is := range c.is {
			if !errors.Is(err, is) {
				t.Errorf("%v is not %v", c.e, is)
			}
		}
		for _, not := range append(c.not, errors.New("other"), Errno(2000), syscall.Errno(1)<<16) {
			if errors.Is(err, not) {
				t.Errorf("%v is %v", c.e, not)
			}
		}
		op := &net.OpError{Op: "read", Net: "o7s", Err: c.e}
		if op.Timeout() != c.timeout {
			t.Errorf("%v: time-out is %v", c.e, op.Timeout())
		}
	}
}
