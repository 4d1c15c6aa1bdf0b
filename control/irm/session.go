package irm

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/ring"
)

// maxPending bounds the requests of one connection that wait for an answer: as
// many as a process may have flows, which it may release all at once.
const maxPending = maxFlows

const (
	// maxFlows is how many flows one process may have: what it can share with
	// another, four times the reference's (spec 47 §4.2, PROG_MAX_FLOWS).
	maxFlows = ring.SlabSlots
	// maxSessions is the default of Config.MaxSessions: far more than programs
	// need, and too few to exhaust the daemon.
	maxSessions = 1024
	// maxEvents is how many events wait for a process that does not read.
	maxEvents = 4 * maxFlows
	// complainEvery is how often misbehaving programs are worth a warning.
	complainEvery = time.Second
)

// session is the connection of one process.
type session struct {
	m      *IRM
	key    uint64
	conn   *ipc.Conn
	pid    int32
	uid    uint32
	admin  bool
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // requests and senders of this session

	flows map[uint32]*flow // guarded by IRM.mu
	gone  bool             // no flow is added any more; guarded by IRM.mu
	prog  string           // guarded by IRM.mu

	mu      sync.Mutex // guards what follows
	pending map[uint64]context.CancelCauseFunc
	events  []ipc.FlowEvent // that wait because the process does not read
	sending bool            // a goroutine sends events
	ended   bool            // no events any more

	// Rings of its flows; guarded by IRM.shareMu.
	wait     int  // descriptor on which the process waits; -1: none
	waitSent bool // the process has it
	shares   []*shared
	own      *shared    // with the daemon; slab and hub are the daemon's side
	slab     *ring.Slab // set with own, and read by its flows
	hub      *ring.Hub
	unshared bool // nothing is shared any more

	appMu sync.Mutex // guards app
	app   *appPort   // nil until a flow can use it
}

var (
	errCancelled = fail(o7serr.EPIPE, "the request was cancelled")
	errLeft      = fail(o7serr.EPIPE, "the process left")
)

// Serve lets programs in until l is closed.
func (m *IRM) Serve(l *ipc.Listener) error {
	for {
		conn, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM):
			m.log.Error("cannot let a program in", "err", err)
			select {
			case <-time.After(100 * time.Millisecond): // others may leave
				continue
			case <-m.ctx.Done():
				return nil
			}
		case err != nil:
			return err
		}
		m.serve(conn)
	}
}

// serve runs a session for conn until the process leaves.
func (m *IRM) serve(conn *ipc.Conn) {
	peer := conn.Peer()
	s := &session{
		m: m, conn: conn, pid: peer.PID, uid: peer.UID,
		admin: peer.UID == 0 || peer.UID == uint32(os.Geteuid()) || slices.ContainsFunc(m.cfg.Groups, peer.InGroup),
		flows: map[uint32]*flow{}, pending: map[uint64]context.CancelCauseFunc{}, wait: -1,
	}
	s.ctx, s.cancel = context.WithCancel(m.ctx)
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		_ = conn.Close()
		return
	}
	if n := m.sessionsOf(s.uid); !s.admin && n >= m.cfg.MaxSessions {
		m.mu.Unlock()
		_ = conn.Close()
		m.complain("too many connections of one user", "uid", s.uid, "pid", s.pid, "limit", m.cfg.MaxSessions)
		return
	}
	s.key = m.key()
	m.sessions[s.key] = s
	m.wg.Add(1)
	m.mu.Unlock()
	go func() {
		defer m.wg.Done()
		stop := s.watch()
		s.read()
		s.end()
		stop()
	}()
}

// sessionsOf counts the connections of a user. It needs mu.
func (m *IRM) sessionsOf(uid uint32) (n int) {
	for _, s := range m.sessions {
		if s.uid == uid {
			n++
		}
	}
	return n
}

// complain warns about a program, but does not let programs fill the log.
func (m *IRM) complain(msg string, args ...any) {
	now := time.Now().UnixNano()
	last := m.complained.Load()
	if now-last < int64(complainEvery) || !m.complained.CompareAndSwap(last, now) {
		m.log.Debug(msg, args...)
		return
	}
	m.log.Warn(msg, args...)
}

// kill ends the connection; the session's goroutine cleans up.
func (s *session) kill() { _ = s.conn.Close() }

// watch ends the connection when the process dies, even when another process
// inherited the socket.
func (s *session) watch() (stop func()) {
	fd, err := s.conn.PIDFD()
	if err != nil {
		return func() {} // the connection's end must do
	}
	_ = unix.SetNonblock(fd, true) // so that the runtime polls it
	f := os.NewFile(uintptr(fd), "pidfd")
	rc, err := f.SyscallConn()
	if err != nil {
		_ = f.Close()
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := rc.Read(func(fd uintptr) bool {
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(p, 0)
			return err == nil && n > 0
		})
		if err == nil {
			s.kill()
		}
	}()
	return func() {
		_ = f.Close()
		<-done
	}
}

// read takes requests until the connection ends.
func (s *session) read() {
	for {
		r, err := s.conn.RecvRequest()
		if errors.Is(err, ipc.ErrMalformed) {
			s.m.stats.malformed.Add(1)
			s.m.complain("malformed request", "pid", s.pid, "err", err)
			if s.conn.Reply(r.ID, nil, fail(o7serr.EINVAL, "%v", err)) != nil {
				return
			}
			continue
		}
		if err != nil {
			return
		}
		switch r.Op {
		case ipc.OpHello: // in order: what follows counts on it
			res, err := s.hello(r)
			s.reply(r, res, err)
			continue
		case ipc.OpCancel:
			s.reply(r, struct{}{}, s.cancelRequest(r))
			continue
		}
		ctx, cancel := context.WithCancelCause(s.ctx)
		s.mu.Lock()
		_, twice := s.pending[r.ID]
		full := len(s.pending) >= maxPending
		if !twice && !full {
			s.pending[r.ID] = cancel
		}
		s.mu.Unlock()
		if twice || full {
			cancel(nil)
			err := fail(o7serr.EINVAL, "request id %d is in use", r.ID)
			if full {
				err = fail(o7serr.EAGAIN, "%d requests wait already", maxPending)
			}
			s.reply(r, nil, err)
			continue
		}
		s.wg.Go(func() {
			s.handle(ctx, r)
			s.mu.Lock()
			delete(s.pending, r.ID)
			s.mu.Unlock()
			cancel(nil)
		})
	}
}

// end removes what the process leaves behind.
func (s *session) end() {
	m := s.m
	_ = s.conn.Close()
	m.mu.Lock()
	s.gone = true
	m.mu.Unlock()
	s.mu.Lock()
	s.ended = true
	for _, cancel := range s.pending {
		cancel(errLeft)
	}
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()

	m.mu.Lock()
	var flows []*flow
	for _, f := range s.flows {
		flows = append(flows, f)
	}
	m.reg.Leave(s.key)
	delete(m.sessions, s.key)
	prog := s.prog
	m.unlock()
	for _, f := range flows {
		f.close(f.quarantine())
	}
	s.unshare()
	s.closeApp()
	if prog != "" {
		m.log.Debug("process left", "pid", s.pid, "prog", prog, "flows", len(flows))
	}
}

func (s *session) reply(r ipc.Request, result any, err error, fds ...int) bool {
	if err != nil {
		result = nil
	}
	if err := s.conn.Reply(r.ID, result, err, fds...); err != nil {
		s.kill()
		return false
	}
	return true
}

// event tells the process about one of its flows. It does not block: events
// that the socket does not take wait for a goroutine.
func (s *session) event(e ipc.FlowEvent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	if !s.sending {
		err := s.conn.Event(e)
		if !errors.Is(err, o7serr.EAGAIN) {
			return // sent, or the process is gone
		}
		s.sending = true
		s.wg.Go(s.sendEvents)
	}
	if len(s.events) >= maxEvents {
		s.m.complain("program does not read its events", "pid", s.pid)
		s.kill()
		return
	}
	s.events = append(s.events, e)
}

func (s *session) sendEvents() {
	for {
		s.mu.Lock()
		list := s.events
		s.events = nil
		if len(list) == 0 {
			s.sending = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		for _, e := range list {
			if s.conn.Send(&ipc.Reply{Event: &e}) != nil {
				return // the connection ended; sending stays set
			}
		}
	}
}

func decode[T any](r ipc.Request) (T, error) {
	var v T
	if len(r.Args) == 0 {
		return v, nil
	}
	if err := json.Unmarshal(r.Args, &v); err != nil {
		return v, fail(o7serr.EINVAL, "arguments of %s: %v", r.Op, err)
	}
	return v, nil
}

func (s *session) hello(r ipc.Request) (any, error) {
	a, err := decode[ipc.HelloArgs](r)
	if err != nil {
		return nil, err
	}
	m := s.m
	peer := s.conn.Peer()
	m.mu.Lock()
	err = m.reg.Announce(s.key, s.pid, peer.UID, peer.GID, a.Prog, a.Args)
	if err == nil {
		s.prog = a.Prog
		close(m.announced)
		m.announced = make(chan struct{})
	}
	m.unlock()
	if err != nil {
		return nil, err
	}
	m.log.Debug("process announced itself", "pid", s.pid, "prog", a.Prog)
	return ipc.HelloResult{Version: m.cfg.Version, PID: s.pid}, nil
}

func (s *session) cancelRequest(r ipc.Request) error {
	a, err := decode[ipc.CancelArgs](r)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if cancel, ok := s.pending[a.ID]; ok {
		cancel(errCancelled)
	}
	return nil // an answer on its way is as good
}

// handle answers r.
func (s *session) handle(ctx context.Context, r ipc.Request) {
	switch r.Op {
	case ipc.OpAlloc:
		a, err := decode[ipc.AllocArgs](r)
		var g *grant
		if err == nil {
			g, err = s.m.alloc(ctx, s, a)
		}
		s.grant(r, g, err)
	case ipc.OpAccept:
		a, err := decode[ipc.AcceptArgs](r)
		var g *grant
		if err == nil {
			g, err = s.m.accept(ctx, s, a)
		}
		s.grant(r, g, err)
	default:
		res, err := s.answer(ctx, r)
		s.reply(r, res, err)
	}
}

// grant sends a flow to the process, and lets it live.
func (s *session) grant(r ipc.Request, g *grant, err error) {
	if err != nil {
		s.reply(r, nil, err)
		return
	}
	if s.reply(r, g.result, nil, g.fds...) {
		g.sent()
	} else {
		g.lost()
	}
}

// manage wraps an operation that needs rights.
func manage[T any](s *session, r ipc.Request, f func(T) error) (any, error) {
	if !s.admin {
		s.m.stats.denied.Add(1)
		s.m.complain("management operation refused", "op", string(r.Op), "pid", s.pid, "uid", s.uid)
		return nil, fail(o7serr.EPERM, "%s: not permitted, expected root or a member of the management group", r.Op)
	}
	a, err := decode[T](r)
	if err != nil {
		return nil, err
	}
	return struct{}{}, f(a)
}

// answer serves every request that has no descriptors in its reply.
func (s *session) answer(ctx context.Context, r ipc.Request) (any, error) {
	m := s.m
	switch r.Op {
	case ipc.OpDealloc:
		a, err := decode[ipc.DeallocArgs](r)
		if err != nil {
			return nil, err
		}
		return struct{}{}, s.dealloc(a.Flow, a.LingerMS)
	case ipc.OpJoin:
		a, err := decode[ipc.JoinArgs](r)
		if err != nil {
			return nil, err
		}
		return nil, fail(o7serr.ENAME, "there is no broadcast layer %q: broadcast layers are not available yet", a.Layer)
	case ipc.OpList:
		a, err := decode[ipc.ListArgs](r)
		if err != nil {
			return nil, err
		}
		return m.List(a)
	case ipc.OpShow:
		a, err := decode[ipc.ShowArgs](r)
		if err != nil {
			return nil, err
		}
		return m.Show(a.What)
	case ipc.OpIPCPCreate:
		return manage(s, r, func(a ipc.IPCPArgs) error { return m.CreateIPCP(a.Name, a.Type) })
	case ipc.OpIPCPDestroy:
		return manage(s, r, func(a ipc.IPCPArgs) error { return m.DestroyIPCP(a.Name) })
	case ipc.OpIPCPBootstrap:
		return manage(s, r, func(a ipc.BootstrapArgs) error { return m.Bootstrap(ctx, a) })
	case ipc.OpIPCPEnroll:
		return manage(s, r, func(a ipc.EnrollArgs) error { return m.Enroll(ctx, a) })
	case ipc.OpIPCPConnect:
		return manage(s, r, func(a ipc.ConnectArgs) error { return m.Connect(ctx, a) })
	case ipc.OpIPCPDisconnect:
		return manage(s, r, func(a ipc.ConnectArgs) error { return m.Disconnect(ctx, a) })
	case ipc.OpNameCreate:
		return manage(s, r, m.CreateName)
	case ipc.OpNameDestroy:
		return manage(s, r, func(a ipc.NameArgs) error { return m.DestroyName(a.Name) })
	case ipc.OpNameRegister:
		return manage(s, r, m.Register)
	case ipc.OpNameUnregister:
		return manage(s, r, m.Unregister)
	case ipc.OpBind:
		return manage(s, r, func(a ipc.BindArgs) error { return m.Bind(ctx, a) })
	case ipc.OpUnbind:
		return manage(s, r, m.Unbind)
	}
	s.m.stats.malformed.Add(1)
	return nil, fail(o7serr.ENOTSUP, "unknown operation %q", r.Op)
}

func (s *session) dealloc(id uint32, lingerMS int64) error {
	if lingerMS < 0 {
		return fail(o7serr.EINVAL, "linger of %d ms is negative", lingerMS)
	}
	s.m.mu.Lock()
	f := s.flows[id]
	s.m.mu.Unlock()
	if f == nil {
		return fail(o7serr.ENOTALLOC, "flow %d is not allocated by process %d", id, s.pid)
	}
	f.close(time.Duration(min(lingerMS, maxTimeoutMS)) * time.Millisecond)
	return nil
}
