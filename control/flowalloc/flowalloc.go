// Package flowalloc is the flow allocator of a unicast layer (spec 21): the
// state machines of requester and responder, and the table of endpoint IDs.
//
// The allocator is deterministic: it has no goroutine, no clock and no socket.
// The shell calls it with the present time, then takes what it produced with
// Drain: payloads for the allocator (EID 0) of other members, and events.
// Payloads for the own address are not special here; the shell hands them back
// to Receive.
//
// All methods must be called from one goroutine at a time, except Lookup and
// the methods of Flow that say otherwise, which are for the packet path.
package flowalloc

import (
	"encoding/binary"
	"errors"
	"io"
	"iter"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/wire"
)

const (
	// renewAfter is the time without a reply after which the requester is asked
	// for a new request; it doubles each time. The reference loses about one
	// reply in sixty (spec 10 oddity 10), and any frame may be lost.
	renewAfter = time.Second
	// renewals bounds the new requests: 1, 3 and 7 s after the first one.
	renewals = 3
	// answerWithin bounds how long a request waits for its answer here. The
	// requester's default time-out is 20 s (spec 33 §3).
	answerWithin = 30 * time.Second
	// lateReply is how long the EID of an abandoned request is remembered, so
	// that the peer of a late positive reply is told that nobody is there.
	lateReply = 30 * time.Second
	// partingFor is how long the peer of a released flow is remembered, to be
	// told again when it still sends: the message was lost, then. It covers four
	// keep-alives of the default peer time-out (spec 30 §10).
	partingFor = 2 * time.Minute
	// partingEvery spaces these repetitions, per flow.
	partingEvery = time.Second
	// maxPartings bounds how many are remembered; the oldest go first.
	maxPartings = 4096
	// Bounds against floods of requests.
	maxWaiting        = 256
	maxWaitingPerPeer = 64
	maxAbandoned      = 1024
)

// Config is what an allocator needs to know.
type Config struct {
	Self    uint64    // own address
	HashLen int       // bytes of the layer's directory hash
	MaxSDU  int       // largest payload of a data-transfer packet; 0: only the receiver's limit of 2048
	Rand    io.Reader // for EIDs; cryptographic outside of tests (spec 21 §4)
}

// Packet is a payload for the flow allocator (EID 0, cube 0) of member Dst.
type Packet struct {
	Dst     uint64
	Payload []byte
}

// Kind says what happened.
type Kind uint8

// Kinds of events.
const (
	Request     Kind = iota + 1 // a peer asks for a flow: answer with Respond
	Established                 // our request was accepted; Data is the reply's piggyback
	Refused                     // our request was refused with Code; the EID is gone
	Renew                       // no reply: get a fresh request and call Reissue, or let it be
	Dealloc                     // the peer released the flow; Close it
	Expired                     // a Request was not answered in time; the EID is gone
)

// Event is something the shell must react to. Slices are the event's own.
type Event struct {
	Kind Kind
	EID  uint64 // ours
	Flow *Flow
	Hash []byte // Request
	Data []byte // Request, Established
	Code int32  // Refused
}

// Counts are totals since New. The dropped ones are disjoint reasons.
type Counts struct {
	RequestsSent, RequestsReceived, Renewed                uint64
	AcceptsSent, RefusalsSent                              uint64
	AcceptsReceived, RefusalsReceived                      uint64
	DeallocsSent, DeallocsReceived, DeallocsRepeated       uint64
	Updates                                                uint64
	Malformed, UnknownCode, UnknownEID, Unexpected         uint64
	Duplicate, Flooded, NoEID, LateAccept, Bogus           uint64
	Abandoned, ExpiredRequests, FlowsOpen, RequestsWaiting uint64
}

// Allocator is the flow allocator of one member.
type Allocator struct {
	cfg     Config
	table   table
	byPeer  map[peer]*Flow // requests we got, and flows made of them
	waiting map[uint64]int // unanswered requests by address of the peer
	nwait   int
	late    map[uint64]abandoned
	// Flows that we released, by our EID, and the same with those that were
	// forgotten since, oldest first.
	partings map[uint64]*parting
	parted   []*parting
	timers   timers
	out      []Packet
	events   []Event
	n        Counts
}

type peer struct{ addr, eid uint64 }

type abandoned struct {
	addr uint64
	end  time.Time
}

type parting struct {
	eid, remote, peer uint64
	end, next         time.Time
}

// New returns an allocator without flows.
func New(cfg Config) *Allocator {
	a := &Allocator{
		cfg:     cfg,
		byPeer:  map[peer]*Flow{},
		waiting: map[uint64]int{},
		late:    map[uint64]abandoned{},

		partings: map[uint64]*parting{},
	}
	a.table.init()
	return a
}

// SetSelf changes the own address; flows stay, requests carry the new one.
func (a *Allocator) SetSelf(addr uint64) { a.cfg.Self = addr }

// Alloc sends a request for a flow to the service with hash at member dst and
// returns our EID. Data that arrives for it from now on belongs to the flow.
// With renewable set, Renew events follow while there is no reply. The caller
// bounds the whole by Cancel. Errors: EMSGSIZE, EAGAIN without a free EID.
func (a *Allocator) Alloc(now time.Time, dst uint64, hash []byte, q qos.Spec, data []byte, renewable bool) (uint64, error) {
	if len(hash) != a.cfg.HashLen {
		return 0, o7serr.Wrap(o7serr.EINVAL, "hash of %d bytes, expected %d", len(hash), a.cfg.HashLen)
	}
	if err := a.fits(len(hash) + len(data)); err != nil {
		return 0, err
	}
	f, err := a.newFlow(dst, q)
	if err != nil {
		return 0, err
	}
	f.state, f.hash, f.renewable = requesting, hash, renewable
	a.request(now, f, data)
	return f.eid, nil
}

func (a *Allocator) fits(n int) error {
	limit := wire.MaxFALen
	if a.cfg.MaxSDU > 0 {
		limit = min(limit, a.cfg.MaxSDU)
	}
	if wire.FALen+n > limit {
		return o7serr.Wrap(o7serr.EMSGSIZE, "flow allocator message of %d bytes, limit is %d", wire.FALen+n, limit)
	}
	return nil
}

func (a *Allocator) newFlow(peer uint64, q qos.Spec) (*Flow, error) {
	var r [4]byte
	if _, err := io.ReadFull(a.cfg.Rand, r[:]); err != nil {
		return nil, err
	}
	f := &Flow{peer: peer, qos: q}
	if !a.table.insert(f, binary.BigEndian.Uint32(r[:])) {
		a.n.NoEID++
		return nil, o7serr.Wrap(o7serr.EAGAIN, "all %d endpoint ids are in use", maxFlows)
	}
	return f, nil
}

func (a *Allocator) request(now time.Time, f *Flow, data []byte) {
	a.n.RequestsSent++
	a.send(f.peer, &wire.FAMsg{
		Code: wire.FAReq, SrcAddr: a.cfg.Self, SEID: f.eid, QoS: f.qos, Hash: f.hash, Data: data,
	})
	if f.renewable && f.renewed < renewals {
		f.deadline = now.Add(renewAfter << f.renewed)
		a.timers.add(f.deadline, f.eid)
	}
}

func (a *Allocator) send(dst uint64, m *wire.FAMsg) {
	a.out = append(a.out, Packet{dst, wire.AppendFA(nil, m)})
}

// Reissue gives up the pending request of eid and sends a new one, with fresh
// data and a new EID, to member dst (which the directory may have changed).
// It returns the new EID, whose Flow takes over User. On an error, which means
// that eid is not pending or that there is no room, eid is gone.
func (a *Allocator) Reissue(now time.Time, eid, dst uint64, data []byte) (uint64, error) {
	old := a.Lookup(eid)
	if old == nil || old.state != requesting {
		return 0, o7serr.Wrap(o7serr.ENOTALLOC, "endpoint %d has no pending request", eid)
	}
	a.abandon(now, old)
	if err := a.fits(len(old.hash) + len(data)); err != nil {
		return 0, err
	}
	f, err := a.newFlow(dst, old.qos)
	if err != nil {
		return 0, err
	}
	if u := old.User(); u != nil {
		f.SetUser(u)
	}
	f.state, f.hash, f.renewable, f.renewed = requesting, old.hash, true, old.renewed+1
	a.n.Renewed++
	a.request(now, f, data)
	return f.eid, nil
}

// Pending reports whether the request of eid has no reply. A reply that was
// received counts before its event was drained.
func (a *Allocator) Pending(eid uint64) bool {
	f := a.Lookup(eid)
	return f != nil && f.state == requesting
}

// abandon frees a pending request; a late acceptance will be answered with a
// deallocation, so that the peer need not wait for a time-out.
func (a *Allocator) abandon(now time.Time, f *Flow) {
	a.n.Abandoned++
	a.remove(f)
	if len(a.late) < maxAbandoned {
		a.late[f.eid] = abandoned{f.peer, now.Add(lateReply)}
		a.timers.add(now.Add(lateReply), f.eid)
	}
}

// Respond answers a Request: code 0 accepts, with the piggyback data; any
// other code refuses (spec 21 §3: -1007 when nobody accepts). Errors:
// ETIMEDOUT when the request is gone, EMSGSIZE when the data does not fit, in
// which case the request is refused.
func (a *Allocator) Respond(now time.Time, eid uint64, code int32, data []byte) error {
	f := a.Lookup(eid)
	if f == nil || f.state != waiting {
		return o7serr.Wrap(o7serr.ETIMEDOUT, "endpoint %d has no request that waits for an answer", eid)
	}
	var err error
	if code == 0 {
		if err = a.fits(len(data)); err != nil {
			code = o7serr.EIPCP.Code()
		}
	} else if code > 0 {
		code = -code
	}
	m := wire.FAMsg{Code: wire.FAReply, REID: f.Remote(), SEID: f.eid, Response: code}
	a.answered(f)
	if code == 0 {
		m.Data = data
		f.state = established
		f.since.Store(now.UnixNano())
		a.n.AcceptsSent++
	} else {
		a.remove(f)
		a.n.RefusalsSent++
	}
	a.send(f.peer, &m)
	return err
}

// answered takes f out of the bounded set of waiting requests.
func (a *Allocator) answered(f *Flow) {
	a.nwait--
	if a.waiting[f.peer]--; a.waiting[f.peer] <= 0 {
		delete(a.waiting, f.peer)
	}
	f.deadline = time.Time{}
}

// Close releases our end of eid, whatever its state: an established flow's
// peer is told (spec 50 §5), a pending request is given up, a waiting one is
// refused with -1007. Unknown EIDs are ignored.
func (a *Allocator) Close(now time.Time, eid uint64) {
	f := a.Lookup(eid)
	if f == nil {
		return
	}
	switch f.state {
	case requesting:
		a.abandon(now, f)
	case waiting:
		_ = a.Respond(now, eid, o7serr.ENAME.Code(), nil)
	case established:
		a.remove(f)
		a.dealloc(f.peer, f.eid, f.Remote())
		a.part(now, f)
	case released:
		a.remove(f)
	}
}

func (a *Allocator) dealloc(dst, own, remote uint64) {
	a.n.DeallocsSent++
	a.send(dst, &wire.FAMsg{Code: wire.FADealloc, REID: remote, SEID: own})
}

// part remembers whom f, which we release, was with.
func (a *Allocator) part(now time.Time, f *Flow) {
	p := &parting{eid: f.eid, remote: f.Remote(), peer: f.peer, end: now.Add(partingFor), next: now.Add(partingEvery)}
	for len(a.parted) > 0 && (len(a.parted) >= maxPartings || !a.parted[0].end.After(now)) {
		delete(a.partings, a.parted[0].eid)
		a.parted[0] = nil
		a.parted = a.parted[1:]
	}
	a.parted = append(a.parted, p)
	a.partings[p.eid] = p
}

// Stray takes note of data for an EID without a flow. If it was that of a flow
// that we released, its peer is told again, once a second.
func (a *Allocator) Stray(now time.Time, eid uint64) {
	p := a.partings[eid]
	if p == nil || !p.end.After(now) || p.next.After(now) {
		return
	}
	p.next = now.Add(partingEvery)
	a.n.DeallocsRepeated++
	a.dealloc(p.peer, p.eid, p.remote)
}

func (a *Allocator) remove(f *Flow) {
	a.table.remove(f)
	if p := (peer{f.peer, f.Remote()}); a.byPeer[p] == f {
		delete(a.byPeer, p)
	}
	f.deadline = time.Time{}
}

// Receive takes the payload of a packet for EID 0. It does not keep it.
func (a *Allocator) Receive(now time.Time, payload []byte) {
	m, err := wire.DecodeFA(payload, a.cfg.HashLen)
	switch {
	case errors.Is(err, wire.ErrUnknownCode):
		a.n.UnknownCode++
		return
	case err != nil:
		a.n.Malformed++
		return
	}
	switch m.Code {
	case wire.FAReq:
		a.requested(now, &m)
	case wire.FAReply:
		a.replied(now, &m)
	case wire.FAUpdate:
		if f := a.known(m.REID); f != nil && f.state == established {
			a.n.Updates++
			f.ece.Store(uint32(m.ECE))
			f.updates.Add(1)
		}
	case wire.FADealloc:
		f := a.known(m.REID)
		switch {
		case f == nil:
		case f.state != established || f.Remote() != m.SEID || m.SrcAddr != 0 && m.SrcAddr != f.peer:
			a.n.Unexpected++
		default:
			a.n.DeallocsReceived++
			f.state = released
			a.events = append(a.events, Event{Kind: Dealloc, EID: f.eid, Flow: f})
		}
	}
}

func (a *Allocator) known(eid uint64) *Flow {
	f := a.Lookup(eid)
	if f == nil {
		a.n.UnknownEID++
	}
	return f
}

// usable reports whether a peer's EID may be that of a flow: smaller ones are
// components, all-ones marks an unallocated flow in the reference (spec 21 §4).
func usable(eid uint64) bool { return eid >= firstEID && eid != ^uint64(0) }

func (a *Allocator) requested(now time.Time, m *wire.FAMsg) {
	a.n.RequestsReceived++
	p := peer{m.SrcAddr, m.SEID}
	switch {
	case !usable(m.SEID) || m.SrcAddr == 0:
		a.n.Bogus++
		return
	case a.byPeer[p] != nil:
		a.n.Duplicate++
		return
	case a.nwait >= maxWaiting || a.waiting[p.addr] >= maxWaitingPerPeer:
		a.n.Flooded++
		return
	}
	f, err := a.newFlow(p.addr, m.QoS)
	if err != nil { // counted
		return
	}
	f.state = waiting
	f.remote.Store(p.eid)
	f.deadline = now.Add(answerWithin)
	a.timers.add(f.deadline, f.eid)
	a.byPeer[p] = f
	a.nwait++
	a.waiting[p.addr]++
	a.events = append(a.events, Event{
		Kind: Request, EID: f.eid, Flow: f,
		Hash: append([]byte(nil), m.Hash...), Data: append([]byte(nil), m.Data...),
	})
}

func (a *Allocator) replied(now time.Time, m *wire.FAMsg) {
	if z, ok := a.late[m.REID]; ok {
		if m.Response >= 0 && usable(m.SEID) {
			a.n.LateAccept++
			delete(a.late, m.REID)
			a.dealloc(z.addr, m.REID, m.SEID)
		}
		return
	}
	f := a.known(m.REID)
	switch {
	case f == nil:
	case f.state != requesting:
		a.n.Unexpected++
	case m.Response < 0:
		a.n.RefusalsReceived++
		a.remove(f)
		a.events = append(a.events, Event{Kind: Refused, EID: f.eid, Flow: f, Code: m.Response})
	case !usable(m.SEID):
		a.n.Bogus++
	default:
		a.n.AcceptsReceived++
		f.state, f.deadline = established, time.Time{}
		f.since.Store(now.UnixNano())
		f.remote.Store(m.SEID)
		a.events = append(a.events, Event{
			Kind: Established, EID: f.eid, Flow: f, Data: append([]byte(nil), m.Data...),
		})
	}
}

// Tick handles the deadlines that have passed.
func (a *Allocator) Tick(now time.Time) {
	for {
		eid, ok := a.timers.expired(now)
		if !ok {
			return
		}
		if z, ok := a.late[eid]; ok && !z.end.After(now) {
			delete(a.late, eid)
			continue
		}
		f := a.Lookup(eid)
		if f == nil || f.deadline.IsZero() || f.deadline.After(now) {
			continue // cancelled
		}
		f.deadline = time.Time{}
		switch f.state {
		case requesting:
			a.events = append(a.events, Event{Kind: Renew, EID: f.eid, Flow: f})
		case waiting:
			a.n.ExpiredRequests++
			a.answered(f)
			a.remove(f)
			a.events = append(a.events, Event{Kind: Expired, EID: f.eid, Flow: f})
		}
	}
}

// NextDeadline is when Tick has something to do; zero: never.
func (a *Allocator) NextDeadline() time.Time { return a.timers.next() }

// Drain returns and forgets what was produced since the last call, in order.
func (a *Allocator) Drain() ([]Packet, []Event) {
	out, events := a.out, a.events
	a.out, a.events = nil, nil
	return out, events
}

// Lookup returns the flow whose EID, all 64 bits of it, is ours; else nil. It
// takes no lock and may be called from any goroutine at any time.
func (a *Allocator) Lookup(eid uint64) *Flow { return a.table.lookup(eid) }

// Flows yields all flows, those that are being allocated included.
func (a *Allocator) Flows() iter.Seq[*Flow] { return a.table.all }

// Counts returns the totals.
func (a *Allocator) Counts() Counts {
	c := a.n
	c.RequestsWaiting = uint64(a.nwait)
	for range a.Flows() {
		c.FlowsOpen++
	}
	return c
}
