package unicast

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/o7s/o7s-router/control/flowalloc"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/wire"
)

// defaultMTU is assumed while no adjacency tells: one Ethernet frame (spec 20 §8).
const defaultMTU = 1496

func (l *Layer) newAllocator(cfg ipcp.Config, addr uint64) *flowalloc.Allocator {
	return flowalloc.New(flowalloc.Config{Self: addr, HashLen: wire.HashLen(uint8(cfg.Hash)), Rand: crand.Reader})
}

// allocation is our request for a flow, while it waits for the reply.
type allocation struct {
	req    ipcp.AllocRequest
	flow   *flow
	others []uint64         // that the directory named, too, and were not asked
	done   chan allocResult // of length 1
	over   bool             // answered or given up; owned by the loop
	looked bool             // the directory was asked again after a refusal
}

type allocResult struct {
	data []byte
	err  error
}

// Alloc asks the directory for a member that serves the name and that member
// for a flow.
func (l *Layer) Alloc(ctx context.Context, req ipcp.AllocRequest) (ipcp.Flow, []byte, error) {
	a := &allocation{req: req, done: make(chan allocResult, 1)}
	if err := l.inLoop(func(now time.Time) error {
		l.query(now, req.Hash, func(now time.Time, addrs []uint64) { l.request(now, a, addrs) })
		return nil
	}); err != nil {
		return nil, nil, err
	}
	select {
	case r := <-a.done:
		if r.err != nil {
			return nil, nil, r.err
		}
		return a.flow, r.data, nil
	case <-ctx.Done():
		l.loop.post(func(now time.Time) { l.abandon(now, a) })
		return nil, nil, ctx.Err()
	case <-l.ctx.Done():
		return nil, nil, o7serr.EIPCPSTATE
	}
}

// request sends the flow request once the directory has answered.
func (l *Layer) request(now time.Time, a *allocation, addrs []uint64) {
	if a.over {
		return // given up meanwhile
	}
	if len(addrs) == 0 {
		a.finish(nil, o7serr.Wrap(o7serr.EIPCP, "name is not in the directory of layer %q", l.LayerName()))
		return
	}
	f := l.newFlow(addrs[0], a.req.QoS)
	eid, err := l.fa.Alloc(now, addrs[0], a.req.Hash, a.req.QoS, a.req.Data, a.req.Renew != nil)
	if err != nil {
		a.finish(nil, fmt.Errorf("flow request: %w", err))
		return
	}
	f.local = eid
	a.flow, a.others = f, addrs[1:]
	l.fa.Lookup(eid).SetUser(f)
	l.allocs[eid] = a
}

func (a *allocation) finish(data []byte, err error) {
	if !a.over {
		a.over = true
		a.done <- allocResult{data, err}
	}
}

// abandon gives up a request whose caller has gone, and forgets where the
// directory sent it: the next query asks the layer again.
func (l *Layer) abandon(now time.Time, a *allocation) {
	if a.over {
		// The reply crossed the cancellation: nobody holds the flow.
		if a.flow != nil && !a.flow.dead.Load() {
			a.flow.Close()
		}
		return
	}
	a.over = true
	if a.flow != nil {
		delete(l.allocs, a.flow.local)
		l.dir.Forget(now, a.req.Hash, a.flow.remoteAddr)
		l.fa.Close(now, a.flow.local)
	}
}

// newFlow makes the data half of a flow with a member.
func (l *Layer) newFlow(peer uint64, q qos.Spec) *flow {
	mtu := defaultMTU
	if c := l.dt.next(peer, 0); c != nil {
		mtu = c.info.MTU
	}
	return &flow{l: l, remoteAddr: peer, info: ipcp.FlowInfo{
		Layer: l.LayerName(), IPCP: l.name, Type: ipcp.Unicast, QoS: q, MTU: mtu - l.dt.hlen, MPL: mpl,
	}}
}

// opened completes the description of a flow before its user gets it.
func (f *flow) opened(remoteEID uint64) {
	f.remoteEID = remoteEID
	f.info.Local = endpointText(f.l.addr.Load(), f.local)
	f.info.Remote = endpointText(f.remoteAddr, remoteEID)
}

// lookup returns the N+1 flow with our endpoint eid. It is on the packet path.
func (l *Layer) lookup(eid uint64) *flow {
	e := l.fa.Lookup(eid)
	if e == nil {
		return nil
	}
	f, _ := e.User().(*flow)
	return f
}

// stepAllocator sends what the allocator has to say and handles its events.
func (l *Layer) stepAllocator(now time.Time) time.Time {
	l.fa.Tick(now)
	for again := true; again; {
		packets, events := l.fa.Drain()
		again = len(events) > 0
		for _, p := range packets {
			if p.Dst == l.addr.Load() { // data transfer never sends to itself
				l.fa.Receive(now, p.Payload)
				again = true
				continue
			}
			l.dt.sendComponent(p.Dst, wire.FlowAllocatorEID, p.Payload)
		}
		for _, e := range events {
			l.allocatorEvent(now, e)
		}
	}
	return l.fa.NextDeadline()
}

func (l *Layer) allocatorEvent(now time.Time, e flowalloc.Event) {
	a := l.allocs[e.EID]
	switch e.Kind {
	case flowalloc.Request:
		f := l.newFlow(e.Flow.Peer(), e.Flow.QoS())
		f.local = e.EID
		f.opened(e.Flow.Remote())
		e.Flow.SetUser(f)
		l.host.FlowArrived(l, &incoming{flow: f, hash: e.Hash, data: e.Data})
	case flowalloc.Established:
		if a != nil {
			delete(l.allocs, e.EID)
			a.flow.opened(e.Flow.Remote())
			a.finish(e.Data, nil)
		}
	case flowalloc.Refused:
		if a != nil {
			delete(l.allocs, e.EID)
			l.dir.Forget(now, a.req.Hash, a.flow.remoteAddr)
			if e.Code == o7serr.ENAME.Code() && a.req.Renew != nil {
				l.elsewhere(now, a, e.Code)
				return
			}
			a.finish(nil, refusal(e.Code))
		}
	case flowalloc.Renew:
		if a != nil && a.req.Renew != nil {
			l.renew(now, e.EID, a)
		}
	case flowalloc.Dealloc:
		if f := flowOf(e.Flow); f != nil {
			f.kill()
		}
	case flowalloc.Expired:
		if f := flowOf(e.Flow); f != nil {
			f.kill()
		}
	}
}

// elsewhere asks another member after one said that nobody there serves the
// name (any more): one that the directory named, or names when it looks again.
func (l *Layer) elsewhere(now time.Time, a *allocation, code int32) {
	refused := a.flow.remoteAddr
	ask := func(now time.Time, addrs []uint64) {
		if len(addrs) == 0 || addrs[0] == refused {
			a.finish(nil, refusal(code))
			return
		}
		a.req.Data = a.req.Renew()
		l.request(now, a, addrs)
	}
	if len(a.others) > 0 {
		ask(now, a.others)
		return
	}
	if a.looked { // once is enough: the rest are the same members again
		a.finish(nil, refusal(code))
		return
	}
	a.looked = true
	l.query(now, a.req.Hash, ask)
}

// renew makes a new request after a second of silence: a reference member loses
// some (spec 21 oddities 3 and 5), and an identical one must not be repeated.
// Another member that serves the name, too, is asked instead: the silent one
// may have died, and its entry in the directory lives on for a day.
func (l *Layer) renew(now time.Time, eid uint64, a *allocation) {
	l.dir.Forget(now, a.req.Hash, a.flow.remoteAddr)
	if len(a.others) > 0 {
		next := a.others[0]
		a.others = append(slices.Clone(a.others[1:]), a.flow.remoteAddr)
		l.reissue(now, eid, a, next)
		return
	}
	// The first answer may not have named all: the directory looks again, and
	// names the silent one last.
	l.query(now, a.req.Hash, func(now time.Time, addrs []uint64) {
		if a.over || l.allocs[eid] != a || !l.fa.Pending(eid) {
			return // answered or given up meanwhile; the answer may be next in the queue
		}
		next := a.flow.remoteAddr
		if len(addrs) > 0 {
			next, a.others = addrs[0], addrs[1:]
		}
		l.reissue(now, eid, a, next)
	})
}

// reissue gives up the pending request of eid for a new one to member dst.
func (l *Layer) reissue(now time.Time, eid uint64, a *allocation, dst uint64) {
	delete(l.allocs, eid)
	f := a.flow
	if dst != f.remoteAddr {
		f = l.newFlow(dst, a.req.QoS)
	}
	neu, err := l.fa.Reissue(now, eid, dst, a.req.Renew())
	if err != nil {
		a.finish(nil, fmt.Errorf("second flow request: %w", err))
		return
	}
	f.local = neu
	a.flow = f
	l.fa.Lookup(neu).SetUser(f)
	l.allocs[neu] = a
}

func flowOf(e *flowalloc.Flow) *flow {
	if e == nil {
		return nil
	}
	f, _ := e.User().(*flow)
	return f
}

func refusal(code int32) error {
	return fmt.Errorf("peer refused the flow: %w", o7serr.FromCode(code, ""))
}

// closeFlow releases our end. Called in the loop.
func (l *Layer) closeFlow(now time.Time, f *flow) { l.fa.Close(now, f.local) }

// component takes a message for one of our components. Called in the loop.
func (l *Layer) component(now time.Time, eid uint64, msg []byte) {
	if eid == wire.DirectoryEID {
		l.dir.Receive(now, msg)
		return
	}
	l.fa.Receive(now, msg)
}

// incoming is a peer's request for a flow.
type incoming struct {
	flow       *flow
	hash, data []byte
}

var _ ipcp.Incoming = (*incoming)(nil)

func (in *incoming) QoS() qos.Spec { return in.flow.info.QoS }
func (in *incoming) Hash() []byte  { return in.hash }
func (in *incoming) Data() []byte  { return in.data }

func (in *incoming) Accept(data []byte) (ipcp.Flow, error) {
	l := in.flow.l
	err := errors.New("layer has ended")
	l.loop.call(func(now time.Time) { err = l.fa.Respond(now, in.flow.local, 0, data) })
	if err != nil {
		in.flow.dead.Store(true)
		return nil, fmt.Errorf("accept: %w", err)
	}
	return in.flow, nil
}

func (in *incoming) Refuse(code int32) {
	l := in.flow.l
	in.flow.dead.Store(true)
	l.loop.post(func(now time.Time) { l.fa.Respond(now, in.flow.local, code, nil) })
}
