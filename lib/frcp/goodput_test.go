package frcp

import (
	"io"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/qos"
)

// goodput sends bytes in messages of 1400 bytes over a path with the given loss
// and delay each way, in virtual time, and returns the rate in bit/s. Neither
// end takes any time for its work, so a path without losses is as fast as the
// windows are large.
func goodput(t *testing.T, cfg Config, loss float64, delay int64, bytes int) float64 {
	r, _ := goodputOn(t, cfg, link{loss: loss, delay: delay}, bytes)
	return r
}

func goodputOn(t *testing.T, cfg Config, l link, bytes int) (float64, Stats) {
	t.Helper()
	cfg.QoS = qos.Data
	cfg.Rand = rands(1)
	a := newConn(t, cfg)
	cfg.Rand = rands(2)
	b := newConn(t, cfg)
	defer a.Release()
	defer b.Release()
	w := newNetwork(3, a, b, l)
	start := w.now
	msg, buf := make([]byte, 1400), make([]byte, 2000)
	sent, got := 0, 0
	step := func() bool {
		for sent < bytes && a.Write(w.now, msg) == nil {
			sent += len(msg)
		}
		for {
			n, _, err := b.Read(buf)
			if err == ErrWouldBlock {
				break
			}
			if err != nil && err != io.EOF {
				t.Fatal(err)
			}
			got += n
		}
		if a.Err() != nil {
			t.Fatal(a.Err())
		}
		return got >= bytes
	}
	if !w.run(600*time.Second, step) {
		t.Fatalf("%d of %d bytes after 600 s: %+v", got, bytes, a.Stats())
	}
	return float64(got) * 8e9 / float64(w.now-start), a.Stats()
}

// With losses our own ends are at least three times as fast as the algorithm of
// the specification. Time is virtual: this is no measurement of the machine.
func TestGoodputWithLosses(t *testing.T) {
	for _, loss := range []float64{0, 0.01, 0.05} {
		bytes := 32 << 20
		ours := goodput(t, Config{}, loss, 20*ms, bytes)
		spec := goodput(t, Config{Spec: true}, loss, 20*ms, bytes/8)
		t.Logf("loss %.0f %%: ours %.1f Mbit/s, spec %.1f, ratio %.1f", 100*loss, ours/1e6, spec/1e6, ours/spec)
		if loss > 0 && ours < 3*spec {
			t.Errorf("loss %v: ours %.1f Mbit/s, spec %.1f", loss, ours/1e6, spec/1e6)
		}
	}
}

// The model finds out what a path carries and leaves its queue alone, with queues
// that are short or long, and random losses or none.
func TestGoodputOfABottleneck(t *testing.T) {
	for _, p := range []struct{ mbit, rtt int64 }{{5, 2 * ms}, {5, 200 * ms}, {100, 2 * ms}, {100, 40 * ms}, {1000, 2 * ms}} {
		rate := p.mbit * 1e6 / 8
		bdp := rate * p.rtt / second
		for _, queue := range []int64{bdp / 2, 2 * bdp} {
			queue = max(queue, 50*1500)
			for _, loss := range []float64{0, 0.01, 0.05} {
				l := link{loss: loss, delay: p.rtt / 2, rate: rate, queue: queue}
				r, s := goodputOn(t, Config{}, l, int(max(rate/4, 40*bdp)))
				share, again := r/float64(8*rate), float64(s.Resent)/float64(s.Sent)
				t.Logf("%4d Mbit/s, rtt %v, queue %4d kB, loss %.2f: %.0f %%, repeated %.1f %%", p.mbit, time.Duration(p.rtt), queue/1000, loss, 100*share, 100*again)
				if share < 0.7 || again > loss+0.12 {
					t.Errorf("too slow, or too much is repeated")
				}
			}
		}
	}
}
