package irm

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/control/oap"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/inbox"
	"github.com/o7s/o7s-router/ipcp/local"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/ring"
)

// childArg makes the test binary a program that serves flows.
const childArg = "o7s-test-server"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == childArg {
		serverMain(os.Args[2:])
		return
	}
	goleak.VerifyTestMain(m)
}

// serverMain accepts flows and echoes what arrives, until it is killed. It
// prints a line when it has announced itself and one for each flow.
func serverMain(args []string) {
	_ = unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
	p, err := join("", filepath.Base(os.Args[0]))
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	fmt.Println("ready")
	for {
		f, err := p.accept(0)
		if err != nil {
			os.Exit(1)
		}
		fmt.Println("flow")
		if len(args) > 0 && args[0] == "once" {
			f.echoOne()
			os.Exit(0)
		}
		go func() {
			for f.echoOne() {
			}
		}()
	}
}

// prog is a program that uses the daemon.
type prog struct {
	*ipc.Client
	desk   ring.Desk
	mu     sync.Mutex // guards events
	events []ipc.FlowEvent
}

// testFlow is a flow in the hands of a prog.
type testFlow struct {
	ipc.FlowResult
	p   *prog
	end *ring.End
}

func join(dir, name string) (*prog, error) {
	p := &prog{}
	var err error
	p.Client, err = ipc.Dialer{RunDir: dir, OnEvent: func(e ipc.FlowEvent) {
		if e.Type == "slab" {
			p.desk.Gone(e.Slab)
			return
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.events = append(p.events, e)
	}}.Dial(context.Background())
	if err != nil {
		return nil, err
	}
	if name != "" {
		_, err = p.Call(context.Background(), ipc.OpHello, ipc.HelloArgs{Prog: name}, nil)
	}
	return p, err
}

func (p *prog) flow(ctx context.Context, op ipc.Op, args any) (*testFlow, error) {
	f := &testFlow{p: p}
	fds, err := p.Call(ctx, op, args, &f.FlowResult)
	if err != nil {
		return nil, err
	}
	f.end, _, err = p.desk.Open(f.Ring, fds, ring.Config{})
	return f, err
}

func (p *prog) alloc(name string) (*testFlow, error) {
	return p.flow(context.Background(), ipc.OpAlloc, ipc.AllocArgs{Name: name, QoS: qos.Raw, TimeoutMS: 5000})
}

func (p *prog) accept(ms int64) (*testFlow, error) {
	return p.flow(context.Background(), ipc.OpAccept, ipc.AcceptArgs{TimeoutMS: ms})
}

// read returns the next message. The bell of a process that died is silent, so
// it looks again now and then; the library does when it is told of the death.
func (f *testFlow) read() (string, error) {
	for deadline := time.Now().Add(5 * time.Second); ; {
		m, err := f.end.Next()
		if err == nil {
			s := string(m)
			f.end.Skip()
			f.end.Release()
			return s, nil
		}
		if !errors.Is(err, ring.ErrEmpty) || f.end.Peer()&ring.Closed != 0 {
			return "", err
		}
		_ = f.end.Waiter().SetDeadline(ring.DirRead, time.Now().Add(50*time.Millisecond))
		if err := f.end.WaitRead(); err != nil && (!errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(deadline)) {
			return "", err
		}
	}
}

func (f *testFlow) echoOne() bool {
	_ = f.end.Waiter().SetDeadline(ring.DirRead, time.Time{})
	for {
		m, err := f.end.Next()
		switch {
		case err == nil:
			err = f.end.Write(m)
			f.end.Skip()
			f.end.Release()
			return err == nil
		case !errors.Is(err, ring.ErrEmpty) || f.end.Peer()&ring.Closed != 0 || f.end.WaitRead() != nil:
			return false
		}
	}
}

func (f *testFlow) close() error {
	_ = f.end.Close()
	f.p.desk.Done(f.Ring)
	_, err := f.p.Call(context.Background(), ipc.OpDealloc, ipc.DeallocArgs{Flow: f.Flow}, nil)
	return err
}

// event waits for an event of f.
func (f *testFlow) event(t *testing.T) (typ string) {
	t.Helper()
	eventually(t, fmt.Sprint("event of flow ", f.Flow), func() bool {
		f.p.mu.Lock()
		defer f.p.mu.Unlock()
		for i, e := range f.p.events {
			if e.Flow == f.Flow {
				f.p.events = slices.Delete(f.p.events, i, i+1)
				typ = e.Type
				return true
			}
		}
		return false
	})
	return typ
}

// node is a resource manager with its socket.
type node struct {
	*IRM
	t   *testing.T
	dir string
}

// newNode starts a resource manager; change may alter its configuration.
func newNode(t *testing.T, change func(*Config)) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "o7s-irm")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // others must reach the socket
		t.Fatal(err)
	}
	n := &node{t: t, dir: dir}
	cfg := Config{
		RunDir: dir, Version: "test", Log: slog.New(slog.DiscardHandler), Factories: map[ipcp.Type]Factory{
			ipcp.Local: func(name string, h ipcp.Host, log *slog.Logger) (ipcp.Layer, error) {
				return local.New(name, h, log), nil
			},
		},
	}
	if os.Getenv("O7S_TEST_LOG") != "" {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if change != nil {
		change(&cfg)
	}
	n.IRM = New(cfg)
	l, err := ipc.Listen(ipc.SocketPath(dir), 0o666)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- n.Serve(l) }()
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if err := errors.Join(<-done, n.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	return n
}

// prog connects a program; name "" does not announce itself.
func (n *node) prog(name string) *prog {
	n.t.Helper()
	p, err := join(n.dir, name)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = p.Close() })
	return p
}

func (n *node) name(name string) {
	n.t.Helper()
	if err := n.CreateName(ipc.NameArgs{Name: name}); err != nil {
		n.t.Fatal(err)
	}
}

// serve binds program prog to name.
func (n *node) serve(name, prog string) {
	n.t.Helper()
	if err := n.Bind(n.t.Context(), ipc.BindArgs{Name: name, Prog: "/bin/" + prog}); err != nil {
		n.t.Fatal(err)
	}
}

// child starts the test binary as a server and waits until it is ready.
func (n *node) child(args ...string) (*exec.Cmd, *bufio.Reader) {
	n.t.Helper()
	cmd := exec.Command(os.Args[0], append([]string{childArg}, args...)...)
	cmd.Env = append(os.Environ(), "O7S_RUN_DIR="+n.dir)
	cmd.Stderr = os.Stderr
	r, w, err := os.Pipe()
	if err != nil {
		n.t.Fatal(err)
	}
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	w.Close()
	n.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = r.Close()
	})
	out := bufio.NewReader(r)
	expect(n.t, out, "ready")
	return cmd, out
}

func expect(t *testing.T, r *bufio.Reader, want string) {
	t.Helper()
	line, err := r.ReadString('\n')
	if err != nil || strings.TrimSpace(line) != want {
		t.Fatalf("child said %q, %v, want %q", line, err, want)
	}
}

// descriptors counts the open descriptors of this process.
func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// eventually waits until ok holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// code checks that err has the number of want.
func code(t *testing.T, err error, want o7serr.Errno) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v (%d), want %d", err, o7serr.Code(err), want.Code())
	}
}

// wireLayer is a layer of two nodes, or of one with itself: requests go to the
// other node's resource manager.
type wireLayer struct {
	name string
	host ipcp.Host

	mu      sync.Mutex    // guards what follows
	delay   time.Duration // of a query
	peer    *wireLayer
	layer   string
	hashes  map[string]bool // that the peer knows
	mute    bool            // requests are never answered
	queries int
	flows   []*wireFlow
}

func newWireLayer(name string, host ipcp.Host) *wireLayer {
	return &wireLayer{name: name, host: host, hashes: map[string]bool{}}
}

func (l *wireLayer) Type() ipcp.Type       { return ipcp.EthDIX }
func (l *wireLayer) Name() string          { return l.name }
func (l *wireLayer) HashAlg() ipcp.HashAlg { return ipcp.SHA3_256 }
func (l *wireLayer) Close() error {
	l.mu.Lock()
	flows := l.flows
	l.mu.Unlock()
	for _, f := range flows {
		f.in.Event(ipcp.EventDealloc)
	}
	return nil
}

func (l *wireLayer) LayerName() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.layer
}

func (l *wireLayer) State() ipcp.State {
	if l.LayerName() == "" {
		return ipcp.StateBoot
	}
	return ipcp.StateOperational
}

func (l *wireLayer) Bootstrap(_ context.Context, cfg ipcp.Config) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.layer = cfg.LayerName
	return nil
}

func (l *wireLayer) Register(hash []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hashes[string(hash)] = true
	return nil
}

func (l *wireLayer) Unregister(hash []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.hashes, string(hash))
	return nil
}

func (l *wireLayer) Query(ctx context.Context, hash []byte) error {
	l.mu.Lock()
	l.queries++
	peer, delay := l.peer, l.delay
	l.mu.Unlock()
	select {
	case <-time.After(delay):
	case <-ctx.Done():
		return ctx.Err()
	}
	peer.mu.Lock()
	defer peer.mu.Unlock()
	if !peer.hashes[string(hash)] {
		return o7serr.ENAME
	}
	return nil
}

type wireReply struct {
	flow *wireFlow
	data []byte
	code int32
}

type wireIncoming struct {
	l     *wireLayer // the responder's
	req   ipcp.AllocRequest
	reply chan wireReply
	ctx   context.Context
}

func (in *wireIncoming) QoS() qos.Spec     { return in.req.QoS }
func (in *wireIncoming) Hash() []byte      { return in.req.Hash }
func (in *wireIncoming) Data() []byte      { return in.req.Data }
func (in *wireIncoming) Refuse(code int32) { in.reply <- wireReply{code: code} }

func (in *wireIncoming) Accept(data []byte) (ipcp.Flow, error) {
	if in.ctx.Err() != nil {
		return nil, errors.New("the requester gave up")
	}
	info := ipcp.FlowInfo{Layer: in.l.LayerName(), IPCP: in.l.name, Type: ipcp.EthDIX, QoS: in.req.QoS, MTU: 1400, MPL: 100}
	a, b := &wireFlow{info: info}, &wireFlow{info: info}
	a.other, b.other = b, a
	in.l.mu.Lock()
	in.l.flows = append(in.l.flows, b)
	in.l.mu.Unlock()
	in.reply <- wireReply{flow: a, data: data}
	return b, nil
}

func (l *wireLayer) Alloc(ctx context.Context, req ipcp.AllocRequest) (ipcp.Flow, []byte, error) {
	l.mu.Lock()
	peer, mute := l.peer, l.mute
	l.mu.Unlock()
	in := &wireIncoming{l: peer, req: req, reply: make(chan wireReply, 1), ctx: ctx}
	if !mute {
		peer.host.FlowArrived(peer, in)
	}
	select {
	case r := <-in.reply:
		if r.code != 0 {
			return nil, nil, o7serr.FromCode(r.code, "refused by the peer")
		}
		return r.flow, r.data, nil
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
}

// wireFlow is one end of a flow of a wireLayer.
type wireFlow struct {
	info  ipcp.FlowInfo
	other *wireFlow
	in    inbox.Box
}

func (f *wireFlow) Info() ipcp.FlowInfo { return f.info }
func (f *wireFlow) Send(b *packet.Buf) error {
	if b.Len() > f.info.MTU {
		b.Release()
		return o7serr.EMSGSIZE
	}
	f.other.in.DeliverOne(b)
	return nil
}
func (f *wireFlow) SetSink(s ipcp.Sink) { f.in.SetSink(s) }
func (f *wireFlow) Close() error {
	f.in.Close()
	f.other.in.Event(ipcp.EventDealloc)
	return nil
}

// memberLayer is a wireLayer whose members meet.
type memberLayer struct {
	*wireLayer
	got chan ipcp.Flow
}

func (l *memberLayer) Type() ipcp.Type { return ipcp.Unicast }
func (l *memberLayer) Enroll(ctx context.Context, dst string) error {
	f, err := l.host.AllocFlow(ctx, l, dst, qos.Raw)
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.layer = "net"
	l.mu.Unlock()
	return f.Close()
}
func (l *memberLayer) Connect(ctx context.Context, dst string, c ipcp.Component, q qos.Spec) error {
	f, err := l.host.AllocFlow(ctx, l, dst, q)
	if err != nil {
		return err
	}
	l.got <- f
	return nil
}
func (l *memberLayer) Disconnect(context.Context, string, ipcp.Component) error { return nil }
func (l *memberLayer) AcceptFlow(f ipcp.Flow, _ string)                         { l.got <- f }

// withLayers adds the fake types to a node.
func withLayers(c *Config) {
	c.Factories[ipcp.EthDIX] = func(name string, h ipcp.Host, _ *slog.Logger) (ipcp.Layer, error) {
		return newWireLayer(name, h), nil
	}
	c.Factories[ipcp.Unicast] = func(name string, h ipcp.Host, _ *slog.Logger) (ipcp.Layer, error) {
		l := newWireLayer(name, h)
		l.peer = l
		return &memberLayer{l, make(chan ipcp.Flow, 8)}, nil
	}
}

// wired makes a node with layer "wire" at IPC process "eth0", which is
// connected with itself.
func wired(t *testing.T, change ...func(*Config)) (*node, *wireLayer) {
	t.Helper()
	n := newNode(t, func(c *Config) {
		withLayers(c)
		for _, f := range change {
			f(c)
		}
	})
	return n, n.wire("eth0")
}

func noDirect(c *Config) { c.NoDirect = true }

// known is how many names are registered.
func (l *wireLayer) known() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.hashes)
}

// set changes the layer.
func (l *wireLayer) set(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
}

func (n *node) wire(name string) *wireLayer {
	n.t.Helper()
	err := n.Bootstrap(n.t.Context(), ipc.BootstrapArgs{
		Name: name, Type: "eth-dix", Layer: "wire", Options: map[string]string{"dev": "lo"},
	})
	if err != nil {
		n.t.Fatal(err)
	}
	p, err := n.find(name)
	if err != nil {
		n.t.Fatal(err)
	}
	l := n.layerOf(p).(*wireLayer)
	l.set(func() { l.peer = l })
	return l
}

func call[T any](t *testing.T, p *prog, op ipc.Op, args any) T {
	t.Helper()
	var out T
	if _, err := p.Call(t.Context(), op, args, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func freshOAP(t *testing.T) []byte {
	t.Helper()
	c, err := oap.NewClient(time.Now(), rand.Reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c.Request()
}

func pointer(list []uint32) unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(list)) }
