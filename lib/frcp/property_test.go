package frcp

import (
	"errors"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"pgregory.net/rapid"
)

// Whatever the network does, what is delivered is what was sent, in order, or
// the flow fails with a number the interface knows; and it always ends.
func TestAnyNetwork(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := link{
			loss:   float64(rapid.IntRange(0, 30).Draw(t, "loss %")) / 100,
			dup:    float64(rapid.IntRange(0, 20).Draw(t, "dup %")) / 100,
			delay:  int64(rapid.IntRange(0, 50).Draw(t, "delay ms")) * ms,
			jitter: int64(rapid.IntRange(0, 30).Draw(t, "jitter ms")) * ms,
		}
		reliable := rapid.Bool().Draw(t, "reliable")
		crc := rapid.Bool().Draw(t, "crc")
		crypt := rapid.Bool().Draw(t, "encrypted")
		if crc || crypt {
			l.flip = float64(rapid.IntRange(0, 10).Draw(t, "flip %")) / 100
		}
		spec := qos.Video
		if reliable {
			spec = qos.Data
		}
		if crc {
			spec = withCRC(spec)
		}
		seed := rapid.Uint64().Draw(t, "seed")
		cfg := func(i uint64) Config {
			c := Config{QoS: spec, MaxPacket: 200, MaxMessage: 20000,
				Window: rapid.SampledFrom([]int{0, 1, 4, 64, 1000}).Draw(t, "window"),
				Rand:   rands(seed+i, rapid.SampledFrom([]uint32{0, 5, 0xffffff00, 0xfffffffe, 0x7fffffff, 0x00fffff0}).Draw(t, "first")),
				Plain:  rapid.IntRange(0, 4).Draw(t, "plain") == 0}
			if crypt {
				c.Cipher = &xor{}
			}
			return c
		}
		mk := func(i uint64) *Conn {
			c, err := New(cfg(i))
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		a, b := mk(1), mk(2)
		both := !a.plain && !b.plain
		w := newNetwork(seed, a, b, l)
		w.check = 3
		stall := int64(rapid.IntRange(0, 3000).Draw(t, "reader stalls ms")) * ms
		start := w.now
		apps := [2]*app{{c: a}, {c: b}}
		for i, p := range apps {
			p.readSize = rapid.SampledFrom([]int{17, 30000}).Draw(t, "read size")
			p.pause = func(now int64) bool { return now-start < stall }
			hi := a.MaxPayload()
			p.out = msgs(seed+uint64(i), rapid.IntRange(1, 300).Draw(t, "messages"), 8, hi)
			p.closeEnd = true
		}
		if both && reliable {
			a.Announce()
			b.Announce()
			// Long messages once the other end is known to be ours.
			w.run(30*time.Second, func() bool { return a.PeerExt() && b.PeerExt() })
			if a.PeerExt() && b.PeerExt() {
				apps[0].out = append(apps[0].out, msgs(seed, 5, 500, 9000)...)
			}
		}
		w.wake = start + stall
		ok := w.run(1500*time.Second, func() bool {
			for _, p := range apps {
				p.run(w.now)
			}
			if w.now >= w.wake {
				w.wake = Never
			}
			fin := true
			for i, p := range apps {
				q := apps[1-i]
				switch {
				case p.err != nil || q.err != nil:
				case reliable && both:
					fin = fin && p.eof
				case reliable:
					fin = fin && len(p.got) == len(q.out) && p.sent == len(p.out)
				default:
					fin = fin && p.sent == len(p.out) && p.c.nxt == p.c.seqno && len(w.q) == 0
				}
			}
			return fin
		})
		if !ok {
			t.Fatalf("hangs: a sent %d of %d got %d err %v %+v\nb sent %d of %d got %d err %v %+v", apps[0].sent, len(apps[0].out), len(apps[0].got), apps[0].err, a.Stats(),
				apps[1].sent, len(apps[1].out), len(apps[1].got), apps[1].err, b.Stats())
		}
		for i, p := range apps {
			q := apps[1-i]
			if p.err != nil {
				var e o7serr.Errno
				if !errors.As(p.err, &e) {
					t.Fatalf("failed with an unnamed error: %v", p.err)
				}
			}
			if s := sameSequence(p.got, q.out, reliable); s != "" {
				t.Fatal(s)
			}
			if reliable && p.err == nil && q.err == nil && len(p.got) != len(q.out) {
				t.Fatalf("%d of %d messages delivered", len(p.got), len(q.out))
			}
		}
		// Both close, and that ends too.
		w.wake = Never
		a.Close(w.now)
		b.Close(w.now)
		if !w.run(300*time.Second, func() bool { return a.Done() && b.Done() }) {
			t.Fatalf("closing hangs: %v %v", a.Err(), b.Err())
		}
		a.Release()
		b.Release()
	})
}

// A reliable flow over a dead network fails after R, at every stage.
func TestPeerVanishes(t *testing.T) {
	for _, spec := range []qos.Spec{qos.Data, qos.Video} {
		a := newConn(t, Config{QoS: spec, Rand: rands(1)})
		b := newConn(t, Config{QoS: spec, Rand: rands(2)})
		w := newNetwork(1, a, b, link{delay: ms})
		start := w.now
		cut := func(now int64) bool { return now-start > 20*ms }
		w.links[0].cut, w.links[1].cut = cut, cut
		pa, pb := &app{c: a, out: msgs(1, 100000, 8, 100), readSize: 2000}, &app{c: b, readSize: 2000, pause: func(now int64) bool { return now-start > 10*ms }}
		if !w.run(400*time.Second, func() bool { pa.run(w.now); pb.run(w.now); return pa.err != nil }) {
			t.Fatalf("%v: no error after %v", ModeOf(spec), time.Duration(w.now-start))
		}
		if !errors.Is(pa.err, o7serr.EFLOWDOWN) {
			t.Fatal(pa.err)
		}
		if d := time.Duration(w.now - start); d < 119*time.Second || d > 125*time.Second {
			t.Errorf("%v: failed after %v", ModeOf(spec), d)
		}
	}
}

// A path that is dead for a minute, then not, loses nothing (issue: survival).
func TestOutage(t *testing.T) {
	a := newConn(t, Config{QoS: qos.Data, Rand: rands(1)})
	b := newConn(t, Config{QoS: qos.Data, Rand: rands(2)})
	w := newNetwork(1, a, b, link{delay: ms})
	start := w.now
	cut := func(now int64) bool { d := now - start; return d > 20*ms && d < 60*second }
	w.links[0].cut, w.links[1].cut = cut, cut
	pa, pb := &app{c: a, out: msgs(1, 5000, 8, 100), closeEnd: true}, &app{c: b, readSize: 2000}
	if !w.run(80*time.Second, func() bool { pa.run(w.now); pb.run(w.now); return pb.eof }) {
		t.Fatalf("not complete: %v %v", pa.err, pb.err)
	}
	if s := sameSequence(pb.got, pa.out, true); s != "" || len(pb.got) != len(pa.out) {
		t.Fatal(s, len(pb.got))
	}
}

// A reader that never reads: the writer is refused, memory stays bounded, the
// flow does not fail, and everything goes on when the reader does.
func TestReaderNeverReads(t *testing.T) {
	for _, spec := range []qos.Spec{qos.Data, qos.Video} {
		a := newConn(t, Config{QoS: spec, Rand: rands(1)})
		b := newConn(t, Config{QoS: spec, Rand: rands(2)})
		w := newNetwork(1, a, b, link{delay: ms})
		start := w.now
		pa := &app{c: a, out: msgs(1, 5000, 8, 100)}
		pb := &app{c: b, readSize: 2000, pause: func(now int64) bool { return now-start < 600*second }}
		w.run(599*time.Second, func() bool { pa.run(w.now); pb.run(w.now); return false })
		if n := b.rTail - b.rHead; pa.err != nil || n > 2*refWindow || len(a.out.s) > 2*refWindow || len(b.ready.s) > 2*refWindow {
			t.Fatalf("%v: err %v, %d messages waiting", ModeOf(spec), pa.err, n)
		}
		if ModeOf(spec) == Ordered {
			continue
		}
		w.wake = start + 600*second
		if !w.run(60*time.Second, func() bool {
			pa.run(w.now)
			pb.run(w.now)
			if w.now >= w.wake {
				w.wake = Never
			}
			return len(pb.got) == 5000
		}) {
			t.Fatalf("%v: %d delivered", ModeOf(spec), len(pb.got))
		}
	}
}
