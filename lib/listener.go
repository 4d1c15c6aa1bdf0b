package o7s

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// Listen listens for streams to one name or several, with the package's client.
// See ListenConfig.Listen.
func Listen(ctx context.Context, names ...string) (*Listener, error) {
	return std.Listen(ctx, names...)
}

// Listen is the function Listen with this client.
func (c *Client) Listen(ctx context.Context, names ...string) (*Listener, error) {
	return ListenConfig{Client: c}.Listen(ctx, names...)
}

// ListenConfig says how to listen. The zero value is what Listen uses.
type ListenConfig struct {
	// Client to use; nil means the package's.
	Client *Client
	// Backlog is how many streams wait for Accept; 0 means 128. Those that
	// arrive beyond that wait at the daemon, or are closed at once when another
	// listener of the process has room.
	Backlog int
	// Log is told, at level Warn, of flows that can carry no stream: their
	// client asked for another qos, and finds the flow closed. nil: nobody is.
	Log *slog.Logger
}

// defaultBacklog is what Linux calls a short one: a server that accepts in a
// loop never has more than a few waiting.
const defaultBacklog = 128

// Listener is a net.Listener for the streams to one name or several. Several
// listeners of a process are independent, and programs may call Accept of the
// Client beside them, for their other names.
//
// While the daemon is away Accept returns an error that is o7serr.EIRMD and
// Temporary. When the daemon is back the names are bound again, and Accept goes
// on.
type Listener struct {
	client   *Client
	x        *exchange
	names    []string
	backlog  int
	log      *slog.Logger
	queue    chan *Conn    // backlog
	trouble  chan error    // why no streams come; has room for one
	done     chan struct{} // closed by Close
	closing  sync.Once
	deadline deadline

	mu    sync.Mutex // guards bound, and is held while binding
	bound []string   // the names that we bound, not somebody else
}

var _ net.Listener = (*Listener)(nil)

// Listen listens for streams to names. A name that the process is not bound to
// yet is bound, as `irm bind process` does, until the Listener is closed. That
// takes the right to manage the node (root, or the daemon's group); other
// programs have to be bound by somebody who has it before they start:
//
//	irm bind program /usr/bin/server name server.example
//
// In either case it is up to the operator to register the name with layers.
func (lc ListenConfig) Listen(ctx context.Context, names ...string) (*Listener, error) {
	c := lc.Client
	if c == nil {
		c = std
	}
	name := strings.Join(names, ",")
	if len(names) == 0 || slices.Contains(names, "") {
		return nil, opError("listen", name, fmt.Errorf("expected a name to listen on: %w", o7serr.EINVAL))
	}
	l := &Listener{
		client: c, x: c.exchange(), names: slices.Compact(slices.Sorted(slices.Values(names))), backlog: lc.Backlog, log: lc.Log,
		trouble: make(chan error, 1), done: make(chan struct{}),
	}
	if l.backlog <= 0 {
		l.backlog = defaultBacklog
	}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	// Accepts under way when the backlog becomes full find room, too.
	l.queue = make(chan *Conn, l.backlog+listenerAccepts)
	l.deadline.init()
	// First the names here, so that no flow goes to somebody else.
	x := l.x
	x.mu.Lock()
	for _, n := range l.names {
		if x.listeners[n] != nil {
			x.mu.Unlock()
			return nil, opError("listen", name, fmt.Errorf("another listener of this process has the name %s: %w", n, o7serr.EEXIST))
		}
	}
	for _, n := range l.names {
		x.listeners[n] = l
	}
	x.mu.Unlock()
	if err := l.bind(ctx); err != nil {
		_ = l.Close()
		return nil, opError("listen", name, err)
	}
	x.mu.Lock()
	a := x.intake(c)
	gone := a.gone
	if !gone {
		a.listeners = append(a.listeners, l)
		a.update()
	}
	x.mu.Unlock()
	if gone {
		_ = l.Close()
		return nil, opError("listen", name, errClosed)
	}
	return l, nil
}

// bind sees to it that the process is bound to every name of the listener.
func (l *Listener) bind(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, err := l.client.connect(ctx)
	if err != nil {
		return err
	}
	for _, n := range l.names {
		ok, err := s.bound(ctx, n)
		if err == nil && !ok {
			_, err = s.ipc.Call(ctx, ipc.OpBind, ipc.BindArgs{Name: n, PID: s.pid}, nil)
			switch {
			case err == nil:
				if !slices.Contains(l.bound, n) {
					l.bound = append(l.bound, n)
				}
			case errors.Is(err, o7serr.EPERM):
				return fmt.Errorf("this process is not bound to the name %s and may not bind itself: "+
					"expected `irm bind program %s name %s` before it starts, or the right to manage the node: %w",
					n, s.program(), n, o7serr.EPERM)
			default:
				if ok, lerr := s.bound(ctx, n); lerr == nil && ok {
					err = nil // somebody did it just now
				}
			}
		}
		if err != nil {
			return fmt.Errorf("bind to name %s: %w", n, err)
		}
	}
	return nil
}

// program is what an operator calls the program of this process: its path, if
// it goes by that name.
func (s *session) program() string {
	if exe, err := os.Executable(); err == nil && filepath.Base(exe) == s.prog {
		return exe
	}
	return s.prog
}

// bound reports whether the process is bound to a name.
func (s *session) bound(ctx context.Context, name string) (bool, error) {
	var list ipc.ListResult
	if _, err := s.ipc.Call(ctx, ipc.OpList, ipc.ListArgs{What: "names", Prefix: name}, &list); err != nil {
		return false, err
	}
	for _, n := range list.Names {
		if n.Name == name {
			return slices.Contains(n.Processes, s.pid), nil
		}
	}
	return false, nil
}

// push takes a flow that arrived. It reports whether the flow is in good hands;
// else it is the caller's to close. exchange.mu is held.
func (l *Listener) push(f *Flow) bool {
	c, err := NewConn(f)
	if err != nil {
		l.log.Warn("flow refused", "name", f.Name(), "err", err)
		return false
	}
	select {
	case l.queue <- c:
		return true
	default:
		l.log.Warn("flow refused: too many wait to be accepted", "name", f.Name(), "backlog", l.backlog)
		return false
	}
}

// fail makes an Accept return err.
func (l *Listener) fail(err error) {
	select {
	case l.trouble <- err:
	default:
	}
}

// mend says that what fail told is over.
func (l *Listener) mend() {
	select {
	case <-l.trouble:
	default:
	}
}

// Accept waits for the next stream; the net.Conn is a *Conn.
func (l *Listener) Accept() (net.Conn, error) {
	c, err := l.AcceptConn(context.Background())
	if err != nil {
		return nil, err // not a nil *Conn
	}
	return c, nil
}

// AcceptConn is Accept with a context.
func (l *Listener) AcceptConn(ctx context.Context) (*Conn, error) {
	c, err := l.accept(ctx)
	if err != nil {
		return nil, opError("accept", l.name(), err)
	}
	l.x.mu.Lock()
	if a := l.x.intakes[l.client]; a != nil {
		a.update() // there is room in the backlog
	}
	l.x.mu.Unlock()
	return c, nil
}

func (l *Listener) accept(ctx context.Context) (*Conn, error) {
	expired := l.deadline.wait()
	select {
	case <-l.done:
		return nil, errListener
	case <-expired:
		return nil, errTimedOut
	default:
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	for {
		select {
		case c := <-l.queue: // before bad news
			return c, nil
		default:
		}
		select {
		case c := <-l.queue:
			return c, nil
		case <-l.done:
			return nil, errListener
		case <-expired:
			return nil, errTimedOut
		case <-l.deadline.changed(expired):
			expired = l.deadline.wait()
		case <-ctx.Done():
			return nil, ctx.Err()
		case err := <-l.trouble:
			return nil, temporary{err}
		}
	}
}

var errListener = fmt.Errorf("listener is closed: %w", net.ErrClosed)

// temporary is an error after which Accept is worth another try. net/http and
// gRPC do that, with growing pauses.
type temporary struct{ error }

func (temporary) Temporary() bool { return true }
func (temporary) Timeout() bool   { return false }
func (t temporary) Unwrap() error { return t.error }

// SetDeadline makes Accept fail after t, present calls too; zero: never. The
// error is os.ErrDeadlineExceeded.
func (l *Listener) SetDeadline(t time.Time) error {
	select {
	case <-l.done:
		return opError("set", l.name(), errListener)
	default:
	}
	l.deadline.set(t)
	return nil
}

func (l *Listener) name() string { return strings.Join(l.names, ",") }

// Addr is the name listened on, an Addr; several are separated by commas.
func (l *Listener) Addr() net.Addr { return Addr(l.name()) }

// Names are the names listened on, sorted.
func (l *Listener) Names() []string { return slices.Clone(l.names) }

// closeTimeout bounds how long Close waits for the daemon to unbind a name.
const closeTimeout = 5 * time.Second

// Close ends the listener: calls of Accept return net.ErrClosed, streams that
// wait for one are closed, names that Listen bound are unbound. Streams that
// were accepted stay.
func (l *Listener) Close() error {
	err := opError("close", l.name(), errListener)
	l.closing.Do(func() {
		close(l.done)
		err = l.unbind() // first, so that no more flows come
		x := l.x
		x.mu.Lock()
		for _, n := range l.names {
			delete(x.listeners, n)
		}
		if a := x.intakes[l.client]; a != nil {
			a.leave(l)
		}
		x.mu.Unlock()
		l.deadline.set(time.Time{})
		for len(l.queue) > 0 {
			select {
			case c := <-l.queue:
				refuse(c.f)
			default: // an Accept took it
			}
		}
	})
	return err
}

// unbind releases the names that bind bound. A daemon that is gone has done so.
func (l *Listener) unbind() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.bound) == 0 {
		return nil
	}
	s := l.client.current()
	if s == nil || s.ipc.Err() != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	var errs []error
	for _, n := range l.bound {
		_, err := s.ipc.Call(ctx, ipc.OpUnbind, ipc.BindArgs{Name: n, PID: s.pid}, nil)
		if err != nil && s.ipc.Err() == nil {
			errs = append(errs, fmt.Errorf("unbind from name %s: %w", n, err))
		}
	}
	l.bound = nil
	if err := errors.Join(errs...); err != nil {
		return opError("close", l.name(), err)
	}
	return nil
}

// deadline is a point in time that closes a channel, and may be changed.
type deadline struct {
	mu    sync.Mutex // guards what follows
	timer *time.Timer
	over  chan struct{} // closed when it has passed
	moved chan struct{} // closed when over is no longer the channel to wait on
}

func (d *deadline) init() {
	d.over, d.moved = make(chan struct{}), make(chan struct{})
}

// wait returns the channel that is closed at the deadline.
func (d *deadline) wait() chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.over
}

// changed returns a channel that is closed once over is not to be waited on any
// more.
func (d *deadline) changed(over chan struct{}) chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.over != over {
		c := make(chan struct{})
		close(c)
		return c
	}
	return d.moved
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	over := make(chan struct{})
	d.over = over
	close(d.moved)
	d.moved = make(chan struct{})
	if t.IsZero() {
		return
	}
	if wait := time.Until(t); wait > 0 {
		d.timer = time.AfterFunc(wait, func() { close(over) })
	} else {
		close(over)
	}
}
