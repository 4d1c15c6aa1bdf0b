// Package o7s is what programs import to talk over an Ouroboros (O7s) network:
// to names, over flows.
//
// # Messages
//
// A program allocates a flow to a name, or accepts flows to the names it is
// bound to, and reads and writes messages. One Write is one message, which is
// normally one Read at the other end:
//
//	f, err := o7s.Alloc(ctx, "oping.example", &qos.Data)
//	...
//	defer f.Close()
//	f.Write([]byte("hello"))
//	n, err := f.Read(buf)
//
// Flow is that interface, with the semantics that programs written for the
// reference expect (spec 33): partial reads and their marks, flags, events,
// time-outs of each call beside deadlines. ReadBatch and WriteBatch move many
// messages at once.
//
// # Streams
//
// Programs written for TCP want bytes, not messages. Dial, a Dialer and Listen
// give them a Conn and a Listener, a net.Conn and a net.Listener that behave as
// those of package net do; net/http and gRPC run over them unchanged, see the
// examples:
//
//	l, err := o7s.Listen(ctx, "web.example")     // http.Serve(l, nil)
//	c, err := o7s.Dial(ctx, "web.example")
//
// NewConn makes a stream of a flow that is there. Both ends of a flow have to
// agree whether it is one: nothing on the wire tells.
//
// # Many flows
//
// A goroutine for each flow is the simple way. A Set is the other one: a single
// goroutine waits for the events of thousands of flows, at the cost of one (spec
// 33 §8):
//
//	s := o7s.NewSet()
//	s.Add(f)
//	n, err := s.Wait(events, -1)     // events[:n]: which flow, and what happened
//
// EventPacket says that a flow has a message. Flows in a set are best read with
// RNOBLOCK (Flow.SetFlags), until syscall.EAGAIN: then no flow can hold up the
// others. See the example of Set.
//
// # Quality of service
//
// The qos.Spec of an allocation chooses what happens between the two ends
// (spec 33 §5). Raw flows (the default of Alloc) carry packets as the network
// does: some are lost, some overtake others. With in_order an end-to-end
// protocol (FRCP, package frcp) puts them in order; with loss 0 as well, as
// qos.Data has it, it repeats what was lost, and Write blocks while the peer
// does not read. Streams need the latter, and it is the default of a Dialer.
// With ber 0 packets carry a checksum. Between two programs on one machine
// nothing is lost or overtaken in any case, and none of this costs anything.
//
// A message has up to Flow.MaxMessage bytes: one packet (Flow.MTU) on raw flows
// and towards the reference, up to 1 MiB on flows with in_order between ends of
// this implementation.
//
// # The end of a flow
//
// Close releases a flow. On flows with in_order, and on streams, the peer reads
// io.EOF after everything that was written; CloseWrite ends one direction only.
// The peer of a raw flow reads ErrDown. Over a layer, Close of a reliable flow
// waits until the peer has what was written (Flow.SetLinger, Conn.SetLinger).
// Towards a reference peer, which knows no end of stream, a flow ends with that
// peer's time-out.
//
// # Errors
//
// Errors are to be asked with errors.Is. They are, or wrap, a number of package
// o7serr (spec 33 §2), which is also its nearest relative in package syscall,
// and where the standard library has an error that says it, that one. Those of
// Conn, Listener and Dialer are *net.OpError, with Timeout as there.
//
//	what happened                      errors.Is               number          also
//	deadline or time-out passed        os.ErrDeadlineExceeded  ETIMEDOUT       syscall.ETIMEDOUT
//	context cancelled                  context.Canceled        -
//	closed here                        net.ErrClosed           ENOTALLOC       syscall.EBADF
//	the peer ended its direction       io.EOF (not wrapped)    -
//	write after CloseWrite             syscall.EPIPE           EPIPE
//	flow down, or released             ErrDown                 EFLOWDOWN       syscall.ECONNRESET, syscall.EPIPE
//	peer silent for its time-out       ErrPeer                 EFLOWPEER       syscall.ETIMEDOUT
//	unknown name, or nobody accepts    ErrName                 ENAME           os.ErrNotExist
//	no layer reaches the name          ErrUnreachable          EIPCP           syscall.EHOSTUNREACH
//	no daemon                          ErrNoDaemon             EIRMD           syscall.ENETDOWN
//	message too long                   syscall.EMSGSIZE        EMSGSIZE
//	would block (RNOBLOCK, WNOBLOCK)   syscall.EAGAIN          EAGAIN
//	not permitted                      os.ErrPermission        EPERM
//	this flow cannot do that           errors.ErrUnsupported   ENOTSUP
//	name in use by another listener    os.ErrExist             EEXIST
//	authentication, encryption         -                       EAUTH, ECRYPT
//
// o7serr.Code is the negative number that the reference's interface returns for
// an error.
//
// # Concurrency
//
// Everything here is safe for concurrent use. Of several goroutines that read a
// flow each gets whole messages, of several that write a stream each writes its
// bytes together. Close and deadlines reach calls that are blocked. A blocked
// call costs a goroutine, not a thread.
//
// At the daemon a process has one queue of flows for all its names. Listeners
// and Accept share it: a flow goes to the listener that has its name, else to
// Accept. A flow that nobody wants is closed.
//
// # How packets travel
//
// Through memory shared with the daemon or, when both ends are on one machine,
// with the other program; where the machine's fast path can serve a program
// directly, through a device of the program. Which it is makes no difference to
// the program.
//
// The functions of the package use one Client for the process, connected with
// the first of them to the daemon that O7S_RUN_DIR names.
package o7s

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// Alloc asks for a flow to name. q nil means qos.Raw; with BER 0 packets carry a
// checksum, which the reference's default builds do not ask for. Without a deadline in
// ctx it gives up after 20 s with o7serr.EPERM, as the reference does; an
// expired deadline is o7serr.ETIMEDOUT.
func Alloc(ctx context.Context, name string, q *qos.Spec) (*Flow, error) {
	return std.Alloc(ctx, name, q)
}

// Accept waits for a flow to any name that this program or process is bound
// to. A request that failed on the way (o7serr.EAUTH, o7serr.ECRYPT) is
// reported; the caller just accepts again.
func Accept(ctx context.Context) (*Flow, error) { return std.Accept(ctx) }

// Join joins a broadcast layer.
func Join(ctx context.Context, layer string) (*Flow, error) { return std.Join(ctx, layer) }

var std = New(Options{})

// Options of a Client. The zero value is what the package's functions use.
type Options struct {
	RunDir string // of the daemon; see ipc.RunDir
	// Prog is the name under which the program is bound to names; by default
	// the base name it was started with, or its script's.
	Prog string
	Args []string // announced with it; by default the program's
	// FRCPSpec makes flows with in_order use the end-to-end protocol as the
	// reference has it, without what our own ends do better between them. For
	// comparisons.
	FRCPSpec bool
}

// Client is a program's access to one daemon. It is safe for concurrent use.
type Client struct {
	opt Options

	mu      sync.Mutex // guards what follows
	session *session   // nil before the first call
	closed  bool

	dialing sync.Mutex // held while connecting; before mu
}

// New returns a client. It connects, and announces the program, with its first
// use or Connect; when the daemon was restarted, the next use connects anew.
func New(o Options) *Client {
	if o.Prog == "" {
		o.Prog = progName(os.Args)
		if o.Args == nil {
			o.Args = os.Args
		}
	}
	return &Client{opt: o}
}

// progName is the name to announce: for an interpreter that of its script.
func progName(args []string) string {
	if len(args) == 0 {
		return ""
	}
	base := filepath.Base(args[0])
	switch strings.TrimRight(base, "0123456789.") {
	case "python", "pypy", "perl", "ruby", "lua", "node", "sh", "bash", "dash":
		for _, a := range args[1:] {
			if !strings.HasPrefix(a, "-") {
				return filepath.Base(a)
			}
		}
	}
	return base
}

// Connect connects to the daemon and announces the program, unless that is
// done. A program may do this early, to be known before it accepts.
func (c *Client) Connect(ctx context.Context) error {
	_, err := c.connect(ctx)
	return err
}

func (c *Client) connect(ctx context.Context) (*session, error) {
	c.dialing.Lock()
	defer c.dialing.Unlock()
	c.mu.Lock()
	s, closed := c.session, c.closed
	c.mu.Unlock()
	if closed {
		return nil, errClosed
	}
	if s != nil && s.ipc.Err() == nil {
		return s, nil
	}
	s, err := newSession(ctx, c.opt)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		go s.close()
		return nil, errClosed
	}
	// Flows of the session before live on, as far as they can without a daemon.
	if c.session != nil {
		c.session.leave()
	}
	c.session = s
	return s, nil
}

// Close closes the listeners, releases every flow, as Flow.Close does, and ends
// the connection. Calls under way fail.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.exchange().forget(c) // listeners unbind, so the connection is still there
	c.mu.Lock()
	s := c.session
	c.session = nil
	c.mu.Unlock()
	if s != nil {
		s.close()
	}
	return nil
}

// current is the session there is, nil without.
func (c *Client) current() *session {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.session
}

// Alloc is the function Alloc with this client.
func (c *Client) Alloc(ctx context.Context, name string, q *qos.Spec) (*Flow, error) {
	if q == nil {
		q = &qos.Raw
	}
	f, err := c.get(ctx, ipc.OpAlloc, ipc.AllocArgs{Name: name, QoS: *q, TimeoutMS: timeout(ctx)})
	if err != nil {
		return nil, fmt.Errorf("allocate flow to %s: %w", name, err)
	}
	return f, nil
}

// Accept is the function Accept with this client.
func (c *Client) Accept(ctx context.Context) (*Flow, error) {
	f, err := c.exchange().accept(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("accept flow: %w", timedOut(err))
	}
	return f, nil
}

// Join is the function Join with this client.
func (c *Client) Join(ctx context.Context, layer string) (*Flow, error) {
	f, err := c.get(ctx, ipc.OpJoin, ipc.JoinArgs{Layer: layer, TimeoutMS: timeout(ctx)})
	if err != nil {
		return nil, fmt.Errorf("join layer %s: %w", layer, err)
	}
	return f, nil
}

// timeout is what is left until ctx expires in ms, 0 when it does not.
func timeout(ctx context.Context) int64 {
	t, ok := ctx.Deadline()
	if !ok {
		return 0
	}
	return max(time.Until(t).Milliseconds(), 1)
}

func (c *Client) get(ctx context.Context, op ipc.Op, args any) (*Flow, error) {
	s, err := c.connect(ctx)
	if err != nil {
		return nil, timedOut(err)
	}
	var f *Flow
	err = s.ipc.Do(ctx, op, args, func(r ipc.Reply, fds []int) (err error) {
		f, err = s.open(r, fds)
		return err
	})
	if err != nil {
		return nil, timedOut(err)
	}
	return f, nil
}

// timedOut makes the expiry of a context the error that the interface has for it.
func timedOut(err error) error {
	if err == context.DeadlineExceeded { //nolint:errorlint // exactly what Context.Err returns
		return fmt.Errorf("%w: %w", o7serr.ETIMEDOUT, err)
	}
	return err
}
