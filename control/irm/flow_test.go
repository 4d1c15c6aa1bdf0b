package irm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/o7s/o7s-router/control/irm/registry"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/ring"
)

// pair makes a flow from client to a server of name "srv".
func pair(t *testing.T, client, server *prog) (c, s *testFlow) {
	t.Helper()
	type res struct {
		f   *testFlow
		err error
	}
	accepted := make(chan res, 1)
	go func() {
		f, err := server.accept(5000)
		accepted <- res{f, err}
	}()
	c, err := client.alloc("srv")
	r := <-accepted
	if err := errors.Join(err, r.err); err != nil {
		t.Fatal(err)
	}
	return c, r.f
}

func exchange(t *testing.T, a, b *testFlow) {
	t.Helper()
	for i, dir := range [][2]*testFlow{{a, b}, {b, a}} {
		for _, msg := range []string{fmt.Sprint("hello ", i), "", strings.Repeat("x", 1400)} {
			if err := dir[0].end.Write([]byte(msg)); err != nil {
				t.Fatal(err)
			}
			if got, err := dir[1].read(); err != nil || got != msg {
				t.Fatalf("received %q, %v", got, err)
			}
		}
	}
}

func TestDirectFlow(t *testing.T) {
	n := newNode(t, nil)
	n.serve("srv", "server")
	client, server := n.prog("client"), n.prog("server")
	c, s := pair(t, client, server)
	exchange(t, c, s)
	if !c.Direct || !s.Direct || c.MPL != 1 || c.MTU != directMTU || s.Name != "srv" || s.QoS != qos.Raw || c.Ring.Side == s.Ring.Side {
		t.Errorf("client %+v, server %+v", c.FlowResult, s.FlowResult)
	}
	flows := call[[]FlowInfo](t, client, ipc.OpShow, ipc.ShowArgs{What: "flows"})
	if len(flows) != 2 || flows[0].Path != "direct" || flows[0].State != "allocated" || flows[1].Prog == flows[0].Prog {
		t.Errorf("flows %+v", flows)
	}
	// What was written before the release can still be read.
	if err := errors.Join(c.end.Write([]byte("bye")), c.close()); err != nil {
		t.Fatal(err)
	}
	if e := s.event(t); e != "dealloc" {
		t.Errorf("event %q", e)
	}
	if got, err := s.read(); err != nil || got != "bye" {
		t.Errorf("read %q, %v", got, err)
	}
	code(t, c.close(), o7serr.ENOTALLOC)
	if err := s.close(); err != nil {
		t.Error(err)
	}
}

// With direct flows off, the local layer carries them, by the same mechanism.
func TestLocalLayer(t *testing.T) {
	n := newNode(t, noDirect)
	client, server := n.prog("client"), n.prog("server")
	n.serve("srv", "server")
	if err := n.Bind(t.Context(), ipc.BindArgs{Name: "srv", PID: int32(os.Getpid())}); err != nil {
		t.Fatal(err)
	}
	if err := n.Bootstrap(t.Context(), ipc.BootstrapArgs{Name: "loc", Type: "local", Layer: "here"}); err != nil {
		t.Fatal(err)
	}
	_, err := client.alloc("srv")
	code(t, err, o7serr.EIPCP)
	if err := n.Register(ipc.RegisterArgs{Name: "srv", Layers: []string{"he*"}}); err != nil {
		t.Fatal(err)
	}
	c, s := pair(t, client, server)
	exchange(t, c, s)
	if c.Layer != "here" || c.Direct || c.Ring.Side == s.Ring.Side || c.MPL != 100 {
		t.Errorf("client %+v, server %+v", c.FlowResult, s.FlowResult)
	}
	if flows := n.Flows(); flows[0].Path != "direct" {
		t.Errorf("flows %+v", flows)
	}
	if err := n.DestroyIPCP("loc"); err != nil {
		t.Error(err)
	}
	if a, b := c.event(t), s.event(t); a != "dealloc" || b != "dealloc" {
		t.Errorf("events %s, %s", a, b)
	}
	_ = c.end.Close()
	_ = s.end.Close()
}

func TestRemoteFlow(t *testing.T) {
	n, l := wired(t)
	server, client := n.prog("server"), n.prog("client")
	n.name("srv")
	if err := n.Register(ipc.RegisterArgs{Name: "srv", IPCPs: []string{"eth0"}}); err != nil {
		t.Fatal(err)
	}
	// A second node, which has the client.
	far := newNode(t, withLayers)
	fl := far.wire("eth9")
	fl.set(func() { fl.peer = l })
	l.set(func() { l.peer = fl })
	far.name("srv")
	remote, err := join(far.dir, "client")
	if err != nil {
		t.Fatal(err)
	}
	defer remote.Close()

	// Nobody is bound: refused at once, not after a time-out.
	begin := time.Now()
	_, err = remote.alloc("srv")
	code(t, err, o7serr.ENAME)
	if d := time.Since(begin); d > 500*time.Millisecond {
		t.Errorf("refused after %v", d)
	}
	if err := n.Bind(t.Context(), ipc.BindArgs{Name: "srv", PID: int32(os.Getpid())}); err != nil {
		t.Fatal(err)
	}
	c, s := pair(t, remote, server)
	exchange(t, c, s)
	if c.Layer != "wire" || c.Direct || c.MTU != 1400 || c.MPL != 100 || c.Ring.Side != 0 || s.Ring.Side != 0 {
		t.Errorf("client %+v, server %+v", c.FlowResult, s.FlowResult)
	}
	// A packet above the MTU is lost, the next one is not.
	if err := errors.Join(c.end.Write(make([]byte, 1401)), c.end.Write([]byte("next"))); err != nil {
		t.Fatal(err)
	}
	if got, err := s.read(); err != nil || got != "next" {
		t.Errorf("received %q, %v", got, err)
	}
	l.mu.Lock()
	end := l.flows[len(l.flows)-1]
	l.mu.Unlock()
	end.in.Event(ipcp.EventDown)
	end.in.Event(ipcp.EventUp)
	if a, b := s.event(t), s.event(t); a != "down" || b != "up" {
		t.Errorf("events %s, %s", a, b)
	}
	// What was written is sent before the flow is released.
	for i := range 100 {
		if err := s.end.Write(fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if e := c.event(t); e != "dealloc" {
		t.Errorf("event %q", e)
	}
	for i := range 100 {
		if got, err := c.read(); err != nil || got != fmt.Sprint(i) {
			t.Fatalf("packet %d: %q, %v", i, got, err)
		}
	}
	if err := c.close(); err != nil {
		t.Error(err)
	}
	_ = client
}

// A program that does not read loses packets, and nobody else waits.
func TestSlowReader(t *testing.T) {
	n, _ := wired(t)
	ses := &session{m: n.IRM, wait: -1}
	defer ses.unshare()
	own, err := ses.ownShare()
	if err != nil {
		t.Fatal(err)
	}
	f := &flow{m: n.IRM, id: 1, session: ses}
	if f.slot, err = own.take(1); err != nil {
		t.Fatal(err)
	}
	defer f.slot.done()
	if f.pump, err = newPump(f, 1400); err != nil {
		t.Fatal(err)
	}
	defer f.pump.close()
	const packets = ring.DefaultCapacity/1008 + 10
	for range packets {
		f.pump.Receive([]*packet.Buf{packet.Get(1000)})
	}
	if got := f.pump.dropped.Load(); got < 9 || got > 11 {
		t.Errorf("%d of %d packets dropped", got, packets)
	}
	if n.Stats().RingDrops != f.pump.dropped.Load() {
		t.Errorf("%d counted", n.Stats().RingDrops)
	}
}

func TestRefusals(t *testing.T) {
	n, l := wired(t, func(c *Config) { c.AllocTimeout = 500 * time.Millisecond })
	p := n.prog("client")
	n.name("srv")
	alloc := func(a ipc.AllocArgs) error {
		_, err := p.flow(t.Context(), ipc.OpAlloc, a)
		return err
	}
	code(t, alloc(ipc.AllocArgs{Name: "nowhere", QoS: qos.Raw}), o7serr.ENAME)
	code(t, alloc(ipc.AllocArgs{Name: "srv", QoS: qos.Raw, Encrypt: true}), o7serr.ECRYPT)
	code(t, alloc(ipc.AllocArgs{Name: "srv", QoS: qos.Raw, Auth: true}), o7serr.EAUTH)
	_, err := p.Call(t.Context(), ipc.OpJoin, ipc.JoinArgs{Layer: "bc"}, nil)
	code(t, err, o7serr.ENAME)
	if err == nil || !strings.Contains(err.Error(), "no broadcast layer") {
		t.Errorf("join: %v", err)
	}

	// No layer knows the name: known as soon as they all said so.
	l.set(func() { l.delay = 20 * time.Millisecond })
	begin := time.Now()
	code(t, alloc(ipc.AllocArgs{Name: "srv", QoS: qos.Raw}), o7serr.EIPCP)
	if d := time.Since(begin); d > 150*time.Millisecond {
		t.Errorf("no layer: after %v", d)
	}
	// A directory that does not answer has its limit.
	l.set(func() { l.delay = time.Minute })
	begin = time.Now()
	code(t, alloc(ipc.AllocArgs{Name: "srv", QoS: qos.Raw}), o7serr.EIPCP)
	if limit := queryLimit(l.Type()); time.Since(begin) < limit || time.Since(begin) > 5*limit {
		t.Errorf("silent directory: after %v, limit %v", time.Since(begin), limit)
	}
	l.set(func() { l.delay = 0 })

	// Nobody answers: an explicit time-out is ETIMEDOUT, the default EPERM.
	if err := n.Register(ipc.RegisterArgs{Name: "srv", Layers: []string{"wire"}}); err != nil {
		t.Fatal(err)
	}
	l.set(func() { l.mute = true })
	code(t, alloc(ipc.AllocArgs{Name: "srv", QoS: qos.Raw, TimeoutMS: 30}), o7serr.ETIMEDOUT)
	code(t, alloc(ipc.AllocArgs{Name: "srv", QoS: qos.Raw}), o7serr.EPERM)

	// A cancelled request ends; so does one whose program leaves.
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	slow := ipc.AllocArgs{Name: "srv", QoS: qos.Raw, TimeoutMS: 60_000}
	if _, err := p.flow(ctx, ipc.OpAlloc, slow); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	go func() { _, _ = p.flow(context.Background(), ipc.OpAlloc, slow) }()
	eventually(t, "the request", func() bool { return len(n.Flows()) > 0 })
	_ = p.Close()
	eventually(t, "the end of the request", func() bool { return len(n.Flows()) == 0 })
	if s := n.Stats(); s.AllocErrors[-1007] != 1 || s.AllocErrors[-1] != 1 {
		t.Errorf("errors %v", s.AllocErrors)
	}
}

func TestAcceptTimeout(t *testing.T) {
	n := newNode(t, nil)
	p := n.prog("server")
	_, err := p.accept(20)
	code(t, err, o7serr.ETIMEDOUT)
	_, err = p.accept(-1)
	code(t, err, o7serr.ETIMEDOUT)
	_, err = n.prog("").accept(1000)
	code(t, err, o7serr.EINVAL) // did not announce itself
	if n := n.Stats().Registry.Accepting; n != 0 {
		t.Errorf("%d accepts left", n)
	}
}

// A request that was seen before is refused and disturbs nobody.
func TestReplay(t *testing.T) {
	n, l := wired(t, noDirect)
	n.serve("srv", "server")
	server, client := n.prog("server"), n.prog("client")
	if err := n.Register(ipc.RegisterArgs{Name: "srv", Layers: []string{"*"}}); err != nil {
		t.Fatal(err)
	}
	var first ipcp.AllocRequest
	rec := &recorder{l, &first}
	n.mu.Lock()
	n.ipcps["eth0"].layer = rec
	n.mu.Unlock()
	c, s := pair(t, client, server)
	replies := make(chan wireReply, 1)
	in := &wireIncoming{l: l, req: first, reply: replies, ctx: t.Context()}
	go func() { _, _ = server.accept(200) }()
	eventually(t, "accept", func() bool { return n.Stats().Registry.Accepting == 1 })
	n.FlowArrived(l, in)
	if r := <-replies; r.code != o7serr.EAUTH.Code() {
		t.Errorf("reply %+v", r)
	}
	if n.Stats().Registry.Accepting != 1 {
		t.Error("the accept was disturbed")
	}
	// So does a requester who gave up.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := l.Alloc(ctx, ipcp.AllocRequest{Hash: first.Hash, QoS: qos.Raw, Data: freshOAP(t)}); err == nil {
		t.Error("allocated for nobody")
	}
	for _, f := range []*testFlow{c, s} {
		if err := f.close(); err != nil {
			t.Error(err)
		}
	}
}

// The flow of the acceptor has the quality of service of the request (spec 21
// §3), whatever that asks for: it is the program's library that provides it.
func TestArrivingQoS(t *testing.T) {
	n, l := wired(t, noDirect)
	n.serve("srv", "server")
	server := n.prog("server")
	unchecked := qos.Raw
	unchecked.BER = 0
	for _, q := range []qos.Spec{qos.BestEffort, qos.Voice, qos.Video, qos.Data, unchecked} {
		type result struct {
			f   *testFlow
			err error
		}
		accepted := make(chan result, 1)
		go func() {
			f, err := server.accept(0)
			accepted <- result{f, err}
		}()
		eventually(t, "accept", func() bool { return n.Stats().Registry.Accepting == 1 })
		replies := make(chan wireReply, 1)
		n.FlowArrived(l, &wireIncoming{l: l, ctx: t.Context(), reply: replies, req: ipcp.AllocRequest{
			Hash: registry.Hash(l.HashAlg(), "srv"), QoS: q, Data: freshOAP(t),
		}})
		if r := <-replies; r.code != 0 {
			t.Errorf("%+v: reply %+v", q, r)
		}
		if r := <-accepted; r.err != nil || r.f.QoS != q {
			t.Errorf("%+v: accepted %+v, %v", q, r.f, r.err)
		} else {
			_ = r.f.close()
		}
	}
}

type recorder struct {
	*wireLayer
	first *ipcp.AllocRequest
}

func (r *recorder) Alloc(ctx context.Context, req ipcp.AllocRequest) (ipcp.Flow, []byte, error) {
	if r.first.Hash == nil {
		*r.first = req
	}
	return r.wireLayer.Alloc(ctx, req)
}

// enrolling is an IPC process that gets no answer to its enrolment.
type enrolling struct {
	*memberLayer
	begun chan struct{}
	over  atomic.Bool // Enroll returned
}

func (l *enrolling) Enroll(ctx context.Context, _ string) error {
	close(l.begun)
	<-ctx.Done()
	time.Sleep(10 * time.Millisecond) // what it does has an end to come to
	l.over.Store(true)
	return ctx.Err()
}

func (l *enrolling) Close() error {
	if !l.over.Load() {
		return errors.New("closed while it enrols")
	}
	return nil
}

// Destroying an IPC process ends what it is doing, at once and first.
func TestDestroyWhileEnrolling(t *testing.T) {
	l := &enrolling{begun: make(chan struct{})}
	n := newNode(t, func(c *Config) {
		withLayers(c)
		unicast := c.Factories[ipcp.Unicast]
		c.Factories[ipcp.Unicast] = func(name string, h ipcp.Host, log *slog.Logger) (ipcp.Layer, error) {
			m, err := unicast(name, h, log)
			l.memberLayer, _ = m.(*memberLayer)
			return l, err
		}
	})
	n.name("net")
	res := make(chan error, 1)
	go func() { res <- n.Enroll(t.Context(), ipc.EnrollArgs{Name: "a", Layer: "net"}) }()
	<-l.begun
	begin := time.Now()
	if err := n.DestroyIPCP("a"); err != nil {
		t.Error(err)
	}
	if err := <-res; err == nil {
		t.Error("the enrolment of a destroyed process succeeded")
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("that took %v", d)
	}
	code(t, n.DestroyIPCP("a"), o7serr.EIPCP)
}

// IPC processes get each other's flows directly, and never their own.
func TestMembers(t *testing.T) {
	n := newNode(t, withLayers)
	for _, name := range []string{"a", "b"} {
		if err := n.CreateIPCP(name, "unicast"); err != nil {
			t.Fatal(err)
		}
	}
	layer := func(name string) *memberLayer {
		p, err := n.find(name)
		if err != nil {
			t.Fatal(err)
		}
		return n.layerOf(p).(*memberLayer)
	}
	a, b := layer("a"), layer("b")
	code(t, n.Enroll(t.Context(), ipc.EnrollArgs{Name: "b", Layer: "net"}), o7serr.ENAME)
	if err := n.Bootstrap(t.Context(), ipc.BootstrapArgs{Name: "a", Layer: "net", Autobind: true}); err != nil {
		t.Fatal(err)
	}
	if err := n.Enroll(t.Context(), ipc.EnrollArgs{Name: "b", Layer: "net", Autobind: true}); err != nil {
		t.Fatal(err)
	}
	_ = (<-a.got).Close()
	if got := n.namesText(); got != "a:[a] b:[b] net:[a b]" {
		t.Errorf("names %s", got)
	}
	for range 3 { // "net" is bound to both, but b is not connected to itself
		if err := n.Connect(t.Context(), ipc.ConnectArgs{Name: "b", Dst: "net", Component: "mgmt"}); err != nil {
			t.Fatal(err)
		}
		mine, theirs := <-b.got, <-a.got
		var s sink
		theirs.SetSink(&s)
		if err := mine.Send(packet.From([]byte("x"))); err != nil || s.n != 1 {
			t.Errorf("direct pipe: %v, %d packets", err, s.n)
		}
		_ = mine.Close()
		_ = theirs.Close()
	}
	// Within the machine nothing is lost: a reliable flow is the same pipe.
	if err := n.Connect(t.Context(), ipc.ConnectArgs{Name: "b", Dst: "net", Component: "dt", QoS: qos.Data}); err != nil {
		t.Fatal(err)
	}
	_ = (<-b.got).Close()
	_ = (<-a.got).Close()

	// A program reaches an IPC process, too, through a pump.
	p := n.prog("client")
	f, err := p.alloc("a")
	if err != nil {
		t.Fatal(err)
	}
	g := <-a.got
	got := make(chanSink, 1)
	g.SetSink(got)
	if err := f.end.Write([]byte("hi")); err != nil {
		t.Fatal(err)
	}
	if msg := <-got; msg != "hi" {
		t.Errorf("received %q", msg)
	}
	_ = g.Close()
	if e := f.event(t); e != "dealloc" {
		t.Errorf("event %q", e)
	}
	_ = f.close()

	// Somebody else's layer is left again.
	if err := n.CreateIPCP("c", "unicast"); err != nil {
		t.Fatal(err)
	}
	n.name("other")
	if err := n.Bind(t.Context(), ipc.BindArgs{Name: "other", IPCP: "a"}); err != nil {
		t.Fatal(err)
	}
	err = n.Enroll(t.Context(), ipc.EnrollArgs{Name: "c", Layer: "other"})
	if err == nil || !strings.Contains(err.Error(), `is a member of layer "net", not of "other"`) {
		t.Errorf("enrolled in the wrong layer: %v", err)
	}
	if l := layer("c"); l.LayerName() != "" {
		t.Errorf("still in %q", l.LayerName())
	}
}

func (n *node) mustNames() (out []string) {
	res, err := n.List(ipc.ListArgs{What: "names"})
	if err != nil {
		n.t.Fatal(err)
	}
	for _, x := range res.Names {
		out = append(out, x.Name+":"+fmt.Sprint(x.IPCPs))
	}
	return out
}

func (n *node) namesText() string { return strings.Join(n.mustNames(), " ") }

type sink struct {
	mu sync.Mutex
	n  int
}

func (s *sink) Receive(pkts []*packet.Buf) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n += len(pkts)
}
func (s *sink) FlowEvent(ipcp.Event) {}

type chanSink chan string

func (s chanSink) Receive(pkts []*packet.Buf) {
	for _, p := range pkts {
		s <- string(p.Bytes())
	}
}
func (s chanSink) FlowEvent(ipcp.Event) {}

// A killed process leaves nothing behind, and its peers know at once.
func TestProcessDies(t *testing.T) {
	n := newNode(t, nil)
	n.serve("srv", filepath.Base(os.Args[0]))
	client := n.prog("client")
	before := descriptors(t)
	cmd, out := n.child()
	var flows []*testFlow
	for range 20 {
		f, err := client.alloc("srv")
		if err != nil {
			t.Fatal(err)
		}
		expect(t, out, "flow")
		if err := f.end.Write([]byte("echo")); err != nil {
			t.Fatal(err)
		}
		if got, err := f.read(); err != nil || got != "echo" {
			t.Fatalf("read %q, %v", got, err)
		}
		flows = append(flows, f)
	}
	if s := n.Stats(); s.FlowsByState["allocated"] != 40 || s.Registry.Processes != 2 {
		t.Errorf("%+v", s)
	}
	begin := time.Now()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, f := range flows {
		if e := f.event(t); e != "dealloc" {
			t.Errorf("event %q", e)
		}
		if d := time.Since(begin); d > time.Second {
			t.Errorf("told after %v", d)
		}
		if err := f.close(); err != nil {
			t.Error(err)
		}
	}
	eventually(t, "cleanup", func() bool { return n.Stats().Registry.Processes == 1 && len(n.Flows()) == 0 })
	_, err := client.alloc("srv")
	code(t, err, o7serr.EIPCP)
	_ = cmd.Wait()
	// The pipe to the child is ours, and what the client waits on: its hub, the
	// descriptor in it, and that of the daemon.
	eventually(t, "closing of descriptors", func() bool { return descriptors(t) <= before+4 })
}

func TestAutoStart(t *testing.T) {
	n := newNode(t, nil)
	prog, err := filepath.Abs(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Bind(t.Context(), ipc.BindArgs{Name: "srv", Prog: prog, Auto: true, Args: []string{childArg, "once"}}); err != nil {
		t.Fatal(err)
	}
	client := n.prog("client")
	f, err := client.alloc("srv")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.end.Write([]byte("echo")); err != nil {
		t.Fatal(err)
	}
	if got, err := f.read(); err != nil || got != "echo" {
		t.Errorf("read %q, %v", got, err)
	}
	if e := f.event(t); e != "dealloc" { // it serves one packet and ends
		t.Errorf("event %q", e)
	}
	_ = f.close()
	eventually(t, "reaping", func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return len(n.children) == 0
	})
	if n := n.Stats().Started; n != 1 {
		t.Errorf("%d programs started", n)
	}
	// One that cannot start fails the allocation at once.
	if err := n.Bind(t.Context(), ipc.BindArgs{Name: "bad", Prog: "/nonexistent/prog", Auto: true}); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	_, err = client.alloc("bad")
	code(t, err, o7serr.EIPCP)
	if d := time.Since(begin); d > 500*time.Millisecond {
		t.Errorf("failed after %v", d)
	}
}

// 1000 flows, direct and over a layer, leave no descriptor, goroutine or id.
func TestNothingIsLeft(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Config)
	}{{"direct", func(*Config) {}}, {"layer", noDirect}} {
		t.Run(tc.name, func(t *testing.T) { openAndClose(t, tc.change) })
	}
}

func openAndClose(t *testing.T, change func(*Config)) {
	n, _ := wired(t, change)
	n.serve("srv", "server")
	if err := n.Register(ipc.RegisterArgs{Name: "srv", Layers: []string{"wire"}}); err != nil {
		t.Fatal(err)
	}
	server, client := n.prog("server"), n.prog("client")
	open := func(count int) {
		for range count {
			c, s := pair(t, client, server)
			if err := errors.Join(c.close(), s.close()); err != nil {
				t.Fatal(err)
			}
		}
	}
	idle := func() bool { return len(n.Flows()) == 0 }
	open(1)
	eventually(t, "end of the first flow", idle)
	// What two processes share they keep: the memory, and what wakes them.
	before, mapped := descriptors(t), mappings(t)
	open(500)
	// A descriptor that a goroutine waits on is closed once that one has woken.
	eventually(t, "release of the rings", idle)
	if n := mappings(t); n > mapped {
		t.Errorf("%d mappings, %d before", n, mapped)
	}
	eventually(t, "closing of descriptors", func() bool { return descriptors(t) <= before })
	if f := n.Flows(); len(f) != 0 {
		t.Errorf("flows left: %+v", f)
	}
	eventually(t, "end of requests", func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return len(n.flows)+len(n.accepts)+len(n.tickets)+len(n.origins)+n.arriving == 0
	})
}

func mappings(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "o7s-ring")
}
