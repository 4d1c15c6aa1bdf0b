package o7s

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// The table of errors in the documentation of the package, made to happen.
func TestErrors(t *testing.T) {
	d := newFake(t)
	check := func(what string, err error, number o7serr.Errno, is ...error) {
		t.Helper()
		if number != 0 && (!errors.Is(err, number) || o7serr.Code(err) != number.Code()) {
			t.Errorf("%s: %v has number %d, want %d", what, err, o7serr.Code(err), number.Code())
		}
		for _, target := range is {
			if !errors.Is(err, target) {
				t.Errorf("%s: %v is not %v", what, err, target)
			}
		}
	}
	buf := make([]byte, 4000)
	event := func(f *Flow, h *held, typ string) {
		h.event(t, typ)
		<-f.Events()
	}
	raw := func() (*Flow, *held) { return d.flow1(t, d.client(t), nil) }

	f, h := raw()
	f.SetDeadline(time.Now())
	check("deadline", second(f.Read(buf)), o7serr.ETIMEDOUT, os.ErrDeadlineExceeded, syscall.ETIMEDOUT)
	f.SetDeadline(time.Time{})
	f.SetReadTimeout(time.Millisecond)
	check("time-out", second(f.Read(buf)), o7serr.ETIMEDOUT, os.ErrDeadlineExceeded)
	f.SetReadTimeout(0)
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	_, err := d.client(t).Accept(ctx)
	check("deadline of a context", err, o7serr.ETIMEDOUT, os.ErrDeadlineExceeded, context.DeadlineExceeded)
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	_, err = d.client(t).Alloc(ctx, "held", nil)
	check("context", err, 0, context.Canceled)
	check("long", second(f.Write(buf)), o7serr.EMSGSIZE, syscall.EMSGSIZE)
	f.SetFlags(RDWR | NONBLOCK)
	check("would block", second(f.Read(buf)), o7serr.EAGAIN, syscall.EAGAIN)
	f.SetFlags(RDONLY)
	check("read only", second(f.Write(buf[:1])), o7serr.EPERM, os.ErrPermission)
	check("no end", f.CloseWrite(), o7serr.ENOTSUP, errors.ErrUnsupported)
	f.SetFlags(Default)
	event(f, h, "peer")
	check("peer", second(f.Read(buf)), o7serr.EFLOWPEER, ErrPeer, syscall.ETIMEDOUT)
	event(f, h, "down")
	check("down", second(f.Read(buf)), o7serr.EFLOWDOWN, ErrDown, syscall.ECONNRESET)
	event(f, h, "dealloc")
	check("released", second(f.Write(buf[:1])), o7serr.EFLOWDOWN, ErrDown, syscall.EPIPE)
	f.Close()
	check("closed", second(f.Read(buf)), o7serr.ENOTALLOC, net.ErrClosed, syscall.EBADF)

	x, y := d.pairQoS(t, d.client(t), d.client(t), &qos.Data)
	x.CloseWrite()
	check("ended", second(x.Write(buf[:1])), o7serr.EPIPE, syscall.EPIPE)
	if _, err := y.Read(buf); err != io.EOF {
		t.Errorf("end: %v", err)
	}

	_, err = d.client(t).Alloc(t.Context(), "nobody", nil)
	check("unknown name", err, o7serr.ENAME, ErrName, os.ErrNotExist)
	_, err = d.client(t).Join(t.Context(), "layer")
	check("no layer", err, o7serr.EIPCP, ErrUnreachable, syscall.EHOSTUNREACH)
	f, _ = raw()
	d.stop()
	check("no daemon", second(f.Read(buf)), o7serr.EIRMD, ErrNoDaemon, syscall.ENETDOWN)
	d.start()
}
