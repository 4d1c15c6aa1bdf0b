package frcp

import (
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/qos"
)

// A path that carries less than its first hop: messages of the first hop's size
// arrive, in packets that are soon nearly as large as the path takes.
func TestPathSize(t *testing.T) {
	for _, spec := range []qos.Spec{qos.Data, qos.Video, withCRC(qos.Data)} {
		for _, mtu := range []int{1200, 1203, 1300, 1480, 1495, 1496, 9000} {
			for _, loss := range []float64{0, 0.1} {
				a := newConn(t, Config{QoS: spec, Rand: rands(1), MaxPacket: 1496})
				b := newConn(t, Config{QoS: spec, Rand: rands(2), MaxPacket: 1496})
				w := newNetwork(uint64(mtu), a, b, link{delay: 5 * ms, loss: loss, mtu: mtu})
				w.check = 20
				a.Announce()
				b.Announce()
				if !w.run(5*time.Second, func() bool { return a.PeerExt() && b.PeerExt() }) {
					continue // all announcements were lost
				}
				pa := &app{c: a, out: msgs(1, 3000, a.MaxPayload()-1, a.MaxPayload())}
				pb := &app{c: b, readSize: 2000}
				for i := range pa.out {
					pa.out[i] = append(pa.out[i], 1)[:a.MaxPayload()]
				}
				part := 0
				w.wake = w.now
				ok := w.run(60*time.Second, func() bool {
					if w.now >= w.wake {
						part += 10
						if w.wake = w.now + 20*ms; part >= len(pa.out) {
							w.wake = Never
						}
					}
					all := pa.out
					pa.out = all[:min(part, len(all))]
					pa.run(w.now)
					pa.out = all
					pb.run(w.now)
					return spec.Loss == 0 && len(pb.got) == len(all)
				})
				if spec.Loss == 0 && !ok || pa.err != nil {
					t.Fatalf("mtu %d, loss %v: %d delivered, %v: %+v", mtu, loss, len(pb.got), pa.err, a.Stats())
				}
				if s := sameSequence(pb.got, pa.out, spec.Loss == 0); s != "" {
					t.Fatal(s)
				}
				carries := a.size.carries
				if carries == 0 {
					carries = 1496
				}
				if carries > mtu || loss == 0 && carries < min(mtu, 1496)-sizeEnough {
					t.Errorf("mtu %d, loss %v: packets of %d bytes", mtu, loss, carries)
				}
			}
		}
	}
}

// On an ordinary path one probe is all it takes, and none where messages are
// small.
func TestPathSizeAtOnce(t *testing.T) {
	a, b, w := ourPair(t, qos.Data, 0)
	probes := 0
	w.tap = func(_ int, p []byte) {
		if len(p) == 1496 && p[0]&byte(Data) == 0 {
			probes++
		}
	}
	pa, pb := &app{c: a, out: msgs(1, 200, 100, 1100)}, &app{c: b, readSize: 2000}
	run := func(n int) {
		t.Helper()
		if !w.run(10*time.Second, func() bool { pa.run(w.now); pb.run(w.now); return len(pb.got) == n && a.TxLen() == 0 }) {
			t.Fatalf("%d delivered", len(pb.got))
		}
	}
	run(200)
	if probes != 0 {
		t.Errorf("%d probes for small messages", probes)
	}
	pa.out = append(pa.out, msgs(2, 200, 1480, 1484)...)
	run(400)
	if probes != 1 || a.fit() != a.MaxPayload() {
		t.Errorf("%d probes, packets for %d of %d bytes", probes, a.fit(), a.MaxPayload())
	}
	if a.Deadline() != Never || b.Deadline() != Never {
		t.Error("something is left to do")
	}
}

// A path that comes to carry less: what is written later arrives, in smaller
// packets, once what had the old size has got through or time is up.
func TestPathShrinks(t *testing.T) {
	a, b, w := ourPair(t, qos.Data, 0)
	w.check = 20
	pa, pb := &app{c: a, out: msgs(1, 200, 1480, 1484)}, &app{c: b, readSize: 2000}
	step := func() { pa.run(w.now); pb.run(w.now) }
	w.run(10*time.Second, func() bool { step(); return len(pb.got) == 200 })
	start := w.now
	w.links[0].cut = func(now int64) bool { return now-start < 3*second } // long enough to doubt
	pa.out = append(pa.out, msgs(2, 1, 100, 101)...)
	if !w.run(20*time.Second, func() bool { step(); return len(pb.got) == 201 }) || a.fit() >= a.MaxPayload() {
		t.Fatalf("%d delivered, packets for %d bytes", len(pb.got), a.fit())
	}
	w.links[0].mtu = 1300
	pa.out = append(pa.out, msgs(3, 100, 1480, 1484)...)
	if !w.run(20*time.Second, func() bool { step(); return len(pb.got) == 301 }) {
		t.Fatalf("%d delivered", len(pb.got))
	}
}
