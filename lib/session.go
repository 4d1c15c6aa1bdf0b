package o7s

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/frcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/keepalive"
	"github.com/o7s/o7s-router/lib/ring"
)

// session is one connection to a daemon and what came over it.
type session struct {
	ipc  *ipc.Client
	prog string // as it was announced
	pid  int32  // of this process as the daemon knows it

	mu     sync.Mutex // guards what follows
	flows  map[uint32]*Flow
	fds    []*Flow // by descriptor, less firstFD
	freeFD int     // no index below is free
	desk   ring.Desk
	tap    *tap                // this process's device on the fast path; nil: none yet
	tapNow atomic.Pointer[tap] // tap, for those without mu
	left   bool                // no flow is added any more, the last one closes the tap
	reaped bool
	alive  alive

	spec   bool // Options.FRCPSpec
	tender tender
}

// firstFD is the lowest descriptor of a flow (spec 33 §1).
const firstFD = 64

func newSession(ctx context.Context, o Options) (*session, error) {
	s := &session{prog: o.Prog, flows: map[uint32]*Flow{}, spec: o.FRCPSpec}
	s.alive.session = s
	s.tender.hub = s.desk.Hub
	c, err := ipc.Dialer{RunDir: o.RunDir, OnEvent: s.event, OnLate: s.late, OnDown: s.down}.Dial(ctx)
	if err != nil {
		return nil, err
	}
	s.ipc = c
	var hello ipc.HelloResult
	if _, err := c.Call(ctx, ipc.OpHello, ipc.HelloArgs{Prog: o.Prog, Args: o.Args}, &hello); err != nil {
		c.Close()
		return nil, fmt.Errorf("announce program %s: %w", o.Prog, err)
	}
	s.pid = hello.PID
	return s, nil
}

// open makes a Flow of a reply. It runs on the connection's reader, so events
// of the flow come after it. The descriptors are its own unless it fails.
func (s *session) open(r ipc.Reply, fds []int) (*Flow, error) {
	var info ipc.FlowResult
	if err := json.Unmarshal(r.Result, &info); err != nil {
		return nil, fmt.Errorf("reply of the resource manager: %w", err)
	}
	if want := info.FDs(); len(fds) != want {
		return nil, fmt.Errorf("reply of the resource manager: %d descriptors with a flow, want %d", len(fds), want)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left {
		return nil, errClosed
	}
	p, err := s.path(&info, fds)
	if err != nil {
		return nil, err
	}
	ipc.CloseFDs(fds) // what is needed of them was copied
	f := newFlow(s, info, p)
	s.flows[f.id] = f
	f.fd = s.takeFD(f)
	s.alive.add(f)
	return f, nil
}

// late takes a flow that nobody waits for any more, for the descriptors with it
// that other flows need, too: the daemon sends those once.
func (s *session) late(r ipc.Reply, fds []int) error {
	f, err := s.open(r, fds)
	if err == nil {
		refuse(f)
	}
	return err
}

// path opens the way of the packets, up to what the program sees of it. On an
// error the descriptors are still open.
func (s *session) path(info *ipc.FlowResult, fds []int) (path, error) {
	p, err := s.carrier(info, fds)
	if err != nil || info.Direct || frcp.ModeOf(info.QoS) == frcp.Bare && info.QoS.BER != 0 {
		return p, err // within the machine nothing is lost or overtaken
	}
	if frcp.ModeOf(info.QoS) == frcp.Bare {
		info.MTU -= frcp.CRCLen
		return newCRCPath(p, info.MTU+frcp.CRCLen), nil
	}
	e, err := newE2EPath(p, info, s.spec, &s.tender)
	if err != nil {
		p.Close()
		return nil, err
	}
	return e, nil
}

// carrier opens what carries the flow's packets.
func (s *session) carrier(info *ipc.FlowResult, fds []int) (path, error) {
	app := info.App
	if app != nil && s.tap == nil && !app.NewFD {
		return nil, fmt.Errorf("reply of the resource manager: flow without its device")
	}
	// The desk takes its descriptors over in any case: give it copies, so that
	// an error leaves all to the caller.
	own := make([]int, info.Ring.FDs())
	for i := range own {
		fd, err := unix.FcntlInt(uintptr(fds[i]), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			ipc.CloseFDs(own[:i])
			return nil, err
		}
		own[i] = fd
	}
	c := ring.Config{MaxMessage: info.MTU}
	if app != nil {
		c.Spin = -1 // the tap is where packets come from
	}
	end, bell, err := s.desk.Open(info.Ring, own, c)
	if err != nil {
		return nil, err
	}
	grant := info.Ring
	done := func() { s.desk.Done(grant) }
	if app == nil {
		return &ringPath{End: end, bell: bell, done: done}, nil
	}
	hub := s.desk.Hub()
	if s.tap == nil {
		if s.tap, err = newTap(fds[len(fds)-1], hub); err != nil {
			end.Close()
			done()
			return nil, err
		}
		s.tapNow.Store(s.tap)
		hub.Serve()
	}
	return newTapPath(s.tap, end, bell, done, app.Handle, app.Headroom), nil
}

// ringPath is a pair of rings as a path.
type ringPath struct {
	*ring.End
	bell *ring.HubEnd
	done func() // after Close
}

func (p *ringPath) Close() error {
	defer p.done()
	return p.End.Close()
}

// OnRing sets what is called when something arrives after Arm.
func (p *ringPath) OnRing(f func(lead bool)) {
	if f == nil {
		p.bell.Handle(nil)
		return
	}
	p.bell.Handle(func() { f(true) })
}

// device is the process's device, nil if it has none.
func (s *session) device() *tap { return s.tapNow.Load() }

// takeFD finds the lowest free descriptor. mu is held.
func (s *session) takeFD(f *Flow) int {
	for s.freeFD < len(s.fds) && s.fds[s.freeFD] != nil {
		s.freeFD++
	}
	if s.freeFD == len(s.fds) {
		s.fds = append(s.fds, nil)
	}
	s.fds[s.freeFD] = f
	s.freeFD++
	return firstFD + s.freeFD - 1
}

// forget removes a flow that is being closed: nothing calls it any more.
func (s *session) forget(f *Flow) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.flows[f.id] == f {
		delete(s.flows, f.id)
		s.fds[f.fd-firstFD] = nil
		s.freeFD = min(s.freeFD, f.fd-firstFD)
	}
	s.alive.remove(f)
}

// event is called by the connection's reader.
func (s *session) event(e ipc.FlowEvent) {
	if e.Type == "slab" {
		s.desk.Gone(e.Slab)
		return
	}
	s.mu.Lock()
	f := s.flows[e.Flow]
	s.mu.Unlock()
	if f == nil {
		return // closed meanwhile
	}
	switch e.Type {
	case "down":
		f.event(EventDown)
	case "up":
		f.event(EventUp)
	case "dealloc":
		f.event(EventDealloc)
	case "peer":
		f.event(EventPeer)
	}
}

// down is called when the daemon is gone.
func (s *session) down(err error) {
	for _, f := range s.all() {
		f.orphan(err)
	}
}

func (s *session) all() []*Flow {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*Flow, 0, len(s.flows))
	for _, f := range s.flows {
		out = append(out, f)
	}
	return out
}

// closeWait bounds how long closing a flow waits for the daemon to confirm.
const closeWait = 5 * time.Second

// release tells the daemon that a flow is no longer used.
func (s *session) release(id uint32, quarantine time.Duration) error {
	if s.ipc.Err() != nil {
		return nil // it knows
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeWait)
	defer cancel()
	_, err := s.ipc.Call(ctx, ipc.OpDealloc, ipc.DeallocArgs{Flow: id, LingerMS: quarantine.Milliseconds()}, nil)
	if s.ipc.Err() != nil {
		return nil
	}
	return err
}

// leave ends a session whose daemon is gone: flows between programs live on.
func (s *session) leave() {
	s.mu.Lock()
	s.left = true
	s.mu.Unlock()
	s.ipc.Close()
	s.reap()
}

func (s *session) close() {
	s.mu.Lock()
	s.left = true
	s.mu.Unlock()
	// Flows first: what was written to reliable ones still needs a carrier.
	// They linger side by side.
	var wg sync.WaitGroup
	for _, f := range s.all() {
		wg.Go(func() { f.Close() })
	}
	wg.Wait()
	s.ipc.Close()
	s.reap()
}

// reap closes what the flows of a session had in common once the last is closed
// and it gets no more.
func (s *session) reap() {
	s.mu.Lock()
	last := s.left && len(s.flows) == 0 && !s.reaped
	s.reaped = s.reaped || last
	s.mu.Unlock()
	if !last {
		return
	}
	_ = s.desk.Close()
	if s.tap != nil {
		s.tap.close()
	}
}

// alive runs the keep-alives of all flows of a session on one timer. Its fields
// are guarded by session.mu.
type alive struct {
	session *session
	rounds  map[time.Duration]*round // by peer time-out
	timer   *time.Timer
	at      int64 // when the timer runs; Never: it does not
}

// round are the flows with the same peer time-out. One look at all of them must
// not take long, nor send a keep-alive on all at once, which a device has no
// room for: many are looked at in turns.
type round struct {
	flows []*Flow
	next  int   // whose turn it is
	at    int64 // when
}

const (
	// turnFlows is how many flows at most have a turn together, as long as a
	// round has no more than maxTurns.
	turnFlows = 256
	maxTurns  = 64
)

// watch is what alive knows of a flow.
type watch struct {
	round          *round // nil: not watched
	index          int    // in round.flows
	state          keepalive.State
	received, sent uint64 // progress seen last
}

// epoch makes monotonic nanoseconds of times.
var epoch = time.Now()

func nanotime() int64 { return int64(time.Since(epoch)) }

// add starts watching f. session.mu is held.
func (a *alive) add(f *Flow) {
	t := time.Duration(f.info.QoS.Timeout) * time.Millisecond
	if t == 0 {
		return
	}
	if a.rounds == nil {
		a.rounds = map[time.Duration]*round{}
		a.timer = time.AfterFunc(time.Hour, a.run)
		a.at = keepalive.Never
	}
	r := a.rounds[t]
	if r == nil {
		r = &round{at: keepalive.Never}
		a.rounds[t] = r
	}
	w := &f.watch
	w.round, w.index, w.state = r, len(r.flows), keepalive.New(t, nanotime())
	w.received, w.sent, _ = f.path.Progress()
	r.flows = append(r.flows, f)
	r.at = min(r.at, w.state.Next())
	a.schedule(r.at)
}

// remove stops watching f. session.mu is held.
func (a *alive) remove(f *Flow) {
	r := f.watch.round
	if r == nil {
		return
	}
	last := len(r.flows) - 1
	r.flows[f.watch.index] = r.flows[last]
	r.flows[f.watch.index].watch.index = f.watch.index
	r.flows[last] = nil
	r.flows = r.flows[:last]
	f.watch.round = nil
	if last == 0 {
		delete(a.rounds, time.Duration(f.info.QoS.Timeout)*time.Millisecond)
		if len(a.rounds) == 0 {
			a.timer.Stop()
			a.at = keepalive.Never
		}
	}
}

// schedule sees to it that the timer runs at t. session.mu is held.
func (a *alive) schedule(t int64) {
	if t < a.at {
		a.at = t
		a.timer.Reset(time.Duration(max(t-nanotime(), 0)))
	}
}

// run looks at the flows whose turn it is; the timer calls it. What it does with
// a flow happens under session.mu, which Flow.Close takes before it ends the path.
func (a *alive) run() {
	s := a.session
	var gone []*Flow
	s.mu.Lock()
	a.at = keepalive.Never
	now := nanotime()
	next := keepalive.Never
	for timeout, r := range a.rounds {
		if now >= r.at {
			gone = r.turn(now, timeout, gone)
		}
		next = min(next, r.at)
	}
	if next != keepalive.Never {
		a.schedule(next)
	}
	s.mu.Unlock()
	for _, f := range gone {
		f.event(EventPeer)
	}
}

// turn looks at the flows whose turn it is, and appends those whose peer is gone.
func (r *round) turn(now int64, timeout time.Duration, gone []*Flow) []*Flow {
	turns := min((len(r.flows)+turnFlows-1)/turnFlows, maxTurns)
	if r.next >= len(r.flows) {
		r.next = 0
	}
	end := min(r.next+(len(r.flows)+turns-1)/turns, len(r.flows))
	next := keepalive.Never
	for ; r.next < end; r.next++ {
		f := r.flows[r.next]
		w := &f.watch
		received, sent, full := f.path.Progress()
		act := w.state.Advance(now, full || received != w.received, sent != w.sent)
		w.received, w.sent = received, sent
		next = min(next, w.state.Next())
		switch act {
		case keepalive.Send:
			f.keepAlive()
		case keepalive.Down:
			gone = append(gone, f)
		}
	}
	if turns > 1 { // each has one in the time in which activity is to be noticed
		next = now + max(int64(timeout)/keepalive.Grain, int64(keepalive.MinTick))/int64(turns)
	}
	r.at = next
	return gone
}
