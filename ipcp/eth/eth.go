// Package eth is the IPC process of an Ethernet layer (spec 10). One process
// serves one interface; everybody on the broadcast domain with the same
// variant, EtherType and directory hash is a member.
//
// The protocol is in package core. This package is the shell: it owns the
// clock, the device and the flows, and demultiplexes frames to them.
//
//	          core (names, allocation)      Flow ... Flow
//	             |  management (EID 0)        |       |
//	device -- demultiplexer, an array of flows by EID
package eth

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/eth/core"
	"github.com/o7s/o7s-router/ipcp/eth/journal"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/wire"
)

const (
	// mpl is the maximum packet lifetime that flows announce, ms (spec 10 §1).
	mpl = 100
	// loopbackMTU caps the MTU of interfaces whose name begins with "lo".
	loopbackMTU = 9000
	// ifNameSize bounds interface names, the terminating zero included.
	ifNameSize = 16
	// Valid EtherTypes (spec 10 §1).
	minEtherType, maxEtherType = 0x0600, 0xfffe
)

// IPCP is a member of an Ethernet layer.
type IPCP struct {
	name string
	host ipcp.Host
	open Opener
	log  *slog.Logger

	// Set by Bootstrap before the device delivers frames, constant afterwards.
	dev      Device
	block    Block
	framer   core.Framer
	mac      core.MAC
	loopback bool   // the interface returns what we send to our own address
	unwatch  func() // ends the reports of the interface's state
	maxSDU   int
	cfg      ipcp.Config

	notes   string // directory of the journal; "": there is none
	journal *journal.Journal

	flows []atomic.Pointer[Flow] // by endpoint, for the demultiplexer
	down  atomic.Bool
	stray atomic.Int64 // when a stray frame was looked at last, ns since 1970
	n     counters

	mu       sync.Mutex // guards what follows; never held during upcalls and sends
	state    ipcp.State
	starting bool
	core     *core.Core
	allocs   map[core.ID]*alloc
	incoming map[core.ID]*incoming
	waiters  map[string][]chan error // queries by hash
	timer    *time.Timer
}

// counters count frames. Those of received frames are disjoint and add up.
type counters struct {
	rxMgmt, rxData, rxBytes                         atomic.Uint64
	txMgmt, txData, txBytes, txFailed               atomic.Uint64
	malformed, otherProtocol, misaddressed, unknown atomic.Uint64
	sendDown, sendTooLong, looped, broadcastData    atomic.Uint64
}

var (
	_ ipcp.Layer     = (*IPCP)(nil)
	_ ipcp.Inspector = (*IPCP)(nil)
	_ ipcp.Counter   = (*IPCP)(nil)
)

// NewDIX returns an eth-dix IPC process that opens its device with open.
func NewDIX(name string, host ipcp.Host, open Opener, log *slog.Logger) *IPCP {
	return &IPCP{
		name: name, host: host, open: open, log: log.With("ipcp", name),
		state:    ipcp.StateBoot,
		allocs:   map[core.ID]*alloc{},
		incoming: map[core.ID]*incoming{},
		waiters:  map[string][]chan error{},
	}
}

// Type returns ipcp.EthDIX.
func (l *IPCP) Type() ipcp.Type { return ipcp.EthDIX }

// Name is the name of the IPC process.
func (l *IPCP) Name() string { return l.name }

// LayerName is the name of the layer, "" before Bootstrap. It never appears on
// the wire.
func (l *IPCP) LayerName() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cfg.LayerName
}

// State is where the IPC process is in its life.
func (l *IPCP) State() ipcp.State {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state
}

// HashAlg is the directory hash of the layer.
func (l *IPCP) HashAlg() ipcp.HashAlg {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cfg.Hash
}

// Bootstrap opens the device and makes this process a member.
func (l *IPCP) Bootstrap(_ context.Context, cfg ipcp.Config) error {
	hashLen, err := check(&cfg)
	if err != nil {
		return fmt.Errorf("bootstrap %s: %w", l.name, err)
	}
	l.mu.Lock()
	if l.state != ipcp.StateBoot || l.starting {
		l.mu.Unlock()
		return o7serr.Wrap(o7serr.EIPCPSTATE, "bootstrap %s: state is %s", l.name, l.state)
	}
	l.starting = true
	l.mu.Unlock()
	if err := l.start(cfg, hashLen); err != nil {
		l.mu.Lock()
		l.starting = false
		l.mu.Unlock()
		return fmt.Errorf("bootstrap %s on %s: %w", l.name, cfg.Eth.Device, err)
	}
	l.log.Info("bootstrapped over dix ethernet", "layer", cfg.LayerName, "device", cfg.Eth.Device,
		"ethertype", fmt.Sprintf("0x%04X", cfg.Eth.EtherType), "mac", macString(l.mac), "max_sdu", l.maxSDU)
	return nil
}

// check completes and verifies a configuration.
func check(cfg *ipcp.Config) (hashLen int, err error) {
	if cfg.Type != ipcp.EthDIX {
		return 0, o7serr.Wrap(o7serr.EIPCPTYPE, "configuration is for %s, expected eth-dix", cfg.Type)
	}
	if cfg.Eth.EtherType == 0 {
		cfg.Eth.EtherType = wire.DefaultEtherType
	}
	if t := cfg.Eth.EtherType; t < minEtherType || t > maxEtherType {
		return 0, o7serr.Wrap(o7serr.EINVAL, "ethertype 0x%04X, expected 0x%04X to 0x%04X", t, minEtherType, maxEtherType)
	}
	if d := cfg.Eth.Device; d == "" || len(d) >= ifNameSize {
		return 0, o7serr.Wrap(o7serr.EINVAL, "interface name %q, expected 1 to %d characters", d, ifNameSize-1)
	}
	if hashLen = wire.HashLen(uint8(cfg.Hash)); hashLen == 0 {
		return 0, o7serr.Wrap(o7serr.EINVAL, "directory hash %d is unknown, expected 0 to 3", cfg.Hash)
	}
	return hashLen, nil
}

func (l *IPCP) start(cfg ipcp.Config, hashLen int) error {
	dev, err := l.open(cfg.Eth.Device)
	if err != nil {
		return err
	}
	l.framer = core.DIX{EtherType: cfg.Eth.EtherType}
	mtu := min(dev.MTU(), l.framer.MaxMTU())
	if strings.HasPrefix(cfg.Eth.Device, "lo") {
		mtu = min(mtu, loopbackMTU)
	}
	l.dev, l.mac, l.maxSDU = dev, dev.MAC(), mtu-l.framer.Overhead()
	l.loopback = l.mac == core.MAC{}
	if l.maxSDU < l.framer.MgmtLen()+hashLen {
		_ = dev.Close()
		return o7serr.Wrap(o7serr.EINVAL, "mtu %d is too small for management messages", mtu)
	}
	_, last := l.framer.Endpoints()
	l.flows = make([]atomic.Pointer[Flow], int(last)+1)
	l.mu.Lock()
	l.cfg = cfg
	l.core = core.New(core.Config{Framer: l.framer, MAC: l.mac, MaxSDU: l.maxSDU, HashLen: hashLen})
	l.mu.Unlock()
	block, err := dev.Claim(cfg.Eth.EtherType, l.receive)
	if err != nil {
		_ = dev.Close()
		return err
	}
	former := l.openJournal()
	l.mu.Lock()
	l.core.Former(time.Now(), former)
	for _, e := range former {
		block.SetUser(e.Endpoint) // what still comes for it is answered
	}
	l.block, l.state = block, ipcp.StateOperational
	l.timer = time.AfterFunc(time.Hour, l.tick)
	l.timer.Stop()
	l.mu.Unlock()
	l.unwatch = dev.OnState(l.linkState)
	if len(former) > 0 {
		l.log.Info("peers of an earlier process are told that its flows are gone", "device", cfg.Eth.Device, "flows", len(former))
		l.tick()
	}
	return nil
}

// openJournal returns the flows that an earlier process left there. Without a
// journal the layer works as well: if this process is killed its peers notice
// later.
func (l *IPCP) openJournal() (former []core.Former) {
	if l.notes == "" || l.loopback {
		return nil
	}
	path := filepath.Join(l.notes, fmt.Sprintf("%s-%04x", l.cfg.Eth.Device, l.cfg.Eth.EtherType))
	j, left, err := journal.Open(path, l.mac, l.cfg.Eth.EtherType, len(l.flows))
	if err != nil {
		l.log.Warn("flows are not noted: when this process is killed peers learn of it late", "err", err)
		return nil
	}
	l.journal = j
	for _, e := range left {
		f := core.Former{Endpoint: e.Local, Peer: core.MAC(e.MAC), Remote: e.Remote}
		if !l.own(f.Peer) {
			former = append(former, f)
		}
	}
	return former
}

// do runs fn on the core and then does what the core wants done. It fails when
// the process is not a member.
func (l *IPCP) do(what string, fn func(now time.Time, c *core.Core)) error {
	l.mu.Lock()
	if l.state != ipcp.StateOperational {
		l.mu.Unlock()
		return o7serr.Wrap(o7serr.EIPCPSTATE, "%s: %s is in state %s", what, l.name, l.state)
	}
	now := time.Now()
	fn(now, l.core)
	w := l.settle(now)
	l.mu.Unlock()
	l.perform(w)
	return nil
}

func (l *IPCP) tick() {
	_ = l.do("timer", func(now time.Time, c *core.Core) { c.Tick(now) })
}

// work is what has to be done without the lock, frames first.
type work struct {
	frames [][]byte
	calls  []func()
}

func (w *work) then(f func()) { w.calls = append(w.calls, f) }

// settle takes events and frames from the core until it has none: frames for
// our own address go back to it at once. The caller holds mu.
func (l *IPCP) settle(now time.Time) *work {
	w := &work{}
	for {
		frames, events := l.core.Drain()
		if len(frames)+len(events) == 0 {
			break
		}
		for i := range events {
			l.event(&events[i], w)
		}
		for _, frame := range frames {
			if f, err := l.framer.Parse(frame); err == nil && l.own(f.Dst) {
				l.n.looped.Add(1)
				l.core.Receive(now, f.Src, f.Dst, frame[f.Offset:f.Offset+f.Bytes])
				continue
			}
			w.frames = append(w.frames, frame)
		}
	}
	if l.timer != nil {
		if next := l.core.NextDeadline(); next.IsZero() {
			l.timer.Stop()
		} else {
			l.timer.Reset(max(0, next.Sub(now)))
		}
	}
	return w
}

// own tells whether frames to mac never leave the machine.
func (l *IPCP) own(mac core.MAC) bool { return mac == l.mac && !l.loopback }

func (l *IPCP) perform(w *work) {
	for _, frame := range w.frames {
		l.n.txMgmt.Add(1)
		if err := l.dev.Send(packet.From(frame)); err != nil {
			l.n.txFailed.Add(1)
			l.log.Debug("management frame not sent", "error", err)
		}
	}
	for _, f := range w.calls {
		f()
	}
}

// event handles an event of the core. The caller holds mu.
func (l *IPCP) event(e *core.Event, w *work) {
	switch e.Kind {
	case core.NameFound:
		l.wake(e.Hash, nil)
	case core.NameUnknown:
		l.wake(e.Hash, o7serr.Wrap(o7serr.ENAME, "nobody in layer %s answers for hash %.4x", l.cfg.LayerName, e.Hash))
	case core.Opened:
		if a := l.allocs[e.ID]; a != nil {
			a.flow = l.newFlow(e.Endpoint, a.req.QoS)
		}
	case core.Vacated:
		if f := l.flows[e.Endpoint].Swap(nil); f != nil {
			// The peer may not know yet: what it sends is for us to see, then.
			if e.Remote == 0 {
				l.block.Clear(e.Endpoint)
			}
			l.journal.Strike(e.Endpoint)
			w.then(f.discard)
		}
	case core.Forgotten:
		if l.flows[e.Endpoint].Load() == nil {
			l.block.Clear(e.Endpoint)
		}
	case core.Established:
		if a := l.allocs[e.ID]; a != nil {
			a.flow.connect(e.Peer, e.Remote)
			l.finish(e.ID, a, e.Data, nil)
		}
	case core.Failed:
		if a := l.allocs[e.ID]; a != nil {
			l.finish(e.ID, a, nil, e.Err)
		}
	case core.Renew:
		if a := l.allocs[e.ID]; a != nil {
			select {
			case a.renew <- struct{}{}:
			default:
			}
		}
	case core.Arrived:
		in := &incoming{l: l, id: e.ID, qos: e.QoS, hash: e.Hash, data: e.Data, from: e.Peer}
		l.incoming[e.ID] = in
		w.then(func() { l.host.FlowArrived(l, in) })
	case core.Expired:
		delete(l.incoming, e.ID)
	case core.Dealloc:
		if f := l.flows[e.Endpoint].Load(); f != nil {
			w.then(f.released)
		}
	}
}

// Register makes this member answer queries for a service. Nothing is sent.
func (l *IPCP) Register(hash []byte) error {
	if err := l.hashFits(hash); err != nil {
		return err
	}
	return l.do("register", func(_ time.Time, c *core.Core) { c.Register(hash) })
}

// Unregister ends that. Nothing is sent; others may keep asking us for a while.
func (l *IPCP) Unregister(hash []byte) error {
	return l.do("unregister", func(_ time.Time, c *core.Core) { c.Unregister(hash) })
}

func (l *IPCP) hashFits(hash []byte) error {
	if want := wire.HashLen(uint8(l.HashAlg())); len(hash) != want {
		return o7serr.Wrap(o7serr.EINVAL, "hash of %d bytes, layer %s has %d", len(hash), l.LayerName(), want)
	}
	return nil
}

// linkUp refuses what would only wait for its time-out.
func (l *IPCP) linkUp() error {
	if l.down.Load() {
		return o7serr.Wrap(o7serr.EFLOWDOWN, "interface of %s is down", l.name)
	}
	return nil
}

// Query reports whether somebody in the layer serves hash. What is not cached
// is asked for by broadcast, which takes up to ctx or 2 s when nobody answers.
func (l *IPCP) Query(ctx context.Context, hash []byte) error {
	if err := cmp.Or(l.hashFits(hash), l.linkUp()); err != nil {
		return err
	}
	deadline, _ := ctx.Deadline()
	var answer chan error
	known := false
	err := l.do("query", func(now time.Time, c *core.Core) {
		if known = c.Query(now, hash, deadline); !known {
			answer = make(chan error, 1)
			l.waiters[string(hash)] = append(l.waiters[string(hash)], answer)
		}
	})
	if err != nil || known {
		return err
	}
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	ws := slices.DeleteFunc(l.waiters[string(hash)], func(c chan error) bool { return c == answer })
	if len(ws) > 0 {
		l.waiters[string(hash)] = ws
	} else {
		delete(l.waiters, string(hash))
		l.core.CancelQuery(hash)
	}
	return o7serr.Wrap(o7serr.ENAME, "nobody in layer %s answered for hash %.4x yet", l.cfg.LayerName, hash)
}

// wake ends the queries for hash. The caller holds mu.
func (l *IPCP) wake(hash []byte, err error) {
	for _, c := range l.waiters[string(hash)] {
		c <- err
	}
	delete(l.waiters, string(hash))
}

// alloc is an allocation that waits for its end.
type alloc struct {
	req   ipcp.AllocRequest
	renew chan struct{} // the core wants a fresh request
	done  chan struct{} // closed with the result
	// Guarded by IPCP.mu until done is closed:
	flow *Flow
	data []byte
	err  error
}

// finish ends an allocation. The caller holds mu.
func (l *IPCP) finish(id core.ID, a *alloc, data []byte, err error) {
	delete(l.allocs, id)
	a.data, a.err = data, err
	close(a.done)
}

// Alloc asks the member that answered for the service, or asks who does.
func (l *IPCP) Alloc(ctx context.Context, req ipcp.AllocRequest) (ipcp.Flow, []byte, error) {
	if err := l.linkUp(); err != nil {
		return nil, nil, err
	}
	a := &alloc{req: req, renew: make(chan struct{}, 1), done: make(chan struct{})}
	var id core.ID
	var refused error
	err := l.do("flow allocation", func(now time.Time, c *core.Core) {
		if id, refused = c.Alloc(now, req.Hash, req.QoS, req.Data, req.Renew != nil); refused == nil {
			l.allocs[id] = a
		}
	})
	if err == nil {
		err = refused
	}
	if err != nil {
		return nil, nil, err
	}
	for {
		select {
		case <-a.renew:
			fresh := req.Renew()
			_ = l.do("flow allocation", func(now time.Time, c *core.Core) { c.Supply(now, id, fresh) })
			continue
		case <-ctx.Done():
			l.giveUp(ctx, id, a)
		case <-a.done:
		}
		break
	}
	<-a.done
	if a.err != nil {
		return nil, nil, a.err
	}
	return a.flow, a.data, nil
}

// giveUp ends an allocation because of ctx, unless it has ended already.
func (l *IPCP) giveUp(ctx context.Context, id core.ID, a *alloc) {
	_ = l.do("flow allocation", func(now time.Time, c *core.Core) {
		if l.allocs[id] == nil {
			return
		}
		timedOut := ctx.Err() == context.DeadlineExceeded
		c.Cancel(now, id, timedOut)
		err := context.Cause(ctx)
		if timedOut {
			err = o7serr.Wrap(o7serr.ETIMEDOUT, "no reply in layer %s", l.cfg.LayerName)
		}
		l.finish(id, a, nil, err)
	})
}

// incoming is a peer's request that waits for its answer.
type incoming struct {
	l    *IPCP
	id   core.ID
	qos  qos.Spec
	hash []byte
	data []byte
	from core.MAC
}

func (in *incoming) QoS() qos.Spec { return in.qos }
func (in *incoming) Hash() []byte  { return in.hash }
func (in *incoming) Data() []byte  { return in.data }

// Accept installs the flow, then sends the reply.
func (in *incoming) Accept(data []byte) (ipcp.Flow, error) {
	var f *Flow
	var refused error
	err := in.l.do("flow accept", func(now time.Time, c *core.Core) {
		var local, remote uint16
		var to core.MAC
		delete(in.l.incoming, in.id)
		if local, to, remote, refused = c.Respond(now, in.id, 0, data); refused == nil {
			f = in.l.newFlow(local, in.qos)
			f.connect(to, remote)
		}
	})
	if err == nil {
		err = refused
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Refuse sends a negative reply.
func (in *incoming) Refuse(code int32) {
	if code == 0 {
		code = o7serr.EIPCP.Code()
	}
	_ = in.l.do("flow refusal", func(now time.Time, c *core.Core) {
		delete(in.l.incoming, in.id)
		_, _, _, _ = c.Respond(now, in.id, code, nil)
	})
}

// linkState is called by the device: all flows learn about it at once.
func (l *IPCP) linkState(up bool) {
	if l.down.Swap(!up) == !up {
		return
	}
	e := ipcp.EventUp
	if !up {
		e = ipcp.EventDown
	}
	n := 0
	for i := range l.flows {
		if f := l.flows[i].Load(); f != nil {
			n++
			f.offloadState(up)
			f.box.Event(e)
		}
	}
	l.log.Info("interface changed state", "device", l.cfg.Eth.Device, "up", up, "flows", n)
}

// Close leaves the layer: peers are told, our flows get EventDealloc.
func (l *IPCP) Close() error {
	l.mu.Lock()
	was := l.state
	if was != ipcp.StateOperational {
		if !l.starting {
			l.state = ipcp.StateShutdown
		}
		l.mu.Unlock()
		return nil
	}
	now := time.Now()
	gone := o7serr.Wrap(o7serr.EIPCPSTATE, "layer %s was left", l.cfg.LayerName)
	for _, id := range slices.Sorted(maps.Keys(l.allocs)) {
		l.core.Cancel(now, id, false)
		l.finish(id, l.allocs[id], nil, gone)
	}
	for _, id := range slices.Sorted(maps.Keys(l.incoming)) {
		_, _, _, _ = l.core.Respond(now, id, o7serr.EIPCPSTATE.Code(), nil)
	}
	clear(l.incoming)
	for hash := range l.waiters {
		l.wake([]byte(hash), gone)
	}
	var flows []*Flow
	for i := range l.flows {
		if f := l.flows[i].Load(); f != nil && f.connected.Load() {
			flows = append(flows, f)
			l.core.Close(now, f.local, 0)
		}
	}
	l.core.Forget()
	w := l.settle(now)
	l.state = ipcp.StateShutdown
	l.timer.Stop()
	l.mu.Unlock()
	// The users still hold the flows: they are told, not closed.
	for _, f := range flows {
		w.then(f.released)
	}
	l.perform(w)
	l.unwatch()
	l.block.Release()
	return errors.Join(l.dev.Close(), l.journal.Close())
}

// Neighbors implements ipcp.Inspector; Ethernet layers have none.
func (l *IPCP) Neighbors() []ipcp.Neighbor { return nil }

// LSDB implements ipcp.Inspector.
func (l *IPCP) LSDB() []ipcp.LSA { return nil }

// Routes implements ipcp.Inspector.
func (l *IPCP) Routes() []ipcp.Route { return nil }

// Directory lists what is registered here and what was learnt.
func (l *IPCP) Directory() []ipcp.DirEntry {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.core == nil {
		return nil
	}
	var d []ipcp.DirEntry
	add := func(hash string, mac core.MAC, kind string, left time.Duration) {
		d = append(d, ipcp.DirEntry{
			IPCP: l.name, Layer: l.cfg.LayerName, Key: fmt.Sprintf("%x", hash),
			Value: macString(mac), Kind: kind, Expiry: left.Seconds(),
		})
	}
	for _, h := range l.core.Names() {
		add(h, l.mac, "local", 0)
	}
	for h, c := range l.core.Cached(time.Now()) {
		add(h, c.MAC, "cached", c.Left)
	}
	slices.SortStableFunc(d, func(a, b ipcp.DirEntry) int { return strings.Compare(a.Key, b.Key) })
	return d
}

// Counters tells what happened to frames and messages.
func (l *IPCP) Counters() iter.Seq2[string, uint64] {
	l.mu.Lock()
	var c core.Counts
	if l.core != nil {
		c = l.core.Counts()
	}
	l.mu.Unlock()
	flows := uint64(0)
	for i := range l.flows {
		if l.flows[i].Load() != nil {
			flows++
		}
	}
	n := &l.n
	all := []struct {
		name string
		n    uint64
	}{
		{"flows", flows},
		{"rx_mgmt", n.rxMgmt.Load()},
		{"rx_data", n.rxData.Load()},
		{"rx_data_bytes", n.rxBytes.Load()},
		{"tx_mgmt", n.txMgmt.Load()},
		{"tx_data", n.txData.Load()},
		{"tx_data_bytes", n.txBytes.Load()},
		{"looped", n.looped.Load()},
		{"rx_malformed_dropped", n.malformed.Load()},
		{"rx_other_protocol_dropped", n.otherProtocol.Load()},
		{"rx_misaddressed_dropped", n.misaddressed.Load()},
		{"rx_broadcast_data_dropped", n.broadcastData.Load()},
		{"rx_unknown_endpoint_dropped", n.unknown.Load()},
		{"tx_device_dropped", n.txFailed.Load()},
		{"tx_too_long_dropped", n.sendTooLong.Load()},
		{"tx_down_dropped", n.sendDown.Load()},
		{"queries_sent", c.QueriesSent},
		{"queries_received", c.QueriesReceived},
		{"query_replies_sent", c.AnswersSent},
		{"query_replies_received", c.AnswersReceived},
		{"flow_requests_sent", c.RequestsSent},
		{"flow_requests_received", c.RequestsReceived},
		{"flow_requests_renewed", c.Renewed},
		{"flow_requests_abandoned", c.Abandoned},
		{"flow_requests_expired", c.RequestsExpired},
		{"flow_accepts_sent", c.AcceptsSent},
		{"flow_accepts_received", c.AcceptsReceived},
		{"flow_refusals_sent", c.RefusalsSent},
		{"flow_refusals_received", c.RefusalsReceived},
		{"flow_late_accepts", c.LateAccept},
		{"deallocs_sent", c.DeallocsSent},
		{"deallocs_received", c.DeallocsReceived},
		{"deallocs_repeated", c.DeallocsRepeated},
		{"endpoints_in_quarantine", c.Quarantined},
		{"endpoint_quarantines_broken", c.QuarantineBroken},
		{"stale_flows_released", c.StaleReleased},
		{"mgmt_malformed_dropped", c.Malformed},
		{"mgmt_misaddressed_dropped", c.Misaddressed},
		{"mgmt_unknown_code_dropped", c.UnknownCode},
		{"mgmt_unexpected_dropped", c.Unexpected},
		{"mgmt_bad_endpoint_dropped", c.BadEndpoint},
		{"mgmt_cache_full_dropped", c.CacheFull},
		{"request_unknown_name_dropped", c.UnknownName},
		{"request_duplicate_dropped", c.Duplicate},
		{"request_flood_dropped", c.Flooded},
		{"request_no_endpoint_dropped", c.NoEndpoint},
	}
	return func(yield func(string, uint64) bool) {
		for _, x := range all {
			if !yield(x.name, x.n) {
				return
			}
		}
	}
}

func macString(m core.MAC) string { return net.HardwareAddr(m[:]).String() }
