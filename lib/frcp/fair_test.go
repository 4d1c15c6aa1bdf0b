package frcp

import (
	"container/heap"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/qos"
)

// shared is a path that several flows take: what they send waits in one queue.
type shared struct {
	now         int64
	delay, rate int64 // each way, ns; bytes/s
	queue, free int64
	ends        []*Conn // flow i from 2i to 2i+1
	q           inFlight
	n           int64
	got         []int
	msg         []byte
	buf         [9216]byte
}

func newShared(t *testing.T, flows int, rate, delay, queue int64) *shared {
	s := &shared{now: 1000 * second, delay: delay, rate: rate, queue: queue, got: make([]int, flows), msg: make([]byte, 1400)}
	for i := range 2 * flows {
		s.ends = append(s.ends, newConn(t, Config{QoS: qos.Data, Rand: rands(uint64(i))}))
	}
	return s
}

func (s *shared) send(from int, p []byte) {
	at := s.now + s.delay
	if from%2 == 0 {
		s.free = max(s.free, s.now)
		if (s.free-s.now)*s.rate/second > s.queue {
			return
		}
		s.free += int64(len(p)) * second / s.rate
		at = s.free + s.delay
	}
	s.n++
	heap.Push(&s.q, transit{at, s.n, from ^ 1, append([]byte(nil), p...)})
}

// run lets flow i send as much as it can from start[i] on.
func (s *shared) run(t *testing.T, until int64, start []int64) {
	msg, buf := s.msg, make([]byte, 9000)
	for s.now < until {
		next := until
		for i, c := range s.ends {
			if i%2 == 0 && s.now >= start[i/2] {
				for c.Write(s.now, msg) == nil {
				}
			} else if i%2 == 0 {
				next = min(next, start[i/2])
			}
			if i%2 == 1 {
				for c.Readable() {
					n, _, err := c.Read(buf)
					if err != nil {
						t.Fatal(err)
					}
					s.got[i/2] += n
				}
			}
			for n := c.Poll(s.now, s.buf[:]); n > 0; n = c.Poll(s.now, s.buf[:]) {
				s.send(i, s.buf[:n])
			}
			if i%2 == 0 && s.now >= start[i/2] && c.Writable() {
				next = s.now + 1
			}
			next = min(next, max(c.Deadline(), s.now+1))
		}
		if len(s.q) > 0 {
			next = min(next, s.q[0].at)
		}
		s.now = max(s.now, next)
		for len(s.q) > 0 && s.q[0].at <= s.now {
			x := heap.Pop(&s.q).(transit)
			s.ends[x.to].Input(s.now, x.p)
		}
	}
}

// Two flows share a bottleneck: the one that comes later gets its part, and
// neither takes the queue of the other for the length of the path.
func TestFairness(t *testing.T) {
	const rate, delay, fair = int64(100e6 / 8), 10 * ms, 50
	for _, queue := range []int64{3, 10} { // tenths of what the path holds
		s := newShared(t, 2, rate, delay, rate*2*delay/second*queue/10)
		start := []int64{s.now, s.now + 2*second}
		s.run(t, start[1]+20*second, start)
		clear(s.got)
		s.run(t, s.now+10*second, start)
		for i, got := range s.got {
			share, m := float64(got)/float64(rate)*100/10, s.ends[2*i].model
			t.Logf("queue %.1f, flow %d: %.0f %%, round trip of %v", float64(queue)/10, i, share, time.Duration(m.minRTT))
			if share < fair/3 || share > 100-fair/3 {
				t.Errorf("a part of %.1f %%", share)
			}
			if m.minRTT > 2*delay+delay/5 {
				t.Errorf("the path seems to take %v", time.Duration(m.minRTT))
			}
		}
		if all := s.got[0] + s.got[1]; int64(all) < 9*rate {
			t.Errorf("%d bytes in 10 s", all)
		}
	}
}

// A flow whose program is the limit keeps nothing back to see the round trip: it
// has no queue. One that sends as much as it can does.
func TestProbeOfTheRoundTrip(t *testing.T) {
	for _, limited := range []bool{false, true} {
		s := newShared(t, 1, 100e6/8, 10*ms, 250e3)
		m := func() *model { return s.ends[0].model }
		s.run(t, s.now+2*second, []int64{s.now})
		s.run(t, s.now+second, []int64{Never})
		probed := false
		for end := s.now + 15*second; s.now < end; {
			from := s.now
			if limited {
				from = Never
				for range 10 { // a fifth of what the path carries
					if err := s.ends[0].Write(s.now, make([]byte, 1400)); err != nil {
						t.Fatal(err)
					}
				}
			}
			if s.delay < 15*ms && s.now > end-13*second {
				s.delay = 15 * ms // the path has become longer
			}
			s.run(t, s.now+5*ms+1, []int64{from})
			probed = probed || m().phase == probeRTT && m().cwnd() < m().bdp(1000)
		}
		if probed == limited || m().minRTT < 30*ms {
			t.Errorf("limited %v: kept back %v, round trip of %v", limited, probed, time.Duration(m().minRTT))
		}
	}
}

// Flows that come one after the other share a bottleneck, however long its queue
// is, and none of them is shut out.
func TestFairnessOfFour(t *testing.T) {
	if raceEnabled {
		t.Skip("a minute of virtual time on one goroutine")
	}
	const flows, rate, delay, span = 4, int64(100e6 / 8), 10 * ms, 20
	for _, queue := range []int64{3, 10, 40} { // tenths of what the path holds
		s := newShared(t, flows, rate, delay, rate*2*delay/second*queue/10)
		start := make([]int64, flows)
		for i := range start {
			start[i] = s.now + int64(i)*1300*ms
		}
		s.run(t, s.now+20*second, start)
		clear(s.got)
		s.run(t, s.now+span*second, start)
		all, least := 0, s.got[0]
		for _, got := range s.got {
			all += got
			least = min(least, got)
		}
		t.Logf("queue %.1f: %v bytes", float64(queue)/10, s.got)
		if int64(all) < rate*span*9/10 || least < int(rate)*span/flows/3 {
			t.Errorf("queue %.1f: %d bytes, the least %d", float64(queue)/10, all, least)
		}
	}
}

// A probe of the round trip ends, also if the packets are so large that a few of
// them are more than it shall have on the way.
func TestProbeEnds(t *testing.T) {
	s := newShared(t, 1, 5e5, 10*ms, 200e3)
	for i := range s.ends {
		s.ends[i] = newConn(t, Config{QoS: qos.Data, Rand: rands(uint64(i)), MaxPacket: 9000})
	}
	s.msg = make([]byte, 8900)
	start := []int64{s.now}
	var since int64
	for end := s.now + 20*second; s.now < end; {
		s.run(t, s.now+50*ms, start)
		switch {
		case s.ends[0].model.phase != probeRTT:
			since = 0
		case since == 0:
			since = s.now
		case s.now-since > 3*second:
			t.Fatalf("a probe of %v, %d packets on the way", time.Duration(s.now-since), s.ends[0].flight.n)
		}
	}
}
