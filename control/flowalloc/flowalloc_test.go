package flowalloc

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Worked bytes of spec 21, without the 15 bytes of the data-transfer header.
const (
	nameHash  = "42dee3b0415b4f690fd91cbd99876f1e9bd8d9745ef7fa32b142773af0349d54"
	clientOAP = "101112131415161718191a1b1c1d1e1f18904d9f4bcccd150000000000000000 00000000"
	serverOAP = `101112131415161718191a1b1c1d1e1f18904d9f4c1918550000000000000000 00000000
		587e1697c0452f8d2d327e33a260ce16ca786745a6131cc4ecf5ac158acce909
		7f0c51285820b839c159914b2b494bca`
	goldenRequest = `000000000a1b2c3d 0000000000000000 deadbeef00000041 0000000000000000 00000000
		ffffffff 00000001 00000001 ffffffff 0001d4c0 0000 00 00 00` + nameHash + clientOAP
	goldenReply = `0000000000000000 deadbeef00000041 1234567800000043 0000000000000000 00000000
		00000000 00000000 00000000 00000000 00000000 0000 01 00 00` + serverOAP
	goldenUpdate = `0000000000000000 deadbeef00000041 0000000000000000 0000000000000000 00000000
		00000000 00000000 00000000 00000000 00000000 0025 02 00 00`
	capturedRefusal = `0000000000000000 dfd868a400000042 e7f67eaf00000048 0000000000000000 fffffc10
		00000000 00000000 00000000 00000000 00000000 0000 01 00 00`
)

const client, server = 0x0a1b2c3d, 0x4e5f6071

var t0 = time.Date(2026, 2, 22, 0, 0, 0, 0, time.UTC)

// random yields the high halves of EIDs of the worked example, then others.
func allocator(self uint64, high ...uint32) *Allocator {
	var r bytes.Buffer
	for _, h := range high {
		r.Write([]byte{byte(h >> 24), byte(h >> 16), byte(h >> 8), byte(h)})
	}
	return New(Config{Self: self, HashLen: 32, Rand: &then{&r, rand.NewChaCha8([32]byte{byte(self)})}})
}

type then struct {
	first *bytes.Buffer
	rest  *rand.ChaCha8
}

func (t *then) Read(p []byte) (int, error) {
	if t.first.Len() > 0 {
		return t.first.Read(p)
	}
	return t.rest.Read(p)
}

// skip uses up the first n descriptors.
func skip(t *testing.T, a *Allocator, n int) {
	t.Helper()
	for range n {
		if f, err := a.newFlow(1, qos.Raw); err != nil {
			t.Fatal(f, err)
		}
	}
}

func one(t *testing.T, a *Allocator) Packet {
	t.Helper()
	out, _ := a.Drain()
	if len(out) != 1 {
		t.Fatalf("%d packets, want 1", len(out))
	}
	return out[0]
}

func event(t *testing.T, a *Allocator, k Kind) Event {
	t.Helper()
	_, events := a.Drain()
	if len(events) != 1 || events[0].Kind != k {
		t.Fatalf("events %+v, want one of kind %d", events, k)
	}
	return events[0]
}

func alloc(t *testing.T, a *Allocator, renewable bool) uint64 {
	t.Helper()
	eid, err := a.Alloc(t0, server, unhex(t, nameHash), qos.Raw, unhex(t, clientOAP), renewable)
	if err != nil {
		t.Fatal(err)
	}
	return eid
}

// The life of a flow in the worked bytes of the specification.
func TestGolden(t *testing.T) {
	c, s := allocator(client, 0, 0xdeadbeef), allocator(server, 0, 0, 0, 0x12345678)
	skip(t, c, 1)
	skip(t, s, 3)

	eid := alloc(t, c, true)
	if eid != 0xdeadbeef00000041 {
		t.Fatalf("eid %x", eid)
	}
	req := one(t, c)
	if d := cmp.Diff(Packet{server, unhex(t, goldenRequest)}, req); d != "" {
		t.Fatal(d)
	}
	if f := c.Lookup(eid); f == nil || f.Remote() != 0 {
		t.Fatal("the pending flow is not in the table")
	}

	s.Receive(t0, req.Payload)
	in := event(t, s, Request)
	if in.Flow.QoS() != qos.Raw || in.Flow.Peer() != client || !bytes.Equal(in.Hash, unhex(t, nameHash)) ||
		!bytes.Equal(in.Data, unhex(t, clientOAP)) {
		t.Fatalf("request %+v", in)
	}
	if err := s.Respond(t0, in.EID, 0, unhex(t, serverOAP)); err != nil {
		t.Fatal(err)
	}
	reply := one(t, s)
	if d := cmp.Diff(Packet{client, unhex(t, goldenReply)}, reply); d != "" {
		t.Fatal(d)
	}
	c.Receive(t0, reply.Payload)
	up := event(t, c, Established)
	if up.EID != eid || up.Flow.Remote() != in.EID || !bytes.Equal(up.Data, unhex(t, serverOAP)) || !up.Flow.Since().Equal(t0) {
		t.Fatalf("established %+v", up)
	}

	c.Receive(t0, unhex(t, goldenUpdate))
	if up.Flow.Congestion() != 0x25 || up.Flow.Updates() != 1 {
		t.Errorf("congestion %#x after %d updates", up.Flow.Congestion(), up.Flow.Updates())
	}

	c.Close(t0, eid)
	bye := one(t, c)
	m, err := wire.DecodeFA(bye.Payload, 32)
	if err != nil || m.Code != wire.FADealloc || m.REID != in.EID || m.SEID != eid || bye.Dst != server || len(bye.Payload) != 61 {
		t.Fatalf("deallocation %+v, %v", m, err)
	}
	s.Receive(t0, bye.Payload)
	if e := event(t, s, Dealloc); e.EID != in.EID {
		t.Errorf("dealloc of %x", e.EID)
	}
	s.Close(t0, in.EID)
	if out, _ := s.Drain(); len(out) != 0 || s.Lookup(in.EID) != nil || c.Lookup(eid) != nil {
		t.Errorf("after the release: %d packets", len(out))
	}
}

func TestRefusal(t *testing.T) {
	c := allocator(client, 0, 0, 0xdfd868a4)
	skip(t, c, 2)
	eid := alloc(t, c, true)
	c.Drain()
	c.Receive(t0, unhex(t, capturedRefusal))
	if e := event(t, c, Refused); e.EID != eid || e.Code != -1008 || c.Lookup(eid) != nil {
		t.Errorf("event %+v", e)
	}
	// And our own refusal is what the reference understands.
	s := allocator(server)
	s.Receive(t0, unhex(t, goldenRequest))
	in := event(t, s, Request)
	if err := s.Respond(t0, in.EID, o7serr.ENAME.Code(), nil); err != nil {
		t.Fatal(err)
	}
	m, err := wire.DecodeFA(one(t, s).Payload, 32)
	if err != nil || m.Response != -1007 || m.REID != 0xdeadbeef00000041 {
		t.Errorf("refusal %+v %v", m, err)
	}
	if err := s.Respond(t0, in.EID, 0, nil); !errors.Is(err, o7serr.ETIMEDOUT) {
		t.Errorf("second answer: %v", err)
	}
}

// A repeated request must not make a second flow (spec 21 oddity 3); a reply
// for an established flow must not change it (oddity 4).
func TestDuplicates(t *testing.T) {
	c, s := allocator(client, 0xdeadbeef), allocator(server)
	eid := alloc(t, c, false)
	req := one(t, c)
	s.Receive(t0, req.Payload)
	s.Receive(t0, req.Payload)
	in := event(t, s, Request)
	if err := s.Respond(t0, in.EID, 0, nil); err != nil {
		t.Fatal(err)
	}
	reply := one(t, s)
	s.Receive(t0, req.Payload)
	if out, events := s.Drain(); len(out)+len(events) != 0 {
		t.Errorf("a late copy of the request had an effect")
	}
	c.Receive(t0, reply.Payload)
	event(t, c, Established)
	refusal := wire.AppendFA(nil, &wire.FAMsg{Code: wire.FAReply, REID: eid, SEID: 4711, Response: -1009})
	c.Receive(t0, refusal)
	if _, events := c.Drain(); len(events) != 0 || c.Lookup(eid).Remote() != in.EID {
		t.Errorf("a reply out of time had an effect: %+v", events)
	}
	if n := s.Counts(); n.Duplicate != 2 || n.RequestsReceived != 3 {
		t.Errorf("counts %+v", n)
	}
}

// No reply: new requests after 1, 2 and 4 s more, then silence; an acceptance
// of one that was given up is answered with a deallocation.
func TestRenew(t *testing.T) {
	c, s := allocator(client), allocator(server)
	eid := alloc(t, c, true)
	c.Lookup(eid).SetUser("user")
	first := one(t, c)
	now := t0
	for i, wait := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second} {
		if got := c.NextDeadline().Sub(now); got != wait {
			t.Fatalf("renewal %d after %v, want %v", i, got, wait)
		}
		now = now.Add(wait)
		c.Tick(now)
		if e := event(t, c, Renew); e.EID != eid {
			t.Fatalf("renew of %x", e.EID)
		}
		next, err := c.Reissue(now, eid, server, []byte{byte(i)})
		if err != nil || next == eid || c.Lookup(eid) != nil || c.Lookup(next).User() != "user" {
			t.Fatalf("eid %x then %x, %v", eid, next, err)
		}
		eid = next
		m, err := wire.DecodeFA(one(t, c).Payload, 32)
		if err != nil || m.SEID != eid || !bytes.Equal(m.Data, []byte{byte(i)}) {
			t.Fatalf("new request %+v, %v", m, err)
		}
	}
	s.Receive(now, first.Payload)
	in := event(t, s, Request)
	if err := s.Respond(now, in.EID, 0, nil); err != nil {
		t.Fatal(err)
	}
	c.Receive(now, one(t, s).Payload)
	s.Receive(now, one(t, c).Payload)
	event(t, s, Dealloc)

	c.Close(now, eid)
	now = now.Add(time.Minute)
	c.Tick(now)
	if !c.NextDeadline().IsZero() || len(c.late) != 0 || c.Counts().FlowsOpen != 0 {
		t.Errorf("left: deadline %v, %d late, %+v", c.NextDeadline(), len(c.late), c.Counts())
	}
}

func TestNotRenewable(t *testing.T) {
	c := allocator(client)
	alloc(t, c, false)
	if !c.NextDeadline().IsZero() {
		t.Error("a request that cannot be renewed has a timer")
	}
}

func request(src, eid uint64) []byte {
	return wire.AppendFA(nil, &wire.FAMsg{Code: wire.FAReq, SrcAddr: src, SEID: eid, QoS: qos.Raw, Hash: make([]byte, 32)})
}

func TestFlood(t *testing.T) {
	s := allocator(server)
	for i := range uint64(100) {
		s.Receive(t0, request(1, 1000+i))
	}
	if n := s.Counts(); n.RequestsWaiting != maxWaitingPerPeer || n.Flooded != 100-maxWaitingPerPeer {
		t.Errorf("one peer: %+v", n)
	}
	for p := range uint64(20) {
		for i := range uint64(20) {
			s.Receive(t0, request(2+p, 1000+i))
		}
	}
	if n := s.Counts(); n.RequestsWaiting != maxWaiting {
		t.Errorf("many peers: %+v", n)
	}
	s.Drain()
	s.Tick(t0.Add(answerWithin))
	_, events := s.Drain()
	if n := s.Counts(); len(events) != maxWaiting || n.RequestsWaiting != 0 || n.FlowsOpen != 0 || len(s.byPeer)+len(s.waiting) != 0 {
		t.Errorf("%d events; %+v", len(events), n)
	}
}

func TestBadInput(t *testing.T) {
	s := allocator(server)
	good := request(1, 100)
	for n := range len(good) {
		s.Receive(t0, good[:n])
	}
	s.Receive(t0, request(0, 100))           // no address
	s.Receive(t0, request(1, 63))            // a component's EID
	s.Receive(t0, request(1, ^uint64(0)))    // "not allocated"
	s.Receive(t0, make([]byte, 2049))        // too long
	s.Receive(t0, unhex(t, goldenReply))     // not ours
	s.Receive(t0, unhex(t, goldenUpdate))    // not ours
	bye := wire.FAMsg{Code: wire.FADealloc}  // not ours
	s.Receive(t0, wire.AppendFA(nil, &bye))  //
	odd := append([]byte(nil), good[:61]...) // a code of the future
	odd[58] = 77
	s.Receive(t0, odd)
	out, events := s.Drain()
	n := s.Counts()
	if len(out)+len(events) != 0 || n.Malformed != uint64(len(good))+1 || n.Bogus != 3 || n.UnknownEID != 3 || n.UnknownCode != 1 {
		t.Errorf("%d packets, %d events, %+v", len(out), len(events), n)
	}
}

// A peer that knows one EID only, or another flow's, cannot release a flow.
func TestDeallocNeedsBoth(t *testing.T) {
	s := allocator(server)
	s.Receive(t0, request(1, 100))
	in := event(t, s, Request)
	if err := s.Respond(t0, in.EID, 0, nil); err != nil {
		t.Fatal(err)
	}
	s.Drain()
	for _, m := range []wire.FAMsg{{SEID: 101}, {SEID: 100, SrcAddr: 2}, {}} {
		m.Code, m.REID = wire.FADealloc, in.EID
		s.Receive(t0, wire.AppendFA(nil, &m))
	}
	if _, events := s.Drain(); len(events) != 0 || s.Counts().Unexpected != 3 {
		t.Errorf("events %+v, counts %+v", events, s.Counts())
	}
}

// Whoever still sends to a flow that we released has missed the deallocation:
// it gets it again, once a second, for two minutes.
func TestStray(t *testing.T) {
	s := allocator(server)
	s.Receive(t0, request(1, 100))
	in := event(t, s, Request)
	if err := s.Respond(t0, in.EID, 0, nil); err != nil {
		t.Fatal(err)
	}
	s.Drain()
	s.Close(t0, in.EID)
	lost := one(t, s)
	silent := func(now time.Time, eid uint64) {
		t.Helper()
		s.Stray(now, eid)
		if out, _ := s.Drain(); len(out) != 0 {
			t.Errorf("stray data for %x is answered", eid)
		}
	}
	silent(t0, in.EID)
	now := t0.Add(partingEvery)
	silent(now, in.EID+1)
	s.Stray(now, in.EID)
	if d := cmp.Diff(lost, one(t, s)); d != "" {
		t.Error(d)
	}
	silent(now, in.EID)
	silent(t0.Add(partingFor), in.EID)
	if n := s.Counts(); n.DeallocsRepeated != 1 {
		t.Errorf("%+v", n)
	}
	for i := range uint64(3 * maxPartings) {
		s.part(t0, &Flow{eid: i})
	}
	if len(s.parted) > maxPartings || len(s.partings) > maxPartings {
		t.Errorf("%d and %d released flows are remembered", len(s.parted), len(s.partings))
	}
}

func TestLimits(t *testing.T) {
	a := allocator(client)
	big := make([]byte, wire.MaxFAReqData(32)+1)
	hash := make([]byte, 32)
	if _, err := a.Alloc(t0, server, hash, qos.Raw, big, false); !errors.Is(err, o7serr.EMSGSIZE) {
		t.Errorf("too much data: %v", err)
	}
	if _, err := a.Alloc(t0, server, hash[1:], qos.Raw, nil, false); !errors.Is(err, o7serr.EINVAL) {
		t.Errorf("short hash: %v", err)
	}
	if _, err := a.Alloc(t0, server, hash, qos.Raw, big[1:], false); err != nil {
		t.Error(err)
	}
	for range maxFlows - 1 {
		if _, err := a.Alloc(t0, server, hash, qos.Raw, nil, false); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.Alloc(t0, server, hash, qos.Raw, nil, false); !errors.Is(err, o7serr.EAGAIN) {
		t.Errorf("one flow too many: %v", err)
	}
	a.Receive(t0, request(1, 100))
	if n := a.Counts(); n.NoEID != 2 || n.FlowsOpen != maxFlows {
		t.Errorf("%+v", n)
	}
	s := allocator(server)
	s.Receive(t0, request(1, 100))
	in := event(t, s, Request)
	if err := s.Respond(t0, in.EID, 0, make([]byte, wire.MaxFAReplyData+1)); !errors.Is(err, o7serr.EMSGSIZE) {
		t.Errorf("too long a reply: %v", err)
	}
	if m, err := wire.DecodeFA(one(t, s).Payload, 32); err != nil || m.Response != -1003 || len(m.Data) != 0 {
		t.Errorf("reply %+v %v", m, err)
	}
}

// A freed descriptor comes last, and with a new random half.
func TestDescriptorsRotate(t *testing.T) {
	a := allocator(client)
	seen := map[uint64]bool{}
	for i := range 2 * maxFlows {
		eid := alloc(t, a, false)
		if want := uint32(64 + i%maxFlows); uint32(eid) != want {
			t.Fatalf("descriptor %d, want %d", uint32(eid), want)
		}
		if seen[eid] {
			t.Fatalf("eid %x twice", eid)
		}
		seen[eid] = true
		a.Close(t0, eid)
		a.Drain()
	}
}

// Two allocators on a network that loses, doubles and reorders: an established
// flow keeps its partner, the shell knows every flow, nothing is left at the end.
func TestLossyNetwork(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := t0
		nodes := map[uint64]*Allocator{1: allocator(1), 2: allocator(2)}
		var air []Packet
		open := map[uint64]map[uint64]bool{1: {}, 2: {}} // EIDs the shell holds
		pair := map[uint64]uint64{}                      // own EID -> the peer's, as established
		pump := func(id uint64) {
			out, events := nodes[id].Drain()
			air = append(air, out...)
			for _, e := range events {
				switch e.Kind {
				case Request:
					open[id][e.EID] = true
				case Established:
					pair[e.EID] = e.Flow.Remote()
				case Refused, Expired:
					if !open[id][e.EID] {
						t.Fatalf("event %+v for an unknown flow", e)
					}
					delete(open[id], e.EID)
				}
			}
		}
		pick := func(t *rapid.T, id uint64) (uint64, bool) {
			var eids []uint64
			for f := range nodes[id].Flows() {
				eids = append(eids, f.EID())
			}
			if len(eids) == 0 {
				return 0, false
			}
			return rapid.SampledFrom(eids).Draw(t, "eid"), true
		}
		node := rapid.SampledFrom([]uint64{1, 2})
		t.Repeat(map[string]func(*rapid.T){
			"alloc": func(t *rapid.T) {
				id := node.Draw(t, "node")
				eid, err := nodes[id].Alloc(now, 3-id, make([]byte, 32), qos.Raw, nil, true)
				if err == nil {
					open[id][eid] = true
				}
				pump(id)
			},
			"respond": func(t *rapid.T) {
				id := node.Draw(t, "node")
				if eid, ok := pick(t, id); ok {
					f := nodes[id].Lookup(eid)
					code := rapid.SampledFrom([]int32{0, -1007}).Draw(t, "code")
					if nodes[id].Respond(now, eid, code, nil) == nil {
						if code == 0 {
							pair[eid] = f.Remote()
						} else {
							delete(open[id], eid)
						}
					}
					pump(id)
				}
			},
			"close": func(t *rapid.T) {
				id := node.Draw(t, "node")
				if eid, ok := pick(t, id); ok {
					nodes[id].Close(now, eid)
					delete(open[id], eid)
					pump(id)
				}
			},
			"renew": func(t *rapid.T) {
				id := node.Draw(t, "node")
				if eid, ok := pick(t, id); ok && nodes[id].Lookup(eid).state == requesting {
					delete(open[id], eid)
					if eid, err := nodes[id].Reissue(now, eid, 3-id, nil); err == nil {
						open[id][eid] = true
					}
					pump(id)
				}
			},
			"deliver": func(t *rapid.T) {
				if len(air) == 0 {
					return
				}
				i := rapid.IntRange(0, len(air)-1).Draw(t, "packet")
				p := air[i]
				switch rapid.IntRange(0, 3).Draw(t, "fate") {
				case 0: // doubled
				default:
					air = append(air[:i], air[i+1:]...)
				}
				nodes[p.Dst].Receive(now, p.Payload)
				pump(p.Dst)
			},
			"tick": func(t *rapid.T) {
				now = now.Add(time.Duration(rapid.IntRange(1, 5000).Draw(t, "ms")) * time.Millisecond)
				for id, a := range nodes {
					a.Tick(now)
					if d := a.NextDeadline(); !d.IsZero() && !d.After(now) {
						t.Fatalf("node %d: deadline %v is not in the future", id, d.Sub(now))
					}
					pump(id)
				}
			},
			"": func(t *rapid.T) {
				for id, a := range nodes {
					n := 0
					for f := range a.Flows() {
						n++
						if !open[id][f.EID()] {
							t.Fatalf("node %d has a flow the shell does not know", id)
						}
						if f.state == established && pair[f.EID()] != f.Remote() {
							t.Fatalf("flow %x changed its partner", f.EID())
						}
					}
					if n != len(open[id]) {
						t.Fatalf("node %d: %d flows, the shell knows %d", id, n, len(open[id]))
					}
				}
			},
		})
		for id, a := range nodes {
			for eid := range open[id] {
				a.Close(now, eid)
			}
			a.Tick(now.Add(time.Hour))
			if n := a.Counts(); n.FlowsOpen+n.RequestsWaiting != 0 || len(a.byPeer)+len(a.late)+len(a.waiting)+len(a.timers) != 0 {
				t.Fatalf("left: %+v", n)
			}
		}
	})
}

func FuzzReceive(f *testing.F) {
	for _, s := range []string{goldenRequest, goldenReply, goldenUpdate, capturedRefusal} {
		b, _ := hex.DecodeString(strings.Join(strings.Fields(s), ""))
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a := allocator(server, 0xdeadbeef, 0xdfd868a4)
		skip(t, a, 1)
		eid, err := a.Alloc(t0, client, make([]byte, 32), qos.Raw, nil, true)
		if err != nil {
			t.Fatal(err)
		}
		a.Receive(t0, b)
		_, events := a.Drain()
		for _, e := range events {
			if e.Kind == Request && a.Respond(t0, e.EID, 0, nil) != nil {
				t.Error("a request cannot be answered")
			}
		}
		a.Receive(t0, b)
		a.Tick(t0.Add(time.Minute))
		a.Close(t0, eid)
	})
}

func BenchmarkLookup(b *testing.B) {
	a := allocator(client)
	f, err := a.newFlow(1, qos.Raw)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if a.Lookup(f.eid) == nil {
			b.Fatal("lost")
		}
	}
}
