package frcp

import "time"

// model estimates what a path carries, from the acknowledgements of a reliable
// flow between our own ends: the largest rate of delivery of the last rounds
// and the smallest round-trip time (as BBR does, draft-cardwell-iccrg-bbr-
// congestion-control; samples of the rate as in draft-cheng-iccrg-delivery-
// rate-estimation). Losses at random do not lower it, losses of a large part
// of what is sent do.
//
// The specification has no congestion control: a sender may have 256 packets on
// the way, whatever the path. So may ours until it knows better; then it has as
// many as the path holds, and paces them.
type model struct {
	delivered   uint64 // bytes that the peer has
	deliveredAt int64
	firstSent   int64  // of the packet that was delivered last
	appLimited  uint64 // samples up to this many delivered bytes show the program's rate, not the path's; 0: none

	rates    [rateRounds]uint64 // largest sample of each of the last rounds, bytes/s
	round    uint32
	roundEnd uint64 // delivered bytes that end the round

	minRTT   int64 // ns; 0: none
	minRTTAt int64
	nextRTT  int64 // the smallest of the window after that, or of this probe
	emptyAt  int64 // probeRTT: ends then; 0: too much is still on the way
	drained  int64 // probeRTT: what was too much has left by then, however few large packets still are
	proven   bool  // it was probed
	rested   bool  // probeRTT: there is no queue of ours, nothing has to be kept back

	seed    uint32 // of where cruise begins
	phase   phase
	full    uint64 // rate that startup reached
	stuck   int    // rounds without much more than that
	cycle   int
	cycleAt int64

	roundLost, roundGot uint64 // bytes
	roundRTT            int64  // smallest of the round, ns; 0: none
	tight               int    // rounds for which the queue of the path is kept short

	paceAt int64 // when everything that was sent has left at the paced rate
}

type phase uint8

const (
	startup  phase = iota // the rate doubles each round until it does not help
	drain                 // what startup queued leaves the path
	cruise                // now and then a little more, to find out
	probeRTT              // too little for a queue, to see the round trip without one
)

const (
	rateRounds  = 10
	startupGain = 2885 // thousandths: 2/ln 2, the smallest that doubles the rate each round
	cwndGain    = 2000 // two round trips' worth: acknowledgements are late and come in bunches
	minRTTKeep  = int64(5 * time.Second)
	// minRTTSoon is the same when it was not probed and packets are lost.
	minRTTSoon = int64(time.Second)

	// When the smallest round-trip time is that old, only this share of what the
	// path holds is on the way for a while, in thousandths (as BBR does: half of
	// it, for 200 ms). The queue is gone then, most of all if it belongs to flows
	// that take each other's for the path's length: they see the smaller time at
	// once, and look again at once.
	probeGain    = 500
	probePackets = 4
	probeTime    = int64(200 * time.Millisecond)

	// Below this round-trip time nothing is paced: the window is a burst of
	// well below a millisecond, and timers are no better than that.
	paceRTT = int64(time.Millisecond)
	// paceBurst is how much of its rate a sender may send at once: timers of a
	// process are that coarse.
	paceBurst = int64(2 * time.Millisecond)
	// minBurst is the same in bytes, for slow paths.
	minBurst = 16 * 1500
	// leastPackets keeps acknowledgements coming on slow paths.
	leastPackets = 32
	// heavyLoss is the share of a round's bytes, in percent, whose loss means
	// that more is sent than the path carries.
	heavyLoss = 25
	// someLoss is the same for losses with a queue: then no more is on the way
	// than the path holds, for some rounds.
	someLoss    = 2
	tightRounds = 16
	tightGain   = 1100
)

// gains of cruise, in thousandths, a round-trip time each.
var gains = [...]int64{1250, 750, 1000, 1000, 1000, 1000, 1000, 1000}

// sent notes a transmission of n bytes; idle: nothing was on the way.
func (m *model) sent(now int64, s *slot, idle bool) {
	if idle {
		m.firstSent, m.deliveredAt = now, now
		if m.phase == cruise && m.minRTT >= paceRTT && now-m.minRTTAt > minRTTKeep {
			m.probe(now, true)
			m.emptyAt = now + max(probeTime, m.minRTT)
		}
	}
	s.firstSent, s.delivered, s.deliveredAt, s.limited = m.firstSent, m.delivered, m.deliveredAt, m.appLimited != 0
	if r := m.pacing(); r > 0 {
		m.paceAt = max(m.paceAt, now-m.burst(r)) + int64(uint64(s.size)*uint64(time.Second)/r)
	}
}

// sample is what one acknowledgement tells.
type sample struct {
	any       bool
	prior     uint64 // delivered when the newest packet was sent
	priorAt   int64
	sendSpan  int64
	limited   bool
	rtt       int64 // of the newest packet that was sent once; 0: none
	rttOf     int64
	newlySent int64
}

// got notes that the packet in s was delivered.
func (m *model) got(now int64, s *slot, x *sample) {
	m.delivered += uint64(s.size)
	m.roundGot += uint64(s.size)
	m.deliveredAt = now
	if !x.any || s.delivered > x.prior || s.sent > x.newlySent {
		*x = sample{
			any: true, prior: s.delivered, priorAt: s.deliveredAt, sendSpan: s.sent - s.firstSent, limited: s.limited,
			rtt: x.rtt, rttOf: x.rttOf, newlySent: s.sent,
		}
		m.firstSent = s.sent
	}
	if !s.again && s.sent >= x.rttOf {
		x.rtt, x.rttOf = max(now-s.sent, 1), s.sent
	}
}

// update takes the sample in; inFlight is what is on the way after it, bytes.
func (m *model) update(now int64, x sample, inFlight uint64) {
	if x.rtt > 0 {
		m.takeRTT(now, x.rtt)
		if m.roundRTT == 0 || x.rtt < m.roundRTT {
			m.roundRTT = x.rtt
		}
	}
	if !x.any || m.minRTT == 0 {
		return
	}
	if m.appLimited != 0 && m.delivered > m.appLimited {
		m.appLimited = 0
	}
	begins := x.prior >= m.roundEnd
	if begins {
		m.roundEnd = m.delivered
		// A round of which nothing was learnt does not push out what is known.
		if m.rates[m.round%rateRounds] != 0 {
			m.round++
			m.rates[m.round%rateRounds] = 0
		}
		if lost := m.roundLost; lost*100 > (lost+m.roundGot)*heavyLoss && lost > 8*1500 {
			for i := range m.rates {
				m.rates[i] = m.rates[i] * 7 / 10
			}
			if m.phase == startup {
				m.phase, m.full = drain, m.rate()
			}
		}
		if m.tight > 0 {
			m.tight--
		}
		// Losses while each packet of the round had to queue are for want of
		// room, not by chance.
		if lost := m.roundLost; lost*100 > (lost+m.roundGot)*someLoss && lost > 8*1500 &&
			m.minRTT >= paceRTT && m.roundRTT > m.minRTT+m.minRTT/4 {
			m.tight = tightRounds
			if m.phase == startup {
				m.phase, m.full = drain, m.rate()
			}
		}
		// Who came when others had filled the queue takes that for the path, and
		// fills it for good.
		if lost := m.roundLost; lost*100 > (lost+m.roundGot)*someLoss && lost > 8*1500 &&
			!m.proven && m.phase == cruise && m.minRTT >= paceRTT && now-m.minRTTAt > minRTTSoon {
			m.probe(now+2*max(x.rtt, m.minRTT), m.appLimited != 0)
		}
		m.roundLost, m.roundGot, m.roundRTT = 0, 0, 0
	}
	if span := max(x.sendSpan, now-x.priorAt); span >= m.minRTT && span > 0 {
		r := uint64(float64(m.delivered-x.prior) * 1e9 / float64(span))
		if cur := &m.rates[m.round%rateRounds]; r > *cur && (!x.limited || r >= m.rate()) {
			*cur = r
		}
	}
	if r := m.pacing(); r > 0 {
		// What was sent at a lower rate than that is not held against it.
		m.paceAt = min(m.paceAt, now+m.burst(r))
	}
	switch m.phase {
	case startup:
		if begins && !x.limited {
			if r := m.rate(); r >= m.full+m.full/4 {
				m.full, m.stuck = r, 0
			} else if m.stuck++; m.stuck >= 3 {
				m.phase = drain
			}
		}
	case drain:
		if inFlight <= m.bdp(1000) {
			m.cruise(now)
		}
	case cruise:
		if now-m.cycleAt >= m.minRTT {
			m.cycle, m.cycleAt = (m.cycle+1)%len(gains), now
		}
	case probeRTT:
		m.probed(now, inFlight)
	}
}

// cruise begins somewhere in the cycle, though not with its second phase, that
// makes up for the first: flows that share a path are not to do the same at once.
func (m *model) cruise(now int64) {
	m.seed = m.seed*1664525 + 1013904223
	m.phase, m.cycle, m.cycleAt = cruise, (2+int(m.seed>>16)%(len(gains)-1))%len(gains), now
}

func (m *model) takeRTT(now, rtt int64) {
	switch {
	case m.minRTT == 0 || rtt <= m.minRTT:
		m.minRTT, m.minRTTAt, m.nextRTT = rtt, now, rtt
	case m.phase == probeRTT:
		m.nextRTT = min(m.nextRTT, rtt)
	case m.phase == cruise && m.minRTT >= paceRTT:
		if now-m.minRTTAt > minRTTKeep {
			m.probe(now+2*rtt, m.appLimited != 0)
		}
	case now-m.minRTTAt > minRTTKeep:
		m.minRTT, m.minRTTAt, m.nextRTT = max(m.nextRTT, 1), now, rtt
	case now-m.minRTTAt > minRTTKeep/2:
		m.nextRTT = min(m.nextRTT, rtt)
	default:
		m.nextRTT = rtt
	}
}

// probe begins to look for the smallest round-trip time anew. By drained what is
// on the way now has left.
func (m *model) probe(drained int64, rested bool) {
	m.drained = drained
	m.phase, m.rested, m.emptyAt, m.nextRTT = probeRTT, rested, 0, Never
}

// probed goes on with that.
func (m *model) probed(now int64, inFlight uint64) {
	if !m.rested {
		m.idle(inFlight) // what is measured now is not what the path carries
	}
	switch {
	case m.emptyAt == 0 && (m.rested || now >= m.drained || inFlight <= m.bdp(probeGain)):
		m.emptyAt, m.nextRTT = now+max(probeTime, m.minRTT), Never
	case m.emptyAt == 0 || now < m.emptyAt || m.nextRTT == Never:
	default:
		m.minRTT, m.minRTTAt, m.proven = m.nextRTT, now, true
		m.cruise(now)
	}
}

// rate is the estimate in bytes/s, 0: none.
func (m *model) rate() (r uint64) {
	for _, v := range m.rates {
		r = max(r, v)
	}
	return r
}

// bdp is what the path holds, times gain thousandths, in bytes.
func (m *model) bdp(gain int64) uint64 {
	return uint64(float64(m.rate()) * float64(m.minRTT) * float64(gain) / 1e12)
}

// cwnd is how many bytes may be on the way.
func (m *model) cwnd() uint64 {
	switch {
	case m.phase == startup:
		return m.bdp(startupGain)
	case m.phase == probeRTT && !m.rested:
		return m.bdp(probeGain)
	case m.tight > 0:
		return m.bdp(tightGain)
	}
	return m.bdp(cwndGain)
}

// least is how many packets may be on the way whatever the model says: as many
// as the specification has while nothing is known, and where a round trip is
// shorter than what schedulers do to it.
func (m *model) least() int {
	switch {
	case m.phase == startup && m.full == 0 || m.minRTT < paceRTT:
		return refWindow
	case m.phase == probeRTT && !m.rested:
		return probePackets
	}
	return leastPackets
}

// pacing is the rate to send at in bytes/s; 0: at once.
func (m *model) pacing() uint64 {
	r := m.rate()
	if r == 0 || m.minRTT < paceRTT {
		return 0
	}
	gain, least := gains[m.cycle], uint64(minBurst)
	switch m.phase {
	case startup:
		// The first samples are of a few packets.
		gain, least = startupGain, startWindow*1500
	case drain:
		gain = 1000000 / startupGain
	case probeRTT:
		gain = 1000
	}
	return max(r*uint64(gain)/1000, least*uint64(time.Second)/uint64(m.minRTT))
}

// burst is the time that minBurst or paceBurst takes at rate r.
func (m *model) burst(r uint64) int64 {
	return max(paceBurst, int64(minBurst*uint64(time.Second)/r))
}

// next is when the pacer lets something go.
func (m *model) next() int64 {
	r := m.pacing()
	if r == 0 {
		return 0
	}
	return m.paceAt - m.burst(r)
}

// idle notes that the program, not the path, limits what is sent.
func (m *model) idle(inFlight uint64) { m.appLimited = max(m.delivered+inFlight, 1) }
