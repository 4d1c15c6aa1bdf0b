package frcp

import (
	"errors"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"pgregory.net/rapid"
)

// Two of our ends with windows of thousands of packets, over paths that lose,
// repeat, swap and damage them and are cut now and then: everything arrives in
// order, or the flow fails with a number; the accounts are right all the time,
// and it ends.
func TestLargeWindows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := link{
			loss:   float64(rapid.SampledFrom([]int{0, 1, 5, 20, 50}).Draw(t, "loss %")) / 100,
			dup:    float64(rapid.IntRange(0, 10).Draw(t, "dup %")) / 100,
			flip:   float64(rapid.IntRange(0, 5).Draw(t, "flip %")) / 100,
			delay:  int64(rapid.SampledFrom([]int{0, 1, 20, 200}).Draw(t, "delay ms")) * ms,
			jitter: int64(rapid.SampledFrom([]int{0, 0, 1, 10, 100}).Draw(t, "jitter ms")) * ms,
		}
		first := func(who string) uint32 {
			return rapid.SampledFrom([]uint32{0, 0xffffff00, 0x7ffffff0, 77}).Draw(t, "first of "+who)
		}
		seed := rapid.Uint64().Draw(t, "seed")
		mk := func(who string) *Conn {
			c, err := New(Config{
				QoS: withCRC(qos.Data), MaxPacket: 100, MaxMessage: 5000, Rand: rands(seed, first(who)),
				Window: rapid.SampledFrom([]int{0, 300, maxWindow}).Draw(t, "window of "+who),
			})
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		a, b := mk("a"), mk("b")
		w := newNetwork(seed, a, b, l)
		w.check = 37
		start := w.now
		if rapid.Bool().Draw(t, "cuts") {
			period, length := int64(rapid.IntRange(200, 20000).Draw(t, "every ms"))*ms, int64(rapid.IntRange(10, 3000).Draw(t, "for ms"))*ms
			n := rapid.IntRange(0, 5).Draw(t, "times")
			w.links[rapid.IntRange(0, 1).Draw(t, "direction")].cut = func(now int64) bool {
				d := now - start
				return d/period < int64(n) && d%period < length
			}
		}
		if rapid.Bool().Draw(t, "announce") {
			a.Announce()
			b.Announce()
		}
		stall := int64(rapid.SampledFrom([]int{0, 0, 500, 5000}).Draw(t, "reader stalls ms")) * ms
		apps := [2]*app{{c: a}, {c: b}}
		for i, p := range apps {
			p.readSize = 5000
			p.pause = func(now int64) bool { return now-start < stall }
			p.out = msgs(seed+uint64(i), rapid.SampledFrom([]int{0, 1, 300, 3000}).Draw(t, "messages"), 8, 70)
			p.closeEnd = true
		}
		w.wake = start + stall
		ok := w.run(3000*time.Second, func() bool {
			apps[0].run(w.now)
			apps[1].run(w.now)
			if w.now >= w.wake {
				w.wake = Never
			}
			fin := true
			for i, p := range apps {
				q := apps[1-i]
				// Who has written nothing does not know the peer, unless it
				// was announced; then there is nobody to tell of the end.
				fin = fin && (p.err != nil || q.err != nil || p.eof || len(q.out) == 0 && !q.c.ext)
			}
			return fin
		})
		if !ok {
			t.Fatalf("hangs: %+v\n%+v", a.Stats(), b.Stats())
		}
		for i, p := range apps {
			q := apps[1-i]
			if p.err != nil {
				if e := o7serr.Errno(0); !errors.As(p.err, &e) {
					t.Fatalf("failed with an unnamed error: %v", p.err)
				}
			}
			if s := sameSequence(p.got, q.out, true); s != "" {
				t.Fatal(s)
			}
			if p.err == nil && q.err == nil && len(p.got) != len(q.out) {
				t.Fatalf("%d of %d messages delivered", len(p.got), len(q.out))
			}
			if err := p.c.invariant(w.now); err != nil {
				t.Fatal(err)
			}
		}
		a.Release()
		b.Release()
	})
}

// On a path that swaps packets but loses none, little is sent again.
func TestReorderingIsNotLoss(t *testing.T) {
	for _, jitter := range []int64{ms / 2, 2 * ms, 8 * ms, 30 * ms} {
		a, b, w := ourPair(t, qos.Data, 0)
		w.check = 2000
		l := link{delay: 20 * ms, jitter: jitter}
		w.links = [2]link{l, l}
		pa, pb := &app{c: a, out: msgs(1, 10000, 1000, 1400)}, &app{c: b, readSize: 2000}
		start := w.now
		if !w.run(100*time.Second, func() bool { pa.run(w.now); pb.run(w.now); return len(pb.got) == len(pa.out) }) {
			t.Fatal("not complete")
		}
		s := a.Stats()
		t.Logf("jitter %v: %v, %d of %d packets repeated, %d probes and time-outs",
			time.Duration(jitter), time.Duration(w.now-start), s.Resent, s.Sent, s.RTOs)
		if s.Resent*20 > s.Sent {
			t.Errorf("jitter %v: %d of %d packets repeated", time.Duration(jitter), s.Resent, s.Sent)
		}
	}
}

// A message of which the window takes only a part waits for a reader that reads
// nothing for longer than a run lasts without data.
func TestPartOfAMessageWaits(t *testing.T) {
	a, b, w := ourPair(t, qos.Data, 0)
	w.check = 10
	wake := w.now + 300*second
	pa := &app{c: a, out: msgs(1, 40, 100000, 100001), closeEnd: true}
	pb := &app{c: b, readSize: 200000, pause: func(now int64) bool { return now < wake }}
	w.wake = wake
	w.run(310*time.Second, func() bool {
		pa.run(w.now)
		pb.run(w.now)
		if w.now >= wake {
			w.wake = Never
		}
		return pb.eof || pa.err != nil || pb.err != nil
	})
	if s := sameSequence(pb.got, pa.out, true); !pb.eof || len(pb.got) != len(pa.out) || s != "" {
		t.Fatalf("%d of %d messages, %v, %v, %s", len(pb.got), len(pa.out), a.Err(), b.Err(), s)
	}
}
