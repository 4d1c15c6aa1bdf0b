package ordered_test

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/local"
	"github.com/o7s/o7s-router/ipcp/ordered"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/qos"
)

// lossy loses, repeats, delays and flips what is sent on a flow.
type lossy struct {
	ipcp.Flow
	mu     sync.Mutex // guards what follows
	rnd    *rand.Rand
	loss   float64
	flip   float64
	delay  time.Duration
	cut    bool
	closed time.Duration // as CloseLinger got it
}

func (l *lossy) Send(b *packet.Buf) error {
	l.mu.Lock()
	lost := l.cut || l.rnd.Float64() < l.loss
	if !lost && b.Len() > 0 && l.rnd.Float64() < l.flip {
		b.Bytes()[l.rnd.IntN(b.Len())] ^= 1 << l.rnd.IntN(8)
	}
	d := l.delay
	if d > 0 {
		d += time.Duration(l.rnd.Int64N(int64(d)))
	}
	l.mu.Unlock()
	if lost {
		b.Release()
		return nil
	}
	if d > 0 {
		time.AfterFunc(d, func() { _ = l.Flow.Send(b) })
		return nil
	}
	return l.Flow.Send(b)
}

func (l *lossy) CloseLinger(d time.Duration) error {
	l.mu.Lock()
	l.closed = d
	l.mu.Unlock()
	return l.Flow.Close()
}

func (l *lossy) setCut(c bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = c
}

// sink keeps the numbers of the messages that come, and the events.
type sink struct {
	mu     sync.Mutex // guards what follows
	got    []uint32
	empty  int
	events []ipcp.Event
	back   ipcp.Flow // every message is sent back on it
}

func (s *sink) Receive(pkts []*packet.Buf) {
	for _, b := range pkts {
		s.mu.Lock()
		if b.Len() == 0 {
			s.empty++
		} else {
			s.got = append(s.got, binary.BigEndian.Uint32(b.Bytes()))
		}
		s.mu.Unlock()
		if s.back != nil && b.Len() > 0 {
			_ = s.back.Send(b)
		} else {
			b.Release()
		}
	}
}

func (s *sink) FlowEvent(e ipcp.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, e)
}

func (s *sink) numbers() []uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]uint32(nil), s.got...)
}

func (s *sink) saw(e ipcp.Event) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.events {
		if x == e {
			return true
		}
	}
	return false
}

const mtu = 1496

func pair(t *testing.T, q qos.Spec, set func(*lossy)) (a, b ipcp.Flow, la, lb *lossy) {
	t.Helper()
	x, y := local.NewPair(ipcp.FlowInfo{QoS: q, MTU: mtu, MPL: 100})
	la = &lossy{Flow: x, rnd: rand.New(rand.NewPCG(1, 2))}
	lb = &lossy{Flow: y, rnd: rand.New(rand.NewPCG(3, 4))}
	if set != nil {
		set(la)
		set(lb)
	}
	var err error
	if a, err = ordered.Wrap(la); err != nil {
		t.Fatal(err)
	}
	if b, err = ordered.Wrap(lb); err != nil {
		t.Fatal(err)
	}
	return a, b, la, lb
}

func message(i int, n int) *packet.Buf {
	b := packet.Get(n)
	clear(b.Bytes())
	binary.BigEndian.PutUint32(b.Bytes(), uint32(i))
	return b
}

func inOrder(t *testing.T, got []uint32, want int) {
	t.Helper()
	if len(got) != want {
		t.Fatalf("%d messages arrived, want %d", len(got), want)
	}
	for i, x := range got {
		if x != uint32(i) {
			t.Fatalf("message %d is number %d", i, x)
		}
	}
}

// A reliable flow over a path that loses, reorders and flips delivers
// everything, in both directions.
func TestReliable(t *testing.T) {
	q := qos.Data
	q.BER = 0
	for name, set := range map[string]func(*lossy){
		"clean, within one call": func(*lossy) {},
		"loss within one call":   func(l *lossy) { l.loss = 0.05 },
		"loss and jitter":        func(l *lossy) { l.loss, l.delay = 0.05, time.Millisecond },
		"flips":                  func(l *lossy) { l.flip, l.delay = 0.05, time.Millisecond },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b, _, _ := pair(t, q, set)
				sa, sb := &sink{}, &sink{}
				sb.back = b
				a.SetSink(sa)
				b.SetSink(sb)
				const count = 3000
				for i := 0; i < count; i++ {
					for a.Send(message(i, 4+i%1400)) != nil {
						time.Sleep(time.Millisecond)
					}
					if i%50 == 0 {
						time.Sleep(time.Millisecond)
					}
				}
				time.Sleep(20 * time.Second)
				inOrder(t, sb.numbers(), count)
				inOrder(t, sa.numbers(), count)
				closeBoth(t, a, b)
			})
		})
	}
}

func closeBoth(t *testing.T, a, b ipcp.Flow) {
	t.Helper()
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	time.Sleep(time.Minute)
	synctest.Wait()
}

// An ordered flow loses messages but never swaps them.
func TestOrdered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := pair(t, qos.Video, func(l *lossy) { l.loss, l.delay = 0.1, time.Millisecond })
		sb := &sink{}
		b.SetSink(sb)
		a.SetSink(&sink{})
		for i := range 2000 {
			_ = a.Send(message(i, 100))
			time.Sleep(200 * time.Microsecond)
		}
		time.Sleep(5 * time.Second)
		got := sb.numbers()
		if len(got) < 500 || len(got) >= 2000 {
			t.Errorf("%d messages of 2000 arrived", len(got))
		}
		for i := 1; i < len(got); i++ {
			if got[i] <= got[i-1] {
				t.Fatalf("message %d after %d", got[i], got[i-1])
			}
		}
		closeBoth(t, a, b)
	})
}

// Raw with ber 0 has the CRC alone.
func TestCRC(t *testing.T) {
	q := qos.Raw
	q.BER = 0
	a, b, la, _ := pair(t, q, nil)
	sb := &sink{}
	b.SetSink(sb)
	if n := a.Info().MTU; n != mtu-4 {
		t.Errorf("mtu is %d, want %d", n, mtu-4)
	}
	for i := range 10 {
		if err := a.Send(message(i, 100)); err != nil {
			t.Fatal(err)
		}
	}
	la.flip = 1
	for i := range 10 {
		_ = a.Send(message(i, 100))
	}
	if err := a.Send(packet.Get(0)); err != nil {
		t.Error(err)
	}
	inOrder(t, sb.numbers(), 10)
	if sb.empty != 1 {
		t.Errorf("%d keep-alives, want 1", sb.empty)
	}
	_ = a.Close()
	if !sb.saw(ipcp.EventDealloc) {
		t.Error("the other end was not told")
	}
	_ = b.Close()
}

// Keep-alives pass beside the protocol.
func TestKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := pair(t, qos.Data, nil)
		sb := &sink{}
		b.SetSink(sb)
		a.SetSink(&sink{})
		_ = a.Send(packet.Get(0))
		_ = a.Send(message(0, 4))
		_ = a.Send(packet.Get(0))
		time.Sleep(time.Second)
		inOrder(t, sb.numbers(), 1)
		if sb.empty != 2 {
			t.Errorf("%d keep-alives, want 2", sb.empty)
		}
		closeBoth(t, a, b)
	})
}

// A path that is cut for a while loses nothing; one that stays cut ends the
// flow after R.
func TestCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, la, lb := pair(t, qos.Data, func(l *lossy) { l.delay = time.Millisecond })
		sa, sb := &sink{}, &sink{}
		a.SetSink(sa)
		b.SetSink(sb)
		cut := func(c bool) { la.setCut(c); lb.setCut(c) }
		for i := range 100 {
			if i == 50 {
				cut(true)
			}
			if err := a.Send(message(i, 1000)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(30 * time.Second)
		cut(false)
		time.Sleep(10 * time.Second)
		inOrder(t, sb.numbers(), 100)
		cut(true)
		_ = a.Send(message(100, 1000))
		time.Sleep(150 * time.Second)
		if !sa.saw(ipcp.EventPeer) {
			t.Error("the end of a path that stays cut was not told")
		}
		if err := a.Send(message(101, 1000)); err == nil {
			t.Error("a flow that has failed takes a message")
		}
		begin := time.Now()
		closeBoth(t, a, b)
		if d := time.Since(begin); d > time.Minute+time.Second {
			t.Errorf("closing took %v", d)
		}
	})
}

// Close tells the peer after what was written, is bounded, and the endpoint
// below gets the quarantine of the protocol.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, la, _ := pair(t, qos.Data, func(l *lossy) { l.delay = 5 * time.Millisecond })
		sb := &sink{}
		b.SetSink(sb)
		a.SetSink(&sink{})
		for i := range 20 {
			_ = a.Send(message(i, 1000))
		}
		begin := time.Now()
		if err := ipcp.CloseLinger(a, time.Second); err != nil {
			t.Error(err)
		}
		if d := time.Since(begin); d > 300*time.Millisecond {
			t.Errorf("closing took %v", d)
		}
		inOrder(t, sb.numbers(), 20)
		time.Sleep(time.Second)
		if !sb.saw(ipcp.EventDealloc) {
			t.Error("the other end was not told")
		}
		if la.closed < time.Second {
			t.Errorf("quarantine of %v, want a second or more", la.closed)
		}
		if err := a.Send(message(0, 10)); err == nil {
			t.Error("a closed flow takes a message")
		}
		closeBoth(t, a, b)
	})
}

// A peer that does not read, a window that is closed: what waits is bounded.
func TestBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, la, _ := pair(t, qos.Data, nil)
		a.SetSink(&sink{})
		b.SetSink(&sink{})
		la.setCut(true)
		refused := 0
		for i := range 20000 {
			if a.Send(message(i, 100)) != nil {
				refused++
			}
		}
		if refused < 15000 {
			t.Errorf("%d of 20000 messages were refused on a path that is cut", refused)
		}
		closeBoth(t, a, b)
	})
}
