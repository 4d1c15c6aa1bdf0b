package frcp

import (
	"fmt"
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
	t.Helper()
	cfg.QoS = qos.Data
	cfg.Rand = rands(1)
	a := newConn(t, cfg)
	cfg.Rand = rands(2)
	b := newConn(t, cfg)
	defer a.Release()
	defer b.Release()
	w := newNetwork(3, a, b, link{loss: loss, delay: delay})
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
	return float64(got) * 8e9 / float64(w.now-start)
}

// With losses our own ends are at least three times as fast as the algorithm of
// the specification. Time is virtual: this is no measurement of the machine.
func TestGoodputWithLosses(t *testing.T) {
	for _, loss := range []float64{0, 0.01, 0.05} {
		bytes := 32 << 20
		ours := goodput(t, Config{}, loss, 20*ms, bytes)
		spec := goodput(t, Config{Spec: true}, loss, 20*ms, bytes/8)
		t.Log(fmt.Sprintf("loss %.0f %%: ours %.1f Mbit/s, spec %.1f, ratio %.1f", 100*loss, ours/1e6, spec/1e6, ours/spec))
		if loss > 0 && ours < 3*spec {
			t.Errorf("loss %v: ours %.1f Mbit/s, spec %.1f", loss, ours/1e6, spec/1e6)
		}
	}
}
