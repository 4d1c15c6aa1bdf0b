package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/testnode"
	"github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/qos"
)

// server answers every message with its tag in front.
type server struct {
	*o7s.Client
	tag string

	mu    sync.Mutex // guards what follows
	flows int        // accepted
	open  int
}

// serve starts a server that is bound to a name and registers it in layers.
func (n *network) serve(host, name string, layers ...string) *server {
	n.t.Helper()
	s := n.server(host, name, "e2e-"+name, "")
	if len(layers) > 0 {
		n.must(host, ipc.OpNameRegister, ipc.RegisterArgs{Name: name, Layers: layers})
	}
	return s
}

// server starts a server as a process of prog, and binds prog to name unless
// name is "".
func (n *network) server(host, name, prog, tag string) *server {
	n.t.Helper()
	if name != "" {
		n.must(host, ipc.OpBind, ipc.BindArgs{Name: name, Prog: "/" + prog})
	}
	s := &server{Client: n.client(host, prog), tag: tag}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	n.t.Cleanup(func() {
		cancel()
		s.Close()
		wg.Wait()
	})
	for range 2 {
		wg.Go(func() {
			for {
				f, err := s.Accept(ctx)
				if err != nil {
					return
				}
				s.count(1, 1)
				wg.Go(func() {
					s.echo(f)
					s.count(0, -1)
				})
			}
		})
	}
	if name != "" {
		testnode.Accepting(n.t, n.RunDir(host), name)
	}
	return s
}

func (s *server) count(flows, open int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flows += flows
	s.open += open
}

// accepted is the number of flows so far, and of those that are open.
func (s *server) accepted() (flows, open int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flows, s.open
}

func (s *server) echo(f *o7s.Flow) {
	defer f.Close()
	buf := make([]byte, 2048)
	copy(buf, s.tag)
	for {
		n, err := f.Read(buf[len(s.tag):])
		if err != nil {
			return
		}
		if _, err := f.Write(buf[:len(s.tag)+n]); err != nil {
			return
		}
	}
}

// ask sends a message and returns the answer.
func ask(f *o7s.Flow, msg string) (string, error) {
	if err := f.SetReadDeadline(time.Now().Add(slack * 2 * time.Second)); err != nil {
		return "", err
	}
	if _, err := f.Write([]byte(msg)); err != nil {
		return "", err
	}
	buf := make([]byte, 2048)
	n, err := f.Read(buf)
	return string(buf[:n]), err
}

// pingPong sends count messages, each after the answer to the one before.
func pingPong(t *testing.T, f *o7s.Flow, count int) {
	t.Helper()
	for i := range count {
		msg := fmt.Sprintf("message %d %s", i, bytes.Repeat([]byte{'x'}, i*13%1000))
		if got, err := ask(f, msg); err != nil || got != msg {
			t.Fatalf("message %d of %d: answer %.40q: %v", i, count, got, err)
		}
	}
}

// pinger sends a message per interval over a flow and notes when the answers come.
type pinger struct {
	flow  *o7s.Flow
	quiet chan struct{} // closed: nothing more is sent
	stop  chan struct{}
	wg    sync.WaitGroup

	mu       sync.Mutex // guards what follows
	sent     uint64
	received uint64
	last     time.Time     // an answer came
	gap      time.Duration // longest between two answers
}

func startPings(f *o7s.Flow, interval time.Duration) *pinger {
	p := &pinger{flow: f, quiet: make(chan struct{}), stop: make(chan struct{}), last: time.Now()}
	_ = f.SetReadDeadline(time.Time{})
	p.wg.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		msg := make([]byte, 64)
		for {
			select {
			case <-tick.C:
			case <-p.quiet:
				return
			}
			p.mu.Lock()
			p.sent++
			binary.BigEndian.PutUint64(msg, p.sent)
			p.mu.Unlock()
			_, _ = f.Write(msg) // a flow that is down for a while loses it
		}
	})
	p.wg.Go(func() {
		buf := make([]byte, 2048)
		for {
			_, err := f.Read(buf)
			select {
			case <-p.stop:
				return
			default:
			}
			if err != nil { // down for a while
				time.Sleep(time.Millisecond)
				continue
			}
			p.mu.Lock()
			now := time.Now()
			p.gap = max(p.gap, now.Sub(p.last))
			p.last = now
			p.received++
			p.mu.Unlock()
		}
	})
	return p
}

// mark starts a new measurement of the longest gap and tells how many answers came so far.
func (p *pinger) mark() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gap = 0
	return p.received
}

// longest is the longest gap since mark, one that lasts included.
func (p *pinger) longest() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return max(p.gap, time.Since(p.last))
}

// more waits until count more answers came.
func (p *pinger) more(t *testing.T, limit time.Duration, count uint64) {
	t.Helper()
	p.mu.Lock()
	from := p.received
	p.mu.Unlock()
	eventually(t, limit, func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.received < from+count {
			return fmt.Errorf("%d answers more, want %d", p.received-from, count)
		}
		return nil
	})
}

// end stops the pings, waits for answers that are on their way, and closes the
// flow.
func (p *pinger) end() (sent, received uint64) {
	close(p.quiet)
	for limit := time.Now().Add(slack * 200 * time.Millisecond); time.Now().Before(limit); time.Sleep(5 * time.Millisecond) {
		p.mu.Lock()
		all := p.received >= p.sent
		p.mu.Unlock()
		if all {
			break
		}
	}
	close(p.stop)
	_ = p.flow.SetReadDeadline(time.Now())
	p.wg.Wait()
	p.flow.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sent, p.received
}

// TestFirstPackets has clients write as soon as they have a flow. Its first
// packets may still come by way of the daemon and those behind them from the
// kernel: none is lost, and none overtakes another.
func TestFirstPackets(t *testing.T) {
	n := up(t, topology(t, "line3", false))
	n.serve("h3", "echo", "uni")
	n.create("echo", "h1")
	c := n.client("h1", "client")
	const burst = 5
	buf := make([]byte, 64)
	for i := range 1000 {
		q := []qos.Spec{qos.Raw, qos.BestEffort, qos.Voice}[i%3]
		f, err := c.Alloc(t.Context(), "echo", &q)
		if err != nil {
			t.Fatalf("flow %d, %+v: %v", i, q, err)
		}
		_ = f.SetDeadline(time.Now().Add(20 * time.Second))
		for j := range burst {
			if _, err := f.Write([]byte{byte(j), byte(i)}); err != nil {
				t.Fatalf("flow %d, %+v: write %d: %v", i, q, j, err)
			}
		}
		for j := range burst {
			if k, err := f.Read(buf); err != nil || string(buf[:k]) != string([]byte{byte(j), byte(i)}) {
				t.Fatalf("flow %d, %+v: echo %d is % x, %v", i, q, j, buf[:k], err)
			}
		}
		_ = f.Close()
	}
}
