package local

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/qos"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host answers every request with answer, from another goroutine.
type host struct{ answer func(ipcp.Incoming) }

func (h *host) FlowArrived(_ ipcp.Layer, in ipcp.Incoming) { go h.answer(in) }

func (h *host) AllocFlow(context.Context, ipcp.Layer, string, qos.Spec) (ipcp.Flow, error) {
	return nil, o7serr.ENOTSUP
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

func boot(t *testing.T, h *host) *IPCP {
	t.Helper()
	l := New("loc", h, slog.New(slog.DiscardHandler))
	cfg := ipcp.Config{Type: ipcp.Local, LayerName: "here", Hash: ipcp.SHA3_256}
	if err := l.Bootstrap(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

var hash = bytes.Repeat([]byte{7}, 32)

func TestAccept(t *testing.T) {
	var server ipcp.Flow
	var data []byte
	h := &host{func(in ipcp.Incoming) {
		if in.QoS() != qos.Video || !bytes.Equal(in.Hash(), hash) {
			_ = errors.New("altered request")
			in.Refuse(-1)
			return
		}
		data = in.Data()
		server, _ = in.Accept([]byte("response"))
		_ = server.Send(packet.From([]byte("early")))
	}}
	l := boot(t, h)
	if err := l.Query(t.Context(), hash); !errors.Is(err, o7serr.ENAME) {
		t.Fatalf("query of an unknown hash: %v", err)
	}
	if err := errors.Join(l.Register(hash), l.Register(hash), l.Query(t.Context(), hash)); err != nil {
		t.Fatal(err)
	}
	client, resp, err := l.Alloc(t.Context(), ipcp.AllocRequest{Hash: hash, QoS: qos.Video, Data: []byte("request")})
	if err != nil || string(resp) != "response" || string(data) != "request" {
		t.Fatalf("response %q, request %q, %v", resp, data, err)
	}
	var cs, ss sink
	client.SetSink(&cs)
	server.SetSink(&ss)
	if err := client.Send(packet.From(nil)); err != nil { // keep-alive
		t.Fatal(err)
	}
	if err := client.Send(packet.Get(MaxSDU + 1)); !errors.Is(err, o7serr.EMSGSIZE) {
		t.Errorf("oversized packet: %v", err)
	}
	if in := client.Info(); in.MPL != 100 || in.MTU != MaxSDU || in.Layer != "here" || in.Local != server.Info().Remote {
		t.Errorf("info %+v", in)
	}
	idA, sideA := client.(*Flow).Pair()
	idB, sideB := server.(*Flow).Pair()
	if idA != idB || sideA != 0 || sideB != 1 {
		t.Errorf("pair ids %v %v, sides %d %d", idA, idB, sideA, sideB)
	}
	if err := errors.Join(client.Close(), client.Close()); err != nil {
		t.Error(err)
	}
	if len(ss.events) != 1 || ss.events[0] != ipcp.EventDealloc {
		t.Errorf("server events %v", ss.events)
	}
	if err := server.Send(packet.From(nil)); !errors.Is(err, o7serr.EFLOWDOWN) {
		t.Errorf("send after the peer's close: %v", err)
	}
	if err := client.Send(packet.From(nil)); !errors.Is(err, o7serr.ENOTALLOC) {
		t.Errorf("send after close: %v", err)
	}
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	time.Sleep(0)
	for deadline := time.Now().Add(5 * time.Second); len(cs.pkts) == 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if len(ss.pkts) != 1 || ss.pkts[0] != "" {
		t.Errorf("server got %q", ss.pkts)
	}
	if s := server.(ipcp.FlowCounter).Stat(); s.RxPackets != 1 || s.TxPackets != 1 || s.TxBytes != 5 {
		t.Errorf("server counted %+v", s)
	}
	for name, n := range l.Counters() {
		if name == "flows" && n != 0 {
			t.Errorf("%d flows left", n)
		}
	}
}

func TestRefusedAtOnce(t *testing.T) {
	l := boot(t, &host{func(in ipcp.Incoming) { in.Refuse(-1009) }})
	if err := l.Register(hash); err != nil {
		t.Fatal(err)
	}
	_, _, err := l.Alloc(t.Context(), ipcp.AllocRequest{Hash: hash})
	if !errors.Is(err, o7serr.EAUTH) {
		t.Errorf("error %v, want EAUTH", err)
	}
	if err := l.Unregister(hash); err != nil {
		t.Fatal(err)
	}
	if _, _, err = l.Alloc(t.Context(), ipcp.AllocRequest{Hash: hash}); !errors.Is(err, o7serr.ENAME) {
		t.Errorf("error %v, want ENAME", err)
	}
}

func TestTimeout(t *testing.T) {
	asked := make(chan ipcp.Incoming, 1)
	l := boot(t, &host{func(in ipcp.Incoming) { asked <- in }})
	if err := l.Register(hash); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, _, err := l.Alloc(ctx, ipcp.AllocRequest{Hash: hash}); !errors.Is(err, o7serr.ETIMEDOUT) {
		t.Errorf("error %v, want ETIMEDOUT", err)
	}
	in := <-asked
	if _, err := in.Accept(nil); !errors.Is(err, o7serr.ETIMEDOUT) {
		t.Errorf("late accept: %v", err)
	}
}

func TestLayerClose(t *testing.T) {
	asked := make(chan ipcp.Incoming, 1)
	first := true
	l := boot(t, &host{func(in ipcp.Incoming) {
		if first {
			first = false
			_, _ = in.Accept(nil)
			return
		}
		asked <- in
	}})
	if err := l.Register(hash); err != nil {
		t.Fatal(err)
	}
	f, _, err := l.Alloc(t.Context(), ipcp.AllocRequest{Hash: hash})
	if err != nil {
		t.Fatal(err)
	}
	res := make(chan error)
	go func() {
		_, _, err := l.Alloc(context.Background(), ipcp.AllocRequest{Hash: hash})
		res <- err
	}()
	in := <-asked
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-res; !errors.Is(err, o7serr.EIPCPSTATE) {
		t.Errorf("pending allocation: %v", err)
	}
	in.Refuse(-1) // answered twice: harmless
	var s sink
	f.SetSink(&s)
	if len(s.events) != 1 || s.events[0] != ipcp.EventDealloc {
		t.Errorf("events %v", s.events)
	}
	if err := l.Register(hash); !errors.Is(err, o7serr.EIPCPSTATE) || l.State() != ipcp.StateShutdown {
		t.Errorf("register after close: %v, state %s", err, l.State())
	}
}

func TestFlowLimit(t *testing.T) {
	l := boot(t, &host{func(in ipcp.Incoming) { _, _ = in.Accept(nil) }})
	if err := l.Register(hash); err != nil {
		t.Fatal(err)
	}
	var flows []ipcp.Flow
	for range MaxFlows {
		f, _, err := l.Alloc(t.Context(), ipcp.AllocRequest{Hash: hash})
		if err != nil {
			t.Fatal(err)
		}
		flows = append(flows, f)
	}
	if _, _, err := l.Alloc(t.Context(), ipcp.AllocRequest{Hash: hash}); !errors.Is(err, o7serr.EAGAIN) {
		t.Errorf("one flow too many: %v", err)
	}
	for _, f := range flows {
		_ = f.Close()
	}
	if _, _, err := l.Alloc(t.Context(), ipcp.AllocRequest{Hash: hash}); err != nil {
		t.Error(err)
	}
}

func BenchmarkSend(b *testing.B) {
	x, y := NewPair(ipcp.FlowInfo{})
	y.SetSink(release{})
	b.ReportAllocs()
	for b.Loop() {
		_ = x.Send(packet.Get(64))
	}
}

type release struct{}

func (release) Receive(pkts []*packet.Buf) {
	for _, p := range pkts {
		p.Release()
	}
}
func (release) FlowEvent(ipcp.Event) {}
