package frcp

import (
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// One announcement is enough for both ends to know each other, also when the
// first ones are lost.
func TestAnnounceIsAnswered(t *testing.T) {
	for lost := range announces {
		a := newConn(t, Config{QoS: qos.Data, Rand: rands(1)})
		b := newConn(t, Config{QoS: qos.Data, Rand: rands(2)})
		w := newNetwork(1, a, b, link{delay: 10 * ms})
		w.check = 1
		n := 0
		w.links[0].cut = func(int64) bool { n++; return n <= lost }
		a.Announce()
		w.run(5*time.Second, func() bool { return a.PeerExt() && b.PeerExt() })
		if !a.PeerExt() || !b.PeerExt() || !a.Heard() {
			t.Fatalf("%d lost: %v %v", lost, a.PeerExt(), b.PeerExt())
		}
		w.run(time.Minute, func() bool { return false })
		if s, r := a.Stats().Control, b.Stats().Control; s > uint64(lost)+2 || r > 2 {
			t.Fatalf("%d lost: %d and %d control packets", lost, s, r)
		}
		if a.Deadline() != Never || b.Deadline() != Never {
			t.Fatal("something is left to do")
		}
	}
}

// Nobody answers: the announcements end.
func TestAnnounceEnds(t *testing.T) {
	a := newConn(t, Config{QoS: qos.Data, Rand: rands(1)})
	now, n := second, 0
	a.Announce()
	buf := make([]byte, 1500)
	for a.Deadline() != Never {
		now = max(now, a.Deadline())
		for a.Poll(now, buf) > 0 {
			n++
		}
		if err := a.invariant(now); err != nil {
			t.Fatal(err)
		}
	}
	if n != announces || now > 10*second {
		t.Fatalf("%d announcements until %v", n, time.Duration(now))
	}
}

// closing lets both ends write, then close at once (or the first only end its
// direction before), over a network that loses what lose says; each end leaves
// when it is done, and is not there any more. It returns how long the later one
// took.
func closing(t *testing.T, half bool, lose func(from int, p []byte, over bool) bool) (took time.Duration, q [2]time.Duration, err [2]error) {
	t.Helper()
	a, b, w := ourPair(t, qos.Data, 0)
	ends := [2]*Conn{a, b}
	w.check = 1
	for i := range 2 {
		w.links[i] = link{delay: 20 * ms}
	}
	pa, pb := &app{c: a, out: msgs(1, 50, 8, 100), closeEnd: half}, &app{c: b, out: msgs(2, 50, 8, 100), readSize: 200}
	pa.readSize = 200
	if !w.run(10*time.Second, func() bool {
		pa.run(w.now)
		pb.run(w.now)
		return len(pa.got) == 50 && len(pb.got) == 50 && (!half || pb.eof) && a.TxLen() == 0 && b.TxLen() == 0
	}) {
		t.Fatal("not transferred")
	}
	var left [2]bool
	var last []byte
	w.tap = func(from int, p []byte) { last = p }
	for i := range 2 {
		w.links[i].cut = func(int64) bool { return left[1-i] || lose(i, last, ends[i].over()) }
	}
	start := w.now
	if half {
		b.Close(w.now)
		w.run(10*time.Second, func() bool { pa.run(w.now); return pa.eof })
	} else {
		b.Close(w.now)
	}
	a.Close(w.now)
	var done [2]int64
	w.run(200*time.Second, func() bool {
		w.wake = w.now + ms
		for i, c := range ends {
			if !left[i] && c.Done() {
				left[i], done[i] = true, w.now
				q[i], err[i] = c.Quarantine(w.now), c.Err()
				w.ends[i] = newConn(t, Config{QoS: qos.Data}) // deaf
			}
		}
		return left[0] && left[1]
	})
	if !left[0] || !left[1] {
		t.Fatal("closing hangs")
	}
	a.Release()
	b.Release()
	return time.Duration(max(done[0], done[1]) - start), q, err
}

func TestClose(t *testing.T) {
	never := func(int, []byte, bool) bool { return false }
	for _, half := range []bool{false, true} {
		took, q, err := closing(t, half, never)
		if took > 100*time.Millisecond || err[0] != nil || err[1] != nil {
			t.Errorf("half %v: took %v, errors %v", half, took, err)
		}
		for _, d := range q {
			if d > 2*defaultMPL+time.Duration(lastWords) {
				t.Errorf("half %v: endpoints kept for %v", half, q)
			}
		}
		// The first farewells are lost.
		n := 0
		took, _, err = closing(t, half, func(_ int, _ []byte, over bool) bool { n++; return over && n%farewells != 0 })
		if took > 300*time.Millisecond || err[0] != nil || err[1] != nil {
			t.Errorf("half %v, farewells lost: took %v, errors %v", half, took, err)
		}
		if half {
			continue
		}
		// All of them are lost: the end that waits for them gives up soon.
		took, _, err = closing(t, half, func(_ int, _ []byte, over bool) bool { return over })
		if took > time.Duration(lastWords)+time.Second || err[0] != nil || err[1] != nil {
			t.Errorf("half %v, all farewells lost: took %v, errors %v", half, took, err)
		}
	}
}

// An end of a flow that only half-closed is told of the other's end of stream however
// long the path was dead.
func TestEndOfStreamSurvivesAnOutage(t *testing.T) {
	a, b, w := ourPair(t, qos.Data, 0)
	w.check = 1
	a.CloseWrite(w.now)
	w.run(time.Second, func() bool { return a.TxLen() == 0 })
	start := w.now
	cut := func(now int64) bool { return now-start < 60*second }
	w.links[0].cut, w.links[1].cut = cut, cut
	b.Close(w.now)
	pa := &app{c: a, readSize: 10}
	w.run(90*time.Second, func() bool { pa.run(w.now); return pa.eof && b.Done() })
	if !pa.eof || !b.Done() || b.Err() != nil {
		t.Fatalf("eof %v, done %v, %v", pa.eof, b.Done(), b.Err())
	}
}

// The endpoint is kept as delta-t has it when the end is not clean.
func TestQuarantine(t *testing.T) {
	a, _, w := ourPair(t, qos.Data, 0)
	a.Abort(o7serr.EFLOWDOWN)
	if q := a.Quarantine(w.now); q < 129*time.Second {
		t.Fatal(q)
	}
}

// A flow that is closed as soon as one message is written, on a path that loses
// nothing and on which packets overtake each other: the message arrives, before
// the end, whatever else of the flow came first.
func TestShortFlow(t *testing.T) {
	for _, spec := range []qos.Spec{qos.Data, qos.Voice} {
		for n := range 2 {
			for seed := range uint64(300) {
				a := newConn(t, Config{QoS: spec, Rand: rands(seed)})
				b := newConn(t, Config{QoS: spec, Rand: rands(seed + 1)})
				w := newNetwork(seed, a, b, link{delay: ms, jitter: 5 * ms})
				w.check = 1
				a.Announce()
				b.Announce()
				if seed%2 == 0 {
					w.run(time.Second, a.PeerExt)
				}
				all, p := msgs(seed, n, 8, 100), &app{c: b, readSize: 200}
				for _, m := range all {
					if err := a.Write(w.now, m); err != nil {
						t.Fatal(err)
					}
				}
				a.Close(w.now)
				start := w.now
				ok := w.run(10*time.Second, func() bool {
					if p.run(w.now); p.eof {
						b.Close(w.now)
					}
					return p.eof && a.Done() && b.Done()
				})
				if s := sameSequence(p.got, all, true); !ok || len(p.got) != n || s != "" || a.Err() != nil || b.Err() != nil {
					t.Fatalf("%v, seed %d: closed %v, %d of %d messages, %v, %v %s", ModeOf(spec), seed, ok, len(p.got), n, a.Err(), b.Err(), s)
				}
				if d := w.now - start; d > 2*endPatience {
					t.Fatalf("%v, seed %d: took %v", ModeOf(spec), seed, time.Duration(d))
				}
			}
		}
	}
}

// The end of stream of an ordered flow does not wait for what was lost for long,
// nor for anything if the flow ends.
func TestEndAfterLoss(t *testing.T) {
	for _, gone := range []bool{false, true} {
		a, b, w := ourPair(t, qos.Voice, 0)
		for i := range 3 {
			w.links[0].cut = func(int64) bool { return i == 2 }
			if err := a.Write(w.now, []byte{byte(i)}); err != nil {
				t.Fatal(err)
			}
			w.run(5*time.Millisecond, func() bool { return false })
		}
		w.links[0].cut = nil
		a.CloseWrite(w.now)
		w.run(5*time.Millisecond, func() bool { return false })
		p, start := &app{c: b, readSize: 10}, w.now
		if p.run(w.now); len(p.got) != 2 || p.eof {
			t.Fatalf("%d messages, end %v", len(p.got), p.eof)
		}
		if gone {
			b.Abort(o7serr.EFLOWDOWN)
		}
		w.run(time.Second, func() bool { p.run(w.now); return p.eof })
		if d := w.now - start; !p.eof || d > endPatience || gone && d > ms || b.Stats().Gaps != 1 {
			t.Errorf("gone %v: end %v after %v, %+v", gone, p.eof, time.Duration(d), b.Stats())
		}
	}
}

// A half-closed flow without retransmission: the end of the stream goes again
// until the peer has it, and no longer; nor does it need room there.
func TestEndOfStreamIsRepeated(t *testing.T) {
	a, b, w := ourPair(t, qos.Video, 0)
	w.check = 1
	start := w.now
	w.links[0].cut = func(now int64) bool { return now-start < 5*second }
	w.links[1].cut = w.links[0].cut
	sent := [2]int{}
	w.tap = func(from int, _ []byte) { sent[from]++ }
	a.CloseWrite(w.now)
	p := &app{c: b, readSize: 10}
	if w.run(20*time.Second, func() bool { p.run(w.now); return p.eof }); !p.eof {
		t.Fatal("no end of stream")
	}
	w.run(time.Second, func() bool { return false })
	if a.Deadline() != Never || b.Deadline() != Never || sent[0] > 10 || sent[1] > 2 {
		t.Errorf("%d packets sent, or something is left to do", sent)
	}

	// Without losses it goes no more often than it did.
	a, b, w = ourPair(t, qos.Video, 0)
	sent = [2]int{}
	w.tap = func(from int, _ []byte) { sent[from]++ }
	a.CloseWrite(w.now)
	w.run(time.Minute, func() bool { return false })
	if !b.eos || sent[0] > eosCopies+1 || sent[1] > eosCopies { // and one control packet
		t.Errorf("end %v, %d packets sent", b.eos, sent)
	}

	// Nobody is there any more.
	a, _, w = ourPair(t, qos.Video, 0)
	w.ends[1] = newConn(t, Config{QoS: qos.Data, Plain: true})
	a.CloseWrite(w.now)
	if w.run(5*time.Minute, func() bool { return a.Deadline() == Never }); a.Deadline() != Never {
		t.Error("it goes for ever")
	}
}

// The end of a stream is taken when the queue of the reader is full, too.
func TestEndOfStreamNeedsNoRoom(t *testing.T) {
	a, b, w := ourPair(t, qos.Video, 0)
	for b.readyPkts < 2*b.grant() {
		w.run(100*time.Millisecond, func() bool {
			for a.Write(w.now, []byte("message")) == nil {
			}
			return false
		})
	}
	for w.run(time.Second, func() bool { return a.Writable() }); a.nxt != a.seqno; {
		w.run(time.Second, func() bool { return a.nxt == a.seqno })
	}
	a.CloseWrite(w.now)
	w.run(time.Second, func() bool { return a.eosSent && b.eos })
	if !b.eos {
		t.Fatalf("sent %v, %+v", a.eosSent, b.Stats())
	}
}
