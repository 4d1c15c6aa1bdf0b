package frcp

// Loss detection between our own ends. The receiver says what it has beyond its
// acknowledgement (tlvSack); a packet is lost when one that was sent after it
// has arrived and the time for reordering is over (RACK, RFC 8985). So all holes
// of a window are filled within one round trip, repetitions that are lost
// included. When nothing is heard at all, the last packet goes again as a probe
// before the retransmission time is up, because its acknowledgement tells what
// else is missing.

// fate is where a packet of the sender is, as far as is known.
type fate uint8

const (
	unknown fate = iota // not sent yet, or nobody keeps account
	onWay               // in Conn.flight
	missing             // to be sent again, in Conn.lost
	arrived             // at the peer, behind a hole; in Conn.sacked
)

// chain is a list of packets of the sender, linked by their numbers.
type chain struct {
	head, tail uint32
	n          int
}

func (c *Conn) push(l *chain, n uint32, s *slot) {
	if l.n == 0 {
		l.head = n
	} else {
		s.prev = l.tail
		c.out.at(l.tail).next = n
	}
	l.tail = n
	l.n++
}

func (c *Conn) unlink(l *chain, n uint32, s *slot) {
	if n == l.head {
		l.head = s.next
	} else {
		c.out.at(s.prev).next = s.next
	}
	if n == l.tail {
		l.tail = s.prev
	} else {
		c.out.at(s.next).prev = s.prev
	}
	l.n--
}

// move gives the packet with number n another fate. Both lists are in the order
// in which packets came into them: that of flight is the order of sending.
func (c *Conn) move(n uint32, s *slot, to fate) {
	switch s.fate {
	case onWay:
		c.unlink(&c.flight, n, s)
		c.inFlight -= uint64(s.size)
	case missing:
		c.unlink(&c.lost, n, s)
	case arrived:
		c.sackedN--
	}
	s.fate = to
	switch to {
	case onWay:
		c.push(&c.flight, n, s)
		c.inFlight += uint64(s.size)
	case missing:
		c.push(&c.lost, n, s)
	case arrived:
		c.sackedN++
	}
}

// ackExt takes an acknowledgement of everything before a, and what a control
// packet has to say besides.
func (c *Conn) ackExt(now int64, a uint32, more []byte) {
	var x sample
	c.known = true
	for n := c.lwe; n != a; n++ {
		s := c.out.at(n)
		c.gotSlot(now, n, s, &x)
		c.move(n, s, unknown)
		c.free(n)
	}
	if a != c.lwe {
		c.lwe = a
		c.sacked.trim(a)
		c.conf = true
		if c.recovering && !before(a, c.recover) {
			c.recovering = false
			c.calm()
		}
	}
	for typ, v, rest, ok := nextTLV(more); ok; typ, v, rest, ok = nextTLV(rest) {
		switch typ {
		case tlvSack:
			for ; len(v) >= 8; v = v[8:] {
				from, to := be32(v), be32(v[4:])
				if to-c.lwe > c.nxt-c.lwe || from-c.lwe >= to-c.lwe {
					continue // made up
				}
				c.sackSpan(now, from, to, &x)
			}
		case tlvTwice:
			if len(v) == 4 {
				c.cameTwice(be32(v))
			}
		}
	}
	if !x.any {
		return
	}
	c.ackTime, c.backoff, c.probing = now, 0, false
	c.mtu.alive()
	if x.rtt > 0 {
		c.rackRTT = x.rtt
		c.sampleRTT(x.rtt)
	}
	c.model.update(now, x, c.inFlight)
	c.detect(now)
}

// sackSpan notes that the peer has [from, to), which are on their way.
func (c *Conn) sackSpan(now int64, from, to uint32, x *sample) {
	fresh := false
	for n, i := from, c.sacked.find(from); before(n, to); i++ {
		// What is known is passed over: each span is told many times.
		end := to
		if i < len(c.sacked.s) && before(c.sacked.s[i].from, to) {
			end = c.sacked.s[i].from
		}
		for ; before(n, end); n++ {
			s := c.out.at(n)
			c.gotSlot(now, n, s, x)
			c.move(n, s, arrived)
			if s.buf != nil {
				s.buf.Release()
				s.buf = nil
			}
			fresh = true
		}
		if end == to {
			break
		}
		n = c.sacked.s[i].to
	}
	if fresh {
		c.sacked.add(from, to)
	}
}

// gotSlot takes in that the packet with number n was delivered, unless that is
// known.
func (c *Conn) gotSlot(now int64, n uint32, s *slot, x *sample) {
	if s.fate == arrived {
		return
	}
	c.model.got(now, s, x)
	// The acknowledgement of a packet that was repeated a moment ago, or is
	// about to be, is for what was sent before. The smallest round trip of a
	// path with a queue is not as small as that of a single packet.
	early := s.again && (c.model.minRTT == 0 || now-s.sent < c.model.minRTT*3/4)
	if early || s.fate == missing {
		c.model.roundLost -= min(c.model.roundLost, uint64(s.size))
		if c.backoff == 0 && n != c.probe && c.model.minRTT > 0 {
			c.reordered = true
			c.patient(n)
		}
	}
	if early {
		return
	}
	c.gotLarge(s)
	if before(n, c.high) {
		c.reordered = c.reordered || !s.again
	} else {
		c.high = n + 1
	}
	if s.sent > c.rackSent || s.sent == c.rackSent && before(c.rackSeq, n) {
		c.rackSent, c.rackSeq = s.sent, n
	}
}

// The time that packets may overtake each other grows while packets turn out
// to be repeated that were not lost, once per round trip, and shrinks again
// after as many recoveries as in RFC 8985 §6.2.
const (
	maxPatience  = 16
	keepPatience = 16
)

func (c *Conn) patient(n uint32) {
	if c.patience > 1 && before(n, c.patientAt) {
		return
	}
	c.patience, c.patientAt, c.patientFor = min(c.patience+1, maxPatience), c.nxt, keepPatience
}

// calm notes that a recovery is over.
func (c *Conn) calm() {
	if c.patientFor > 0 {
		if c.patientFor--; c.patientFor == 0 {
			c.patience = 1
		}
	}
}

// cameTwice notes that the peer got the packet with number n more than once.
func (c *Conn) cameTwice(n uint32) {
	if c.reordered && n != c.probe && c.nxt-n <= uint32(len(c.out.s)) {
		c.patient(n)
	}
}

// reorder is for how long packets may overtake each other. Without a sign of
// that three packets behind a hole are proof (RFC 8985 §6.2).
func (c *Conn) reorder() int64 {
	if !c.reordered && (c.recovering || c.sackedN >= dupThreshold) {
		return 0
	}
	return min(int64(c.patience)*c.model.minRTT/4, c.srtt)
}

// detect marks what is lost.
func (c *Conn) detect(now int64) {
	c.rackAt = Never
	if c.rackSent == 0 {
		return
	}
	wait := c.rackRTT + c.reorder()
	for c.flight.n > 0 {
		n := c.flight.head
		s := c.out.at(n)
		if s.sent > c.rackSent || s.sent == c.rackSent && !before(n, c.rackSeq) {
			return
		}
		if now < s.sent+wait {
			c.rackAt = s.sent + wait
			return
		}
		c.lose(n, s)
		if !c.recovering {
			c.recovering, c.recover = true, c.nxt
			c.stats.FastRetransmits++
		}
	}
}

// lose marks the packet with number n as lost: it is sent again.
func (c *Conn) lose(n uint32, s *slot) {
	c.move(n, s, missing)
	c.model.roundLost += uint64(s.size)
}

// loseAll marks everything on the way as lost, lowest first: time is up.
func (c *Conn) loseAll() {
	for n := c.lwe; n != c.nxt; n++ {
		switch s := c.out.at(n); s.fate {
		case onWay:
			c.lose(n, s)
		case missing:
			// Behind those that were lost now and come before it: few are sent
			// at a time, and the first is what the peer waits for.
			c.move(n, s, missing)
		}
	}
}

// paced reports whether the model governs what is sent.
func (c *Conn) paced() bool { return c.model != nil }

// room reports whether one more packet may be on the way.
func (c *Conn) room() bool {
	if c.backoff > 0 && c.flight.n >= max(sweepMax>>c.backoff, 1) {
		return false // the path may be cut
	}
	return c.flight.n < c.model.least() || c.inFlight < c.model.cwnd()
}

// probeAt is when the last packet goes again because nothing is heard: after
// the time that an acknowledgement takes with its delay, or when the
// retransmission time of the first is up. That starts anew then.
func (c *Conn) probeAt() int64 {
	if c.probing || c.lost.n > 0 || c.flight.n == 0 || c.srtt == 0 || c.backoff > 0 {
		return Never
	}
	return min(max(c.lastSent, c.ackTime)+c.srtt+max(probeMin, 4*c.mdev), c.oldest()+c.rto)
}

// probeMin is what a probe waits at least, longer than a round trip: the delay
// of acknowledgements, and something for the clocks of the two ends.
const probeMin = ackDelay + 5_000_000

// oldest is when the packet was sent that was sent first of those on the way, or
// when anything was acknowledged if that was later.
func (c *Conn) oldest() int64 {
	return max(c.out.at(c.flight.head).sent, c.ackTime)
}

// timeUpAt is when everything on the way is given up.
func (c *Conn) timeUpAt() int64 {
	if c.flight.n == 0 || c.probeAt() != Never {
		return Never
	}
	t := c.oldest()
	if c.probing {
		t = max(t, c.probedAt)
	}
	return t + min(c.rto<<c.backoff, maxRTO)
}

// timersExt are the timers of a reliable flow between our own ends.
func (c *Conn) timersExt(now int64) {
	if now >= c.rackAt {
		c.detect(now)
	}
	switch {
	case now >= c.timeUpAt():
		c.stats.RTOs++
		c.loseAll()
		c.backoff = min(c.backoff+1, 16)
		c.timeUpMTU(now)
		c.probing = false
		c.recovering, c.recover = true, c.nxt
	case now >= c.probeAt():
		c.probing, c.probe, c.probeDue = true, c.flight.tail, true
		c.probedAt = now
	}
}

// pollExt sends what is lost, else what is new, as the model allows.
func (c *Conn) pollExt(now int64, dst []byte) int {
	if c.cut.on {
		if n := c.nextPiece(now, dst); n > 0 {
			return n
		}
	}
	if c.probeDue {
		c.probeDue = false
		if c.probe-c.lwe < c.nxt-c.lwe && c.out.at(c.probe).fate == onWay {
			return c.repeat(now, dst, c.probe, true)
		}
	}
	if c.lost.n == 0 && c.nxt == c.seqno {
		if c.flight.n > 0 && c.room() {
			c.model.idle(c.inFlight) // the path could take more than the program or the peer's window give
		}
		return 0
	}
	switch {
	case !c.room() || now < c.model.next():
		return 0
	case c.lost.n > 0:
		return c.repeat(now, dst, c.lost.head, false)
	}
	return c.sendNext(now, dst)
}

// deadlineExt is what Deadline adds for a reliable flow between our own ends.
func (c *Conn) deadlineExt() int64 {
	d := Never
	if (c.lost.n > 0 || c.nxt != c.seqno) && c.room() {
		d = c.model.next()
	}
	return min(d, c.rackAt, c.probeAt(), c.timeUpAt())
}
