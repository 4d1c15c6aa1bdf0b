// Package unicast is the IPC process of a unicast layer (spec 20, 21, 40–43):
// it assembles the deterministic cores of control/ (handshake, enrolment,
// link-state routing, directory, flow allocator) with the fast path's tables.
//
//	N+1 flows  --  flow allocator (EID 0)   directory (EID 1)
//	                      \                   /
//	                       data transfer  <- forwarding table <- link state
//	                      /      |                                  |
//	N-1 flows        DT flows  (XDP)                           MGMT flows
//
// The control part runs in one goroutine (loop.go); packets pass in the
// goroutines of their senders and receivers (dt.go) or in the kernel.
package unicast

import (
	"context"
	crand "crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/control/dht"
	"github.com/o7s/o7s-router/control/enroll"
	"github.com/o7s/o7s-router/control/flowalloc"
	"github.com/o7s/o7s-router/control/linkstate"
	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/keepalive"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/wire"
)

// mpl is the maximum packet lifetime that flows of the layer get (spec 47 §2), ms.
const mpl = 100

// Layer is an IPC process of a unicast layer. It implements ipcp.Member and
// ipcp.Inspector; methods are safe for concurrent use.
type Layer struct {
	name  string
	host  ipcp.Host
	plane *fastpath.Plane
	log   *slog.Logger

	ctx    context.Context // ends with the layer
	cancel context.CancelFunc
	wg     sync.WaitGroup
	loop   *loop
	addr   atomic.Uint64
	born   time.Time // zero of the keep-alives' clock

	mu    sync.Mutex // guards state and cfg
	state ipcp.State
	cfg   ipcp.Config
	busy  bool // a bootstrap or enrolment is under way

	dt dataTransfer

	// Owned by the loop from start on.
	ls     *linkstate.Instance
	dir    *dht.Node
	fa     *flowalloc.Allocator
	conns  map[linkstate.FlowID]*conn
	nextID linkstate.FlowID
	reach  map[uint64]struct{} // destinations with a route
	// updates is how often members announce their adjacencies.
	updates time.Duration
	// changed is when routes last appeared or went.
	changed  time.Time
	wanted   map[intent]qos.Spec // adjacencies that the operator asked for
	retrying map[intent]bool
	queries  map[dht.QueryID]func(now time.Time, addrs []uint64)
	asked    bool                   // a query was made since the directory's last step
	allocs   map[uint64]*allocation // by own EID
}

var (
	_ ipcp.Member    = (*Layer)(nil)
	_ ipcp.Inspector = (*Layer)(nil)
	_ ipcp.Counter   = (*Layer)(nil)
	_ ipcp.DTCounter = (*Layer)(nil)
)

// New returns an IPC process that is not a member of a layer yet.
func New(name string, host ipcp.Host, plane *fastpath.Plane, log *slog.Logger) *Layer {
	ctx, cancel := context.WithCancel(context.Background())
	return &Layer{
		name: name, host: host, plane: plane, log: log.With("ipcp", name),
		ctx: ctx, cancel: cancel, state: ipcp.StateBoot, loop: newLoop(), born: time.Now(),
		conns:  make(map[linkstate.FlowID]*conn),
		wanted: make(map[intent]qos.Spec), retrying: make(map[intent]bool),
		queries: make(map[dht.QueryID]func(time.Time, []uint64)), allocs: make(map[uint64]*allocation),
	}
}

func (l *Layer) Type() ipcp.Type { return ipcp.Unicast }
func (l *Layer) Name() string    { return l.name }

func (l *Layer) State() ipcp.State {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state
}

func (l *Layer) LayerName() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cfg.LayerName
}

func (l *Layer) HashAlg() ipcp.HashAlg {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cfg.Hash
}

// Bootstrap makes this the first member of a layer.
func (l *Layer) Bootstrap(_ context.Context, cfg ipcp.Config) error {
	if err := l.claim(); err != nil {
		return err
	}
	defer l.unclaim()
	if err := enroll.Validate(cfg); err != nil {
		return err
	}
	cfg.Unicast.Peer = 0
	return l.start(cfg)
}

// claim reserves the transition from boot to operational.
func (l *Layer) claim() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state != ipcp.StateBoot || l.busy {
		return o7serr.Wrap(o7serr.EIPCPSTATE, "ipcp %q is %s, expected %s", l.name, l.state, ipcp.StateBoot)
	}
	l.busy = true
	return nil
}

func (l *Layer) unclaim() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.busy = false
}

// drawAddress returns a random 32-bit address other than 0 (flat address
// authority, spec 20 §2.2) and than the given ones.
func drawAddress(not ...uint64) uint64 {
	var b [4]byte
draw:
	for {
		crand.Read(b[:])
		a := uint64(binary.BigEndian.Uint32(b[:]))
		if a == 0 {
			continue
		}
		for _, n := range not {
			if a == n {
				continue draw
			}
		}
		return a
	}
}

// start initialises the components in the order of spec 41 §5.1 and begins to
// serve as a member of the layer.
func (l *Layer) start(cfg ipcp.Config) error {
	u := cfg.Unicast
	addr := drawAddress(u.Peer)
	table, err := l.plane.NewLayer(l.name, addr, int(u.AddrSize))
	if err != nil {
		return fmt.Errorf("forwarding table: %w", err)
	}
	l.addr.Store(addr)
	l.dt.l, l.dt.table, l.dt.asize, l.dt.hlen, l.dt.ttl = l, table, int(u.AddrSize), wire.DTLen(int(u.AddrSize)), u.MaxTTL
	l.dt.self.Store(addr)
	now := time.Now()
	if l.ls, err = l.newRouting(cfg, addr, now); err != nil {
		_ = table.Close()
		return fmt.Errorf("routing: %w", err)
	}
	if l.dir, err = l.newDirectory(cfg, addr, now); err != nil {
		_ = table.Close()
		return fmt.Errorf("directory: %w", err)
	}
	l.fa = l.newAllocator(cfg, addr)
	l.updates = time.Duration(u.TUpdate) * time.Second

	l.mu.Lock()
	if l.state != ipcp.StateBoot { // closed while it enrolled
		l.mu.Unlock()
		_ = table.Close()
		return o7serr.Wrap(o7serr.EIPCPSTATE, "ipcp %q was closed", l.name)
	}
	l.cfg = cfg
	// Joiners that we serve get our address as their first directory contact.
	l.cfg.Unicast.Peer = addr
	l.state = ipcp.StateOperational
	l.wg.Add(1)
	l.mu.Unlock()

	go func() {
		defer l.wg.Done()
		l.loop.run(l.ctx.Done(), l.step)
	}()
	l.log.Info("member of layer", "layer", cfg.LayerName, "address", addrText(addr), "routing", u.Routing.String())
	return nil
}

// step drains what the cores produced and returns the next deadline.
func (l *Layer) step(now time.Time) time.Time {
	if l.State() != ipcp.StateOperational {
		return time.Time{}
	}
	var next time.Time
	earliest := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	for _, c := range l.conns {
		l.settled(now, c)
		if c.comp == ipcp.DataTransfer && !c.up && !c.down {
			earliest(c.readyAt)
		}
		earliest(l.keepAlive(now, c))
	}
	earliest(l.stepRouting(now))
	// The allocator asks the directory again after a refusal: what comes of
	// that must not wait for the next event.
	dir, alloc := l.stepDirectory(now), l.stepAllocator(now)
	for l.asked {
		dir, alloc = l.stepDirectory(now), l.stepAllocator(now)
	}
	earliest(dir)
	earliest(alloc)
	return next
}

// mono is now as keepalive counts it: nanoseconds of the monotonic clock.
func (l *Layer) mono(now time.Time) int64 { return int64(now.Sub(l.born)) }

// keepAlive runs spec 30 §10 on an adjacency and returns its next deadline.
func (l *Layer) keepAlive(now time.Time, c *conn) time.Time {
	rx, tx := c.activity()
	heard, sent := rx != c.lastRxCnt, tx != c.lastTxCnt
	c.lastRxCnt, c.lastTxCnt = rx, tx
	if heard {
		c.lastRx = now
	}
	switch c.alive.Advance(l.mono(now), heard, sent) {
	case keepalive.Send:
		c.send(nil)
		c.lastTxCnt++ // the keep-alive itself is no news
	case keepalive.Down:
		// Posted, not called: the caller walks the table of adjacencies.
		l.loop.post(func(now time.Time) { l.lost(now, c, "peer timed out") })
	}
	look := l.doubts(now, c, heard, tx)
	next := c.alive.Next()
	if next == keepalive.Never {
		return look
	}
	if at := l.born.Add(time.Duration(next)); look.IsZero() || at.Before(look) {
		return at
	}
	return look
}

// Connect makes an adjacency for component c with the member that serves dst.
// It is kept: an adjacency that is lost is made again until Disconnect.
func (l *Layer) Connect(ctx context.Context, dst string, comp ipcp.Component, q qos.Spec) error {
	if l.State() != ipcp.StateOperational {
		return o7serr.Wrap(o7serr.EIPCPSTATE, "ipcp %q is not a member of a layer", l.name)
	}
	if comp != ipcp.DataTransfer && comp != ipcp.Management {
		return o7serr.Wrap(o7serr.EINVAL, "component %q (expected %s or %s)", comp, ipcp.Management, ipcp.DataTransfer)
	}
	if comp == ipcp.Management {
		q = qos.Raw // spec 40 §5
	}
	_, err := l.connect(ctx, dst, comp, q)
	// A conflict of addresses is settled by the redraw; the second try has the new one.
	if errors.Is(err, o7serr.EAGAIN) {
		_, err = l.connect(ctx, dst, comp, q)
	}
	if err != nil {
		return err
	}
	key := intent{dst, comp}
	l.loop.call(func(time.Time) {
		l.wanted[key] = q
		l.keep(key) // if it was lost since
	})
	return nil
}

// Disconnect releases the adjacency that Connect made.
func (l *Layer) Disconnect(_ context.Context, dst string, comp ipcp.Component) error {
	found := false
	l.loop.call(func(now time.Time) {
		key := intent{dst, comp}
		_, found = l.wanted[key]
		delete(l.wanted, key)
		for _, c := range l.conns {
			if c.dst == dst && c.comp == comp {
				found = true
				l.remove(now, c)
			}
		}
	})
	if !found {
		return o7serr.Wrap(o7serr.ENOTALLOC, "ipcp %q has no %s connection to %q", l.name, comp, dst)
	}
	return nil
}

// conflict draws a new address (spec 50 §6): adjacencies are dropped, those we
// made are made again, and the directory publishes our names anew.
func (l *Layer) conflict(now time.Time, seen string) {
	old := l.addr.Load()
	addr := drawAddress(old)
	l.log.Warn("our address is used by another member too; drawing a new one", "seen_in", seen, "old", addrText(old), "new", addrText(addr))
	l.leave(now)
	l.mu.Lock()
	l.cfg.Unicast.Peer = addr
	cfg := l.cfg
	l.mu.Unlock()
	ls, err := l.newRouting(cfg, addr, now)
	if err != nil {
		l.log.Error("routing cannot start again", "err", err)
		return
	}
	l.ls = ls
	l.addr.Store(addr)
	l.dt.self.Store(addr)
	l.dt.table.SetAddress(addr)
	l.dt.table.Replace(nil)
	l.reach = nil
	l.dir.SetSelf(now, addr)
	l.fa.SetSelf(addr)
	for key := range l.wanted {
		l.keep(key)
	}
}

// leave says goodbye while there are routes and flows to say so on: the peers of
// our flows are told, our adjacencies withdrawn, and both released.
func (l *Layer) leave(now time.Time) {
	for _, e := range slices.Collect(l.fa.Flows()) {
		if f := flowOf(e); f != nil {
			f.kill()
		}
		l.fa.Close(now, e.EID())
	}
	for eid, a := range l.allocs { // their requests are gone, and no reply will come
		delete(l.allocs, eid)
		a.finish(nil, o7serr.Wrap(o7serr.EAGAIN, "ipcp %q left its place in the layer while the flow was allocated", l.name))
	}
	packets, _ := l.fa.Drain()
	for _, p := range packets {
		if p.Dst != l.addr.Load() {
			l.dt.sendComponent(p.Dst, wire.FlowAllocatorEID, p.Payload)
		}
	}
	l.ls.Leave(now)
	l.ls.Tick(now)
	l.sendRouting()
	for _, c := range l.conns {
		l.remove(now, c)
	}
}

// Close leaves the layer.
func (l *Layer) Close() error {
	l.mu.Lock()
	was := l.state
	l.state = ipcp.StateShutdown
	l.mu.Unlock()
	if was == ipcp.StateShutdown {
		return nil
	}
	if was == ipcp.StateOperational {
		l.loop.call(func(now time.Time) {
			clear(l.wanted)
			l.leave(now)
		})
	}
	l.cancel()
	l.wg.Wait()
	if was == ipcp.StateOperational {
		return l.dt.table.Close()
	}
	return nil
}

func addrText(a uint64) string { return wire.AddrString(a) }
