package irm

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/control/irm/registry"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/qos"
)

type counter = atomic.Uint64

// flow is an allocated flow in the hands of a process.
type flow struct {
	id      uint32
	m       *IRM
	session *session
	name    string
	lower   ipcp.Flow
	slot    *slot
	pump    *pump       // nil: the other end is a process of this machine, too
	app     *appFlow    // nil: no fast-path device carries it
	why     string      // no device
	down    atomic.Bool // for show
	once    sync.Once
}

// grant is what a process gets with a flow. Exactly one of sent and lost must
// be called.
type grant struct {
	flow   *flow
	result ipc.FlowResult
	fds    []int    // stay ours
	share  *shared  // whose descriptors are among them
	port   *appPort // its, too
}

// sent says that the process has the flow: events may follow. What has arrived
// for it is in its rings since before (see attach).
func (g *grant) sent() {
	f := g.flow
	g.share.told(g.result.Ring.Side)
	if g.port != nil {
		f.session.appMu.Lock()
		g.port.sent = true
		f.session.appMu.Unlock()
	}
	if f.pump != nil {
		f.pump.open()
		return
	}
	f.lower.SetSink(watcher{f})
}

// lost says that the process did not get it.
func (g *grant) lost() { g.flow.close(0) }

// newFlow takes a flow id for s, in the given pending state.
func (m *IRM) newFlow(s *session, state registry.FlowState, name string, spec qos.Spec) (uint32, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(s.flows) >= maxFlows {
		return 0, fail(o7serr.EAGAIN, "process %d has %d flows, more are not allowed", s.pid, maxFlows)
	}
	id, err := m.reg.New(registry.Flow{Client: s.key, PID: s.pid, UID: s.uid, Name: name, QoS: spec})
	if err != nil {
		return 0, err
	}
	if err := m.reg.Move(id, state, nil); err != nil {
		return 0, err
	}
	return id, nil
}

// freeFlow gives up an id that never became a flow.
func (m *IRM) freeFlow(id uint32) {
	m.mu.Lock()
	defer m.mu.Unlock()
	_ = m.reg.Move(id, registry.FlowNull, nil)
}

// attach makes e the flow id of process s. It owns e, also on error.
func (m *IRM) attach(s *session, id uint32, e end, name string) (*grant, error) {
	m.mu.Lock()
	gone := s.gone
	if !gone {
		s.wg.Add(1) // what the process shares stays until this is done
		defer s.wg.Done()
	}
	m.mu.Unlock()
	if gone {
		e.discard()
		return nil, errLeft
	}
	info := e.flow.Info()
	f := &flow{id: id, m: m, session: s, name: name, lower: e.flow, slot: e.slot}
	res := ipc.FlowResult{
		Flow: id, Name: name, QoS: info.QoS, MPL: info.MPL, MTU: info.MTU,
		Layer: info.Layer, Direct: e.direct,
	}
	g := &grant{flow: f, share: e.share}
	side := e.side
	var err error
	if e.slot == nil {
		if g.share, err = s.ownShare(); err == nil {
			f.slot, err = g.share.take(1)
		}
		if err != nil {
			_ = e.flow.Close()
			return nil, err
		}
		if f.pump, err = newPump(f, info.MTU); err != nil {
			f.slot.done()
			_ = e.flow.Close()
			return nil, err
		}
		side = 1 - daemonSide
		res.MTU = min(info.MTU, f.pump.end.MaxMessage())
	} else {
		res.MTU = min(info.MTU, directMTU)
	}
	g.fds = g.share.granted(&res.Ring, f.slot.n, side)
	g.result = res
	if f.pump != nil {
		s.offload(f, g)
		f.pump.start()
		// Packets that came before the process's device had the flow have to be
		// in the rings when the process gets it: it reads these first, and those
		// of an ordered flow would come too late behind the device's.
		f.lower.SetSink(f.pump)
	}

	// From here on others see the flow: it must be complete.
	m.mu.Lock()
	err = errLeft
	if !s.gone {
		err = m.reg.Move(id, registry.FlowAllocated, func(r *registry.Flow) {
			r.Name, r.QoS, r.MPL, r.Direct = name, info.QoS, info.MPL, e.direct
			r.Layer, r.Lower = info.Layer, info.IPCP
		})
	}
	if err == nil {
		m.flows[id] = f
		s.flows[id] = f
	}
	m.mu.Unlock()
	if err != nil {
		f.shut(0)
		return nil, err
	}
	return g, nil
}

// deadQuarantine is what the protocol of an ordered flow asks for when it has
// just sent and received (spec 30 §3.1 and §9). A process that ended without
// closing its flow cannot say.
const deadQuarantine = 146 * time.Second

// quarantine is for how long the endpoint of a flow whose process is gone may
// still get packets of its protocol.
func (f *flow) quarantine() time.Duration {
	if f.lower.Info().QoS.InOrder != 0 {
		return deadQuarantine
	}
	return 0
}

// close ends the flow and frees its id at once. The layer keeps the endpoint
// out of use for the quarantine.
func (f *flow) close(quarantine time.Duration) {
	f.once.Do(func() {
		m := f.m
		m.mu.Lock()
		delete(m.flows, f.id)
		_ = m.reg.Move(f.id, registry.FlowDeallocPending, nil)
		m.mu.Unlock()
		f.shut(quarantine)
		m.mu.Lock()
		delete(f.session.flows, f.id)
		_ = m.reg.Move(f.id, registry.FlowDeallocated, nil)
		_ = m.reg.Move(f.id, registry.FlowNull, nil)
		m.mu.Unlock()
	})
}

// shut releases what the flow consists of.
func (f *flow) shut(quarantine time.Duration) {
	if f.pump != nil {
		f.session.unload(f)
		f.pump.leave()
	}
	if err := ipcp.CloseLinger(f.lower, quarantine); err != nil {
		f.m.log.Debug("flow closed", "flow", f.id, "err", err)
	}
	if f.pump != nil {
		f.pump.close()
	}
	f.slot.done()
}

// event passes a flow event to the process.
func (f *flow) event(e ipcp.Event) {
	var typ string
	switch e {
	case ipcp.EventDown:
		typ = "down"
		f.down.Store(true)
	case ipcp.EventUp:
		typ = "up"
		f.down.Store(false)
	case ipcp.EventDealloc:
		typ = "dealloc"
		f.down.Store(true)
	case ipcp.EventPeer:
		typ = "peer"
		f.down.Store(true)
	default:
		return
	}
	f.session.event(ipc.FlowEvent{Flow: f.id, Type: typ})
}

// watcher is the sink of a flow whose packets do not pass the daemon.
type watcher struct{ f *flow }

func (w watcher) Receive(pkts []*packet.Buf) {
	for _, p := range pkts {
		p.Release()
	}
}

func (w watcher) FlowEvent(e ipcp.Event) { w.f.event(e) }
