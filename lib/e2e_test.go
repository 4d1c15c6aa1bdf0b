package o7s

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/frcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/ring"
)

// A wire joins the far ends of two flows, as the daemon and a layer would, and
// impairs what it carries.
type wire struct {
	loss  float64 // fraction of packets
	swap  float64 // fraction that the next packet overtakes
	stop  chan struct{}
	wg    sync.WaitGroup
	quiet chan struct{} // closed: nothing passes
}

// between starts a wire from a to b.
func (w *wire) between(t *testing.T, a, b *held) {
	w.stop, w.quiet = make(chan struct{}), make(chan struct{})
	for i, d := range [][2]*held{{a, b}, {b, a}} {
		w.wg.Go(func() { w.carry(d[0].end, d[1].end, rand.New(rand.NewPCG(uint64(i), 1))) })
	}
	t.Cleanup(func() {
		close(w.stop)
		a.end.Kick(ring.DirRead)
		b.end.Kick(ring.DirRead)
		w.wg.Wait()
	})
}

func (w *wire) carry(from, to *ring.End, rng *rand.Rand) {
	var late []byte
	for {
		m, err := from.Next()
		switch {
		case errors.Is(err, ring.ErrEmpty):
			if late != nil {
				_ = to.Write(late)
				late = nil
			}
			select {
			case <-w.stop:
				return
			default:
			}
			if from.Peer()&ring.Closed != 0 || from.WaitRead() != nil {
				return
			}
			continue
		case err != nil:
			return
		}
		cut := false
		select {
		case <-w.quiet:
			cut = true
		default:
		}
		switch x := rng.Float64(); {
		case cut || x < w.loss:
		case x < w.loss+w.swap && late == nil:
			late = bytes.Clone(m)
		default:
			_ = to.Write(m) // a full ring is a loss, too
			if late != nil {
				_ = to.Write(late)
				late = nil
			}
		}
		from.Skip()
		from.Release()
	}
}

// wired allocates a flow on each of two clients and joins their far ends.
func (d *fake) wired(t *testing.T, q qos.Spec, w *wire) (x, y *Flow, hx, hy *held) {
	t.Helper()
	x, hx = d.flow1(t, d.client(t), &q)
	y, hy = d.flow1(t, d.client(t), &q)
	w.between(t, hx, hy)
	return x, y, hx, hy
}

func testMessage(i, limit int) []byte {
	m := make([]byte, 1+i*7919%limit)
	for k := range m {
		m[k] = byte(i*31 + k)
	}
	return m
}

func TestReliableFlow(t *testing.T) {
	for _, tc := range []struct {
		name  string
		w     *wire
		n     int
		limit int
		ber   uint32
	}{
		{"clean", &wire{}, 3000, 1400, 1},
		{"checked", &wire{}, 1000, 1400, 0},
		{"lossy", &wire{loss: 0.02, swap: 0.05}, 800, 1400, 1},
		{"fragments", &wire{loss: 0.01}, 20, 200_000, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			q := qos.Data
			q.BER = tc.ber
			x, y, _, _ := newFake(t).wired(t, q, tc.w)
			if tc.limit > 1400 {
				waitFor(t, func() bool { return x.MaxMessage() > 1500 })
			}
			errs := make(chan error, 2)
			go func() { // the echo
				buf := make([]byte, 1<<20)
				for {
					n, err := y.Read(buf)
					if err == nil {
						_, err = y.Write(buf[:n])
					}
					if err != nil {
						if err == io.EOF {
							err = nil
						}
						errs <- errors.Join(err, y.CloseWrite())
						return
					}
				}
			}()
			go func() {
				for i := range tc.n {
					if _, err := x.Write(testMessage(i, tc.limit)); err != nil {
						errs <- fmt.Errorf("message %d: %w", i, err)
						return
					}
				}
				errs <- x.CloseWrite()
			}()
			_ = x.SetReadDeadline(time.Now().Add(30 * time.Second))
			buf := make([]byte, 1<<20)
			for i := range tc.n {
				n, err := x.Read(buf)
				if err != nil || !bytes.Equal(buf[:n], testMessage(i, tc.limit)) {
					t.Fatalf("message %d: %d bytes, %v; %+v", i, n, err, x.Stats())
				}
			}
			if n, err := x.Read(buf); n != 0 || err != io.EOF {
				t.Errorf("after the end: %d bytes, %v", n, err)
			}
			if err := errors.Join(<-errs, <-errs, x.Close(), y.Close()); err != nil {
				t.Error(err)
			}
			if _, err := x.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("write after close: %v", err)
			}
		})
	}
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("did not happen in time")
		}
	}
}

// A peer that does not read closes the window: writers wait, or are told, and
// no more is kept than the window.
func TestPeerThatDoesNotRead(t *testing.T) {
	x, y, _, _ := newFake(t).wired(t, qos.Data, &wire{})
	if err := x.SetFlags(Default | WNOBLOCK); err != nil {
		t.Fatal(err)
	}
	msg := make([]byte, 1000)
	n := 0
	waitFor(t, func() bool { // refused for good, not for a full ring
		var err error
		for err == nil {
			if _, err = x.Write(msg); err == nil {
				n++
			}
		}
		if !errors.Is(err, o7serr.EAGAIN) {
			t.Fatalf("after %d messages: %v", n, err)
		}
		return n >= 256
	})
	if n > 1<<15 {
		t.Errorf("%d messages are kept for a peer that does not read", n)
	}
	if err := x.SetFlags(Default); err != nil {
		t.Fatal(err)
	}
	_ = x.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	for {
		if _, err := x.Write(msg); err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, o7serr.ETIMEDOUT) {
				t.Errorf("write: %v", err)
			}
			break
		}
		n++
	}
	_ = x.SetWriteDeadline(time.Time{})
	// Reading opens it again.
	wrote := make(chan error, 1)
	go func() {
		_, err := x.Write(msg)
		wrote <- err
	}()
	buf := make([]byte, 2000)
	for i := range n + 1 {
		if k, err := y.Read(buf); err != nil || k != len(msg) {
			t.Fatalf("message %d: %d bytes, %v", i, k, err)
		}
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
}

// Close waits for acknowledgements as long as it may.
func TestLinger(t *testing.T) {
	var w wire
	x, y, _, _ := newFake(t).wired(t, qos.Data, &w)
	buf := make([]byte, 100)
	for range 2 {
		if _, err := x.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if _, err := y.Read(buf); err != nil {
			t.Fatal(err)
		}
	}
	close(w.quiet)
	if _, err := x.Write([]byte("lost")); err != nil {
		t.Fatal(err)
	}
	const limit = 60 * time.Millisecond
	x.SetLinger(limit)
	begin := time.Now()
	if err := x.Close(); err != nil {
		t.Error(err)
	}
	if d := time.Since(begin); d < limit {
		t.Errorf("closed after %v", d)
	}
	y.SetLinger(0)
	begin = time.Now()
	if err := y.Close(); err != nil {
		t.Error(err)
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("without lingering closed after %v", d)
	}
}

// What arrived is read before the end that the other end, or the layer, made.
func TestReleasedByTheOther(t *testing.T) {
	x, y, hx, _ := newFake(t).wired(t, qos.Data, &wire{})
	for i := range 10 {
		if _, err := y.Write(testMessage(i, 100)); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, func() bool { return x.RxLen() == 10 })
	blocked := make(chan error, 1)
	go func() {
		buf := make([]byte, 200)
		for i := range 10 {
			if n, err := x.Read(buf); err != nil || !bytes.Equal(buf[:n], testMessage(i, 100)) {
				blocked <- fmt.Errorf("message %d: %w", i, err)
				return
			}
		}
		_, err := x.Read(buf)
		blocked <- err
	}()
	hx.event(t, "dealloc")
	if err := <-blocked; !errors.Is(err, o7serr.EFLOWDOWN) {
		t.Errorf("read: %v", err)
	}
	if _, err := x.Write([]byte("x")); !errors.Is(err, o7serr.EFLOWDOWN) {
		t.Errorf("write: %v", err)
	}
}

// A flow that is down goes on trying: what was written arrives once it is up.
func TestDownIsForAWhile(t *testing.T) {
	x, y, hx, _ := newFake(t).wired(t, qos.Data, &wire{})
	hx.event(t, "down")
	if e := <-x.Events(); e != EventDown {
		t.Fatal(e)
	}
	if _, err := x.Write([]byte("through")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	if n, err := y.Read(buf); err != nil || string(buf[:n]) != "through" {
		t.Errorf("%q, %v", buf[:n], err)
	}
}

// reference is a peer that is not one of ours, at the far end of a flow.
func reference(t *testing.T, h *held) *frcp.Conn {
	c, err := frcp.New(frcp.Config{QoS: qos.Data, MaxPacket: 1500, Rand: sequence, Plain: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Release)
	return c
}

func TestReferencePeer(t *testing.T) {
	x, h := newFake(t).pairWithReference(t)
	c := reference(t, h)
	if _, err := x.Write(make([]byte, 1500)); !errors.Is(err, o7serr.EMSGSIZE) {
		t.Errorf("a message that does not fit a packet: %v", err)
	}
	if _, err := x.Write([]byte("request")); err != nil {
		t.Fatal(err)
	}
	buf, frame := make([]byte, 100), make([]byte, 1500)
	exchange := func(until func() bool) {
		for end := time.Now().Add(10 * time.Second); !until(); time.Sleep(100 * time.Microsecond) {
			if time.Now().After(end) {
				t.Fatal("did not happen in time")
			}
			for {
				m, err := h.end.Next()
				if err != nil {
					break
				}
				if len(m) > 0 && m[0]&byte(frcp.Ext) == 0 {
					t.Error("our end does not say what it is")
				}
				c.Input(nanotime(), m)
				h.end.Skip()
				h.end.Release()
			}
			for n := c.Poll(nanotime(), frame); n > 0; n = c.Poll(nanotime(), frame) {
				_ = h.end.Write(frame[:n])
			}
		}
	}
	exchange(c.Readable)
	if n, _, err := c.Read(buf); err != nil || string(buf[:n]) != "request" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	if err := c.Write(nanotime(), []byte("answer")); err != nil {
		t.Fatal(err)
	}
	exchange(func() bool { return x.RxLen() > 0 })
	if n, err := x.Read(buf); err != nil || string(buf[:n]) != "answer" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	// It learns nothing of an end; closing is not in its way.
	if err := x.CloseWrite(); err != nil {
		t.Error(err)
	}
	x.SetLinger(time.Second)
	if err := x.Close(); err != nil {
		t.Error(err)
	}
}

func (d *fake) pairWithReference(t *testing.T) (*Flow, *held) {
	return d.flow1(t, d.client(t), &qos.Data)
}

// Flows without order over a layer have no end of stream; within the machine
// every flow has.
func TestEndOfStream(t *testing.T) {
	d := newFake(t)
	raw, _ := d.flow1(t, d.client(t), nil)
	if err := raw.CloseWrite(); !errors.Is(err, o7serr.ENOTSUP) {
		t.Errorf("raw flow over a layer: %v", err)
	}
	a, b := d.client(t), d.client(t)
	x, y := d.pair(t, a, b)
	if _, err := x.Write([]byte("last")); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(x.CloseWrite(), x.CloseWrite()); err != nil {
		t.Fatal(err)
	}
	if _, err := x.Write([]byte("more")); !errors.Is(err, o7serr.EPIPE) {
		t.Errorf("write after the end: %v", err)
	}
	buf := make([]byte, 100)
	if n, err := y.Read(buf); err != nil || string(buf[:n]) != "last" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	for range 2 {
		if n, err := y.Read(buf); n != 0 || err != io.EOF {
			t.Errorf("after the end: %d bytes, %v", n, err)
		}
	}
	// The other direction is open, and a blocked reader sees its end.
	got := make(chan error, 1)
	go func() {
		n, err := x.Read(buf)
		if err == nil && string(buf[:n]) != "back" {
			err = fmt.Errorf("read %q", buf[:n])
		}
		if err == nil {
			if _, err = x.Read(buf); err == io.EOF {
				err = nil
			}
		}
		got <- err
	}()
	if _, err := y.Write([]byte("back")); err != nil {
		t.Error(err)
	}
	if err := y.CloseWrite(); err != nil {
		t.Error(err)
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
}

// Reads and writes of a flow that carries data steadily do not allocate.
func TestOrderedFlowAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	x, y, _, _ := newFake(t).wired(t, qos.Data, &wire{})
	msg, buf := make([]byte, 1000), make([]byte, 2000)
	round := func() {
		for range 50 {
			if _, err := x.Write(msg); err != nil {
				t.Fatal(err)
			}
		}
		for range 50 {
			if _, err := y.Read(buf); err != nil {
				t.Fatal(err)
			}
		}
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // a collection empties the pools
	// Queues and pools grow, and grow again when the machine is busy and more
	// is on the way than ever before, but not for ever.
	n := 1.
	for range 20 {
		if n = testing.AllocsPerRun(50, round); n < 1 {
			return
		}
	}
	t.Errorf("%.0f allocations for 50 messages", n)
}

// A message larger than a packet can be written as soon as the flow is there:
// it waits until the peer has said that it is one of ours.
func TestLargeFirstMessage(t *testing.T) {
	d := newFake(t)
	x, hx := d.flow1(t, d.client(t), &qos.Data)
	big := testMessage(1, 1)
	big = append(big, make([]byte, 100_000)...)
	if err := x.SetFlags(Default | WNOBLOCK); err != nil {
		t.Fatal(err)
	}
	if _, err := x.Write(big); !errors.Is(err, o7serr.EAGAIN) {
		t.Errorf("without blocking: %v", err)
	}
	if err := x.SetFlags(Default); err != nil {
		t.Fatal(err)
	}
	if err := x.SetWriteDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := x.Write(big); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("with a deadline: %v", err)
	}
	if err := x.SetWriteDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	wrote := make(chan error, 1)
	go func() {
		_, err := x.Write(big)
		wrote <- err
	}()
	y, hy := d.flow1(t, d.client(t), &qos.Data)
	(&wire{}).between(t, hx, hy)
	buf := make([]byte, len(big)+1)
	if n, err := y.Read(buf); err != nil || !bytes.Equal(buf[:n], big) {
		t.Errorf("read %d bytes, %v", n, err)
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
}

// Nobody answers: the message is too large after a while, and so are later ones
// at once.
func TestLargeMessageToNobody(t *testing.T) {
	d := newFake(t)
	x, _ := d.flow1(t, d.client(t), &qos.Data)
	begin := time.Now()
	if _, err := x.Write(make([]byte, 5000)); !errors.Is(err, o7serr.EMSGSIZE) {
		t.Error(err)
	}
	if d := time.Since(begin); d < time.Duration(meetTime) {
		t.Errorf("given up after %v", d)
	}
	if _, err := x.Write(make([]byte, frcp.DefaultMaxMessage+1)); !errors.Is(err, o7serr.EMSGSIZE) {
		t.Error(err)
	}
	x.SetLinger(0)
}

// While a goroutine waits on a flow nobody else looks after it, and when that
// one leaves, what arrives is acknowledged all the same.
func TestTenderRests(t *testing.T) {
	x, y, _, _ := newFake(t).wired(t, qos.Data, &wire{})
	resting := func(f *Flow) bool {
		td := &f.session.tender
		td.mu.Lock()
		defer td.mu.Unlock()
		return !td.busy
	}
	for round := range 3 {
		_ = x.SetReadDeadline(time.Time{})
		read := make(chan error, 1)
		go func() {
			_, err := x.Read(make([]byte, 100))
			read <- err
		}()
		waitFor(t, func() bool { return x.e2e.drives() && resting(x) })
		if round == 0 { // a deadline that ends the wait
			_ = x.SetReadDeadline(past)
			if err := <-read; !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
		}
		if _, err := y.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if round > 0 {
			if err := <-read; err != nil {
				t.Fatal(err)
			}
		}
		waitFor(t, func() bool { return y.e2e.TxLen(10) == 0 })
		if round == 0 {
			_ = x.SetReadDeadline(time.Time{})
			if _, err := x.Read(make([]byte, 100)); err != nil {
				t.Fatal(err)
			}
		}
		waitFor(t, func() bool { return resting(x) && resting(y) })
	}
}

// drives reports whether a goroutine waits for the lower path.
func (p *e2ePath) drives() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.driving != nobody
}

// below is a path under the protocol that does what the test says.
type below struct {
	path
	mu       sync.Mutex // guards what follows
	in       [][]byte
	deadline time.Time
	waits    chan struct{} // one for each wait that began
	kick     chan struct{}
}

func (b *below) Next() ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.in) == 0 {
		return nil, ring.ErrEmpty
	}
	return b.in[0], nil
}

func (b *below) Skip() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.in = b.in[1:]
}

func (b *below) WaitRead() error {
	b.waits <- struct{}{}
	<-b.kick
	return nil
}

func (b *below) Kick(ring.Dir) {
	select {
	case b.kick <- struct{}{}:
	default:
	}
}

func (b *below) SetDeadline(_ ring.Dir, t time.Time) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.deadline = t
	return nil
}

func (*below) Release()               {}
func (*below) OnRing(func(lead bool)) {}
func (*below) Arm() bool              { return true }
func (*below) Put([]byte) error       { return nil }
func (*below) Flush()                 {}
func (*below) Peer() ring.State       { return 0 }
func (*below) Close() error           { return nil }

// above makes the protocol on a path of the test's.
func above(t *testing.T, q qos.Spec) (*e2ePath, *below) {
	t.Helper()
	b := &below{waits: make(chan struct{}, 100), kick: make(chan struct{}, 1)}
	hub, err := ring.NewHub(-1)
	if err != nil {
		t.Fatal(err)
	}
	td := &tender{hub: func() *ring.Hub { return hub }}
	p, err := newE2EPath(b, &ipc.FlowResult{QoS: q, MTU: 1500}, false, td)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Close()
		hub.Close()
	})
	return p, b
}

// What has arrived when the other end releases the flow is read, also if the
// news of that come before the reader has looked.
func TestReleasedBeforeTheReaderLooked(t *testing.T) {
	p, b := above(t, qos.Voice)
	peer, err := frcp.New(frcp.Config{QoS: qos.Voice, MaxPacket: 1500, Rand: sequence})
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Release()
	read := make(chan error, 1)
	go func() {
		for {
			m, err := p.Next()
			if errors.Is(err, ring.ErrEmpty) {
				if err = p.WaitRead(); err == nil {
					continue
				}
			}
			if err == nil && string(m) != "last words" {
				err = fmt.Errorf("read %q", m)
			}
			read <- err
			return
		}
	}()
	<-b.waits
	f := &Flow{path: p, e2e: p}
	f.state.Store(stateDealloc)
	if r, w := f.trouble(false), f.trouble(true); r != nil || !errors.Is(w, errDealloc) {
		t.Errorf("before the protocol knows: read %v, write %v", r, w)
	}
	if err := peer.Write(1, []byte("last words")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1500)
	n := peer.Poll(1, buf)
	b.mu.Lock()
	b.in = append(b.in, buf[:n])
	b.mu.Unlock()
	p.fail(errDealloc)
	if err := <-read; err != nil {
		t.Error(err)
	}
}

// A large message that was refused, and is not tried again, keeps nobody busy.
func TestLargeMessageGivenUp(t *testing.T) {
	p, _ := above(t, qos.Data)
	if err := p.Put(make([]byte, 5000)); !errors.Is(err, ring.ErrFull) {
		t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := nanotime() + int64(time.Hour)
	for p.conn.Poll(now, p.frame) > 0 { // announcements
		now += int64(time.Hour)
	}
	if d := p.deadline(now); d <= now {
		t.Errorf("the next look is due %v ago", time.Duration(now-d))
	}
}

// A deadline further away than a wait of the lower path lasts is none before its
// time.
func TestFarDeadline(t *testing.T) {
	p, b := above(t, qos.Data)
	far := time.Now().Add(10 * time.Hour)
	_ = p.SetDeadline(ring.DirRead, far)
	p.mu.Lock()
	if d := p.dl[ring.DirRead]; d < int64(far.Sub(epoch)) {
		t.Errorf("expires %v early", far.Sub(epoch)-time.Duration(d))
	}
	p.setLower(p.dl[ring.DirRead])
	p.mu.Unlock()
	if d := time.Until(b.deadline); d > time.Duration(maxWait) || d < 0 {
		t.Errorf("the lower path waits for %v", d)
	}
}
