// Package kit is what the tools share: how they read their options, where
// flows come from, the loop of a server, a printer and a pacer.
package kit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// Flow is what the tools need of one; *o7s.Flow is one, whose documentation holds.
type Flow interface {
	io.ReadWriteCloser
	ReadBatch(bufs [][]byte, sizes []int) (int, error)
	WriteBatch(msgs [][]byte) (int, error)
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
	SetReadTimeout(time.Duration)
	SetWriteTimeout(time.Duration)
	SetFlags(o7s.Flags) error
	FD() int
	MTU() int
	QoS() qos.Spec
}

// Network is where flows come from.
type Network interface {
	Alloc(ctx context.Context, name string, q qos.Spec) (Flow, error)
	Accept(ctx context.Context) (Flow, error)
}

// linger bounds how long a tool waits in the end until the peer has
// acknowledged everything: one of the reference may be gone without a word.
const linger = 3 * time.Second

type library struct{ *o7s.Client }

func (l library) Alloc(ctx context.Context, name string, q qos.Spec) (Flow, error) {
	f, err := l.Client.Alloc(ctx, name, &q)
	if err != nil {
		return nil, err
	}
	f.SetLinger(linger)
	return f, nil
}

func (l library) Accept(ctx context.Context) (Flow, error) {
	f, err := l.Client.Accept(ctx)
	if err != nil {
		return nil, err
	}
	f.SetLinger(linger)
	return f, nil
}

// Library is the network of the daemon in runDir, to programs called prog with
// the arguments args. The function returned ends it.
func Library(runDir, prog string, args []string) (Network, func()) {
	c := o7s.New(o7s.Options{RunDir: runDir, Prog: prog, Args: append([]string{prog}, args...)})
	return library{c}, func() { _ = c.Close() }
}

// Interruptible is a context that an interrupt ends; a second one kills the
// program.
func Interruptible() (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// Wrong says on stderr what is wrong with a command line, and is the exit status.
func Wrong(stderr io.Writer, prog string, err error) int {
	fmt.Fprintf(stderr, "%s: %v (see %s --help)\n", prog, err, prog)
	return 1
}

// Explain is the number that the reference prints, and what it means.
func Explain(what string, err error) string {
	return fmt.Sprintf("%s: %d. (%v)", what, o7serr.Code(err), err)
}

// acceptPause is after which time a failed accept is tried again.
const acceptPause = 100 * time.Millisecond

// Serve accepts flows until ctx ends, at most slots at a time, and calls handle
// for each on a goroutine of its own; it closes the flow. The flow's reads and
// writes end with ctx. It returns the exit status, after the last handler.
func Serve(ctx context.Context, n Network, slots int, prog string, stderr io.Writer, handle func(context.Context, Flow)) int {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	free := make(chan struct{}, slots)
	for {
		select {
		case free <- struct{}{}:
		case <-ctx.Done():
			return 0
		}
		f, err := n.Accept(ctx)
		switch {
		case ctx.Err() != nil:
			if err == nil {
				f.Close()
			}
			return 0
		case errors.Is(err, o7serr.EIRMD):
			fmt.Fprintf(stderr, "%s: %v\n", prog, err)
			return 1
		case err != nil: // of one client: spec 33 §3 says to accept again
			<-free
			fmt.Fprintln(stderr, Explain("Failed to accept flow", err))
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
			}
			continue
		}
		wg.Go(func() {
			defer func() { <-free }()
			defer f.Close()
			stop := context.AfterFunc(ctx, func() { f.Close() })
			defer stop()
			handle(ctx, f)
		})
	}
}

// Ended reports whether err says that the other end released the flow.
func Ended(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, o7serr.EFLOWDOWN) }

// Reason is err in words for a user: the end of a stream is an error to a tool
// that still expects something.
func Reason(err error) error {
	if errors.Is(err, io.EOF) {
		return errors.New("the other end closed the flow")
	}
	return err
}

// SplitHint is what more to tell who sent a message that f does not carry.
func SplitHint(f Flow) string {
	if f.QoS().InOrder == 0 {
		return ", and -q data splits messages"
	}
	return ", as the other end does not put messages together"
}

// Silent reports whether err says that nothing came for too long.
func Silent(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, o7serr.EFLOWPEER)
}

// Terminal reports whether w is one.
func Terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
