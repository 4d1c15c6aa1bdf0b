package core

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket/pcapgo"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	clientMAC = MAC{2, 0, 0, 0, 1, 2}
	serverMAC = MAC{2, 0, 0, 0, 2, 1}
	dix       = DIX{EtherType: wire.DefaultEtherType}
	t0        = time.Date(2026, 2, 22, 0, 0, 0, 0, time.UTC)
)

func member(mac MAC) *Core {
	return New(Config{Framer: dix, MAC: mac, MaxSDU: 1496, HashLen: 32})
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Worked bytes of spec 10.
const (
	nameHash   = `42dee3b0415b4f690fd91cbd99876f1e9bd8d9745ef7fa32b142773af0349d54`
	clientOAP  = `101112131415161718191a1b1c1d1e1f18904d9f4bcccd15000000000000000000000000`
	serverOAP  = `101112131415161718191a1b1c1d1e1f18904d9f4c191855000000000000000000000000587e1697c0452f8d2d327e33a260ce16ca786745a6131cc4ecf5ac158acce9097f0c51285820b839c159914b2b494bca`
	zeros      = `000000000000000000000000000000000000000000000000000000000000000000` // 33 bytes
	goldQuery  = `ffffffffffff 020000000102 a000 0000 0047 00000000` + zeros + `02 00` + nameHash
	goldAnswer = `020000000102 020000000201 a000 0000 0047 00000000` + zeros + `03 00` + nameHash
	goldReq    = `020000000201 020000000102 a000 0000 006b 0040 0000 00000001 0000000000000000
		00000001 ffffffff ffffffff 0001d4c0 00000000 00 00 00` + nameHash + clientOAP
	goldReply = `020000000102 020000000201 a000 0000 007b 0040 0040` + zeros + `01 00` + serverOAP
)

// drained is what a core produced, frames decoded.
type drained struct {
	frames [][]byte
	events []Event
}

func drain(c *Core) drained {
	f, e := c.Drain()
	return drained{f, e}
}

func (d drained) kinds() (k []Kind) {
	for _, e := range d.events {
		k = append(k, e.Kind)
	}
	return k
}

func (d drained) frame(t *testing.T) []byte {
	t.Helper()
	if len(d.frames) != 1 {
		t.Fatalf("%d frames, want 1", len(d.frames))
	}
	return d.frames[0]
}

// give passes a frame as the demultiplexer does.
func give(t testing.TB, c *Core, now time.Time, frame []byte) {
	t.Helper()
	f, err := dix.Parse(frame)
	if err != nil || f.Local != 0 {
		t.Fatalf("frame %x: %+v, %v", frame, f, err)
	}
	c.Receive(now, f.Src, f.Dst, frame[f.Offset:f.Offset+f.Bytes])
}

func mgmt(from, to MAC, m *wire.EthMgmt) []byte { return dix.MgmtFrame(to, from, m) }

func expect(t *testing.T, d drained, kinds ...Kind) {
	t.Helper()
	if diff := cmp.Diff(kinds, d.kinds()); diff != "" {
		t.Fatal("events:", diff)
	}
}

// The life of a flow in the worked bytes of the specification.
func TestGolden(t *testing.T) {
	c, s := member(clientMAC), member(serverMAC)
	hash := unhex(t, nameHash)
	s.Register(hash)

	if c.Query(t0, hash, time.Time{}) {
		t.Fatal("unknown name is known")
	}
	query := drain(c).frame(t)
	if d := cmp.Diff(unhex(t, goldQuery), query); d != "" {
		t.Fatal("query:", d)
	}
	give(t, s, t0, query)
	answer := drain(s).frame(t)
	if d := cmp.Diff(unhex(t, goldAnswer), answer); d != "" {
		t.Fatal("answer:", d)
	}
	give(t, c, t0, answer)
	expect(t, drain(c), NameFound)
	if !c.Query(t0, hash, time.Time{}) {
		t.Fatal("known name is unknown")
	}

	id, err := c.Alloc(t0, hash, qos.Raw, unhex(t, clientOAP), true)
	if err != nil {
		t.Fatal(err)
	}
	d := drain(c)
	expect(t, d, Opened)
	if diff := cmp.Diff(unhex(t, goldReq), d.frame(t)); diff != "" {
		t.Fatal("request:", diff)
	}
	give(t, s, t0, d.frame(t))
	d = drain(s)
	expect(t, d, Arrived)
	in := d.events[0]
	if in.QoS != qos.Raw || !bytes.Equal(in.Hash, hash) || !bytes.Equal(in.Data, unhex(t, clientOAP)) || in.Peer != clientMAC {
		t.Fatalf("request %+v", in)
	}
	local, to, remote, err := s.Respond(t0, in.ID, 0, unhex(t, serverOAP))
	if err != nil || local != 64 || to != clientMAC || remote != 64 {
		t.Fatal(local, to, remote, err)
	}
	reply := drain(s).frame(t)
	if d := cmp.Diff(unhex(t, goldReply), reply); d != "" {
		t.Fatal("reply:", d)
	}
	give(t, c, t0, reply)
	d = drain(c)
	expect(t, d, Established)
	if e := d.events[0]; e.ID != id || e.Endpoint != 64 || e.Remote != 64 || e.Peer != serverMAC || !bytes.Equal(e.Data, unhex(t, serverOAP)) {
		t.Fatalf("established %+v", e)
	}
	if !c.NextDeadline().IsZero() {
		c.Tick(t0.Add(time.Hour)) // stale timers have no effect
		expect(t, drain(c))
	}

	c.Close(t0, 64, 0)
	d = drain(c)
	expect(t, d, Vacated)
	bye, err := wire.DecodeDIXMgmt(d.frame(t)[18:], 32)
	if err != nil || bye.Code != 16 || bye.SrcEID != 64 || bye.DstEID != 64 || len(d.frame(t)) != 18+39 {
		t.Fatalf("deallocation %+v %v", bye, err)
	}
	give(t, s, t0, d.frame(t))
	expect(t, drain(s), Dealloc)
	s.Close(t0, 64, 0)
	d = drain(s)
	expect(t, d, Vacated)
	if len(d.frames) != 0 {
		t.Error("the answer to a deallocation is silence")
	}
}

// A data frame of the worked bytes.
func TestGoldenData(t *testing.T) {
	want := unhex(t, `020000000201 020000000102 a000 0040 0005 68656c6c6f`)
	h := dix.Header(serverMAC, clientMAC, 64, 99)
	dix.SetLength(h, 5)
	got := append(h, "hello"...)
	if d := cmp.Diff(want, got); d != "" {
		t.Fatal(d)
	}
	f, err := dix.Parse(append(got, make([]byte, 37)...)) // padded
	if err != nil || f != (Frame{Dst: serverMAC, Src: clientMAC, Local: 64, Offset: 18, Bytes: 5}) {
		t.Error(f, err)
	}
	if _, err := (DIX{0xa001}).Parse(got); !errors.Is(err, ErrOtherProtocol) {
		t.Error("another EtherType:", err)
	}
	for n := range got {
		if _, err := dix.Parse(got[:n]); err == nil {
			t.Errorf("%d bytes of a frame are accepted", n)
		}
	}
}

// Queries repeat after 50, 100, 150 ... ms and end after 2 s or at the deadline.
func TestQuerySchedule(t *testing.T) {
	hash := unhex(t, nameHash)
	for _, c := range []struct {
		deadline time.Duration
		want     []int // ms of the queries, then of the end
	}{
		{0, []int{0, 50, 150, 300, 500, 750, 1050, 1400, 1800, 2000}},
		{time.Minute, []int{0, 50, 150, 300, 500, 750, 1050, 1400, 1800, 2000}},
		{200 * time.Millisecond, []int{0, 50, 150, 200}},
		{20 * time.Millisecond, []int{0, 20}},
	} {
		m := member(clientMAC)
		var end time.Time
		if c.deadline != 0 {
			end = t0.Add(c.deadline)
		}
		m.Query(t0, hash, end)
		var got []int
		for now := t0; ; now = m.NextDeadline() {
			m.Tick(now)
			d := drain(m)
			if len(d.frames)+len(d.events) > 0 {
				got = append(got, int(now.Sub(t0)/time.Millisecond))
			}
			if len(d.events) > 0 {
				expect(t, d, NameUnknown)
				break
			}
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Error(c.deadline, d)
		}
		if len(m.queries)+len(m.timers) != 0 {
			t.Errorf("left: %d queries, %d timers", len(m.queries), len(m.timers))
		}
	}
}

func TestCancelQuery(t *testing.T) {
	m, hash := member(clientMAC), make([]byte, 32)
	m.Query(t0, hash, time.Time{})
	m.CancelQuery(hash)
	drain(m)
	m.Tick(t0.Add(time.Hour))
	if d := drain(m); len(d.frames)+len(d.events) != 0 {
		t.Error("a cancelled query goes on")
	}
}

func answer(from, to MAC, hash []byte) []byte {
	return mgmt(from, to, &wire.EthMgmt{Code: wire.NameQueryReply, Hash: hash})
}

func TestCache(t *testing.T) {
	m := member(clientMAC)
	hash := unhex(t, nameHash)
	other := MAC{2, 0, 0, 0, 3, 1}
	give(t, m, t0, answer(other, clientMAC, hash)) // unasked
	give(t, m, t0, answer(serverMAC, clientMAC, hash))
	if mac, ok := m.resolve(t0, string(hash)); !ok || mac != serverMAC {
		t.Error("the newest answer does not win")
	}
	give(t, m, t0.Add(30*time.Second), answer(other, clientMAC, hash))
	if mac, _ := m.resolve(t0.Add(59*time.Second), string(hash)); mac != other {
		t.Error("a repeated answer does not move to the front")
	}
	if len(m.cache[string(hash)]) != 2 {
		t.Error("a repeated answer makes a second entry")
	}
	m.resolve(t0.Add(61*time.Second), string(hash))
	if len(m.cache[string(hash)]) != 1 {
		t.Error("an old entry does not expire")
	}
	if _, ok := m.resolve(t0.Add(91*time.Second), string(hash)); ok || len(m.cache) != 0 {
		t.Error("old entries do not expire")
	}
	for i := range 20 {
		give(t, m, t0, answer(MAC{2, 1, byte(i)}, clientMAC, hash))
	}
	if len(m.cache[string(hash)]) != maxCachedPerHash {
		t.Errorf("%d entries of one name", len(m.cache[string(hash)]))
	}
	for i := range 2 * maxCached {
		h := make([]byte, 32)
		h[0], h[1], h[2] = byte(i), byte(i>>8), 1
		give(t, m, t0, answer(serverMAC, clientMAC, h))
	}
	if len(m.cache) != maxCached || m.Counts().CacheFull == 0 {
		t.Errorf("%d names cached", len(m.cache))
	}
	// What is asked for finds room all the same.
	mine := bytes.Repeat([]byte{9}, 32)
	m.Query(t0, mine, time.Time{})
	give(t, m, t0, answer(serverMAC, clientMAC, mine))
	if !m.Query(t0, mine, time.Time{}) {
		t.Error("an answer that was asked for is not kept")
	}
}

// establish makes a flow from c to s and returns both endpoints.
func establish(t *testing.T, c, s *Core, now time.Time) (client, server uint16) {
	t.Helper()
	hash := unhex(t, nameHash)
	s.Register(hash)
	give(t, c, now, answer(s.cfg.MAC, c.cfg.MAC, hash))
	drain(c)
	if _, err := c.Alloc(now, hash, qos.Raw, nil, false); err != nil {
		t.Fatal(err)
	}
	give(t, s, now, drain(c).frame(t))
	d := drain(s)
	expect(t, d, Arrived)
	server, _, client, err := s.Respond(now, d.events[0].ID, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	give(t, c, now, drain(s).frame(t))
	expect(t, drain(c), Established)
	return client, server
}

// No reply: the cached answer is dropped, the name asked for again and a new
// request sent from a new endpoint; then again after 2 and 4 s. The first one's
// late acceptance is answered with a deallocation.
func TestRenew(t *testing.T) {
	c, s := member(clientMAC), member(serverMAC)
	hash := unhex(t, nameHash)
	s.Register(hash)
	give(t, c, t0, answer(serverMAC, clientMAC, hash))
	id, err := c.Alloc(t0, hash, qos.Raw, []byte("first request id"), true)
	if err != nil {
		t.Fatal(err)
	}
	first := drain(c).frame(t)
	now := t0
	for i, wait := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second} {
		c.Tick(now.Add(wait - time.Nanosecond))
		expect(t, drain(c))
		now = now.Add(wait)
		c.Tick(now)
		expect(t, drain(c), Vacated, Renew)
		c.Supply(now, id, []byte{byte(i)})
		d := drain(c)
		expect(t, d)
		if m, err := wire.DecodeDIXMgmt(d.frame(t)[18:], 32); err != nil || m.Code != wire.NameQueryReq {
			t.Fatalf("not a query: %+v, %v", m, err)
		}
		give(t, s, now, d.frame(t))
		give(t, c, now, drain(s).frame(t))
		d = drain(c)
		expect(t, d, Opened)
		m, err := wire.DecodeDIXMgmt(d.frame(t)[18:], 32)
		if err != nil || m.SrcEID != uint16(65+i) || !bytes.Equal(m.Data, []byte{byte(i)}) {
			t.Fatalf("request %+v, %v", m, err)
		}
	}
	give(t, s, now, first)
	if _, _, _, err := s.Respond(now, drain(s).events[0].ID, 0, nil); err != nil {
		t.Fatal(err)
	}
	give(t, c, now, drain(s).frame(t))
	d := drain(c)
	expect(t, d)
	give(t, s, now, d.frame(t))
	expect(t, drain(s), Dealloc)

	c.Cancel(now, id, true)
	expect(t, drain(c), Vacated)
	if c.Query(now, hash, now) {
		t.Error("the answer is still believed after a time-out")
	}
}

// The service has moved: the new attempt goes where the name is now.
func TestRenewFollowsTheName(t *testing.T) {
	c := member(clientMAC)
	hash := unhex(t, nameHash)
	give(t, c, t0, answer(serverMAC, clientMAC, hash))
	id, err := c.Alloc(t0, hash, qos.Raw, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	c.Tick(t0.Add(time.Second))
	c.Supply(t0.Add(time.Second), id, nil)
	drain(c)
	moved := MAC{2, 0, 0, 0, 9, 9}
	give(t, c, t0.Add(time.Second), answer(moved, clientMAC, hash))
	f, err := dix.Parse(drain(c).frame(t))
	if err != nil || f.Dst != moved {
		t.Errorf("new request goes to %v, %v", f.Dst, err)
	}
	// And when it is nowhere any more, the allocation fails at once.
	c.Tick(t0.Add(3 * time.Second))
	c.Supply(t0.Add(3*time.Second), id, nil)
	c.Tick(t0.Add(4 * time.Second))
	drain(c)
	c.Tick(t0.Add(5 * time.Second))
	d := drain(c)
	expect(t, d, Failed)
	if !errors.Is(d.events[0].Err, o7serr.EIPCP) {
		t.Error(d.events[0].Err)
	}
}

func TestRefusal(t *testing.T) {
	for _, c := range []struct {
		sent int32
		want o7serr.Errno
	}{{-1009, o7serr.EAUTH}, {-1007, o7serr.ENAME}, {1008, o7serr.ECRYPT}} {
		m := member(clientMAC)
		hash := unhex(t, nameHash)
		give(t, m, t0, answer(serverMAC, clientMAC, hash))
		if _, err := m.Alloc(t0, hash, qos.Raw, nil, true); err != nil {
			t.Fatal(err)
		}
		drain(m)
		give(t, m, t0, mgmt(serverMAC, clientMAC, &wire.EthMgmt{Code: wire.FlowReply, DstEID: 64, SrcEID: 70, Response: c.sent}))
		d := drain(m)
		expect(t, d, Vacated, Failed)
		if !errors.Is(d.events[1].Err, c.want) {
			t.Errorf("%d: %v", c.sent, d.events[1].Err)
		}
	}
}

// Replies that the reference sends by mistake, and that others could forge.
func TestBadReplies(t *testing.T) {
	c := member(clientMAC)
	hash := unhex(t, nameHash)
	give(t, c, t0, answer(serverMAC, clientMAC, hash))
	if _, err := c.Alloc(t0, hash, qos.Raw, nil, false); err != nil {
		t.Fatal(err)
	}
	drain(c)
	reply := func(from, to MAC, src, dst uint16) {
		give(t, c, t0, mgmt(from, to, &wire.EthMgmt{Code: wire.FlowReply, SrcEID: src, DstEID: dst}))
	}
	reply(serverMAC, MAC{}, 64, 0xffff)             // the reference lost a race
	reply(serverMAC, MAC{}, 64, 64)                 //
	reply(serverMAC, clientMAC, 64, 0xffff)         //
	reply(serverMAC, clientMAC, 0, 64)              // no endpoint
	reply(serverMAC, clientMAC, 0xffff, 64)         //
	reply(MAC{2, 6, 6, 6, 6, 6}, clientMAC, 64, 64) // not the one asked
	reply(serverMAC, wire.Broadcast, 64, 64)        //
	reply(serverMAC, clientMAC, 64, 65)             // no such allocation
	reply(wire.Broadcast, clientMAC, 64, 64)        // from nobody
	if d := drain(c); len(d.frames)+len(d.events) != 0 {
		t.Fatalf("a bad reply had an effect: %v", d.kinds())
	}
	n := c.Counts()
	if n.Misaddressed != 4 || n.BadEndpoint != 2 || n.Unexpected != 3 {
		t.Errorf("%+v", n)
	}
	reply(serverMAC, clientMAC, 70, 64)
	expect(t, drain(c), Established)
	// In the established state a reply changes nothing (oddity 4).
	give(t, c, t0, mgmt(serverMAC, clientMAC, &wire.EthMgmt{Code: wire.FlowReply, SrcEID: 99, DstEID: 64, Response: -1009}))
	expect(t, drain(c))
	if c.eps.get(64).remote != 70 {
		t.Error("a late reply rebound the flow")
	}
}

func TestBadRequests(t *testing.T) {
	s := member(serverMAC)
	hash := unhex(t, nameHash)
	s.Register(hash)
	req := func(src uint16, h []byte) []byte {
		return mgmt(clientMAC, serverMAC, &wire.EthMgmt{Code: wire.FlowReq, SrcEID: src, Hash: h})
	}
	give(t, s, t0, req(0, hash))
	give(t, s, t0, req(0xffff, hash))
	good := req(64, hash)[18:]
	for n := range good {
		s.Receive(t0, clientMAC, serverMAC, good[:n])
	}
	odd := append([]byte(nil), good...)
	odd[37] = 99
	s.Receive(t0, clientMAC, serverMAC, odd)
	give(t, s, t0, mgmt(clientMAC, wire.Broadcast, &wire.EthMgmt{Code: wire.FlowReq, SrcEID: 64, Hash: hash}))
	give(t, s, t0, mgmt(clientMAC, wire.Broadcast, &wire.EthMgmt{Code: wire.NameQueryReq, Hash: make([]byte, 32)}))
	if d := drain(s); len(d.frames)+len(d.events) != 0 {
		t.Fatalf("a bad request had an effect: %v", d.kinds())
	}
	n := s.Counts()
	if n.BadEndpoint != 2 || n.Malformed != uint64(len(good)) || n.UnknownCode != 1 || n.Misaddressed != 1 {
		t.Errorf("%+v", n)
	}
}

// A request for a name that is not registered any more is refused: a requester
// of the reference never asks again who serves it.
func TestRequestUnknownName(t *testing.T) {
	c, s := member(clientMAC), member(serverMAC)
	hash := unhex(t, nameHash)
	give(t, c, t0, mgmt(serverMAC, clientMAC, &wire.EthMgmt{Code: wire.NameQueryReply, Hash: hash}))
	id, err := c.Alloc(t0, hash, qos.Raw, []byte("oap"), true)
	if err != nil {
		t.Fatal(err)
	}
	give(t, s, t0, drain(c).frame(t))
	d := drain(s)
	expect(t, d)
	refusal := mgmt(serverMAC, clientMAC, &wire.EthMgmt{Code: wire.FlowReply, DstEID: 64, Response: -1007})
	if diff := cmp.Diff(refusal, d.frame(t)); diff != "" {
		t.Fatal(diff)
	}
	if n := s.Counts(); n.UnknownName != 1 || n.RefusalsSent != 1 {
		t.Errorf("%+v", n)
	}
	give(t, c, t0, refusal)
	d = drain(c)
	expect(t, d, Vacated, Failed)
	if e := d.events[1]; e.ID != id || !errors.Is(e.Err, o7serr.ENAME) {
		t.Errorf("%+v", e)
	}
	// Ours does ask again.
	if c.Query(t0, hash, time.Time{}) {
		t.Error("still believes that the name is served")
	}
	// On the loopback interface the name may be another member's.
	lo := member(MAC{})
	give(t, lo, t0, mgmt(MAC{}, MAC{}, &wire.EthMgmt{Code: wire.FlowReq, SrcEID: 64, Hash: hash}))
	if d := drain(lo); len(d.frames)+len(d.events) != 0 {
		t.Errorf("answered on the loopback interface: %v", d.kinds())
	}
}

func request(from MAC, ep uint16, oap string) []byte {
	hash, _ := hex.DecodeString(nameHash)
	return mgmt(from, serverMAC, &wire.EthMgmt{Code: wire.FlowReq, SrcEID: ep, Hash: hash, Data: []byte(oap)})
}

// Copies of a request make one flow; a different one from the same endpoint
// shows that the peer has released what it used it for.
func TestDuplicateAndStale(t *testing.T) {
	s := member(serverMAC)
	s.Register(unhex(t, nameHash))
	const id1, id2, id3 = "0123456789abcdef+1", "abcdefabcdefabcd+2", "fedcbafedcbafedc+3"
	give(t, s, t0, request(clientMAC, 64, id1))
	give(t, s, t0, request(clientMAC, 64, id1))
	d := drain(s)
	expect(t, d, Arrived)
	first := d.events[0].ID
	give(t, s, t0, request(clientMAC, 64, id2)) // while pending
	d = drain(s)
	expect(t, d, Expired, Arrived)
	if d.events[0].ID != first {
		t.Error("the wrong request expired")
	}
	if _, _, _, err := s.Respond(t0, first, 0, nil); !errors.Is(err, o7serr.ETIMEDOUT) {
		t.Error("an expired request is answered:", err)
	}
	ep, _, _, err := s.Respond(t0, d.events[1].ID, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	drain(s)
	give(t, s, t0, request(clientMAC, 64, id2))
	expect(t, drain(s))
	give(t, s, t0, request(clientMAC, 64, id3)) // while established
	d = drain(s)
	expect(t, d, Dealloc, Arrived)
	if d.events[0].Endpoint != ep {
		t.Error("the wrong flow was released")
	}
	s.Close(t0, ep, 0)
	if d := drain(s); len(d.frames) != 0 {
		t.Error("a deallocation was sent for an endpoint that the peer uses for something else")
	}
	if n := s.Counts(); n.Duplicate != 2 || n.StaleReleased != 2 {
		t.Errorf("%+v", n)
	}
}

func TestFlood(t *testing.T) {
	s := member(serverMAC)
	s.Register(unhex(t, nameHash))
	for i := range uint16(100) {
		give(t, s, t0, request(clientMAC, 64+i, ""))
	}
	if s.nwait != maxWaitingPerMAC || s.Counts().Flooded != 100-maxWaitingPerMAC {
		t.Errorf("one peer: %d wait", s.nwait)
	}
	for m := range byte(20) {
		for i := range uint16(20) {
			give(t, s, t0, request(MAC{2, 7, m}, 64+i, ""))
		}
	}
	if s.nwait != maxWaiting {
		t.Errorf("many peers: %d wait", s.nwait)
	}
	drain(s)
	s.Tick(t0.Add(answerWithin))
	if d := drain(s); len(d.events) != maxWaiting || s.nwait != 0 || len(s.waiting)+len(s.byPeer)+len(s.flows) != 0 {
		t.Errorf("%d events, left: %d %d %d %d", len(d.events), s.nwait, len(s.waiting), len(s.byPeer), len(s.flows))
	}
}

// A deallocation counts only with both endpoints and the peer's MAC.
func TestDeallocMustMatch(t *testing.T) {
	c, s := member(clientMAC), member(serverMAC)
	ce, se := establish(t, c, s, t0)
	bye := func(from MAC, src, dst uint16) {
		give(t, s, t0, mgmt(from, serverMAC, &wire.EthMgmt{Code: wire.EthDealloc, SrcEID: src, DstEID: dst}))
	}
	bye(MAC{2, 6, 6, 6, 6, 6}, ce, se)
	bye(clientMAC, ce+1, se)
	bye(clientMAC, ce, se+1)
	expect(t, drain(s))
	bye(clientMAC, ce, se)
	expect(t, drain(s), Dealloc)
	bye(clientMAC, ce, se)
	expect(t, drain(s))
	if s.Counts().Unexpected != 4 {
		t.Errorf("%+v", s.Counts())
	}
}

// An endpoint in quarantine is not used again before its time, unless there is
// no other: then it is the one whose time is up first.
func TestQuarantine(t *testing.T) {
	m := member(serverMAC)
	n := len(m.eps.free)
	take := func(now time.Time) *flow {
		f := &flow{}
		if !m.eps.take(now, f) {
			t.Fatal("no endpoint")
		}
		return f
	}
	flows := make([]*flow, n)
	for i := range flows {
		flows[i] = take(t0)
	}
	if m.eps.take(t0, &flow{}) {
		t.Fatal("an endpoint too many")
	}
	a, b, c := flows[10].ep, flows[20].ep, flows[30].ep
	m.eps.release(t0, flows[10], 20*time.Second)
	m.eps.release(t0, flows[20], 10*time.Second)
	m.eps.release(t0, flows[30], 0)
	if f := take(t0); f.ep != c {
		t.Errorf("endpoint %d before the one without quarantine", f.ep)
	}
	if got := m.Counts(); got.Quarantined != 2 || got.QuarantineBroken != 0 {
		t.Errorf("%+v", got)
	}
	if f := take(t0); f.ep != b {
		t.Errorf("endpoint %d before the one whose time is up first", f.ep)
	}
	if got := m.Counts(); got.Quarantined != 1 || got.QuarantineBroken != 1 {
		t.Errorf("%+v", got)
	}
	if f := take(t0.Add(20 * time.Second)); f.ep != a {
		t.Errorf("endpoint %d, want %d", f.ep, a)
	}
	if got := m.Counts(); got.Quarantined != 0 || got.QuarantineBroken != 1 {
		t.Errorf("%+v", got)
	}
	m.eps.release(t0, flows[40], 1000*time.Hour)
	m.eps.expire(t0.Add(maxQuarantine))
	if len(m.eps.held) != 0 {
		t.Error("quarantine without a bound")
	}
}

// Whoever still sends to a flow that we released has missed the deallocation:
// it gets it again, once a second, for two minutes.
func TestStray(t *testing.T) {
	c, s := member(clientMAC), member(serverMAC)
	ce, se := establish(t, c, s, t0)
	s.Close(t0, se, 10*time.Second)
	d := drain(s)
	expect(t, d, Vacated)
	if d.events[0].Remote != ce {
		t.Errorf("vacated %+v", d.events[0])
	}
	lost := d.frame(t)
	silent := func(now time.Time, from MAC, ep uint16) {
		t.Helper()
		s.Stray(now, from, ep)
		if d := drain(s); len(d.frames) != 0 {
			t.Errorf("stray from %x for %d is answered", from, ep)
		}
	}
	silent(t0, clientMAC, se) // too early
	now := t0.Add(time.Second)
	silent(now, MAC{2, 6, 6, 6, 6, 6}, se)
	silent(now, clientMAC, se+1)
	s.Stray(now, clientMAC, se)
	again := drain(s).frame(t)
	if d := cmp.Diff(lost, again); d != "" {
		t.Error("repeated deallocation:", d)
	}
	silent(now.Add(partingEvery-1), clientMAC, se)
	give(t, c, now, again)
	expect(t, drain(c), Dealloc)
	silent(t0.Add(partingFor), clientMAC, se)
	if s.Counts().DeallocsRepeated != 1 {
		t.Errorf("%+v", s.Counts())
	}

	// Not by the peer that released it, and not once the endpoint is used again.
	c.Close(now, ce, 0)
	drain(c)
	silent(now, serverMAC, ce)
	for i := range 3 * maxPartings {
		f := &flow{ep: uint16(64 + i%4000), mac: clientMAC, remote: 1}
		s.part(t0, f)
	}
	if len(s.parted) > maxPartings || len(s.partings) > maxPartings {
		t.Errorf("%d and %d partings are remembered", len(s.parted), len(s.partings))
	}
	if _, err := s.Alloc(now, unhex(t, nameHash), qos.Raw, nil, false); err != nil {
		t.Fatal(err)
	}
}

// A process that takes the place of one that was killed releases its flows.
func TestFormer(t *testing.T) {
	c, s := member(clientMAC), member(serverMAC)
	ce, se := establish(t, c, s, t0)
	s = member(serverMAC)
	s.Former(t0, []Former{
		{Endpoint: se, Peer: clientMAC, Remote: ce},
		{Endpoint: se, Peer: clientMAC, Remote: ce + 1}, // twice
		{Endpoint: 1, Peer: clientMAC, Remote: ce},      // no endpoint of a flow
		{Endpoint: 0xffff, Peer: clientMAC, Remote: ce}, //
		{Endpoint: 100, Peer: clientMAC, Remote: 0},     //
		{Endpoint: 101, Peer: MAC{1}, Remote: 64},       // a group
		{Endpoint: 102, Peer: MAC{}, Remote: 64},        // nobody
	})
	bye := drain(s).frame(t)
	give(t, c, t0, bye)
	expect(t, drain(c), Dealloc)
	s.Stray(t0.Add(partingEvery), clientMAC, se)
	if d := cmp.Diff(bye, drain(s).frame(t)); d != "" {
		t.Error(d)
	}
	seen := map[uint16]bool{}
	for range len(s.eps.free) - 1 {
		f := &flow{}
		if !s.eps.take(t0, f) || f.ep == se || seen[f.ep] {
			t.Fatalf("endpoint %d is taken", f.ep)
		}
		seen[f.ep] = true
	}
	if f := (&flow{}); !s.eps.take(t0, f) || f.ep != se || s.Counts().QuarantineBroken != 1 {
		t.Errorf("the last endpoint is %d, %+v", f.ep, s.Counts())
	}
}

func TestLimits(t *testing.T) {
	c := member(clientMAC)
	hash := unhex(t, nameHash)
	give(t, c, t0, answer(serverMAC, clientMAC, hash))
	if _, err := c.Alloc(t0, hash, qos.Raw, make([]byte, 1426), false); !errors.Is(err, o7serr.EMSGSIZE) {
		t.Errorf("1426 bytes in a request: %v", err)
	}
	if _, err := c.Alloc(t0, hash[1:], qos.Raw, nil, false); !errors.Is(err, o7serr.EINVAL) {
		t.Errorf("short hash: %v", err)
	}
	var last ID
	for range 4032 {
		id, err := c.Alloc(t0, hash, qos.Raw, make([]byte, 1425), false)
		if err != nil {
			t.Fatal(err)
		}
		last = id
	}
	drain(c)
	if _, err := c.Alloc(t0, hash, qos.Raw, nil, false); err != nil {
		t.Fatal(err)
	}
	d := drain(c)
	expect(t, d, Failed)
	if !errors.Is(d.events[0].Err, o7serr.EAGAIN) {
		t.Error(d.events[0].Err)
	}
	c.Cancel(t0, last, false)
	if _, err := c.Alloc(t0, hash, qos.Raw, nil, false); err != nil {
		t.Fatal(err)
	}
	expect(t, drain(c), Vacated, Opened)

	s := member(serverMAC)
	s.Register(hash)
	for i, n := range []int{1457, 1458} {
		give(t, s, t0, request(clientMAC, 64+uint16(i), ""))
		id := drain(s).events[0].ID
		_, _, _, err := s.Respond(t0, id, 0, make([]byte, n))
		if fits := n <= 1457; (err == nil) != fits {
			t.Errorf("%d bytes in a reply: %v", n, err)
		}
		m, _ := wire.DecodeDIXMgmt(drain(s).frame(t)[18:], 32)
		if (m.Response == 0) != (n <= 1457) {
			t.Errorf("%d bytes in a reply: response %d", n, m.Response)
		}
	}
}

// A freed endpoint comes last.
func TestEndpointsRotate(t *testing.T) {
	c, s := member(clientMAC), member(serverMAC)
	for i := range 5000 {
		ce, se := establish(t, c, s, t0)
		if want := uint16(64 + i%4032); ce != want || se != want {
			t.Fatalf("flow %d has endpoints %d and %d", i, ce, se)
		}
		c.Close(t0, ce, 0)
		give(t, s, t0, drain(c).frame(t))
		s.Close(t0, se, 0)
		drain(s)
	}
	if len(c.flows)+len(s.flows)+len(c.byPeer)+len(s.byPeer) != 0 {
		t.Error("something is left")
	}
}

// A name that is registered here is known; requests for it go to ourselves.
func TestOwnName(t *testing.T) {
	m := member(clientMAC)
	hash := unhex(t, nameHash)
	m.Register(hash)
	if !m.Query(t0, hash, time.Time{}) {
		t.Fatal("own name is unknown")
	}
	if _, err := m.Alloc(t0, hash, qos.Raw, nil, false); err != nil {
		t.Fatal(err)
	}
	give(t, m, t0, drain(m).frame(t))
	d := drain(m)
	expect(t, d, Arrived)
	local, to, remote, err := m.Respond(t0, d.events[0].ID, 0, nil)
	if err != nil || local != 65 || remote != 64 || to != clientMAC {
		t.Fatal(local, remote, to, err)
	}
	give(t, m, t0, drain(m).frame(t))
	expect(t, drain(m), Established)
	m.Close(t0, local, 0)
	give(t, m, t0, drain(m).frame(t))
	expect(t, drain(m), Dealloc)
	m.Unregister(hash)
	if m.Query(t0, hash, time.Time{}) {
		t.Error("the name is known after it was unregistered")
	}
}

// replay yields the management messages of a capture.
func replay(t *testing.T, file string) (msgs []captured) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := pcapgo.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	for {
		b, ci, err := r.ReadPacketData()
		if err != nil {
			return msgs
		}
		h, err := dix.Parse(b)
		if err != nil || h.Local != 0 {
			continue
		}
		m, err := wire.DecodeDIXMgmt(b[h.Offset:h.Offset+h.Bytes], 32)
		if err != nil {
			t.Fatal(err)
		}
		msgs = append(msgs, captured{ci.Timestamp, h, m, b})
	}
}

type captured struct {
	at    time.Time
	h     Frame
	m     wire.EthMgmt
	frame []byte
}

var captures = []string{"testdata/ethdix-2host-oping.pcap", "testdata/ethdix-2host-qos-release.pcap"}

// In the place of the reference server we send what it sent, less its own
// endpoint numbers: it reuses them at once.
func TestReplayAsServer(t *testing.T) {
	for _, file := range captures {
		s := member(serverMAC)
		msgs := replay(t, file)
		for _, c := range msgs {
			if c.h.Src == serverMAC && c.m.Code == wire.NameQueryReply {
				s.Register(c.m.Hash)
			}
		}
		replies := 0
		for i, c := range msgs {
			if c.h.Src != clientMAC {
				continue
			}
			s.Tick(c.at)
			drain(s)
			give(t, s, c.at, c.frame)
			// What the reference sent before the client spoke again.
			var want *captured
			for j := i + 1; j < len(msgs) && want == nil && msgs[j].at.Sub(c.at) < 1500*time.Millisecond; j++ {
				if m := &msgs[j]; m.h.Src == serverMAC && m.m.Code == c.m.Code^1 && m.m.DstEID == c.m.SrcEID {
					want = m
				}
			}
			d := drain(s)
			if c.m.Code == wire.FlowReq {
				kinds := d.kinds()
				if len(kinds) == 2 && kinds[0] == Dealloc {
					s.Close(t0, d.events[0].Endpoint, 0) // the client reused its endpoint
					drain(s)
					d.events = d.events[1:]
				}
				expect(t, d, Arrived)
				in := d.events[0]
				if in.QoS != c.m.QoS || !bytes.Equal(in.Data, c.m.Data) {
					t.Fatalf("%s %d: %+v", file, i, in)
				}
				if want == nil { // it was not registered at the time
					s.Respond(t0, in.ID, -1007, nil)
					continue
				}
				if _, _, _, err := s.Respond(t0, in.ID, 0, want.m.Data); err != nil {
					t.Fatal(err)
				}
				d = drain(s)
				got, _ := wire.DecodeDIXMgmt(d.frame(t)[18:], 32)
				got.SrcEID = want.m.SrcEID
				d.frames[0] = mgmt(serverMAC, clientMAC, &got)
			}
			if want == nil {
				if len(d.frames) != 0 {
					t.Errorf("%s %d: the reference was silent", file, i)
				}
				continue
			}
			replies++
			if diff := cmp.Diff(want.frame, d.frame(t)); diff != "" {
				t.Errorf("%s %d: %s", file, i, diff)
			}
		}
		if replies < 7 {
			t.Errorf("%s: compared %d replies only", file, replies)
		}
	}
}

// In the place of the reference client we send what it sent, and accept what
// the reference server answers.
func TestReplayAsClient(t *testing.T) {
	for _, file := range captures {
		c := member(clientMAC)
		eps := map[uint16]uint16{} // the reference's endpoint -> ours
		flows := 0
		for i, m := range replay(t, file) {
			switch {
			case m.h.Src == clientMAC && m.m.Code == wire.NameQueryReq:
				if c.Query(m.at, m.m.Hash, m.at.Add(200*time.Millisecond)) {
					continue // the reference's time-out of an unknown name
				}
				if diff := cmp.Diff(m.frame, drain(c).frame(t)); diff != "" {
					t.Errorf("%s %d: %s", file, i, diff)
				}
			case m.h.Src == clientMAC && m.m.Code == wire.FlowReq:
				// The reference believes its cache for ever.
				give(t, c, m.at, answer(serverMAC, clientMAC, m.m.Hash))
				drain(c)
				if _, err := c.Alloc(m.at, m.m.Hash, m.m.QoS, m.m.Data, false); err != nil {
					t.Fatal(err)
				}
				d := drain(c)
				got, _ := wire.DecodeDIXMgmt(d.frame(t)[18:], 32)
				eps[m.m.SrcEID] = got.SrcEID
				got.SrcEID = m.m.SrcEID
				if diff := cmp.Diff(m.frame, mgmt(clientMAC, serverMAC, &got)); diff != "" {
					t.Errorf("%s %d: %s", file, i, diff)
				}
			case m.h.Src == serverMAC && m.m.Code == wire.FlowReply:
				m.m.DstEID = eps[m.m.DstEID]
				give(t, c, m.at, mgmt(serverMAC, clientMAC, &m.m))
				d := drain(c)
				if len(d.events) > 1 && d.events[0].Kind == Dealloc {
					d.events = d.events[1:] // the server reused an endpoint
				}
				expect(t, d, Established)
				if e := d.events[0]; e.Remote != m.m.SrcEID || !bytes.Equal(e.Data, m.m.Data) {
					t.Errorf("%s %d: %+v", file, i, e)
				}
				flows++
			case m.h.Src == serverMAC:
				give(t, c, m.at, m.frame)
				drain(c)
			}
		}
		if flows < 6 {
			t.Errorf("%s: only %d flows", file, flows)
		}
	}
}

// Three members on a network that loses, doubles and reorders frames: whatever
// happens, the shells' view stays consistent and nothing is left at the end.
func TestLossyNetwork(t *testing.T) {
	macs := []MAC{{2, 1}, {2, 2}, {2, 3}}
	hashes := [][]byte{bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)}
	rapid.Check(t, func(t *rapid.T) {
		now := t0
		nodes := map[MAC]*Core{}
		type shell struct {
			alloc map[ID]bool
			ep    map[uint16]ID
			up    map[uint16]bool
			in    map[ID]bool
		}
		shells := map[MAC]*shell{}
		for _, m := range macs {
			nodes[m] = member(m)
			shells[m] = &shell{map[ID]bool{}, map[uint16]ID{}, map[uint16]bool{}, map[ID]bool{}}
		}
		type flying struct {
			to    MAC
			frame []byte
		}
		var air []flying
		oap := byte(0)
		fresh := func() []byte { oap++; return bytes.Repeat([]byte{oap}, 16) }
		pump := func(m MAC) {
			frames, events := nodes[m].Drain()
			s := shells[m]
			for _, e := range events {
				switch e.Kind {
				case Opened:
					if _, used := s.ep[e.Endpoint]; used {
						t.Fatalf("endpoint %d opened twice", e.Endpoint)
					}
					s.ep[e.Endpoint] = e.ID
				case Vacated:
					if s.ep[e.Endpoint] != e.ID {
						t.Fatalf("endpoint %d vacated by %d, is %d's", e.Endpoint, e.ID, s.ep[e.Endpoint])
					}
					delete(s.ep, e.Endpoint)
					delete(s.up, e.Endpoint)
				case Established:
					if !s.alloc[e.ID] || s.ep[e.Endpoint] != e.ID {
						t.Fatalf("established %+v out of the blue", e)
					}
					delete(s.alloc, e.ID)
					s.up[e.Endpoint] = true
				case Failed:
					if !s.alloc[e.ID] {
						t.Fatalf("failed %+v out of the blue", e)
					}
					delete(s.alloc, e.ID)
				case Renew:
					if !s.alloc[e.ID] {
						t.Fatalf("renew %+v out of the blue", e)
					}
				case Arrived:
					s.in[e.ID] = true
				case Expired:
					if !s.in[e.ID] {
						t.Fatalf("expired %+v out of the blue", e)
					}
					delete(s.in, e.ID)
				case Dealloc:
					if !s.up[e.Endpoint] {
						t.Fatalf("dealloc %+v out of the blue", e)
					}
				}
			}
			for _, f := range frames {
				h, err := dix.Parse(f)
				if err != nil {
					t.Fatal(err)
				}
				for _, to := range macs {
					if to == h.Dst || h.Dst == wire.Broadcast && to != m {
						air = append(air, flying{to, f})
					}
				}
			}
		}
		pick := func(t *rapid.T) (MAC, *Core, *shell) {
			m := rapid.SampledFrom(macs).Draw(t, "member")
			return m, nodes[m], shells[m]
		}
		anyID := func(t *rapid.T, ids map[ID]bool) (ID, bool) {
			for id := ID(1); id < 1000; id++ {
				if ids[id] && rapid.Bool().Draw(t, "this") {
					return id, true
				}
			}
			return 0, false
		}
		t.Repeat(map[string]func(*rapid.T){
			"register": func(t *rapid.T) {
				_, c, _ := pick(t)
				h := rapid.SampledFrom(hashes).Draw(t, "hash")
				if rapid.Bool().Draw(t, "on") {
					c.Register(h)
				} else {
					c.Unregister(h)
				}
			},
			"alloc": func(t *rapid.T) {
				m, c, s := pick(t)
				id, err := c.Alloc(now, rapid.SampledFrom(hashes).Draw(t, "hash"), qos.Raw, fresh(), true)
				if err != nil {
					t.Fatal(err)
				}
				s.alloc[id] = true
				pump(m)
			},
			"supply": func(t *rapid.T) {
				m, c, s := pick(t)
				if id, ok := anyID(t, s.alloc); ok {
					c.Supply(now, id, fresh())
					pump(m)
				}
			},
			"cancel": func(t *rapid.T) {
				m, c, s := pick(t)
				if id, ok := anyID(t, s.alloc); ok {
					c.Cancel(now, id, rapid.Bool().Draw(t, "timed out"))
					delete(s.alloc, id)
					pump(m)
				}
			},
			"respond": func(t *rapid.T) {
				m, c, s := pick(t)
				if id, ok := anyID(t, s.in); ok {
					delete(s.in, id)
					ep, _, _, err := c.Respond(now, id, rapid.SampledFrom([]int32{0, -1007}).Draw(t, "code"), nil)
					if err != nil {
						t.Fatal(err)
					}
					if ep != 0 {
						s.ep[ep], s.up[ep] = id, true
					}
					pump(m)
				}
			},
			"close": func(t *rapid.T) {
				m, c, s := pick(t)
				for ep := uint16(64); ep < 200; ep++ {
					if s.up[ep] && rapid.Bool().Draw(t, "this") {
						c.Close(now, ep, time.Duration(rapid.IntRange(0, 10).Draw(t, "quarantine"))*time.Second)
						break
					}
				}
				pump(m)
			},
			"stray": func(t *rapid.T) {
				m, c, _ := pick(t)
				c.Stray(now, rapid.SampledFrom(macs).Draw(t, "from"), rapid.Uint16Range(60, 80).Draw(t, "endpoint"))
				pump(m)
			},
			"deliver": func(t *rapid.T) {
				if len(air) == 0 {
					return
				}
				i := rapid.IntRange(0, len(air)-1).Draw(t, "frame")
				f := air[i]
				fate := rapid.IntRange(0, 9).Draw(t, "fate")
				if fate != 0 { // 0: doubled
					air = append(air[:i:i], air[i+1:]...)
				}
				if fate == 1 { // lost
					return
				}
				h, _ := dix.Parse(f.frame)
				nodes[f.to].Receive(now, h.Src, h.Dst, f.frame[h.Offset:h.Offset+h.Bytes])
				pump(f.to)
			},
			"tick": func(t *rapid.T) {
				now = now.Add(time.Duration(rapid.IntRange(1, 3000).Draw(t, "ms")) * time.Millisecond)
				for _, m := range macs {
					nodes[m].Tick(now)
					if d := nodes[m].NextDeadline(); !d.IsZero() && !d.After(now) {
						t.Fatalf("deadline %v is not in the future", d.Sub(now))
					}
					pump(m)
				}
			},
			"": func(t *rapid.T) {
				for _, m := range macs {
					c, s := nodes[m], shells[m]
					if n := c.eps.used - len(c.eps.held); n != len(s.ep) {
						t.Fatalf("%d endpoints in use, the shell knows %d", n, len(s.ep))
					}
					if c.nwait != len(s.in) {
						t.Fatalf("%d requests wait, the shell knows %d", c.nwait, len(s.in))
					}
				}
			},
		})
		for _, m := range macs {
			c, s := nodes[m], shells[m]
			for id := range s.alloc {
				c.Cancel(now, id, true)
			}
			for id := range s.in {
				_, _, _, _ = c.Respond(now, id, -1003, nil)
			}
			for ep := range s.up {
				c.Close(now, ep, 0)
			}
			c.Tick(now.Add(time.Hour))
			c.eps.expire(now.Add(time.Hour))
			if n := len(c.flows) + len(c.byPeer) + len(c.waiting) + len(c.late) + len(c.queries) + len(c.timers) + c.eps.used; n != 0 {
				t.Fatalf("left: %d flows, %d peers, %d waiting, %d late, %d queries, %d timers, %d endpoints",
					len(c.flows), len(c.byPeer), len(c.waiting), len(c.late), len(c.queries), len(c.timers), c.eps.used)
			}
		}
	})
}

func FuzzReceive(f *testing.F) {
	for _, s := range []string{goldQuery, goldAnswer, goldReq, goldReply} {
		f.Add(unhex(f, s)[18:])
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		c := member(clientMAC)
		hash := unhex(t, nameHash)
		c.answered(t0, serverMAC, &wire.EthMgmt{Hash: hash})
		if _, err := c.Alloc(t0, hash, qos.Raw, nil, true); err != nil {
			t.Fatal(err)
		}
		c.Register(hash)
		c.Drain()
		for _, to := range []MAC{clientMAC, wire.Broadcast} {
			c.Receive(t0, serverMAC, to, payload)
			frames, events := c.Drain()
			for _, fr := range frames {
				if h, err := dix.Parse(fr); err != nil || h.Dst != serverMAC {
					t.Errorf("sent %x", fr)
				}
			}
			for _, e := range events {
				if e.Kind == Arrived {
					if _, _, _, err := c.Respond(t0, e.ID, 0, nil); err != nil {
						t.Error(err)
					}
				}
			}
		}
		c.Tick(t0.Add(time.Hour))
	})
}
