package keepalive

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestIdle is the sequence of spec 30 §10 for T = 2 s: empty packets at 0.5, 1.0
// and 1.5 s, none after the peer was declared down at 2 s.
func TestIdle(t *testing.T) {
	start := time.Unix(1000, 0)
	c := New(start, 2*time.Second)
	var sent []time.Duration
	for {
		now := c.Next()
		if now.IsZero() {
			break
		}
		send, down := c.Poll(now, 0, uint64(len(sent)))
		if send {
			sent = append(sent, now.Sub(start).Truncate(time.Millisecond))
		}
		if down {
			if d := now.Sub(start); d <= 2*time.Second || d > 2*time.Second+time.Millisecond {
				t.Errorf("down after %v, want 2s", d)
			}
		}
	}
	want := []time.Duration{500 * time.Millisecond, time.Second, 1500 * time.Millisecond}
	if len(sent) != len(want) {
		t.Fatalf("keep-alives at %v, want %v", sent, want)
	}
	for i := range want {
		if sent[i] != want[i] {
			t.Errorf("keep-alives at %v, want %v", sent, want)
		}
	}
	if send, down := c.Poll(start.Add(time.Hour), 5, 5); send || down || !c.Down() {
		t.Error("a flow whose peer timed out came back")
	}
}

func TestOff(t *testing.T) {
	c := New(time.Unix(0, 0), 0)
	if send, down := c.Poll(time.Unix(1e6, 0), 0, 0); send || down || !c.Next().IsZero() {
		t.Error("a flow without time-out sent a keep-alive or timed out")
	}
}

// TestActivity: whatever the traffic, polled at Next and at random times, a
// peer heard from within T is never down, and silence never lasts past T + T/4.
func TestActivity(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const T = 1000 * time.Millisecond
		start := time.Unix(0, 0)
		now, lastRx, lastTx := start, start, start
		var rx, tx uint64
		c := New(now, T)
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			step := time.Duration(rapid.Int64Range(1, int64(T/5)).Draw(t, "step"))
			now = now.Add(step)
			if rapid.Bool().Draw(t, "rx") {
				rx, lastRx = rx+1, now
			}
			if rapid.Bool().Draw(t, "tx") {
				tx, lastTx = tx+1, now
			}
			send, down := c.Poll(now, rx, tx)
			if down != (now.Sub(lastRx) > T) {
				t.Fatalf("down %v with %v of silence", down, now.Sub(lastRx))
			}
			if down {
				return
			}
			if send != (now.Sub(lastTx) > T/4) {
				t.Fatalf("send %v after %v without sending", send, now.Sub(lastTx))
			}
			if send {
				tx, lastTx = tx+1, now
			}
		}
	})
}
