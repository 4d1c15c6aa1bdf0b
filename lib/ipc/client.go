package ipc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/o7s/o7s-router/lib/o7serr"
)

// RunDir is the daemon's run directory: flag when not empty, then the
// environment's O7S_RUN_DIR, then the default.
func RunDir(flag string) string {
	if flag != "" {
		return flag
	}
	if d := os.Getenv("O7S_RUN_DIR"); d != "" {
		return d
	}
	return DefaultRunDir
}

// SocketPath is the daemon's socket in its run directory.
func SocketPath(runDir string) string { return filepath.Join(runDir, SocketName) }

// Client is a program's connection to the daemon. It is safe for concurrent
// use; any number of calls may be under way. When the connection ends every
// call fails with an error that is o7serr.EIRMD.
type Client struct {
	conn    *Conn
	path    string
	onEvent func(FlowEvent)
	onLate  func(Reply, []int) error
	onDown  func(error)
	done    chan struct{} // closed when the reader is gone

	mu      sync.Mutex // guards what follows
	calls   map[uint64]*call
	last    uint64 // last request ID used
	down    error  // why the connection ended; nil while it lives
	closing bool   // by Close
}

// call is a request under way. op and handle are set before it is in
// Client.calls, err before ready is closed.
type call struct {
	op     Op
	handle func(Reply, []int) error
	ready  chan struct{}
	err    error
	parts  []byte // of a long result; the reader's

	mu   sync.Mutex // makes handing over the reply and giving up exclude each other
	left bool       // the caller gave up
}

// finish ends the call, once.
func (cl *call) finish(err error) {
	cl.err = err
	close(cl.ready)
}

// Dialer makes clients that hear of events.
type Dialer struct {
	RunDir string // see RunDir
	// OnEvent is called for every event, in the order in which events and
	// replies arrived, from the goroutine that reads the connection: it must
	// not block, and must not wait for a call on the same client.
	OnEvent func(FlowEvent)
	// OnLate is called for a flow whose caller had given up when it came, and
	// that has descriptors: there may be some among them that later flows need,
	// too. The flow and the descriptors are the callee's, to release, unless it
	// returns an error. It has the restrictions of OnEvent. nil: all is released.
	OnLate func(Reply, []int) error
	// OnDown is called once when the connection ends, unless Close ended it.
	OnDown func(error)
}

// Dial connects to the daemon that serves runDir.
func Dial(ctx context.Context, runDir string) (*Client, error) {
	return Dialer{RunDir: runDir}.Dial(ctx)
}

// Dial connects to the daemon. An error is o7serr.EIRMD.
func (d Dialer) Dial(ctx context.Context) (*Client, error) {
	path := SocketPath(RunDir(d.RunDir))
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	conn, err := dial(path)
	if err != nil {
		return nil, unreachable(path, err)
	}
	c := &Client{
		conn: conn, path: path, onEvent: d.OnEvent, onLate: d.OnLate, onDown: d.OnDown,
		done: make(chan struct{}), calls: make(map[uint64]*call),
	}
	go c.read()
	return c, nil
}

func unreachable(path string, err error) error {
	if errors.Is(err, io.EOF) {
		err = errors.New("it closed the connection")
	}
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w at %s: no permission to connect", o7serr.EIRMD, path)
	}
	return fmt.Errorf("%w at %s: is `o7s-router daemon` running? (%v)", o7serr.EIRMD, path, cause(err))
}

// cause strips what the message around it says already.
func cause(err error) error {
	for {
		e := errors.Unwrap(err)
		if e == nil {
			return err
		}
		err = e
	}
}

// Close ends the connection and waits until no callback runs any more. Calls
// under way fail. It must not be called from a callback.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closing = true
	c.mu.Unlock()
	err := c.conn.Close()
	<-c.done
	return err
}

// Err tells why the connection ended, nil while it lives.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.down
}

// Path is the daemon's socket.
func (c *Client) Path() string { return c.path }

// Call sends a request and waits for its reply. The result goes to result
// unless that is nil; the descriptors that came with it are returned and are
// the caller's to close. A refusal is an error that wraps the o7serr.Errno.
// When ctx ends first the request is cancelled at the daemon, and a flow that
// was allocated in that moment is released again.
func (c *Client) Call(ctx context.Context, op Op, args, result any) ([]int, error) {
	var fds []int
	err := c.Do(ctx, op, args, func(r Reply, f []int) error {
		if result != nil {
			if err := json.Unmarshal(r.Result, result); err != nil {
				return fmt.Errorf("reply to %s: %w", op, err)
			}
		}
		fds = f
		return nil
	})
	if err != nil {
		return nil, err
	}
	return fds, nil
}

// Do is Call for callers to whom the order of replies and events matters:
// handle gets the positive reply, and the descriptors to keep unless it
// returns an error, before any later event is delivered. It has the
// restrictions of Dialer.OnEvent. It is not called when ctx ended first.
func (c *Client) Do(ctx context.Context, op Op, args any, handle func(Reply, []int) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	cl := &call{op: op, handle: handle, ready: make(chan struct{})}
	id, err := c.start(cl, args)
	if err != nil {
		return err
	}
	select {
	case <-cl.ready:
		return cl.err
	case <-ctx.Done():
	}
	cl.mu.Lock()
	select {
	case <-cl.ready: // the reply won
		cl.mu.Unlock()
		return cl.err
	default:
	}
	cl.left = true
	cl.mu.Unlock()
	c.forget(OpCancel, CancelArgs{ID: id})
	return ctx.Err()
}

// DoAll is Do, except that when ctx ends it cancels the request and waits for
// what the daemon says: either that it is cancelled, or what came meanwhile.
func (c *Client) DoAll(ctx context.Context, op Op, args any, handle func(Reply, []int) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	cl := &call{op: op, handle: handle, ready: make(chan struct{})}
	id, err := c.start(cl, args)
	if err != nil {
		return err
	}
	select {
	case <-cl.ready:
		return cl.err
	case <-ctx.Done():
	}
	c.forget(OpCancel, CancelArgs{ID: id})
	<-cl.ready
	return cl.err
}

// start registers and sends a request.
func (c *Client) start(cl *call, args any) (uint64, error) {
	raw, err := json.Marshal(args)
	if err != nil {
		return 0, err
	}
	c.mu.Lock()
	if c.down != nil {
		c.mu.Unlock()
		return 0, c.down
	}
	c.last++
	id := c.last
	c.calls[id] = cl
	c.mu.Unlock()
	if err := c.conn.Send(&Request{ID: id, Op: cl.op, Args: raw}); err != nil {
		c.mu.Lock()
		delete(c.calls, id)
		c.mu.Unlock()
		if !errors.Is(err, o7serr.EMSGSIZE) {
			c.fail(err)
			err = c.Err()
		}
		return 0, err
	}
	return id, nil
}

// forget sends a request whose reply nobody waits for. Never blocks.
func (c *Client) forget(op Op, args any) {
	raw, err := json.Marshal(args)
	if err != nil {
		return
	}
	c.mu.Lock()
	c.last++
	id := c.last
	c.mu.Unlock()
	// When the daemon does not read it will not act on it either; it cleans
	// up when the connection ends.
	c.conn.TrySend(&Request{ID: id, Op: op, Args: raw})
}

// Release deallocates a flow without waiting for the answer. It does not block.
func (c *Client) Release(flow uint32) { c.forget(OpDealloc, DeallocArgs{Flow: flow}) }

// read is the reader goroutine.
func (c *Client) read() {
	defer close(c.done)
	for {
		var r Reply
		fds, err := c.conn.Recv(&r)
		if err != nil {
			c.fail(err)
			return
		}
		if r.ID == 0 {
			CloseFDs(fds)
			if r.Event != nil && c.onEvent != nil {
				c.onEvent(*r.Event)
			}
			continue
		}
		c.reply(r, fds)
	}
}

func (c *Client) reply(r Reply, fds []int) {
	c.mu.Lock()
	cl := c.calls[r.ID]
	if !r.More {
		delete(c.calls, r.ID)
	}
	c.mu.Unlock()
	if cl == nil { // to what forget sent
		CloseFDs(fds)
		return
	}
	if len(r.Part) > 0 {
		cl.parts = append(cl.parts, r.Part...)
		if r.More {
			CloseFDs(fds)
			return
		}
		r.Result = cl.parts
	}
	err := o7serr.FromCode(r.Code, r.Error)
	cl.mu.Lock()
	defer cl.mu.Unlock()
	switch {
	case err != nil:
		CloseFDs(fds)
		cl.finish(err)
	case cl.left:
		if len(fds) == 0 || c.onLate == nil || c.onLate(r, fds) != nil {
			CloseFDs(fds)
			c.undo(cl.op, r)
		}
	default:
		if err = cl.handle(r, fds); err != nil {
			CloseFDs(fds)
			c.undo(cl.op, r)
		}
		cl.finish(err)
	}
}

// undo releases the flow of a positive reply that nobody took.
func (c *Client) undo(op Op, r Reply) {
	switch op {
	case OpAlloc, OpAccept, OpJoin:
		var f FlowResult
		if json.Unmarshal(r.Result, &f) == nil {
			c.Release(f.Flow)
		}
	}
}

// fail ends the connection, and every call under way, once.
func (c *Client) fail(err error) {
	c.conn.Close()
	down := unreachable(c.path, err)
	c.mu.Lock()
	if c.down != nil {
		c.mu.Unlock()
		return
	}
	c.down = down
	calls := c.calls
	c.calls = nil
	closing := c.closing
	for _, cl := range calls {
		cl.finish(down)
	}
	c.mu.Unlock()
	if !closing && c.onDown != nil {
		c.onDown(down)
	}
}
