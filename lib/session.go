package o7s

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/frcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/keepalive"
	"github.com/o7s/o7s-router/lib/ring"
)

// session is one connection to a daemon and what came over it.
type session struct {
	ipc *ipc.Client

	mu    sync.Mutex // guards what follows
	flows map[uint32]*Flow
	fds   []*Flow // by descriptor, less firstFD
	tap   *tap    // this process's device on the fast path; nil: none yet
	left  bool    // no flow is added any more, the last one closes the tap
	alive alive

	spec   bool // Options.FRCPSpec
	tender tender
}

// firstFD is the lowest descriptor of a flow (spec 33 §1).
const firstFD = 64

func newSession(ctx context.Context, o Options) (*session, error) {
	s := &session{flows: map[uint32]*Flow{}, spec: o.FRCPSpec}
	s.alive.session = s
	c, err := ipc.Dialer{RunDir: o.RunDir, OnEvent: s.event, OnDown: s.down}.Dial(ctx)
	if err != nil {
		return nil, err
	}
	s.ipc = c
	if _, err := c.Call(ctx, ipc.OpHello, ipc.HelloArgs{Prog: o.Prog, Args: o.Args}, nil); err != nil {
		c.Close()
		return nil, fmt.Errorf("announce program %s: %w", o.Prog, err)
	}
	return s, nil
}

// open makes a Flow of a reply. It runs on the connection's reader, so events
// of the flow come after it. The descriptors are its own unless it fails.
func (s *session) open(r ipc.Reply, fds []int) (*Flow, error) {
	var info ipc.FlowResult
	if err := json.Unmarshal(r.Result, &info); err != nil {
		return nil, fmt.Errorf("reply of the resource manager: %w", err)
	}
	want := 3
	if info.App != nil && info.App.NewFD {
		want = 4
	}
	if len(fds) != want {
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
	unix.Close(fds[0]) // mapped
	f := newFlow(s, info, p)
	s.flows[f.id] = f
	f.fd = s.takeFD(f)
	s.alive.add(f)
	return f, nil
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
	if app != nil {
		if s.tap == nil && !app.NewFD {
			return nil, fmt.Errorf("reply of the resource manager: flow without its device")
		}
		if s.tap == nil {
			t, err := newTap(fds[3])
			if err != nil {
				return nil, err
			}
			s.tap = t
		}
	}
	// The ring takes its descriptors over in any case: give it copies, so that
	// an error leaves all to the caller.
	own := [3]int{fds[0]}
	for i := 1; i < 3; i++ {
		fd, err := unix.FcntlInt(uintptr(fds[i]), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			if i == 2 {
				unix.Close(own[1])
			}
			return nil, err
		}
		own[i] = fd
	}
	c := ring.Config{Offset: info.Ring.Offset, Size: info.Ring.Size, Side: info.Side, MaxMessage: info.MTU}
	if app != nil {
		c.Spin = -1 // the tap is where packets come from
	}
	end, err := ring.OpenFDs(own, c)
	if err != nil {
		return nil, fmt.Errorf("open flow: %w", err)
	}
	ipc.CloseFDs(fds[1:])
	if app == nil {
		return end, nil
	}
	return newTapPath(s.tap, end, app.Handle, app.Headroom), nil
}

// takeFD finds the lowest free descriptor. mu is held.
func (s *session) takeFD(f *Flow) int {
	for i, g := range s.fds {
		if g == nil {
			s.fds[i] = f
			return firstFD + i
		}
	}
	s.fds = append(s.fds, f)
	return firstFD + len(s.fds) - 1
}

// forget removes a flow that is being closed: nothing calls it any more.
func (s *session) forget(f *Flow) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.flows[f.id] == f {
		delete(s.flows, f.id)
		s.fds[f.fd-firstFD] = nil
	}
	s.alive.remove(f)
}

// event is called by the connection's reader.
func (s *session) event(e ipc.FlowEvent) {
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

// reap closes the device of a session that gets no flows any more once the
// last is closed.
func (s *session) reap() {
	s.mu.Lock()
	var t *tap
	if s.left && len(s.flows) == 0 {
		t, s.tap = s.tap, nil
	}
	s.mu.Unlock()
	if t != nil {
		t.close()
	}
}

// alive runs the keep-alives of all flows of a session on one timer. Its fields
// are guarded by session.mu.
type alive struct {
	session *session
	flows   map[*Flow]*watch
	timer   *time.Timer
}

// watch is a flow with a peer time-out.
type watch struct {
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
	w := &watch{state: keepalive.New(t, nanotime())}
	w.received, w.sent, _ = f.path.Progress()
	if a.flows == nil {
		a.flows = map[*Flow]*watch{}
		a.timer = time.AfterFunc(time.Hour, a.run)
	}
	a.flows[f] = w
	a.schedule(nanotime())
}

// remove stops watching f. session.mu is held.
func (a *alive) remove(f *Flow) {
	delete(a.flows, f)
	if len(a.flows) == 0 && a.timer != nil {
		a.timer.Stop()
	}
}

// schedule sets the timer. session.mu is held.
func (a *alive) schedule(now int64) {
	next := keepalive.Never
	for _, w := range a.flows {
		next = min(next, w.state.Next())
	}
	if next != keepalive.Never {
		a.timer.Reset(time.Duration(max(next-now, 0)))
	}
}

// run looks at all flows; the timer calls it. What it does with a flow happens
// under session.mu, which Flow.Close takes before it ends the path.
func (a *alive) run() {
	s := a.session
	var gone []*Flow
	s.mu.Lock()
	now := nanotime()
	for f, w := range a.flows {
		received, sent, full := f.path.Progress()
		act := w.state.Advance(now, full || received != w.received, sent != w.sent)
		w.received, w.sent = received, sent
		switch act {
		case keepalive.Send:
			f.keepAlive()
		case keepalive.Down:
			gone = append(gone, f)
		}
	}
	a.schedule(now)
	s.mu.Unlock()
	for _, f := range gone {
		f.event(EventPeer)
	}
}
