package core

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/wire"
)

// oapIDLen is the length of the identifier at the start of an OAP request
// (spec 32): two requests with the same one are copies of each other.
const oapIDLen = 16

// Alloc begins an allocation: it resolves hash if needed and sends the
// request. Opened, then Established or Failed follow; the caller bounds the
// waiting by Cancel. With renewable set, Renew events come while there is no
// reply. Errors: EMSGSIZE, EINVAL.
func (c *Core) Alloc(now time.Time, hash []byte, q qos.Spec, data []byte, renewable bool) (ID, error) {
	if len(hash) != c.cfg.HashLen {
		return 0, o7serr.Wrap(o7serr.EINVAL, "hash of %d bytes, expected %d", len(hash), c.cfg.HashLen)
	}
	if err := c.fits(len(hash) + len(data)); err != nil {
		return 0, err
	}
	f := c.newFlow()
	f.hash, f.qos, f.renewable = string(hash), q, renewable
	c.start(now, f, data)
	return f.id, nil
}

func (c *Core) newFlow() *flow {
	c.lastID++
	f := &flow{id: c.lastID}
	c.flows[f.id] = f
	return f
}

// Supply continues an allocation after Renew with a fresh request; an
// identical one must never be repeated (spec 10 oddity 5). It does nothing
// when the allocation has ended meanwhile.
func (c *Core) Supply(now time.Time, id ID, data []byte) {
	f := c.flows[id]
	if f == nil || f.state != renewing {
		return
	}
	if err := c.fits(len(f.hash) + len(data)); err != nil {
		c.fail(now, f, err)
		return
	}
	f.renewed++
	c.n.Renewed++
	c.start(now, f, data)
}

func (c *Core) start(now time.Time, f *flow, data []byte) {
	mac, ok := c.resolve(now, f.hash)
	if ok {
		c.request(now, f, mac, data)
		return
	}
	f.state, f.data = resolving, data
	c.ask(now, f.hash, time.Time{})
}

// resolved continues the allocations that waited for hash.
func (c *Core) resolved(now time.Time, hash string, mac MAC) {
	for _, f := range c.resolvingFlows(hash) {
		c.request(now, f, mac, f.data)
	}
}

func (c *Core) unresolved(now time.Time, hash string) {
	for _, f := range c.resolvingFlows(hash) {
		c.fail(now, f, o7serr.Wrap(o7serr.EIPCP, "nobody answers for hash %.4x", hash))
	}
}

// resolvingFlows returns them in the order of their allocation.
func (c *Core) resolvingFlows(hash string) (fs []*flow) {
	for _, f := range c.flows {
		if f.state == resolving && f.hash == hash {
			fs = append(fs, f)
		}
	}
	slices.SortFunc(fs, func(a, b *flow) int { return cmp.Compare(a.id, b.id) })
	return fs
}

func (c *Core) request(now time.Time, f *flow, mac MAC, data []byte) {
	f.data = nil
	if err := c.open(now, f); err != nil {
		c.fail(now, f, err)
		return
	}
	f.state, f.mac = requesting, mac
	c.n.RequestsSent++
	c.send(mac, &wire.EthMgmt{Code: wire.FlowReq, SrcEID: f.ep, QoS: f.qos, Hash: []byte(f.hash), Data: data})
	f.deadline = time.Time{}
	if f.renewable && f.renewed < renewals {
		f.deadline = now.Add(renewAfter << f.renewed)
		c.timers.add(timer{at: f.deadline, id: f.id})
	}
}

func (c *Core) open(now time.Time, f *flow) error {
	if !c.eps.take(now, f) {
		c.n.NoEndpoint++
		return o7serr.Wrap(o7serr.EAGAIN, "all %d endpoints are in use", len(c.eps.free))
	}
	c.taken(f.ep)
	c.event(Event{Kind: Opened, ID: f.id, Endpoint: f.ep})
	return nil
}

// taken forgets what an endpoint was before.
func (c *Core) taken(ep uint16) {
	delete(c.late, ep)
	delete(c.partings, ep)
}

func (c *Core) fail(now time.Time, f *flow, err error) {
	c.drop(now, f, 0)
	c.event(Event{Kind: Failed, ID: f.id, Err: err})
}

// drop removes f and frees its endpoint after the quarantine.
func (c *Core) drop(now time.Time, f *flow, quarantine time.Duration) {
	c.vacate(now, f, quarantine)
	delete(c.flows, f.id)
	if p := (peer{f.mac, f.remote}); c.byPeer[p] == f {
		delete(c.byPeer, p)
	}
	if f.state == waiting {
		c.unwait(f)
	}
	f.state, f.deadline = 0, time.Time{}
}

// unwait takes f out of the bounded set of unanswered requests.
func (c *Core) unwait(f *flow) {
	c.nwait--
	if c.waiting[f.mac]--; c.waiting[f.mac] <= 0 {
		delete(c.waiting, f.mac)
	}
}

func (c *Core) vacate(now time.Time, f *flow, quarantine time.Duration) {
	if f.ep != 0 {
		e := Event{Kind: Vacated, ID: f.id, Endpoint: f.ep}
		if c.partings[f.ep] != nil {
			e.Remote = f.remote
		}
		c.event(e)
		c.eps.release(now, f, quarantine)
	}
}

// Cancel gives up an allocation that has no reply. timedOut says that the peer
// had its time: what is cached about it is dropped (spec 10 oddity 6). It does
// nothing when the allocation is established or over.
func (c *Core) Cancel(now time.Time, id ID, timedOut bool) {
	f := c.flows[id]
	if f == nil || f.state != resolving && f.state != requesting && f.state != renewing {
		return
	}
	if f.state == requesting {
		c.abandon(now, f, timedOut)
	}
	wasResolving := f.state == resolving
	c.drop(now, f, 0)
	if q := c.queries[f.hash]; wasResolving && q != nil && !q.asked && !c.resolvingFor(f.hash) {
		delete(c.queries, f.hash)
	}
}

// abandon frees the endpoint of a request that has no reply. A late acceptance
// is answered with a deallocation: the peer need not wait for its time-out.
func (c *Core) abandon(now time.Time, f *flow, silent bool) {
	c.n.Abandoned++
	if silent {
		c.forget(f.hash, f.mac)
	}
	end := now.Add(lateReply)
	c.late[f.ep] = abandoned{f.mac, end}
	c.timers.add(timer{at: end, ep: f.ep})
	c.vacate(now, f, 0)
}

func (c *Core) flowTimer(now time.Time, id ID) {
	f := c.flows[id]
	if f == nil || f.deadline.IsZero() || f.deadline.After(now) {
		return
	}
	f.deadline = time.Time{}
	switch f.state {
	case requesting:
		c.abandon(now, f, true)
		f.state = renewing
		c.event(Event{Kind: Renew, ID: f.id})
	case waiting:
		c.n.RequestsExpired++
		c.expire(now, f)
	}
}

func (c *Core) expire(now time.Time, f *flow) {
	c.drop(now, f, 0)
	c.event(Event{Kind: Expired, ID: f.id})
}

// Respond answers a peer's request: code 0 accepts with the piggyback data and
// returns the endpoint of the flow (Opened and Established are not repeated as
// events); any other code refuses. Errors: ETIMEDOUT when the request is gone,
// EMSGSIZE and EAGAIN when it could not be accepted, which refuses it.
func (c *Core) Respond(now time.Time, id ID, code int32, data []byte) (local uint16, to MAC, remote uint16, err error) {
	f := c.flows[id]
	if f == nil || f.state != waiting {
		return 0, MAC{}, 0, o7serr.Wrap(o7serr.ETIMEDOUT, "the request is not waiting for an answer")
	}
	if code > 0 {
		code = -code
	}
	if code == 0 {
		if err = c.fits(len(data)); err == nil && !c.eps.take(now, f) {
			c.n.NoEndpoint++
			err = o7serr.Wrap(o7serr.EAGAIN, "all %d endpoints are in use", len(c.eps.free))
		}
		if err != nil {
			code = o7serr.EIPCP.Code()
		}
	}
	m := wire.EthMgmt{Code: wire.FlowReply, SrcEID: f.ep, DstEID: f.remote, Response: code}
	to, remote = f.mac, f.remote
	if code != 0 {
		c.n.RefusalsSent++
		c.drop(now, f, 0)
		c.send(to, &m)
		return 0, to, remote, err
	}
	c.taken(f.ep)
	c.unwait(f)
	f.state, f.deadline = established, time.Time{}
	m.Data = data
	c.n.AcceptsSent++
	c.send(to, &m)
	return f.ep, to, remote, nil
}

// Close releases the flow at endpoint and tells its peer (spec 50 §5), unless
// it is the peer that released it. The endpoint is not used again for the
// quarantine, at most five minutes, while there are others. Unknown endpoints
// are ignored.
func (c *Core) Close(now time.Time, endpoint uint16, quarantine time.Duration) {
	f := c.eps.get(endpoint)
	if f == nil || f.state != established && f.state != released {
		return
	}
	if f.state == established {
		c.dealloc(f.mac, f.ep, f.remote)
		c.part(now, f)
	}
	c.drop(now, f, quarantine)
}

// part remembers whom f, which we release, was with.
func (c *Core) part(now time.Time, f *flow) {
	p := &parting{ep: f.ep, remote: f.remote, mac: f.mac, end: now.Add(partingFor), next: now.Add(partingEvery)}
	for len(c.parted) >= maxPartings {
		c.forgetParting()
	}
	c.parted = append(c.parted, p)
	c.partings[p.ep] = p
}

// Former is a flow of an earlier process with our address.
type Former struct {
	Endpoint uint16
	Peer     MAC
	Remote   uint16
}

// formerQuarantine keeps the endpoints of an earlier process free: it ended in
// the midst of everything (spec 30 §9).
const formerQuarantine = 146 * time.Second

// Former releases the flows of an earlier process, which could not tell its
// peers: as Close would have, with a quarantine. It must be the first call.
// Nonsense is ignored.
func (c *Core) Former(now time.Time, flows []Former) {
	in := map[uint16]bool{}
	for _, f := range flows {
		switch {
		case f.Endpoint < c.eps.first, int(f.Endpoint) >= len(c.eps.flows), in[f.Endpoint],
			!usable(f.Remote), f.Peer[0]&1 != 0, f.Peer == MAC{}:
			continue
		}
		in[f.Endpoint] = true
		c.dealloc(f.Peer, f.Endpoint, f.Remote)
		c.part(now, &flow{ep: f.Endpoint, mac: f.Peer, remote: f.Remote})
	}
	c.eps.reserve(now.Add(formerQuarantine), in)
}

// forgetParting forgets the oldest.
func (c *Core) forgetParting() {
	old := c.parted[0]
	c.parted[0] = nil
	c.parted = c.parted[1:]
	if c.partings[old.ep] == old {
		delete(c.partings, old.ep)
		c.event(Event{Kind: Forgotten, Endpoint: old.ep})
	}
}

// Forget forgets the peers of all flows that were released.
func (c *Core) Forget() {
	for len(c.parted) > 0 {
		c.forgetParting()
	}
}

// Stray takes note of data from a member for an endpoint without a flow. If it
// is the peer of one that we released there it is told again, once a second.
func (c *Core) Stray(now time.Time, from MAC, endpoint uint16) {
	p := c.partings[endpoint]
	if p == nil || p.mac != from || !p.end.After(now) || p.next.After(now) {
		return
	}
	p.next = now.Add(partingEvery)
	c.n.DeallocsRepeated++
	c.dealloc(p.mac, p.ep, p.remote)
}

func (c *Core) dealloc(to MAC, local, remote uint16) {
	c.n.DeallocsSent++
	c.send(to, &wire.EthMgmt{Code: wire.EthDealloc, SrcEID: local, DstEID: remote})
}

// Receive takes the payload of a management frame that came from a member. It
// does not keep it.
func (c *Core) Receive(now time.Time, from, to MAC, payload []byte) {
	m, err := c.cfg.Framer.DecodeMgmt(payload, c.cfg.HashLen)
	switch {
	case errors.Is(err, wire.ErrUnknownCode):
		c.n.UnknownCode++
		return
	case err != nil:
		c.n.Malformed++
		return
	case m.Code != wire.NameQueryReq && to != c.cfg.MAC,
		from == wire.Broadcast, from[0]&1 != 0: // a group address sends nothing
		c.n.Misaddressed++
		return
	}
	switch m.Code {
	case wire.NameQueryReq:
		c.queried(from, &m)
	case wire.NameQueryReply:
		c.answered(now, from, &m)
	case wire.FlowReq:
		c.requested(now, from, &m)
	case wire.FlowReply:
		c.replied(now, from, &m)
	case wire.EthDealloc:
		c.deallocated(from, &m)
	}
}

// usable tells whether a peer's endpoint may be sent to: 0 is management,
// all-ones is what the reference sends when it lost a race (spec 10 oddity 10).
func usable(ep uint16) bool { return ep != 0 && ep != 0xffff }

func (c *Core) requested(now time.Time, from MAC, m *wire.EthMgmt) {
	c.n.RequestsReceived++
	p := peer{from, m.SrcEID}
	oap := string(m.Data[:min(len(m.Data), oapIDLen)])
	old := c.byPeer[p]
	switch {
	case !usable(m.SrcEID):
		c.n.BadEndpoint++
		return
	case old != nil && old.oap == oap && old.oap != "":
		c.n.Duplicate++
		return
	}
	if _, ok := c.registered[string(m.Hash)]; !ok {
		c.n.UnknownName++
		// The reference is silent here, but its requesters believe for ever
		// that we serve a name, once they heard so: a refusal costs them a
		// moment, silence 20 s each time. Members on the loopback interface
		// share an address, so the request may be for another one of them.
		if c.cfg.MAC != (MAC{}) {
			c.n.RefusalsSent++
			c.send(from, &wire.EthMgmt{Code: wire.FlowReply, DstEID: m.SrcEID, Response: o7serr.ENAME.Code()})
		}
		return
	}
	if c.nwait >= maxWaiting || c.waiting[from] >= maxWaitingPerMAC {
		c.n.Flooded++
		return
	}
	// The peer uses the endpoint for something new, so what it used it for
	// before is over. Reference peers do not tell; their descriptors are reused
	// at once, and what we still sent would reach the new flow.
	if old != nil {
		c.stale(now, old)
	}
	f := c.newFlow()
	f.state, f.mac, f.remote, f.oap, f.qos = waiting, from, m.SrcEID, oap, m.QoS
	f.deadline = now.Add(answerWithin)
	c.timers.add(timer{at: f.deadline, id: f.id})
	c.byPeer[p] = f
	c.nwait++
	c.waiting[from]++
	c.event(Event{
		Kind: Arrived, ID: f.id, Peer: from, Remote: m.SrcEID, QoS: m.QoS,
		Hash: append([]byte(nil), m.Hash...), Data: append([]byte(nil), m.Data...),
	})
}

func (c *Core) stale(now time.Time, f *flow) {
	c.n.StaleReleased++
	if f.state == waiting {
		c.expire(now, f)
		return
	}
	c.release(f)
}

// release notes that the peer is gone.
func (c *Core) release(f *flow) {
	if f.state != established {
		return
	}
	f.state = released
	delete(c.byPeer, peer{f.mac, f.remote})
	c.event(Event{Kind: Dealloc, ID: f.id, Endpoint: f.ep})
}

func (c *Core) replied(now time.Time, from MAC, m *wire.EthMgmt) {
	f := c.eps.get(m.DstEID)
	if f == nil {
		if z, ok := c.late[m.DstEID]; ok && z.mac == from && m.Response == 0 && usable(m.SrcEID) {
			c.n.LateAccept++
			delete(c.late, m.DstEID)
			c.dealloc(from, m.DstEID, m.SrcEID)
			return
		}
	}
	switch {
	case f == nil || f.state != requesting || f.mac != from:
		c.n.Unexpected++
	case m.Response != 0: // also positive ones fail in Ethernet layers (spec 21 oddity 7)
		c.n.RefusalsReceived++
		code := m.Response
		if code > 0 {
			code = -code
		}
		if code == o7serr.ENAME.Code() { // it was served there, but is not any more
			c.forget(f.hash, f.mac)
		}
		c.fail(now, f, fmt.Errorf("peer refused the flow: %w", o7serr.FromCode(code, "")))
	case !usable(m.SrcEID):
		c.n.BadEndpoint++
	default:
		c.n.AcceptsReceived++
		f.state, f.remote, f.deadline = established, m.SrcEID, time.Time{}
		p := peer{from, f.remote}
		if old := c.byPeer[p]; old != nil {
			c.n.StaleReleased++
			c.release(old)
		}
		c.byPeer[p] = f
		c.event(Event{
			Kind: Established, ID: f.id, Endpoint: f.ep, Peer: from, Remote: f.remote, QoS: f.qos,
			Data: append([]byte(nil), m.Data...),
		})
	}
}

func (c *Core) deallocated(from MAC, m *wire.EthMgmt) {
	f := c.eps.get(m.DstEID)
	if f == nil || f.state != established || f.mac != from || f.remote != m.SrcEID {
		c.n.Unexpected++
		return
	}
	c.n.DeallocsReceived++
	c.release(f)
}
