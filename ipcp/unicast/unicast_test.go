package unicast

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/o7s/o7s-router/control/cacep"
	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/local"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/wire"
)

// world joins members of one layer in one process: AllocFlow makes a pair of
// flows and hands the far end to the member of that name. Links can be cut.
type world struct {
	t    *testing.T
	slow atomic.Int64 // ns that AllocFlow takes
	mu   sync.Mutex   // guards all below
	// links are pairs of member names that can talk; ends their open flows.
	links   map[[2]string]bool
	members map[string]*Layer
	ends    map[[2]string][]*link
	apps    map[string]func(ipcp.Incoming) // by member
}

// link is one N-1 flow with a switch.
type link struct {
	a, b *cutFlow
}

// cutFlow is an end of a local pair that loses everything while it is down.
type cutFlow struct {
	*local.Flow
	mu     sync.Mutex // guards what follows
	down   bool
	silent bool // nobody knows that it is
	sink   ipcp.Sink
}

func (f *cutFlow) Send(b *packet.Buf) error {
	f.mu.Lock()
	down, silent := f.down, f.silent
	f.mu.Unlock()
	if down {
		b.Release()
		if silent {
			return nil
		}
		return o7serr.EFLOWDOWN
	}
	return f.Flow.Send(b)
}

func (f *cutFlow) SetSink(s ipcp.Sink) {
	f.mu.Lock()
	f.sink = s
	f.mu.Unlock()
	f.Flow.SetSink(s)
}

// set changes the state; silent leaves the user without the event, as a link
// that fails further away does.
func (f *cutFlow) set(up, silent bool) {
	f.mu.Lock()
	f.down, f.silent = !up, silent
	s := f.sink
	f.mu.Unlock()
	if s == nil || silent {
		return
	}
	if up {
		s.FlowEvent(ipcp.EventUp)
	} else {
		s.FlowEvent(ipcp.EventDown)
	}
}

func newWorld(t *testing.T) *world {
	return &world{t: t, links: map[[2]string]bool{}, members: map[string]*Layer{}, ends: map[[2]string][]*link{}, apps: map[string]func(ipcp.Incoming){}}
}

func pairKey(a, b string) [2]string {
	if a > b {
		a, b = b, a
	}
	return [2]string{a, b}
}

// member adds an IPC process with a data plane of its own.
func (w *world) member(name string) *Layer {
	w.t.Helper()
	plane, err := fastpath.New(fastpath.Options{DisableXDP: true, MaxRoutes: 1000})
	if err != nil {
		w.t.Fatal(err)
	}
	l := New(name, w, plane, slog.New(slog.DiscardHandler))
	w.mu.Lock()
	w.members[name] = l
	w.mu.Unlock()
	w.t.Cleanup(func() { plane.Close() })
	return l
}

func (w *world) link(a, b string) { w.links[pairKey(a, b)] = true }

func (w *world) AllocFlow(_ context.Context, l ipcp.Layer, name string, q qos.Spec) (ipcp.Flow, error) {
	w.mu.Lock()
	to := w.members[name]
	key := pairKey(l.Name(), name)
	ok := w.links[key]
	w.mu.Unlock()
	if to == nil || !ok {
		return nil, o7serr.Wrap(o7serr.EIPCP, "no layer reaches %q", name)
	}
	time.Sleep(time.Duration(w.slow.Load()))
	a, b := local.NewPair(ipcp.FlowInfo{Layer: "wire", Type: ipcp.EthDIX, QoS: q, MTU: 1496, MPL: 100})
	n := &link{a: &cutFlow{Flow: a}, b: &cutFlow{Flow: b}}
	w.mu.Lock()
	w.ends[key] = append(w.ends[key], n)
	w.mu.Unlock()
	to.AcceptFlow(n.b, name)
	return n.a, nil
}

func (w *world) FlowArrived(l ipcp.Layer, in ipcp.Incoming) {
	w.mu.Lock()
	f := w.apps[l.Name()]
	w.mu.Unlock()
	if f == nil {
		in.Refuse(o7serr.ENAME.Code())
		return
	}
	go f(in)
}

// cut takes every flow between two members down or up.
func (w *world) cut(a, b string, up, silent bool) {
	w.mu.Lock()
	ends := w.ends[pairKey(a, b)]
	w.mu.Unlock()
	for _, n := range ends {
		n.a.set(up, silent)
		n.b.set(up, silent)
	}
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// line builds members joined as the names follow each other; close ends them.
func (w *world) line(policy ipcp.RoutingPolicy, names ...string) (close func()) {
	w.t.Helper()
	ctx := context.Background()
	for i, n := range names {
		m := w.member(n)
		if i == 0 {
			cfg := ipcp.Config{Type: ipcp.Unicast, LayerName: "net", Hash: ipcp.SHA3_256, Unicast: ipcp.DefaultUnicast()}
			cfg.Unicast.Routing = policy
			w.must(m.Bootstrap(ctx, cfg))
			continue
		}
		w.link(names[i-1], n)
		w.must(m.Enroll(ctx, names[i-1]))
		w.connect(n, names[i-1])
	}
	return func() {
		for _, n := range names {
			w.must(w.members[n].Close())
		}
		time.Sleep(time.Millisecond) // whoever was told closes its flows
	}
}

func (w *world) connect(from, to string) {
	w.t.Helper()
	ctx := context.Background()
	w.must(w.members[from].Connect(ctx, to, ipcp.Management, qos.Raw))
	w.must(w.members[from].Connect(ctx, to, ipcp.DataTransfer, qos.Raw))
}

func nameHash(name string) []byte {
	h, err := wire.HashName(wire.HashSHA3_256, name)
	if err != nil {
		panic(err)
	}
	return h
}

// collector keeps what a flow receives.
type collector struct {
	mu     sync.Mutex // guards all below
	pkts   [][]byte
	events []ipcp.Event
}

func (c *collector) Receive(pkts []*packet.Buf) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range pkts {
		c.pkts = append(c.pkts, bytes.Clone(b.Bytes()))
		b.Release()
	}
}

func (c *collector) FlowEvent(e ipcp.Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events = append(c.events, e)
}

func (c *collector) take() ([][]byte, []ipcp.Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, e := c.pkts, c.events
	c.pkts, c.events = nil, nil
	return p, e
}

// echo makes a member accept every flow and send back what it gets.
func (w *world) echo(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.apps[name] = func(in ipcp.Incoming) {
		f, err := in.Accept([]byte("reply to " + string(in.Data())))
		if err != nil {
			w.t.Errorf("accept: %v", err)
			return
		}
		f.SetSink(&echoer{f: f})
	}
}

type echoer struct{ f ipcp.Flow }

func (e *echoer) Receive(pkts []*packet.Buf) {
	for _, b := range pkts {
		e.f.Send(b)
	}
}
func (e *echoer) FlowEvent(ev ipcp.Event) {
	if ev == ipcp.EventDealloc {
		go e.f.Close()
	}
}

// dial allocates a flow and checks that the piggyback came back.
func (w *world) dial(from, name string) (ipcp.Flow, *collector) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	f, data, err := w.members[from].Alloc(ctx, ipcp.AllocRequest{Hash: nameHash(name), QoS: qos.Raw, Data: []byte("request")})
	w.must(err)
	if string(data) != "reply to request" {
		w.t.Fatalf("piggyback %q", data)
	}
	c := &collector{}
	f.SetSink(c)
	return f, c
}

// ping sends a packet and reports whether its echo came.
func ping(f ipcp.Flow, c *collector, msg string) bool {
	c.take()
	f.Send(packet.From([]byte(msg)))
	synctest.Wait()
	got, _ := c.take()
	return len(got) == 1 && string(got[0]) == msg
}

// TestThreeNodes: enrol, route, register, allocate and talk over a line, both
// directions, and the release reaches the other end.
func TestThreeNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b", "c")
		time.Sleep(time.Second)
		a, b, c := w.members["a"], w.members["b"], w.members["c"]
		for _, m := range []*Layer{a, b, c} {
			if n := len(m.Routes()); n != 2 {
				t.Errorf("%s has %d routes, want 2", m.Name(), n)
			}
			if n := len(m.LSDB()); n != 4 {
				t.Errorf("%s has %d LSAs, want 4", m.Name(), n)
			}
		}
		for _, dir := range []struct{ from, at string }{{"a", "c"}, {"c", "a"}, {"b", "c"}, {"a", "b"}} {
			w.echo(dir.at)
			name := "svc." + dir.from + dir.at
			w.must(w.members[dir.at].Register(nameHash(name)))
			w.must(w.members[dir.from].Query(context.Background(), nameHash(name)))
			f, col := w.dial(dir.from, name)
			for i := range 100 {
				if !ping(f, col, fmt.Sprint("packet ", i)) {
					t.Fatalf("%s -> %s: packet %d was lost", dir.from, dir.at, i)
				}
			}
			if f.Info().MTU != 1481 {
				t.Errorf("MTU %d, want 1481 (spec 20 §8)", f.Info().MTU)
			}
			if err := f.Send(packet.Get(1482)); !errors.Is(err, o7serr.EMSGSIZE) {
				t.Errorf("packet above the MTU: %v", err)
			}
			w.must(f.Close())
			synctest.Wait()
		}
		var open uint64
		for _, m := range []*Layer{a, b, c} {
			for name, n := range m.Counters() {
				if name == "fa_flows_open" {
					open += n
				}
			}
		}
		if open != 0 {
			t.Errorf("%d flows are left after all were closed", open)
		}
		end()
	})
}

// TestRefusals: unknown names and names that nobody serves fail at once.
func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b", "c")
		time.Sleep(2 * time.Second)
		start := time.Now()
		if err := w.members["a"].Query(context.Background(), nameHash("nobody")); !errors.Is(err, o7serr.EIPCP) {
			t.Errorf("query of an unknown name: %v", err)
		}
		w.must(w.members["c"].Register(nameHash("registered")))
		_, _, err := w.members["a"].Alloc(context.Background(), ipcp.AllocRequest{Hash: nameHash("registered"), QoS: qos.Raw})
		if !errors.Is(err, o7serr.ENAME) {
			t.Errorf("allocation that is refused: %v", err)
		}
		if d := time.Since(start); d > 100*time.Millisecond {
			t.Errorf("refusals took %v", d)
		}
		if err := w.members["a"].Bootstrap(context.Background(), ipcp.Config{}); !errors.Is(err, o7serr.EIPCPSTATE) {
			t.Errorf("second bootstrap: %v", err)
		}
		if err := w.members["a"].Disconnect(context.Background(), "nobody", ipcp.DataTransfer); !errors.Is(err, o7serr.ENOTALLOC) {
			t.Errorf("disconnect of no connection: %v", err)
		}
		end()
		if err := w.members["a"].Register(nameHash("late")); !errors.Is(err, o7serr.EIPCPSTATE) {
			t.Errorf("register after close: %v", err)
		}
	})
}

// TestOtherRegistrant: when two members serve a name and one of them refuses,
// or is silent because it lost the request or died, the other one is found
// within one allocation.
func TestOtherRegistrant(t *testing.T) {
	for _, bad := range []string{"b", "c"} { // one of them is asked first
		for _, tc := range []struct {
			name string
			app  func(ipcp.Incoming)
			most time.Duration
		}{
			{"refuses", func(in ipcp.Incoming) { in.Refuse(o7serr.ENAME.Code()) }, 100 * time.Millisecond},
			{"silent", func(ipcp.Incoming) {}, 1100 * time.Millisecond},
		} {
			t.Run(bad+" "+tc.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					end := w.line(ipcp.LinkState, "a", "b", "c")
					w.echo("b")
					w.echo("c")
					w.mu.Lock()
					w.apps[bad] = tc.app
					w.mu.Unlock()
					time.Sleep(2 * time.Second)
					w.must(w.members["b"].Register(nameHash("svc")))
					w.must(w.members["c"].Register(nameHash("svc")))
					time.Sleep(2 * time.Second)
					n := 0
					start := time.Now()
					ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
					defer cancel()
					f, data, err := w.members["a"].Alloc(ctx, ipcp.AllocRequest{
						Hash: nameHash("svc"), QoS: qos.Raw, Data: []byte("request 0"),
						Renew: func() []byte { n++; return fmt.Appendf(nil, "request %d", n) },
					})
					w.must(err)
					if want := fmt.Sprintf("reply to request %d", n); string(data) != want {
						t.Errorf("piggyback %q, want %q", data, want)
					}
					if d := time.Since(start); d > tc.most {
						t.Errorf("took %v", d)
					}
					c := &collector{}
					f.SetSink(c)
					if !ping(f, c, "hello") {
						t.Error("no echo")
					}
					w.must(f.Close())
					end()
				})
			})
		}
	}
}

// TestFreshName: a name is found as soon as the layer stands, though its
// directory is still forming.
func TestFreshName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b", "c")
		for len(w.members["a"].Routes()) < 2 {
			time.Sleep(time.Millisecond)
		}
		w.must(w.members["c"].Register(nameHash("svc")))
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := w.members["a"].Query(ctx, nameHash("svc")); err != nil {
			t.Errorf("query right after the routes came: %v", err)
		}
		end()
	})
}

// TestLinkCut: the ring goes the other way within milliseconds of the report,
// and comes back.
func TestLinkCut(t *testing.T) {
	for _, policy := range []ipcp.RoutingPolicy{ipcp.LinkState, ipcp.LFA, ipcp.ECMP} {
		t.Run(policy.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				end := w.line(policy, "a", "b", "c", "d")
				w.link("d", "a")
				w.connect("d", "a")
				time.Sleep(5 * time.Second)
				w.echo("b")
				w.must(w.members["b"].Register(nameHash("svc")))
				f, col := w.dial("a", "svc")
				if !ping(f, col, "before") {
					t.Fatal("no echo before the cut")
				}
				w.cut("a", "b", false, false)
				time.Sleep(200 * time.Millisecond)
				if !ping(f, col, "during") {
					t.Fatalf("no echo 200 ms after the cut; routes of a: %+v", w.members["a"].Routes())
				}
				w.cut("a", "b", true, false)
				time.Sleep(5 * time.Second)
				if !ping(f, col, "after") {
					t.Fatal("no echo after the link came back")
				}
				if r := w.members["a"].Routes(); len(r) != 3 {
					t.Errorf("routes after the link came back: %+v", r)
				}
				w.must(f.Close())
				end()
			})
		})
	}
}

// TestSilentPeer: a neighbour that falls silent without a report is found by
// its time-out and the adjacency is made again when it is back.
func TestSilentPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b")
		time.Sleep(time.Second)
		w.cut("a", "b", false, true)
		time.Sleep(119 * time.Second)
		if n := len(w.members["b"].Neighbors()); n != 2 {
			t.Errorf("%d adjacencies before the time-out, want 2", n)
		}
		time.Sleep(30 * time.Second)
		// The old flows stay dead; new ones work: both adjacencies come back.
		time.Sleep(time.Minute)
		for _, n := range w.members["b"].Neighbors() {
			if n.State != "up" {
				t.Errorf("adjacency not back: %+v", n)
			}
		}
		if r := w.members["b"].Routes(); len(r) != 1 {
			t.Errorf("routes after the peer is back: %+v", r)
		}
		end()
	})
}

// TestIdleAdjacencies: keep-alives hold them for hours.
func TestIdleAdjacencies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b")
		time.Sleep(2 * time.Hour)
		for _, n := range w.members["a"].Neighbors() {
			if n.State != "up" || n.Silent > 33 { // a keep-alive each 30 s, seen at a poll up to T/64 later
				t.Errorf("after two idle hours: %+v", n)
			}
		}
		end()
	})
}

// TestDisconnect withdraws the route, and nothing connects again.
func TestDisconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b", "c")
		time.Sleep(time.Second)
		w.must(w.members["c"].Disconnect(context.Background(), "b", ipcp.DataTransfer))
		time.Sleep(time.Second)
		if r := w.members["a"].Routes(); len(r) != 1 {
			t.Errorf("routes of a after the disconnect: %+v", r)
		}
		time.Sleep(time.Minute)
		if n := len(w.members["c"].Neighbors()); n != 1 {
			t.Errorf("%d adjacencies of c, want the management one", n)
		}
		end()
	})
}

// TestAddressConflict: a member that finds its address in use draws another
// one, reconnects and serves its names again.
func TestAddressConflict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b", "c")
		time.Sleep(time.Second)
		c := w.members["c"]
		w.echo("c")
		w.must(c.Register(nameHash("svc")))
		time.Sleep(time.Second)
		old := c.Address()
		// Another member far away announces c's address: the LSA arrives at c.
		forged := wire.LSA{Dst: w.members["a"].Address() + 1, Src: old, Seqno: 7}.AppendTo(nil)
		c.loop.call(func(now time.Time) {
			for id, n := range c.conns {
				if n.comp == ipcp.Management {
					c.ls.Receive(now, id, forged)
				}
			}
		})
		time.Sleep(10 * time.Second)
		if c.Address() == old {
			t.Fatal("the address was not drawn again")
		}
		f, col := w.dial("a", "svc")
		if !ping(f, col, "hello") {
			t.Error("no echo under the new address")
		}
		w.must(f.Close())
		end()
	})
}

// TestStrayBeforeHandshake: a member that restarts uses its endpoint numbers
// again, so packets for its former self, or for ours, come first on a new flow.
func TestStrayBeforeHandshake(t *testing.T) {
	stray := func(f ipcp.Flow) {
		f.Send(packet.Get(0)) // keep-alive
		f.Send(packet.From(wire.AppendLSA(nil, wire.LSA{Dst: 0x0A0B0C0D, Src: 0x4F3A21C7, Seqno: 9})))
		b := packet.Get(wire.DTLen(4) + 64)
		wire.PutDT(b.Bytes(), 4, wire.DT{Dst: 0x4e5f6071, TTL: 60, EID: 0x1234567800000043})
		f.Send(b)
	}
	pair := func() (ipcp.Flow, *collector, ipcp.Flow) {
		near, far := local.NewPair(ipcp.FlowInfo{Layer: "wire", Type: ipcp.EthDIX, QoS: qos.Raw, MTU: 1496, MPL: 100})
		c := &collector{}
		near.SetSink(c)
		return near, c, far
	}
	const peer = 0x49FCC0D4
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a")
		a := w.members["a"]

		near, c, far := pair()
		stray(near)
		a.AcceptFlow(far, "a")
		hs := cacep.NewInitiator(time.Now(), string(ipcp.Management), peer)
		near.Send(packet.From(hs.Message()))
		synctest.Wait()
		pkts, _ := c.take()
		if len(pkts) != 1 {
			t.Fatalf("%d answers", len(pkts))
		}
		if addr, err := hs.Receive(time.Now(), pkts[0]); err != nil || addr != a.Address() {
			t.Errorf("answer of %#x: %v", addr, err)
		}
		w.must(near.Close())

		near, _, far = pair()
		p := newPending()
		far.SetSink(p)
		stray(near)
		_, _, reply, err := cacep.Accept(cacep.NewInitiator(time.Now(), string(ipcp.DataTransfer), a.Address()).Message(), peer)
		w.must(err)
		near.Send(packet.From(reply))
		if addr, err := a.initiate(context.Background(), far, p, ipcp.DataTransfer); err != nil || addr != peer {
			t.Errorf("initiator: %#x, %v", addr, err)
		}
		w.must(near.Close())
		w.must(far.Close())

		// Nothing else comes: refused at the handshake's deadline, silently.
		near, c, far = pair()
		stray(near)
		a.AcceptFlow(far, "a")
		time.Sleep(cacep.Timeout + time.Millisecond)
		if pkts, events := c.take(); len(pkts) != 0 || !slices.Contains(events, ipcp.EventDealloc) {
			t.Errorf("%d packets, events %v", len(pkts), events)
		}
		w.must(near.Close())
		end()
	})
}

// TestHostileData: whatever comes on a DT flow is counted by one reason and
// never answered with a crash.
func TestHostileData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b")
		time.Sleep(time.Second)
		a := w.members["a"]
		var dt *conn
		a.loop.call(func(time.Time) {
			for _, c := range a.conns {
				if c.comp == ipcp.DataTransfer {
					dt = c
				}
			}
		})
		self := a.Address()
		hdr := func(dst uint64, qc, ttl uint8, eid uint64) *packet.Buf {
			b := packet.Get(wire.DTLen(4))
			wire.PutDT(b.Bytes(), 4, wire.DT{Dst: dst, QC: qc, TTL: ttl, EID: eid})
			return b
		}
		dt.Receive([]*packet.Buf{
			packet.Get(0),                 // keep-alive
			packet.From(make([]byte, 14)), // short
			hdr(self, 3, 60, 70),          // no such cube
			hdr(self^1, 0, 1, 70),         // TTL ends here
			hdr(self^1, 0, 0, 70),         // TTL that the reference would wrap
			hdr(self^1, 0, 60, 70),        // no route
			hdr(self, 0, 0, 1<<40|70),     // no such endpoint
			hdr(self, 0, 60, 63),          // no such component
			hdr(self, 0, 60, 0),           // flow allocator: empty message
			hdr(self, 0, 60, 1),           // directory: empty message
			hdr(self, 0, 60, ^uint64(0)),  // the reference's marker for no flow
		})
		synctest.Wait()
		want := map[string]uint64{
			"dt_short_dropped": 1, "dt_cube_dropped": 1, "dt_ttl_dropped": 2, "dt_no_route_dropped": 1,
			"dt_eid_dropped": 2, "dt_component_dropped": 1, "dt_send_dropped": 0,
			"fa_malformed_dropped": 1, "dht_malformed_dropped": 1,
		}
		for name, n := range a.Counters() {
			if x, ok := want[name]; ok && x != n {
				t.Errorf("%s = %d, want %d", name, n, x)
			}
		}
		end()
	})
}

// TestFlood: messages that come faster than they are handled are dropped and
// counted; memory does not grow, and our own events pass.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b")
		time.Sleep(time.Second)
		a := w.members["a"]
		var dt, mgmt *conn
		a.loop.call(func(time.Time) {
			for _, c := range a.conns {
				if c.comp == ipcp.DataTransfer {
					dt = c
				} else {
					mgmt = c
				}
			}
		})
		busy := make(chan struct{})
		a.loop.post(func(time.Time) { <-busy })
		synctest.Wait()
		for range 2 * maxQueued {
			b := packet.Get(wire.DTLen(4) + 1)
			wire.PutDT(b.Bytes(), 4, wire.DT{Dst: a.Address(), TTL: 60, EID: wire.FlowAllocatorEID})
			dt.Receive([]*packet.Buf{b})
			mgmt.Receive([]*packet.Buf{packet.From([]byte("x"))})
		}
		a.loop.mu.Lock()
		n := len(a.loop.queue)
		a.loop.mu.Unlock()
		if n != maxQueued {
			t.Errorf("%d messages wait, want %d", n, maxQueued)
		}
		if n := a.dt.drops[dropBusy].Load(); n != 3*maxQueued {
			t.Errorf("%d messages counted as dropped, want %d", n, 3*maxQueued)
		}
		dt.FlowEvent(ipcp.EventDown)
		close(busy)
		synctest.Wait()
		for _, n := range a.Neighbors() {
			if n.Component == "dt" && n.State != "down" {
				t.Errorf("the link's event was lost: %+v", n)
			}
		}
		end()
	})
}

// dtConn is a member's data-transfer adjacency, nil without one.
func dtConn(l *Layer) (dt *conn) {
	l.loop.call(func(time.Time) {
		for _, c := range l.conns {
			if c.comp == ipcp.DataTransfer {
				dt = c
			}
		}
	})
	return dt
}

// TestReconnect: an adjacency comes back as it was asked for, also when it is
// lost in the moment it was made, and not when it was disconnected meanwhile.
func TestReconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b")
		b := w.members["b"]
		w.must(b.Disconnect(t.Context(), "a", ipcp.DataTransfer))
		spec := qos.Raw
		spec.Timeout = 7000
		w.must(b.Connect(t.Context(), "a", ipcp.DataTransfer, spec))
		for range 3 {
			c := dtConn(b)
			if c == nil || c.info.QoS != spec {
				t.Fatalf("adjacency %+v, want one with %+v", c, spec)
			}
			c.FlowEvent(ipcp.EventDealloc)
			time.Sleep(time.Second)
		}
		b.loop.call(func(now time.Time) { b.conflict(now, "test") })
		time.Sleep(time.Second)
		c := dtConn(b)
		if c == nil || c.info.QoS != spec {
			t.Fatalf("after a new address: adjacency %+v, want one with %+v", c, spec)
		}
		w.slow.Store(int64(time.Second))
		c.FlowEvent(ipcp.EventDealloc)
		time.Sleep(500 * time.Millisecond) // it is being made
		w.must(b.Disconnect(t.Context(), "a", ipcp.DataTransfer))
		time.Sleep(10 * time.Second)
		if c := dtConn(b); c != nil {
			t.Errorf("adjacency that was disconnected: %+v", c)
		}

		// Connected by hand while it is being made: once is enough.
		w.must(b.Connect(t.Context(), "a", ipcp.DataTransfer, spec))
		dtConn(b).FlowEvent(ipcp.EventDealloc)
		time.Sleep(500 * time.Millisecond)
		w.slow.Store(0)
		w.must(b.Connect(t.Context(), "a", ipcp.DataTransfer, spec))
		time.Sleep(10 * time.Second)
		if n := len(b.Neighbors()); n != 2 {
			t.Errorf("%d adjacencies, want one for management and one for data: %+v", n, b.Neighbors())
		}
		end()
	})
}

// TestCloseWhileEnrolling leaves nothing behind that works.
func TestCloseWhileEnrolling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a")
		w.link("a", "b")
		b := w.member("b")
		w.slow.Store(int64(time.Second))
		res := make(chan error)
		go func() { res <- b.Enroll(t.Context(), "a") }()
		time.Sleep(500 * time.Millisecond)
		w.must(b.Close())
		if err := <-res; !errors.Is(err, o7serr.EIPCPSTATE) {
			t.Errorf("enrolment: %v", err)
		}
		if s := b.State(); s != ipcp.StateShutdown {
			t.Errorf("state %s", s)
		}
		end()
	})
}

// TestAllocDuringConflict: an allocation whose endpoint is gone fails at once.
func TestAllocDuringConflict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b")
		time.Sleep(time.Second)
		a, b := w.members["a"], w.members["b"]
		w.mu.Lock()
		w.apps["b"] = func(ipcp.Incoming) {} // never answers
		w.mu.Unlock()
		w.must(b.Register(nameHash("svc")))
		time.Sleep(time.Second)
		begin := time.Now()
		time.AfterFunc(500*time.Millisecond, func() {
			a.loop.post(func(now time.Time) { a.conflict(now, "test") })
		})
		_, _, err := a.Alloc(t.Context(), ipcp.AllocRequest{Hash: nameHash("svc"), QoS: qos.Raw, Data: []byte("request")})
		if d := time.Since(begin); !errors.Is(err, o7serr.EAGAIN) || d > time.Second {
			t.Errorf("after %v: %v", d, err)
		}
		end()
	})
}
