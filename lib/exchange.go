package o7s

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// exchange gives the flows that a process accepts to whoever they are for. At
// the daemon a process has one queue for all its names (spec 33 §3): an accept
// gets a flow for any of them, whichever client of the process made it. Here
// the flow goes to the listener that has its name, else to who called Accept.
//
// Accepts are pending at the daemon only as long as somebody wants flows. A
// flow that arrives although nobody does is closed, so that its peer knows.
type exchange struct {
	mu        sync.Mutex           // guards what follows, and the fields of its intakes
	listeners map[string]*Listener // by name
	intakes   map[*Client]*intake
	spare     []spare // flows for Accept that came between two calls of it
}

// spare is a flow without a taker.
type spare struct {
	a *intake
	f *Flow
}

const (
	// listenerAccepts is how many accepts of a client with listeners are
	// pending: while one flow is on its way through the daemon others arrive.
	listenerAccepts = 4
	// maxSpare bounds the flows that wait for the next call of Accept.
	maxSpare = defaultBacklog
	// Waits before a daemon that is not there is tried again.
	minRetry = 10 * time.Millisecond
	maxRetry = time.Second
)

// exchanges has one exchange for each daemon, by the path of its socket.
var exchanges struct {
	mu sync.Mutex // guards m
	m  map[string]*exchange
}

// exchange returns the one that c is part of.
func (c *Client) exchange() *exchange {
	path := ipc.SocketPath(ipc.RunDir(c.opt.RunDir))
	exchanges.mu.Lock()
	defer exchanges.mu.Unlock()
	x := exchanges.m[path]
	if x == nil {
		x = &exchange{listeners: map[string]*Listener{}, intakes: map[*Client]*intake{}}
		if exchanges.m == nil {
			exchanges.m = map[string]*exchange{}
		}
		exchanges.m[path] = x
	}
	return x
}

// intake is a client's part of an exchange.
type intake struct {
	x      *exchange
	client *Client

	waiters   []*waiter   // calls of Accept, oldest first
	listeners []*Listener // of this client
	pending   []*request
	mixed     bool // Accept was called
	gone      bool // the client was closed

	// After an error accepts for listeners wait for retry.
	broken error
	retry  context.CancelFunc // ends the goroutine that repairs; nil: none
}

// request is an accept at the daemon.
type request struct{ cancel context.CancelFunc }

// waiter is a call of Accept.
type waiter struct{ result chan accepted } // has room for the one

type accepted struct {
	f   *Flow
	err error
}

// intake returns that of c, made if need be. x.mu is held.
func (x *exchange) intake(c *Client) *intake {
	a := x.intakes[c]
	if a == nil {
		a = &intake{x: x, client: c}
		x.intakes[c] = a
	}
	return a
}

// accept is Client.Accept.
func (x *exchange) accept(ctx context.Context, c *Client) (*Flow, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	x.mu.Lock()
	a := x.intake(c)
	if a.gone {
		x.mu.Unlock()
		return nil, errClosed
	}
	a.mixed = true
	if len(x.spare) > 0 {
		f := x.spare[0].f
		x.spare = slices.Delete(x.spare, 0, 1)
		x.mu.Unlock()
		return f, nil
	}
	w := &waiter{result: make(chan accepted, 1)}
	a.waiters = append(a.waiters, w)
	a.update()
	x.mu.Unlock()
	select {
	case r := <-w.result:
		return r.f, r.err
	case <-ctx.Done():
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	select {
	case r := <-w.result: // at this moment
		return r.f, r.err
	default:
	}
	a.drop(w)
	a.update()
	return nil, ctx.Err()
}

func (a *intake) drop(w *waiter) {
	a.waiters = slices.DeleteFunc(a.waiters, func(v *waiter) bool { return v == w })
}

// update makes as many accepts pending as are wanted. x.mu is held.
func (a *intake) update() {
	want := len(a.waiters)
	listening := false
	if a.broken == nil {
		for _, l := range a.listeners {
			listening = listening || len(l.queue) < l.backlog
		}
	}
	if listening {
		want = max(want, listenerAccepts)
	}
	for len(a.pending) < want {
		ctx, cancel := context.WithCancel(context.Background())
		r := &request{cancel}
		a.pending = append(a.pending, r)
		go a.run(ctx, r)
	}
	// Withdrawing one may lose a flow that comes at this moment, so it is done
	// only when nobody is left to take it. Full backlogs have room for those.
	if len(a.listeners) == 0 {
		for i := want; i < len(a.pending); i++ {
			a.pending[i].cancel()
		}
	}
	if want == 0 && len(a.pending) == 0 && len(a.listeners) == 0 && !a.mixed {
		delete(a.x.intakes, a.client)
	}
}

// run is one accept at the daemon.
func (a *intake) run(ctx context.Context, r *request) {
	f, err := a.client.get(ctx, ipc.OpAccept, ipc.AcceptArgs{})
	withdrawn := ctx.Err() != nil
	r.cancel()
	x := a.x
	x.mu.Lock()
	a.pending = slices.DeleteFunc(a.pending, func(p *request) bool { return p == r })
	var nobody *Flow
	switch {
	case err == nil:
		if !x.deliver(a, f) {
			nobody = f
		}
	case !withdrawn:
		a.failed(err)
	}
	a.update()
	x.mu.Unlock()
	if nobody != nil {
		refuse(nobody)
	}
}

// deliver finds the taker of f, which a accepted. x.mu is held.
func (x *exchange) deliver(a *intake, f *Flow) bool {
	if l := x.listeners[f.Name()]; l != nil {
		return l.push(f)
	}
	if a.give(accepted{f: f}) {
		return true
	}
	mixed := false
	for _, b := range x.intakes {
		if b.give(accepted{f: f}) {
			return true
		}
		mixed = mixed || b.mixed
	}
	if mixed && !a.gone && len(x.spare) < maxSpare {
		x.spare = append(x.spare, spare{a, f})
		return true
	}
	return false
}

// give serves the oldest call of Accept. x.mu is held.
func (a *intake) give(r accepted) bool {
	if len(a.waiters) == 0 {
		return false
	}
	a.waiters[0].result <- r
	a.waiters = slices.Delete(a.waiters, 0, 1)
	return true
}

// failed handles the error of an accept. x.mu is held.
func (a *intake) failed(err error) {
	if errors.Is(err, o7serr.EAUTH) || errors.Is(err, o7serr.ECRYPT) {
		// One request was bad. It concerns nobody but who asks for such news.
		a.give(accepted{err: err})
		return
	}
	for a.give(accepted{err: err}) {
	}
	if len(a.listeners) > 0 {
		a.breakdown(err)
	}
}

// breakdown tells the listeners that no flows come, and starts to repair that.
// x.mu is held.
func (a *intake) breakdown(err error) {
	a.broken = err
	for _, l := range a.listeners {
		l.fail(err)
	}
	if a.retry == nil {
		ctx, cancel := context.WithCancel(context.Background())
		a.retry = cancel
		go a.repair(ctx)
	}
}

// repair connects to a daemon that was restarted and binds the names again.
func (a *intake) repair(ctx context.Context) {
	x := a.x
	for wait := minRetry; ; wait = min(2*wait, maxRetry) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		x.mu.Lock()
		list := slices.Clone(a.listeners)
		x.mu.Unlock()
		var err error
		for _, l := range list {
			if err = l.bind(ctx); err != nil {
				break
			}
		}
		x.mu.Lock()
		if ctx.Err() != nil {
			x.mu.Unlock()
			return
		}
		if err == nil {
			a.retry()
			a.broken, a.retry = nil, nil
			for _, l := range a.listeners {
				l.mend()
			}
			a.update()
			x.mu.Unlock()
			return
		}
		a.broken = err
		for _, l := range a.listeners {
			l.fail(err)
		}
		x.mu.Unlock()
	}
}

// leave is for listeners that are closed. x.mu is held.
func (a *intake) leave(l *Listener) {
	a.listeners = slices.DeleteFunc(a.listeners, func(m *Listener) bool { return m == l })
	if len(a.listeners) == 0 {
		if a.retry != nil {
			a.retry()
			a.retry = nil
		}
		a.broken = nil
	}
	a.update()
}

// forget ends a client's part: it was closed, and its flows are.
func (x *exchange) forget(c *Client) {
	x.mu.Lock()
	a := x.intakes[c]
	if a == nil {
		x.mu.Unlock()
		return
	}
	a.gone, a.mixed = true, false
	x.spare = slices.DeleteFunc(x.spare, func(s spare) bool { return s.a == a })
	for a.give(accepted{err: errClosed}) {
	}
	list := slices.Clone(a.listeners)
	a.update()
	x.mu.Unlock()
	for _, l := range list {
		_ = l.Close()
	}
}

// refuse releases a flow that was accepted and has no taker: no end of stream,
// nobody was there. That may take a while, and the caller has other flows to
// look after.
func refuse(f *Flow) {
	go func() { _ = f.Abort() }()
}
