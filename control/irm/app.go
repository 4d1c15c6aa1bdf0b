package irm

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/packet"
)

// AppOffloader is implemented by flows whose packets XDP can carry between the
// network and a program's own device.
type AppOffloader interface {
	// OffloadApp gives the flow to the program behind app. headroom is what the
	// program's frames have in front of the payload, bytes.
	OffloadApp(app *fastpath.App) (handle uint32, headroom int, err error)
}

// appUnloader is implemented by flows that keep account of their offload: their
// statistics include what XDP carried.
type appUnloader interface{ UnloadApp(handle uint32) }

// appFlow is a flow in the hands of a program's device.
type appFlow struct {
	port   *appPort
	handle uint32
}

// appPort is the device of one process.
type appPort struct {
	app  *fastpath.App
	sent bool // the process has the descriptor; guarded by session.appMu

	mu    sync.Mutex // guards flows
	flows map[uint32]*flow
}

// fd is the number of the device's descriptor, which stays ours. It must stay
// in non-blocking mode, which File.Fd would end.
func (a *appPort) fd() (fd int) {
	fd = -1
	if rc, err := a.app.File().SyscallConn(); err == nil {
		_ = rc.Control(func(n uintptr) { fd = int(n) })
	}
	return fd
}

// punt takes what the process sent towards a next hop of user space.
func (a *appPort) punt(handle uint32, payload *packet.Buf) {
	a.mu.Lock()
	f := a.flows[handle]
	a.mu.Unlock()
	if f == nil {
		payload.Release()
		return
	}
	_ = f.lower.Send(payload) // the layer counts what it cannot send
}

// appPool keeps devices in store: making one takes the kernel tens of
// milliseconds, which no allocation has to wait for.
type appPool struct {
	plane *fastpath.Plane
	log   *slog.Logger
	wg    sync.WaitGroup

	mu      sync.Mutex // guards what follows
	spare   []*fastpath.App
	out     int // devices of processes
	making  bool
	changed chan struct{} // closed and replaced when a device is there, or none can be made
	later   *time.Timer   // starts a refill
	closed  bool
	failed  error     // why the last device could not be made
	retry   time.Time // until then none is tried
}

const (
	// appSpares is how many devices are in store: a client and a server that
	// start together.
	appSpares = 2
	// appWait is how long an allocation waits for a device in the making.
	appWait = 30 * time.Millisecond
	// appRetry is how long no device is tried after one could not be made: there
	// may be too many, and processes leave.
	appRetry = time.Second
	// appPause is how long the store waits before it replaces a device: making
	// one keeps the fast path busy, which the flow that took the last one is
	// about to use.
	appPause = 100 * time.Millisecond
	// maxApps leaves a dozen of the fast path's 63 ports to the network; the
	// flows of further processes use rings.
	maxApps = 48
)

var errApps = fmt.Errorf("%d processes have a device on the fast path already", maxApps)

// newAppPool returns nil when there is no kernel data path.
func newAppPool(plane *fastpath.Plane, log *slog.Logger) *appPool {
	if plane == nil {
		return nil
	}
	if ok, _ := plane.Kernel(); !ok {
		return nil
	}
	p := &appPool{plane: plane, log: log, changed: make(chan struct{})}
	p.later = time.AfterFunc(time.Hour, p.refill)
	p.later.Stop()
	return p
}

// refill makes devices until the store is full. It does not wait.
func (p *appPool) refill() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.making || p.closed || time.Now().Before(p.retry) || len(p.spare) >= appSpares || p.out+len(p.spare) >= maxApps {
		return
	}
	p.making = true
	p.wg.Go(p.fill)
}

func (p *appPool) fill() {
	for more := true; more; {
		app, err := p.plane.NewApp("spare")
		p.mu.Lock()
		switch {
		case err != nil:
			if p.failed == nil {
				p.log.Warn("programs get no device on the fast path", "reason", err)
			}
			p.failed, p.retry = err, time.Now().Add(appRetry)
		case p.closed:
			defer app.Close()
		default:
			p.spare, p.failed = append(p.spare, app), nil
		}
		more = err == nil && !p.closed && len(p.spare) < appSpares && p.out+len(p.spare) < maxApps
		p.making = more
		close(p.changed)
		p.changed = make(chan struct{})
		p.mu.Unlock()
	}
}

// take returns a device, or the reason why there is none.
func (p *appPool) take() (*fastpath.App, error) {
	if p == nil {
		return nil, errors.New("no kernel data path")
	}
	limit := time.NewTimer(appWait)
	defer limit.Stop()
	for {
		p.mu.Lock()
		var app *fastpath.App
		if n := len(p.spare); n > 0 {
			app, p.spare = p.spare[n-1], p.spare[:n-1]
			p.out++
			p.later.Reset(appPause)
		}
		err, changed := p.failed, p.changed
		switch {
		case p.closed:
			err = errShutdown
		case p.out >= maxApps:
			err = errApps
		}
		p.mu.Unlock()
		if app != nil {
			return app, nil
		}
		if err != nil {
			p.refill() // it may work by now
			return nil, err
		}
		p.refill()
		select {
		case <-changed:
		case <-limit.C:
			return nil, errors.New("no device was ready when the flow was allocated")
		}
	}
}

// put removes the device of a process that left.
func (p *appPool) put(app *fastpath.App) {
	_ = app.Close()
	p.mu.Lock()
	p.out--
	p.mu.Unlock()
}

// close waits for a device in the making and removes the spare ones.
func (p *appPool) close() {
	if p == nil {
		return
	}
	p.mu.Lock()
	p.closed = true
	p.later.Stop()
	spare := p.spare
	p.spare = nil
	p.mu.Unlock()
	p.wg.Wait()
	for _, app := range spare {
		_ = app.Close()
	}
}

// device returns the device of the process, which it gets with its first flow
// that XDP can carry.
func (s *session) device() (*appPort, error) {
	s.appMu.Lock()
	defer s.appMu.Unlock()
	if s.app != nil {
		return s.app, nil
	}
	app, err := s.m.apps.take()
	if err != nil {
		return nil, err
	}
	s.app = &appPort{app: app, flows: map[uint32]*flow{}}
	app.OnPunt(s.app.punt)
	return s.app, nil
}

func (s *session) closeApp() {
	s.appMu.Lock()
	a := s.app
	s.appMu.Unlock()
	if a != nil {
		s.m.apps.put(a.app)
	}
}

// offload moves f to the process's device if that can be. Otherwise it stays
// with the rings, and f.why says why.
func (s *session) offload(f *flow, g *grant) {
	o, ok := f.lower.(AppOffloader)
	if !ok {
		f.why = "the other end is in the daemon"
		return
	}
	port, err := s.device()
	if err != nil {
		f.why = err.Error()
		return
	}
	handle, room, err := o.OffloadApp(port.app)
	if err != nil {
		f.why = err.Error()
		return
	}
	f.app = &appFlow{port, handle}
	if most := fastpath.MaxAppFrame - room; g.result.MTU > most {
		s.unload(f)
		f.app = nil
		f.why = fmt.Sprintf("MTU %d is too large for a device of a program (at most %d)", g.result.MTU, most)
		return
	}
	port.mu.Lock()
	port.flows[handle] = f
	port.mu.Unlock()
	g.result.App = &ipc.AppPort{Device: "tap", Handle: handle, Headroom: room}
	// Until a reply with the descriptor is known to have gone, each has it.
	s.appMu.Lock()
	g.result.App.NewFD = !port.sent
	s.appMu.Unlock()
	if g.result.App.NewFD {
		g.fds = append(g.fds, port.fd())
		g.port = port
	}
}

// unload takes f from the process's device.
func (s *session) unload(f *flow) {
	a := f.app
	if a == nil {
		return
	}
	a.port.mu.Lock()
	delete(a.port.flows, a.handle)
	a.port.mu.Unlock()
	if u, ok := f.lower.(appUnloader); ok {
		u.UnloadApp(a.handle)
	} else {
		a.port.app.Remove(a.handle)
	}
}

// owner is the process behind a port of the fast path.
type owner struct {
	pid  int32
	prog string
}

func (m *IRM) appOwners() map[uint32]owner {
	m.mu.Lock()
	owners := make(map[*session]owner, len(m.sessions))
	for _, s := range m.sessions {
		owners[s] = owner{s.pid, s.prog}
	}
	m.mu.Unlock()
	out := map[uint32]owner{}
	for s, o := range owners {
		s.appMu.Lock()
		if s.app != nil {
			out[s.app.app.Slot()] = o
		}
		s.appMu.Unlock()
	}
	return out
}
