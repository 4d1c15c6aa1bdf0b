package eth_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/eth"
	"github.com/o7s/o7s-router/ipcp/eth/core"
	"github.com/o7s/o7s-router/ipcp/eth/ethtest"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	macA, macB = core.MAC{2, 0, 0, 0, 0, 1}, core.MAC{2, 0, 0, 0, 0, 2}
	macC       = core.MAC{2, 0, 0, 0, 0, 3}
	hash       = bytes.Repeat([]byte{7}, 32)
)

// host answers requests with answer, in another goroutine; nil: never.
type host struct {
	answer  func(ipcp.Incoming)
	running sync.WaitGroup // answers
}

func (h *host) FlowArrived(_ ipcp.Layer, in ipcp.Incoming) {
	if h.answer != nil {
		h.running.Go(func() { h.answer(in) })
	}
}

func (h *host) AllocFlow(context.Context, ipcp.Layer, string, qos.Spec) (ipcp.Flow, error) {
	return nil, o7serr.ENOTSUP
}

// accept returns a host that accepts everything and hands the flows over.
func accept(reply string) (*host, chan ipcp.Flow) {
	flows := make(chan ipcp.Flow, 64)
	return &host{answer: func(in ipcp.Incoming) {
		if f, err := in.Accept([]byte(reply)); err == nil {
			flows <- f
		}
	}}, flows
}

type sink struct {
	mu     sync.Mutex
	pkts   []string
	events []ipcp.Event
}

func (s *sink) Receive(pkts []*packet.Buf) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range pkts {
		s.pkts = append(s.pkts, string(p.Bytes()))
		p.Release()
	}
}

func (s *sink) FlowEvent(e ipcp.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, e)
}

func (s *sink) want(t *testing.T, pkts []string, events ...ipcp.Event) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := cmp.Diff(pkts, s.pkts); d != "" {
		t.Error("packets:", d)
	}
	if d := cmp.Diff(events, s.events); d != "" {
		t.Error("events:", d)
	}
	s.pkts, s.events = nil, nil
}

func config(etherType uint16) ipcp.Config {
	return ipcp.Config{
		Type: ipcp.EthDIX, LayerName: "link", Hash: ipcp.SHA3_256,
		Eth: ipcp.EthConfig{Device: "eth0", EtherType: etherType},
	}
}

func boot(t *testing.T, p *ethtest.Port, h ipcp.Host) *eth.IPCP {
	t.Helper()
	return bootType(t, p, h, 0)
}

func bootType(t *testing.T, p *ethtest.Port, h ipcp.Host, etherType uint16) *eth.IPCP {
	t.Helper()
	l := eth.NewDIX("dix", h, p.Open, slog.New(slog.DiscardHandler))
	if err := l.Bootstrap(t.Context(), config(etherType)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func counters(l *eth.IPCP) map[string]uint64 {
	m := map[string]uint64{}
	for k, v := range l.Counters() {
		m[k] = v
	}
	return m
}

func send(t *testing.T, f ipcp.Flow, pkts ...string) {
	t.Helper()
	for _, p := range pkts {
		if err := f.Send(packet.From([]byte(p))); err != nil {
			t.Fatal(err)
		}
	}
}

// pair returns the two ends of a flow from a to b.
func pair(t *testing.T, a *eth.IPCP, flows chan ipcp.Flow) (client, server ipcp.Flow) {
	t.Helper()
	client, _, err := a.Alloc(t.Context(), ipcp.AllocRequest{Hash: hash, QoS: qos.Raw})
	if err != nil {
		t.Fatal(err)
	}
	return client, <-flows
}

func TestFlowLife(t *testing.T) {
	var hub ethtest.Hub
	pa, pb := hub.Port(macA, 1500), hub.Port(macB, 1500)
	h, flows := accept("response")
	a, b := boot(t, pa, &host{}), boot(t, pb, h)
	if err := errors.Join(b.Register(hash), b.Register(hash), a.Query(t.Context(), hash)); err != nil {
		t.Fatal(err)
	}
	client, data, err := a.Alloc(t.Context(), ipcp.AllocRequest{Hash: hash, QoS: qos.Raw, Data: []byte("request")})
	if err != nil || string(data) != "response" {
		t.Fatalf("%q, %v", data, err)
	}
	server := <-flows
	want := ipcp.FlowInfo{
		Layer: "link", IPCP: "dix", Type: ipcp.EthDIX, QoS: qos.Raw, MTU: 1496, MPL: 100,
		Local: "02:00:00:00:00:01/64", Remote: "02:00:00:00:00:02/64",
	}
	if d := cmp.Diff(want, client.Info()); d != "" {
		t.Error(d)
	}

	var cs, ss sink
	send(t, server, "early", "data")
	client.SetSink(&cs)
	cs.want(t, []string{"early", "data"})
	server.SetSink(&ss)
	long := string(make([]byte, 1496))
	send(t, client, "", "one", long)
	ss.want(t, []string{"", "one", long})
	if err := client.Send(packet.Get(1497)); !errors.Is(err, o7serr.EMSGSIZE) {
		t.Errorf("1497 bytes: %v", err)
	}
	full := packet.From([]byte("no head room"))
	for full.Push(1) != nil {
	}
	full.Pull(250)
	if err := client.Send(full); err != nil {
		t.Error(err)
	}
	ss.mu.Lock()
	if len(ss.pkts) != 1 {
		t.Errorf("%d packets", len(ss.pkts))
	}
	ss.pkts = nil
	ss.mu.Unlock()
	if s := client.(ipcp.FlowCounter).Stat(); s.TxPackets != 4 || s.RxPackets != 2 || s.RxBytes != 9 {
		t.Errorf("counted %+v", s)
	}

	if pa.Endpoints(wire.DefaultEtherType) != 1 || pb.Endpoints(wire.DefaultEtherType) != 1 {
		t.Error("endpoints are not installed in the fast path")
	}
	if err := errors.Join(client.Close(), client.Close()); err != nil {
		t.Error(err)
	}
	ss.want(t, nil, ipcp.EventDealloc)
	if err := server.Send(packet.From(nil)); !errors.Is(err, o7serr.EFLOWDOWN) {
		t.Errorf("send to a released flow: %v", err)
	}
	if err := client.Send(packet.From(nil)); !errors.Is(err, o7serr.ENOTALLOC) {
		t.Errorf("send on a closed flow: %v", err)
	}
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	// What comes for the end that was released first is looked at for a while:
	// the peer may not know yet.
	if n, m := pa.Endpoints(wire.DefaultEtherType), pb.Endpoints(wire.DefaultEtherType); n != 1 || m != 0 {
		t.Errorf("%d and %d endpoints are left in the fast path, want 1 and 0", n, m)
	}
	// Frames for the released endpoint go nowhere.
	hub.Inject(nil, frame(macB, macA, 64, "stale"))
	if c := counters(b); c["rx_unknown_endpoint_dropped"] != 1 || c["flows"] != 0 || c["deallocs_received"] != 1 {
		t.Errorf("%v", c)
	}
	if d := a.Directory(); len(d) != 1 || d[0].Kind != "cached" || d[0].Value != "02:00:00:00:00:02" {
		t.Errorf("directory %+v", d)
	}
}

// A deallocation that was lost is sent again when the peer's data shows that.
func TestLostDealloc(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lost := false
		hub := ethtest.Hub{Fate: func(*ethtest.Port, []byte) int {
			if lost {
				return 0
			}
			return 1
		}}
		pa, pb := hub.Port(macA, 1500), hub.Port(macB, 1500)
		h, flows := accept("")
		a, b := boot(t, pa, &host{}), boot(t, pb, h)
		if err := b.Register(hash); err != nil {
			t.Fatal(err)
		}
		client, _, err := a.Alloc(t.Context(), ipcp.AllocRequest{Hash: hash, QoS: qos.Raw})
		if err != nil {
			t.Fatal(err)
		}
		server := <-flows
		var ss sink
		server.SetSink(&ss)
		lost = true
		if err := ipcp.CloseLinger(client, 10*time.Second); err != nil {
			t.Fatal(err)
		}
		lost = false
		for range 3 {
			_ = server.Send(packet.From([]byte("still here?")))
		}
		ss.want(t, nil)
		time.Sleep(time.Second)
		_ = server.Send(packet.From([]byte("still here?")))
		ss.want(t, nil, ipcp.EventDealloc)
		if c := counters(a); c["deallocs_repeated"] != 1 || c["endpoints_in_quarantine"] != 1 {
			t.Errorf("%v", c)
		}
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Minute)
		if n := pa.Endpoints(wire.DefaultEtherType) + pb.Endpoints(wire.DefaultEtherType); n != 0 {
			t.Errorf("%d endpoints are left in the fast path", n)
		}
	})
}

func frame(to, from core.MAC, eid uint16, payload string) []byte {
	return wire.AppendDIX(nil, to, from, wire.DefaultEtherType, eid, []byte(payload))
}

func TestUnknownName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var hub ethtest.Hub
		a, b := boot(t, hub.Port(macA, 1500), &host{}), boot(t, hub.Port(macB, 1500), &host{})
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		start := time.Now()
		if err := a.Query(ctx, hash); !errors.Is(err, o7serr.ENAME) || time.Since(start) != 200*time.Millisecond {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		start = time.Now()
		if err := a.Query(t.Context(), hash); !errors.Is(err, o7serr.ENAME) || time.Since(start) != 2*time.Second {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		start = time.Now()
		_, _, err := a.Alloc(t.Context(), ipcp.AllocRequest{Hash: hash})
		if !errors.Is(err, o7serr.EIPCP) || time.Since(start) != 2*time.Second {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		// A name that appears while we ask is found by a repeated query.
		go func() {
			time.Sleep(110 * time.Millisecond)
			_ = b.Register(hash)
		}()
		start = time.Now()
		if err := a.Query(t.Context(), hash); err != nil || time.Since(start) != 150*time.Millisecond {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		if c := counters(b); c["query_replies_sent"] != 1 {
			t.Errorf("%v", c)
		}
	})
}

func TestRefuse(t *testing.T) {
	var hub ethtest.Hub
	a := boot(t, hub.Port(macA, 1500), &host{})
	b := boot(t, hub.Port(macB, 1500), &host{answer: func(in ipcp.Incoming) { in.Refuse(o7serr.ENAME.Code()); in.Refuse(-1) }})
	if err := b.Register(hash); err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.Alloc(t.Context(), ipcp.AllocRequest{Hash: hash}); !errors.Is(err, o7serr.ENAME) {
		t.Errorf("error %v, want ENAME", err)
	}
	if c := counters(b); c["flow_refusals_sent"] != 1 || counters(a)["flows"] != 0 {
		t.Errorf("%v", c)
	}
}

// The first reply is lost: after a second a new request goes out, with a new
// endpoint and new data; the flow of the lost reply is released.
func TestRenew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var hub ethtest.Hub
		var lost atomic.Bool
		hub.Fate = func(from *ethtest.Port, f []byte) int {
			if m, err := wire.DecodeDIXMgmt(f[18:], 32); from.MAC() == macB && err == nil && m.Code == wire.FlowReply && !lost.Swap(true) {
				return 0
			}
			return 1
		}
		var got []string
		flows := make(chan ipcp.Flow, 2)
		a := boot(t, hub.Port(macA, 1500), &host{})
		b := boot(t, hub.Port(macB, 1500), &host{answer: func(in ipcp.Incoming) {
			got = append(got, string(in.Data()))
			f, err := in.Accept(append([]byte("reply to "), in.Data()...))
			if err != nil {
				t.Error(err)
			}
			flows <- f
		}})
		if err := b.Register(hash); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		f, data, err := a.Alloc(t.Context(), ipcp.AllocRequest{
			Hash: hash, Data: []byte("first"), Renew: func() []byte { return []byte("second") },
		})
		if err != nil || string(data) != "reply to second" || time.Since(start) != time.Second {
			t.Fatalf("after %v: %q, %v", time.Since(start), data, err)
		}
		if d := cmp.Diff([]string{"first", "second"}, got); d != "" {
			t.Error(d)
		}
		if f.Info().Local != "02:00:00:00:00:01/65" {
			t.Errorf("the new request came from %s", f.Info().Local)
		}
		if c := counters(a); c["flow_requests_renewed"] != 1 || c["flow_requests_abandoned"] != 1 || c["flows"] != 1 {
			t.Errorf("%v", c)
		}
		_ = f.Close()
		(<-flows).Close()
		(<-flows).Close()
	})
}

// A request that must not be renewed waits for the caller's time-out; the
// silent member is forgotten.
func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var hub ethtest.Hub
		a := boot(t, hub.Port(macA, 1500), &host{})
		asked := make(chan ipcp.Incoming, 1)
		b := boot(t, hub.Port(macB, 1500), &host{answer: func(in ipcp.Incoming) { asked <- in }})
		if err := b.Register(hash); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if _, _, err := a.Alloc(ctx, ipcp.AllocRequest{Hash: hash}); !errors.Is(err, o7serr.ETIMEDOUT) {
			t.Errorf("error %v, want ETIMEDOUT", err)
		}
		if len(a.Directory()) != 0 {
			t.Error("the silent member is still cached")
		}
		// It answers late: the flow that it makes is released at once.
		f, err := (<-asked).Accept(nil)
		if err != nil {
			t.Fatal(err)
		}
		var s sink
		f.SetSink(&s)
		s.want(t, nil, ipcp.EventDealloc)
		_ = f.Close()
	})
}

func TestLinkState(t *testing.T) {
	var hub ethtest.Hub
	pa := hub.Port(macA, 1500)
	h, flows := accept("")
	a, b := boot(t, pa, &host{}), boot(t, hub.Port(macB, 1500), h)
	if err := b.Register(hash); err != nil {
		t.Fatal(err)
	}
	c1, s1 := pair(t, a, flows)
	c2, s2 := pair(t, a, flows)
	var k1, k2, ks sink
	c1.SetSink(&k1)
	c2.SetSink(&k2)
	s1.SetSink(&ks)
	pa.SetUp(false)
	pa.SetUp(false)
	if err := c1.Send(packet.From(nil)); !errors.Is(err, o7serr.EFLOWDOWN) {
		t.Errorf("send while down: %v", err)
	}
	if err := a.Query(t.Context(), hash); !errors.Is(err, o7serr.EFLOWDOWN) {
		t.Errorf("query while down: %v", err)
	}
	if _, _, err := a.Alloc(t.Context(), ipcp.AllocRequest{Hash: hash}); !errors.Is(err, o7serr.EFLOWDOWN) {
		t.Errorf("allocation while down: %v", err)
	}
	pa.SetUp(true)
	send(t, c1, "again")
	ks.want(t, []string{"again"})
	k1.want(t, nil, ipcp.EventDown, ipcp.EventUp)
	k2.want(t, nil, ipcp.EventDown, ipcp.EventUp)
	for _, f := range []ipcp.Flow{c1, c2, s1, s2} {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A member that is on a port of its own sees the frames of others on a hub,
// and its own coming back, without harm.
func TestForeignFrames(t *testing.T) {
	hub := ethtest.Hub{Flood: true}
	h, flows := accept("")
	a, b := boot(t, hub.Port(macA, 1500), &host{}), boot(t, hub.Port(macB, 1500), h)
	c := boot(t, hub.Port(macC, 1500), &host{})
	if err := b.Register(hash); err != nil {
		t.Fatal(err)
	}
	client, server := pair(t, a, flows)
	var s sink
	server.SetSink(&s)
	send(t, client, "x")
	s.want(t, []string{"x"})
	if n := counters(c); n["rx_misaddressed_dropped"] != 4 || n["queries_received"] != 1 {
		t.Errorf("%v", n)
	}
	inject := func(b []byte) { hub.Inject(nil, b) }
	inject(frame(macA, macA, 64, "from ourselves"))
	inject(frame(wire.Broadcast, macB, 64, "data to all"))
	inject(frame(core.MAC{}, macB, 0, "to nobody"))
	inject(frame(macA, macB, 63, "component"))
	inject(frame(macA, macB, 4095, "not allocated"))
	inject(frame(macA, macB, 4096, "too high"))
	inject(frame(macA, macB, 0xffff, "too high"))
	inject(frame(macA, macB, 64, string(make([]byte, 99)))[:60]) // cut
	n := counters(a)
	if n["rx_broadcast_data_dropped"] != 1 || n["rx_unknown_endpoint_dropped"] != 4 || n["rx_malformed_dropped"] != 1 {
		t.Errorf("%v", n)
	}
	_ = client.Close()
	_ = server.Close()
}

// Layers with different EtherTypes share a port and do not hear each other.
func TestTwoLayersOnOnePort(t *testing.T) {
	var hub ethtest.Hub
	pa, pb := hub.Port(macA, 1500), hub.Port(macB, 1500)
	h, flows := accept("")
	a1, a2 := bootType(t, pa, &host{}, 0xa000), bootType(t, pa, &host{}, 0xa001)
	b2 := bootType(t, pb, h, 0xa001)
	if err := b2.Register(hash); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := a1.Query(ctx, hash); !errors.Is(err, o7serr.ENAME) {
		t.Errorf("the other layer's name: %v", err)
	}
	client, server := pair(t, a2, flows)
	_ = client.Close()
	_ = server.Close()
	third := eth.NewDIX("third", &host{}, pa.Open, slog.New(slog.DiscardHandler))
	if err := third.Bootstrap(t.Context(), config(0xa001)); err == nil {
		t.Error("two layers claim one EtherType")
	}
}

// Two users of one member talk to each other without a frame on the wire.
func TestBothEndsHere(t *testing.T) {
	var hub ethtest.Hub
	hub.Fate = func(*ethtest.Port, []byte) int { t.Error("a frame on the wire"); return 0 }
	h, flows := accept("")
	a := boot(t, hub.Port(macA, 1500), h)
	if err := a.Register(hash); err != nil {
		t.Fatal(err)
	}
	client, server := pair(t, a, flows)
	var s sink
	server.SetSink(&s)
	send(t, client, "x", "")
	_ = client.Close()
	s.want(t, []string{"x", ""}, ipcp.EventDealloc)
	_ = server.Close()
}

// A loopback interface returns what we send; its address is zero.
func TestLoopback(t *testing.T) {
	var hub ethtest.Hub
	p := hub.Port(core.MAC{}, 65536)
	hub.Fate = func(_ *ethtest.Port, f []byte) int { hub.Inject(nil, f); return 0 }
	h, flows := accept("")
	l := eth.NewDIX("lo", h, p.Open, slog.New(slog.DiscardHandler))
	cfg := config(0)
	cfg.Eth.Device = "lo"
	if err := l.Bootstrap(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.Register(hash); err != nil {
		t.Fatal(err)
	}
	client, server := pair(t, l, flows)
	if client.Info().MTU != 8996 {
		t.Errorf("mtu %d", client.Info().MTU)
	}
	var s sink
	server.SetSink(&s)
	send(t, client, "x")
	_ = client.Close()
	s.want(t, []string{"x"}, ipcp.EventDealloc)
	_ = server.Close()
}

func TestBootstrapErrors(t *testing.T) {
	var hub ethtest.Hub
	p := hub.Port(macA, 1500)
	for name, change := range map[string]func(*ipcp.Config){
		"type":      func(c *ipcp.Config) { c.Type = ipcp.Local },
		"ethertype": func(c *ipcp.Config) { c.Eth.EtherType = 0x05ff },
		"reserved":  func(c *ipcp.Config) { c.Eth.EtherType = 0xffff },
		"device":    func(c *ipcp.Config) { c.Eth.Device = "" },
		"long":      func(c *ipcp.Config) { c.Eth.Device = "abcdefghijklmnop" },
		"hash":      func(c *ipcp.Config) { c.Hash = 4 },
	} {
		l := eth.NewDIX("dix", &host{}, p.Open, slog.New(slog.DiscardHandler))
		cfg := config(0)
		change(&cfg)
		if err := l.Bootstrap(t.Context(), cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if err := l.Register(hash); err == nil || l.State() != ipcp.StateBoot {
			t.Errorf("%s: %v in state %s", name, err, l.State())
		}
		if err := l.Bootstrap(t.Context(), config(0)); err != nil {
			t.Errorf("%s: second attempt: %v", name, err)
		}
		if err := l.Bootstrap(t.Context(), config(0)); !errors.Is(err, o7serr.EIPCPSTATE) {
			t.Errorf("%s: third attempt: %v", name, err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Leaving the layer ends everything that is under way and tells the peers.
func TestCloseLayer(t *testing.T) {
	var hub ethtest.Hub
	pa := hub.Port(macA, 1500)
	h, flows := accept("")
	a, b := boot(t, pa, &host{}), boot(t, hub.Port(macB, 1500), h)
	mute := bytes.Repeat([]byte{8}, 32)
	c := boot(t, hub.Port(macC, 1500), &host{})
	if err := errors.Join(b.Register(hash), c.Register(mute)); err != nil {
		t.Fatal(err)
	}
	client, server := pair(t, a, flows)
	var cs, ss sink
	client.SetSink(&cs)
	server.SetSink(&ss)
	results := make(chan error, 2)
	go func() {
		_, _, err := a.Alloc(context.Background(), ipcp.AllocRequest{Hash: mute})
		results <- err
	}()
	go func() { results <- a.Query(context.Background(), bytes.Repeat([]byte{9}, 32)) }()
	for counters(c)["flow_requests_received"] == 0 || counters(a)["queries_sent"] < 3 {
		time.Sleep(time.Millisecond)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-results; !errors.Is(err, o7serr.EIPCPSTATE) {
			t.Errorf("error %v, want EIPCPSTATE", err)
		}
	}
	cs.want(t, nil, ipcp.EventDealloc)
	ss.want(t, nil, ipcp.EventDealloc)
	if err := errors.Join(client.Close(), server.Close(), a.Close()); err != nil {
		t.Error(err)
	}
	if !pa.Closed() || pa.Endpoints(wire.DefaultEtherType) != 0 {
		t.Error("something is left on the port")
	}
	if err := a.Register(hash); !errors.Is(err, o7serr.EIPCPSTATE) || a.State() != ipcp.StateShutdown {
		t.Errorf("register after close: %v", err)
	}
}

// Many users at once, with frames lost and doubled: run with -race.
func TestConcurrent(t *testing.T) {
	var hub ethtest.Hub
	var n atomic.Uint32
	hub.Fate = func(*ethtest.Port, []byte) int {
		switch n.Add(1) % 7 {
		case 3:
			return 2
		}
		return 1
	}
	var open sync.WaitGroup
	h := &host{answer: func(in ipcp.Incoming) {
		f, err := in.Accept(nil)
		if err != nil {
			t.Error(err)
			return
		}
		gone := make(chan struct{})
		f.SetSink(&echo{f: f, gone: gone})
		open.Go(func() { <-gone; _ = f.Close() })
	}}
	pa, pb := hub.Port(macA, 1500), hub.Port(macB, 1500)
	a, b := boot(t, pa, &host{}), boot(t, pb, h)
	if err := b.Register(hash); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 25 {
				f, _, err := a.Alloc(t.Context(), ipcp.AllocRequest{
					Hash: hash, Data: fmt.Append(nil, i), Renew: func() []byte { return nil },
				})
				if err != nil {
					t.Error(err)
					return
				}
				var s sink
				f.SetSink(&s)
				for range 10 {
					if err := f.Send(packet.From([]byte("ping"))); err != nil {
						t.Error(err)
					}
				}
				for {
					s.mu.Lock()
					got := len(s.pkts)
					s.mu.Unlock()
					if got >= 10 {
						break
					}
					time.Sleep(50 * time.Microsecond)
				}
				if err := f.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	h.running.Wait() // the answer to a request may go on after the flow was closed
	open.Wait()
	if n := counters(a)["flows"] + counters(b)["flows"]; n != 0 {
		t.Errorf("%d flows left", n)
	}
	if err := errors.Join(a.Close(), b.Close()); err != nil {
		t.Error(err)
	}
	if n := pa.Endpoints(wire.DefaultEtherType) + pb.Endpoints(wire.DefaultEtherType); n != 0 {
		t.Errorf("%d endpoints left", n)
	}
}

// echo returns packets to their sender until the flow is released.
type echo struct {
	f    ipcp.Flow
	once sync.Once
	gone chan struct{}
}

func (e *echo) Receive(pkts []*packet.Buf) {
	for _, p := range pkts {
		_ = e.f.Send(p)
	}
}

func (e *echo) FlowEvent(ev ipcp.Event) {
	if ev == ipcp.EventDealloc {
		e.once.Do(func() { close(e.gone) })
	}
}

// Whatever arrives is counted once and harms nobody.
func FuzzFrame(f *testing.F) {
	f.Add(frame(macA, macB, 64, "data"))
	f.Add(frame(wire.Broadcast, macB, 0, string(wire.AppendDIXMgmt(nil, &wire.EthMgmt{Code: wire.NameQueryReq, Hash: hash}))))
	f.Add(frame(macA, macB, 0, string(wire.AppendDIXMgmt(nil, &wire.EthMgmt{Code: wire.FlowReq, SrcEID: 77, Hash: hash}))))
	f.Add(frame(macA, macB, 0, string(wire.AppendDIXMgmt(nil, &wire.EthMgmt{Code: wire.EthDealloc, SrcEID: 64, DstEID: 64}))))
	f.Fuzz(func(t *testing.T, b []byte) {
		var hub ethtest.Hub
		p := &raw{Port: hub.Port(macA, 1500)}
		l := eth.NewDIX("dix", &host{}, func(string) (eth.Device, error) { return p, nil }, slog.New(slog.DiscardHandler))
		if err := l.Bootstrap(t.Context(), config(0)); err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := l.Register(hash); err != nil {
			t.Fatal(err)
		}
		p.rx([]*packet.Buf{packet.From(b), packet.From(b)})
		c := counters(l)
		sum := c["rx_mgmt"] + c["rx_data"] + c["rx_malformed_dropped"] + c["rx_other_protocol_dropped"] +
			c["rx_misaddressed_dropped"] + c["rx_broadcast_data_dropped"] + c["rx_unknown_endpoint_dropped"]
		if sum != 2 {
			t.Errorf("2 frames, %d counted: %v", sum, c)
		}
	})
}

// raw gives a test the receive function of the layer.
type raw struct {
	*ethtest.Port
	rx func([]*packet.Buf)
}

func (r *raw) Claim(etherType uint16, rx func([]*packet.Buf)) (eth.Block, error) {
	r.rx = rx
	return r.Port.Claim(etherType, rx)
}

func (r *raw) Send(b *packet.Buf) error { b.Release(); return nil }

// BenchmarkReceive is the demultiplexer with frames of n flows in one batch.
func BenchmarkReceive(b *testing.B) {
	for _, n := range []int{1, 4} {
		b.Run(fmt.Sprint(n, "flows"), func(b *testing.B) {
			var hub ethtest.Hub
			p := &raw{Port: hub.Port(macA, 1500)}
			l := eth.NewDIX("dix", &host{}, func(string) (eth.Device, error) { return p, nil }, slog.New(slog.DiscardHandler))
			if err := l.Bootstrap(b.Context(), config(0)); err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			for range n {
				openFlow(b, l, p).SetSink(release{})
			}
			frames := make([]*packet.Buf, 64)
			b.ReportAllocs()
			for b.Loop() {
				for i := range frames {
					frames[i] = packet.Get(60)
					wire.PutDIX(frames[i].Bytes(), macA, macB, wire.DefaultEtherType, uint16(64+i%n), 42)
				}
				p.rx(frames)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/64, "ns/packet")
		})
	}
}

// openFlow makes a flow whose peer is played by the test.
func openFlow(t testing.TB, l *eth.IPCP, p *raw) ipcp.Flow {
	t.Helper()
	done := make(chan ipcp.Flow)
	go func() {
		f, _, err := l.Alloc(context.Background(), ipcp.AllocRequest{Hash: hash, QoS: qos.Raw})
		if err != nil {
			t.Error(err)
		}
		done <- f
	}()
	reply := func(m *wire.EthMgmt) {
		p.rx([]*packet.Buf{packet.From(frame(macA, macB, 0, string(wire.AppendDIXMgmt(nil, m))))})
	}
	reply(&wire.EthMgmt{Code: wire.NameQueryReply, Hash: hash})
	for eid := uint16(64); ; eid = 64 + (eid-63)%16 {
		reply(&wire.EthMgmt{Code: wire.FlowReply, SrcEID: eid, DstEID: eid})
		select {
		case f := <-done:
			return f
		case <-time.After(time.Millisecond):
		}
	}
}

type release struct{}

func (release) Receive(pkts []*packet.Buf) {
	for _, p := range pkts {
		p.Release()
	}
}
func (release) FlowEvent(ipcp.Event) {}
