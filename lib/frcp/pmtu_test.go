package frcp

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"pgregory.net/rapid"
)

// narrow makes the links drop packets longer than what mtu says; cut may drop
// others as well.
func (w *network) narrow(mtu func(now int64) int, cut func(now int64) bool) {
	size := 0
	w.tap = func(_ int, p []byte) { size = len(p) }
	for i := range w.links {
		w.links[i].cut = func(now int64) bool { return size > mtu(now) || cut != nil && cut(now) }
	}
}

func always(n int) func(int64) int { return func(int64) int { return n } }

// narrowPair are two of ours that have not heard of each other.
func narrowPair(t testing.TB, spec qos.Spec, most int, delay int64) (*Conn, *Conn, *network) {
	t.Helper()
	a := newConn(t, Config{QoS: spec, Rand: rands(1), MaxPacket: most})
	b := newConn(t, Config{QoS: spec, Rand: rands(2), MaxPacket: most})
	w := newNetwork(1, a, b, link{delay: delay})
	w.check = 1
	return a, b, w
}

// transfer sends out from a to b and fails if that does not work within limit.
func transfer(t testing.TB, w *network, a, b *Conn, out [][]byte, limit time.Duration) time.Duration {
	t.Helper()
	pa, pb := &app{c: a, out: out}, &app{c: b, readSize: 1 << 20}
	start := w.now
	if !w.run(limit, func() bool { pa.run(w.now); pb.run(w.now); return len(pb.got) == len(out) || pa.err != nil }) || pa.err != nil {
		t.Fatalf("%d of %d messages after %v, error %v, %+v", len(pb.got), len(out), time.Duration(w.now-start), pa.err, a.Stats())
	}
	if s := sameSequence(pb.got, out, true); s != "" {
		t.Fatal(s)
	}
	return time.Duration(w.now - start)
}

func TestPathMTUIsFound(t *testing.T) {
	for _, c := range []struct{ most, path, low int }{
		{1496, 1496, 1496},
		{1200, 1200, 1200},
		{1000, 1000, 1000},
		{1496, 1300, 1300 - pmtuStep},
		{1496, 1200, 1200},
		{4000, 1496, 1496 - pmtuStep},
		{4000, 3999, 3999 - pmtuStep},
		{1496, 900, 900 - pmtuStep},
		{1496, 300, 300 - pmtuStep},
	} {
		for _, loss := range []float64{0, 0.05} {
			a, b, w := narrowPair(t, qos.Data, c.most, 5*ms)
			w.links[0].loss, w.links[1].loss = loss, loss
			w.narrow(always(c.path), nil)
			a.Announce()
			b.Announce()
			w.run(2*time.Second, func() bool { return a.PeerExt() && b.PeerExt() })
			transfer(t, w, a, b, msgs(1, 60, 100, 2*c.most), time.Minute)
			for range 4 { // while there is data, the search goes on
				w.run(5*time.Second, func() bool { return false })
				transfer(t, w, a, b, msgs(1, 20, 100, 2*c.most), time.Minute)
			}
			s := a.Stats()
			if s.PathMTU < c.low || s.PathMTU > c.path {
				t.Errorf("first hop %d, path %d, loss %v: found %d, %+v", c.most, c.path, loss, s.PathMTU, s)
			}
			if loss == 0 && c.path == c.most && (s.Probes > 1 || s.Resent > 0 || s.Pieces > 0) {
				t.Errorf("first hop %d, path the same: %+v", c.most, s)
			}
			w.run(time.Minute, func() bool { return false })
			if a.Deadline() != Never || b.Deadline() != Never {
				t.Error("something is left to do")
			}
			a.Release()
			b.Release()
		}
	}
}

// What was sent whole before the peer was known, and does not fit, arrives in
// pieces as soon as the peer is heard of.
func TestSentBeforeThePeerWasKnown(t *testing.T) {
	for _, path := range []int{1300, 1200, 500} {
		a, b, w := narrowPair(t, qos.Data, 1496, 10*ms)
		w.narrow(always(path), nil)
		out := msgs(1, 30, 1300, 1450)
		pa := &app{c: a, out: out}
		pa.run(w.now)
		w.run(30*time.Millisecond, func() bool { return false })
		if a.Stats().Sent == 0 {
			t.Fatal("nothing sent")
		}
		b.Announce()
		pb := &app{c: b, readSize: 2000}
		start := w.now
		ok := w.run(30*time.Second, func() bool { pa.run(w.now); pb.run(w.now); return len(pb.got) == len(out) })
		if s := sameSequence(pb.got, out, true); !ok || s != "" {
			t.Fatalf("path %d: %d delivered, %s, %+v", path, len(pb.got), s, a.Stats())
		}
		t.Logf("path %d: %v, %+v", path, time.Duration(w.now-start), a.Stats())
		if path >= pmtuBase && w.now-start > 3*second {
			t.Errorf("path %d: took %v", path, time.Duration(w.now-start))
		}
	}
}

// A path that becomes narrower under a transfer does not end it.
func TestPathBecomesNarrower(t *testing.T) {
	a, b, w := narrowPair(t, qos.Data, 1496, 10*ms)
	mtu := 1496
	w.narrow(func(int64) int { return mtu }, nil)
	out := msgs(1, 200, 1300, 1450)
	transfer(t, w, a, b, out, time.Minute)
	if a.Stats().PathMTU != 1496 {
		t.Fatal("not found", a.Stats().PathMTU)
	}
	for _, mtu = range []int{1250, 1200, 600} {
		took := transfer(t, w, a, b, out, 2*time.Minute)
		s := a.Stats()
		t.Logf("%d: %v, %+v", mtu, took, s)
		if s.PathMTU > mtu || s.BlackHoles == 0 || mtu >= pmtuBase && took > 5*time.Second {
			t.Errorf("%d: %v, %+v", mtu, took, s)
		}
	}
	w.run(time.Minute, func() bool { return false }) // the search is over
	// Wider again: found when it is looked for the next time.
	mtu = 1496
	w.run(time.Duration(pmtuRaise), func() bool { return false })
	transfer(t, w, a, b, out, time.Minute)
	transfer(t, w, a, b, out, time.Minute)
	if s := a.Stats(); s.PathMTU != 1496 {
		t.Fatalf("%+v", s)
	}
}

// A path that is dead for a while has the same size afterwards.
func TestOutageKeepsPathMTU(t *testing.T) {
	for _, length := range []int64{500 * ms, 5 * second, 60 * second} {
		a, b, w := narrowPair(t, qos.Data, 1496, 10*ms)
		out := msgs(1, 3000, 1300, 1450)
		transfer(t, w, a, b, out[:500], time.Minute)
		from := w.now + 20*ms
		w.narrow(always(1496), func(now int64) bool { return now > from && now < from+length })
		took := transfer(t, w, a, b, out, 3*time.Minute)
		if s := a.Stats(); s.PathMTU != 1496 || took > time.Duration(length)+15*time.Second {
			t.Errorf("dead for %v: done after %v, %+v", time.Duration(length), took, s)
		}
	}
}

// Losses at random are no black hole.
func TestLossIsNoBlackHole(t *testing.T) {
	a, b, w := narrowPair(t, qos.Data, 1496, 10*ms)
	w.check = 100
	w.links[0].loss, w.links[1].loss = 0.05, 0.05
	transfer(t, w, a, b, msgs(1, 30000, 1400, 1450), 2*time.Minute)
	if s := a.Stats(); s.BlackHoles > 0 || s.PathMTU != 1496 {
		t.Errorf("%+v", s)
	}
}

// An ordered flow has no acknowledgements: it asks now and then whether its
// size still passes.
func TestOrderedFlowFollowsThePath(t *testing.T) {
	a, b, w := narrowPair(t, qos.Video, 1496, 10*ms)
	mtu := 1496
	w.narrow(func(int64) int { return mtu }, nil)
	a.Announce()
	b.Announce()
	got, buf, msg := 0, make([]byte, 2000), make([]byte, 1450)
	send := func(d time.Duration) (share float64) {
		n := 0
		got = 0
		end := w.now + int64(d)
		for w.now < end {
			if a.Write(w.now, msg) == nil {
				n++
			}
			w.run(20*time.Millisecond, func() bool {
				for {
					if k, _, err := b.Read(buf); err != nil || k != len(msg) {
						return false
					}
					got++
				}
			})
		}
		return float64(got) / float64(n)
	}
	if s := send(10 * time.Second); s < 0.99 || a.Stats().PathMTU != 1496 {
		t.Fatal(s, a.Stats())
	}
	mtu = 1300
	send(25 * time.Second)
	if s := send(10 * time.Second); s < 0.99 || a.Stats().PathMTU > 1300 {
		t.Fatal(s, a.Stats())
	}
}

// A reference end is sent neither probes nor pieces.
func TestReferenceIsNotProbed(t *testing.T) {
	ref := newReference(qos.Data, 0)
	a := newConn(t, Config{QoS: qos.Data, Rand: rands(1)})
	w := newNetwork(1, a, ref, link{delay: ms, loss: 0.05})
	w.tap = func(from int, p []byte) {
		if h, _ := (Header12{}).Parse(p); from == 0 && h.Flags&Data == 0 && len(p) > HeaderLen {
			t.Errorf("payload in a control packet: %x", p)
		}
	}
	pa := &app{c: a, out: msgs(1, 500, 1300, 1450)}
	w.run(100*time.Second, func() bool { pa.run(w.now); return len(ref.got) == 500 })
	if s := a.Stats(); len(ref.got) != 500 || s.Probes+s.Pieces+s.BlackHoles > 0 || s.PathMTU != 1496 {
		t.Fatalf("%d, %+v", len(ref.got), s)
	}
}

// Whatever the path's size does, together with losses, swaps and damage, what
// is delivered is what was sent.
func TestAnyPathMTU(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		most := rapid.SampledFrom([]int{300, 1201, 1496, 4000}).Draw(t, "first hop")
		seed := rapid.Uint64().Draw(t, "seed")
		l := link{
			loss:   float64(rapid.SampledFrom([]int{0, 1, 10, 30}).Draw(t, "loss %")) / 100,
			dup:    float64(rapid.IntRange(0, 10).Draw(t, "dup %")) / 100,
			flip:   float64(rapid.IntRange(0, 5).Draw(t, "flip %")) / 100,
			delay:  int64(rapid.SampledFrom([]int{0, 1, 20}).Draw(t, "delay ms")) * ms,
			jitter: int64(rapid.SampledFrom([]int{0, 1, 20}).Draw(t, "jitter ms")) * ms,
		}
		mk := func(s uint64) *Conn {
			cfg := Config{QoS: withCRC(qos.Data), MaxPacket: most, Rand: rands(seed + s)}
			if s == 2 && rapid.Bool().Draw(t, "narrow at the other end") {
				cfg.MaxPacket = 1300
			}
			if seed%3 == 0 {
				cfg.Cipher = &xor{}
			}
			c, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		a, b := mk(1), mk(2)
		w := newNetwork(seed, a, b, l)
		w.check = 7
		sizes := rapid.SliceOfN(rapid.SampledFrom([]int{300, 500, 1200, 1300, 4000}), 1, 6).Draw(t, "sizes")
		every := int64(rapid.SampledFrom([]int{10, 300, 5000}).Draw(t, "every ms")) * ms
		start := w.now
		w.narrow(func(now int64) int {
			if i := (now - start) / every; i < int64(len(sizes)) {
				return sizes[i]
			}
			return sizes[len(sizes)-1]
		}, nil)
		if rapid.Bool().Draw(t, "announce") {
			a.Announce()
		}
		b.Announce()
		hi := min(a.MaxPayload(), b.MaxPayload())
		apps := [2]*app{{c: a, readSize: 9000}, {c: b, readSize: 9000}}
		for i, p := range apps {
			p.out = msgs(seed+uint64(i), rapid.IntRange(1, 100).Draw(t, "messages"), 8, hi)
			p.closeEnd = true
		}
		ok := w.run(1500*time.Second, func() bool {
			fin := true
			for _, p := range apps {
				p.run(w.now)
				fin = fin && (p.err != nil || p.eof)
			}
			return fin || apps[0].err != nil || apps[1].err != nil
		})
		if !ok {
			t.Fatalf("hangs: %+v\n%+v", a.Stats(), b.Stats())
		}
		for i, p := range apps {
			q := apps[1-i]
			if e := o7serr.Errno(0); p.err != nil && !errors.As(p.err, &e) {
				t.Fatalf("failed with an unnamed error: %v", p.err)
			}
			if s := sameSequence(p.got, q.out, true); s != "" {
				t.Fatal(s)
			}
			if p.err == nil && q.err == nil && len(p.got) != len(q.out) {
				t.Fatalf("%d of %d messages delivered", len(p.got), len(q.out))
			}
			// Without a word of the other end before its own data, an end does not
			// know it; announcements can be lost.
			if p.err != nil && l.loss < 0.3 && sizes[len(sizes)-1] >= most {
				t.Fatalf("failed: %v, %+v", p.err, p.c.Stats())
			}
		}
		a.Release()
		b.Release()
	})
}

// Pieces that nobody of ours would send are refused, and what is kept of the
// others is bounded.
func TestHostilePieces(t *testing.T) {
	c := newConn(t, Config{QoS: qos.Data})
	now := second
	in := func(f Flags, seq uint32, v ...byte) {
		p := make([]byte, HeaderLen, HeaderLen+len(v))
		Header12{}.Put(p, Header{Flags: f | Ext, Seq: seq})
		c.Input(now, append(p, v...))
		if err := c.invariant(now); err != nil {
			t.Fatal(err)
		}
	}
	piece := func(seq uint32, total, off, n int) []byte {
		v := make([]byte, tlvHeader+pieceHeader+n)
		v[0] = tlvPiece
		binary.BigEndian.PutUint16(v[1:], uint16(pieceHeader+n))
		binary.BigEndian.PutUint32(v[3:], seq)
		binary.BigEndian.PutUint16(v[7:], uint16(total))
		binary.BigEndian.PutUint16(v[9:], uint16(off))
		return v
	}
	in(0, 0, piece(100, 128, 0, 64)...) // no run
	in(DRF, 100)
	for _, v := range [][]byte{
		piece(100, 0, 0, 1), piece(100, 128, 63, 64), piece(100, 128, 0, 65), piece(100, 128, 64, 65),
		piece(100, 65535, 65472, 64), piece(100, 128, 0, 0), piece(99, 128, 0, 64), piece(100+refWindow, 128, 0, 64),
		piece(100, 128, 0, 64)[:20], piece(101, 65535, 0, 1024),
	} {
		in(0, 0, v...)
		if c.partials != 0 {
			t.Fatalf("accepted %x", v)
		}
	}
	r := rand.New(rand.NewPCG(1, 1))
	for range 20000 {
		n := 64 * (1 + r.IntN(4))
		in(0, 0, piece(101+r.Uint32N(250), 64*(5+r.IntN(60)), 64*r.IntN(60), n)...)
		if c.partials > maxPartial {
			t.Fatal(c.partials)
		}
		poll(c, now)
	}
	// The next one is always taken, also over what others left.
	in(0, 0, piece(100, 128, 64, 64)...)
	in(0, 0, piece(100, 128, 0, 64)...)
	if c.next == 100 {
		t.Fatal("not accepted")
	}
	c.Release()
	if c.partials != 0 {
		t.Fatal("kept")
	}
}
