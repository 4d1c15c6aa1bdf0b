// Package irm is the resource manager: it knows names, who serves them and
// which layers there are, and makes flows between programs, between programs
// and IPC processes, and between IPC processes of this machine and others
// (spec 45). Its state is package registry, which is deterministic; this
// package is the shell of goroutines, sockets and programs around it.
package irm

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/control/irm/registry"
	"github.com/o7s/o7s-router/control/oap"
	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/ipcp"
)

// Factory makes an IPC process called name that waits for its bootstrap or
// enrolment.
type Factory func(name string, host ipcp.Host, log *slog.Logger) (ipcp.Layer, error)

// Config is what a resource manager is made of.
type Config struct {
	// RunDir is the directory of the instance; started programs get it as
	// O7S_RUN_DIR.
	RunDir string
	// Groups may manage the node, as root may.
	Groups []uint32
	// Factories has the types of layers that are available.
	Factories map[ipcp.Type]Factory
	// Plane is the fast path: `show` asks it, and programs get a device of their
	// own on it. Nil without.
	Plane *fastpath.Plane
	// NoDirect makes flows between local programs use the local layer.
	NoDirect bool
	// AllocTimeout limits allocations that name no time-out; 0 means the
	// reference's 20 s.
	AllocTimeout time.Duration
	// MaxSessions is how many connections a user may have who does not manage
	// the node; 0 means 1024.
	MaxSessions int
	// Version is what OpHello tells.
	Version string
	// Output is where started programs write; nil discards it.
	Output *os.File
	Log    *slog.Logger
}

// IRM is a resource manager. Make one with New; all methods are safe for
// concurrent use.
type IRM struct {
	cfg    Config
	log    *slog.Logger
	quiet  *slog.Logger // for checks that are repeated
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // what Close waits for
	stats  stats
	apps   *appPool // nil without a kernel data path
	// complained is when a program's misbehaviour was logged last, ns.
	complained atomic.Int64

	shareMu   sync.Mutex // guards lastShare, and what sessions share; after mu and originMu
	lastShare uint32

	oapMu  sync.Mutex // guards server
	server *oap.Server

	originMu sync.Mutex // guards origins
	// origins are the allocations of processes over local layers that wait for
	// their answer, by the id of their OAP request: when the acceptor is a
	// process of this machine, too, both get one slot of rings.
	origins map[oapID]*origin

	mu        sync.Mutex // guards what follows
	reg       *registry.Registry
	ipcps     map[string]*process
	lastIPCP  int32
	sessions  map[uint64]*session
	flows     map[uint32]*flow
	accepts   map[uint64]*pendingAccept
	tickets   map[uint64]chan registry.Answer
	children  map[*child]struct{}
	announced chan struct{} // closed and replaced when a process announces itself
	serial    uint64        // last key of a session or an accept
	arriving  int           // requests from layers that wait
	timer     *time.Timer   // of the registry's deadline
	closed    bool
}

type oapID [16]byte

// stats are counters for `show` and metrics.
type stats struct {
	allocOK, allocFailed   atomic.Uint64
	acceptOK, acceptFailed atomic.Uint64
	refused                atomic.Uint64 // requests from layers that nobody took
	oapFailed              atomic.Uint64
	started                atomic.Uint64 // programs
	malformed              atomic.Uint64 // requests on the socket
	denied                 atomic.Uint64
	ringDrops              atomic.Uint64 // packets dropped because a program's ring was full
	allocErrors            sync.Map      // int32 code -> *counter
	latency                histogram
}

// New returns a resource manager without names and layers. Serve lets programs in.
func New(cfg Config) *IRM {
	if cfg.AllocTimeout == 0 {
		cfg.AllocTimeout = allocTimeout
	}
	if cfg.MaxSessions == 0 {
		cfg.MaxSessions = maxSessions
	}
	ctx, cancel := context.WithCancel(context.Background())
	m := &IRM{
		cfg: cfg, log: cfg.Log, quiet: slog.New(slog.DiscardHandler), ctx: ctx, cancel: cancel,
		server: oap.NewServer(), origins: map[oapID]*origin{},
		reg: registry.New(), ipcps: map[string]*process{}, sessions: map[uint64]*session{},
		flows: map[uint32]*flow{}, accepts: map[uint64]*pendingAccept{},
		tickets: map[uint64]chan registry.Answer{}, children: map[*child]struct{}{},
		announced: make(chan struct{}), apps: newAppPool(cfg.Plane, cfg.Log),
	}
	m.timer = time.AfterFunc(time.Hour, m.expire)
	m.timer.Stop()
	return m
}

// Close ends everything: programs lose their connection and flows, layers are
// left, started programs get SIGTERM. It returns when all goroutines ended.
func (m *IRM) Close() error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	m.timer.Stop()
	m.mu.Unlock()
	m.cancel()

	m.mu.Lock()
	var sessions []*session
	for _, s := range m.sessions {
		sessions = append(sessions, s)
	}
	m.mu.Unlock()
	for _, s := range sessions {
		s.kill()
	}
	var errs []error
	// Layers above first, which are the younger ones: they release their flows
	// over those below.
	list := m.processes()
	slices.SortFunc(list, func(a, b *process) int { return cmp.Compare(b.id, a.id) })
	for _, p := range list {
		if _, ok := m.layerOf(p).(ipcp.Member); ok {
			errs = append(errs, m.DestroyIPCP(p.name))
		}
	}
	for _, p := range list {
		if _, ok := m.layerOf(p).(ipcp.Member); !ok {
			errs = append(errs, m.DestroyIPCP(p.name))
		}
	}
	m.stopChildren()
	m.wg.Wait()
	m.apps.close()
	return errors.Join(errs...)
}

// key returns a number that was not used before. It needs mu.
func (m *IRM) key() uint64 {
	m.serial++
	return m.serial
}

// unlock carries out what the registry wants and releases mu.
func (m *IRM) unlock() {
	for {
		answers := m.reg.Take()
		if len(answers) == 0 {
			break
		}
		for _, a := range answers {
			if a.Verdict == registry.Start {
				m.startProgram(a.Exec)
				continue
			}
			if ch, ok := m.tickets[a.Ticket]; ok {
				delete(m.tickets, a.Ticket)
				ch <- a // has room for the one answer
			}
		}
	}
	if at, ok := m.reg.Deadline(); ok && !m.closed {
		m.timer.Reset(time.Until(at))
	} else {
		m.timer.Stop()
	}
	m.mu.Unlock()
}

func (m *IRM) expire() {
	m.mu.Lock()
	m.reg.Expire(time.Now())
	m.unlock()
}

// seek returns who takes a flow to a name; ENAME when nobody does.
func (m *IRM) seek(ctx context.Context, q registry.Request) (registry.Acceptor, error) {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return registry.Acceptor{}, errShutdown
	}
	ans, err := m.reg.Seek(time.Now(), q)
	var ch chan registry.Answer
	if ans.Verdict == registry.Waiting {
		ch = make(chan registry.Answer, 1)
		m.tickets[ans.Ticket] = ch
	}
	m.unlock()
	switch {
	case err != nil:
		return registry.Acceptor{}, err
	case ans.Verdict == registry.Found:
		return ans.Acceptor, nil
	case ans.Verdict == registry.Nobody:
		return registry.Acceptor{}, errNobody
	}
	select {
	case ans = <-ch:
	case <-ctx.Done():
		m.mu.Lock()
		m.reg.Abandon(ans.Ticket)
		delete(m.tickets, ans.Ticket)
		m.unlock()
		select {
		case late := <-ch:
			if late.Verdict == registry.Found {
				m.giveBack(late.Acceptor)
			}
		default:
		}
		return registry.Acceptor{}, context.Cause(ctx)
	}
	if ans.Verdict != registry.Found {
		return registry.Acceptor{}, errNobody
	}
	return ans.Acceptor, nil
}
