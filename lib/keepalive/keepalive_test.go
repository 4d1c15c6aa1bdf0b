package keepalive

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// The reference with T = 2000 ms: empty frames at 0.5, 1.0 and 1.5 s, the peer
// down at 2 s, none afterwards (spec 30 §10).
func TestIdle(t *testing.T) {
	s := New(2*time.Second, 0)
	var sent []int64
	down := int64(0)
	for s.Next() < Never && down == 0 {
		now := s.Next()
		switch s.Advance(now, false, false) {
		case Send:
			sent = append(sent, now/1e6)
		case Down:
			down = now / 1e6
		}
	}
	if len(sent) != 3 || sent[0] != 500 || sent[1] != 1000 || sent[2] != 1500 || down != 2000 {
		t.Errorf("keep-alives at %v ms, down at %d ms", sent, down)
	}
	if s.Next() != Never || s.Advance(1e12, false, false) != None {
		t.Error("something is done after the peer is down")
	}
}

func TestNoTimeout(t *testing.T) {
	var s State
	if s.Next() != Never || s.Advance(1e15, false, false) != None {
		t.Error("a flow without time-out does something")
	}
}

// Against an oracle that reads the clock at each packet: never down while the
// peer was heard within T, down at most a grain after T, and never silent for
// longer than T/4 and a grain.
func TestProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		T := rapid.Int64Range(50, 200000).Draw(t, "T ms") * 1e6
		grain := max(T/Grain, int64(MinTick))
		s := New(time.Duration(T), 0)
		var now, lastRx, lastTx int64
		var rx, tx bool
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			next := s.Next()
			if next < now || next > now+grain {
				t.Fatalf("at %d the next look is at %d", now, next)
			}
			// A packet at some time before the next look, or none.
			if at := now + rapid.Int64Range(0, 3*grain).Draw(t, "packet after"); at < next {
				now = at
				if rapid.Bool().Draw(t, "received") {
					lastRx, rx = now, true
				} else {
					lastTx, tx = now, true
				}
				if rapid.Bool().Draw(t, "looks at once") {
					next = now
				}
			}
			now = next
			switch s.Advance(now, rx, tx) {
			case Down:
				if now-lastRx < T {
					t.Fatalf("down %d after the last packet, T is %d", now-lastRx, T)
				}
				return
			case Send:
				lastTx = now
			}
			rx, tx = false, false
			if now-lastRx > T+grain {
				t.Fatalf("not down %d after the last packet, T is %d", now-lastRx, T)
			}
			if now-lastTx > T/4+grain {
				t.Fatalf("silent for %d, T is %d", now-lastTx, T)
			}
		}
	})
}
