package frcp

// Loss detection between our own ends. The receiver says what it has beyond its
// acknowledgement (tlvSack); a packet is lost when one that was sent after it
// has arrived and the time for reordering is over (RACK, RFC 8985). So all holes
// of a window are filled within one round trip, repetitions that are lost
// included. When nothing is heard at all, the last packet goes again as a probe
// before the retransmission time is up, because its acknowledgement tells what
// else is missing.

// ackExt takes an acknowledgement of everything before a, and the spans in sack.
func (c *Conn) ackExt(now int64, a uint32, sack []byte) {
	var x sample
	for s := c.lwe; s != a; s++ {
		c.gotSlot(now, s, &x)
		c.free(s)
	}
	if a != c.lwe {
		c.lwe = a
		c.sacked.trim(a)
		c.conf = true
	}
	got := func(from, to uint32) {
		for s := from; s != to; s++ {
			c.gotSlot(now, s, &x)
			sl := c.out.at(s)
			if sl.buf != nil {
				sl.buf.Release()
				sl.buf = nil
			}
			sl.sacked = true
			c.sackedN++
		}
	}
	for typ, v, rest, ok := nextTLV(sack); ok; typ, v, rest, ok = nextTLV(rest) {
		if typ != tlvSack {
			continue
		}
		for ; len(v) >= 8; v = v[8:] {
			from, to := be32(v), be32(v[4:])
			if to-from > c.nxt-c.lwe || to-c.lwe > c.nxt-c.lwe || from-c.lwe >= to-c.lwe {
				continue // old, or made up
			}
			c.sacked.add(from, to, got)
		}
	}
	if !x.any {
		return
	}
	c.ackTime, c.backoff, c.probing = now, 0, false
	if x.rtt > 0 {
		c.rackRTT = x.rtt
		c.sampleRTT(x.rtt)
	}
	c.model.update(now, x, c.inFlight)
	c.detect(now)
}

// gotSlot notes that the packet with number n was delivered, unless that is
// known.
func (c *Conn) gotSlot(now int64, n uint32, x *sample) {
	s := c.out.at(n)
	if s.sacked {
		s.sacked = false
		c.sackedN--
		return
	}
	c.model.got(now, s, x)
	c.leave(s)
	if s.lost {
		s.lost = false
		c.lostN--
	}
	// The acknowledgement of a packet that was repeated a moment ago is for
	// what was sent first.
	if s.again && now-s.sent < c.model.minRTT {
		c.reordered = true
		return
	}
	if !s.again && before(n, c.high) {
		c.reordered = true
	}
	if !before(n, c.high) {
		c.high = n + 1
	}
	if s.sent > c.rackSent || s.sent == c.rackSent && before(c.rackSeq, n) {
		c.rackSent, c.rackSeq = s.sent, n
	}
}

// enter and leave keep account of what is on the way.
func (c *Conn) enter(s *slot) {
	if !s.flying {
		s.flying = true
		c.inFlight += uint64(s.size)
		c.flying++
	}
}

func (c *Conn) leave(s *slot) {
	if s.flying {
		s.flying = false
		c.inFlight -= uint64(s.size)
		c.flying--
	}
}

// reorder is for how long packets may overtake each other. Without a sign of
// that three packets behind a hole are proof (RFC 8985 §6.2).
func (c *Conn) reorder() int64 {
	if !c.reordered && c.sackedN >= dupThreshold {
		return 0
	}
	return c.model.minRTT / 4
}

// detect marks what is lost. It looks at the holes only, and at what was sent
// behind the last of them.
func (c *Conn) detect(now int64) {
	c.rackAt = Never
	if c.rackSent == 0 || c.lwe == c.nxt {
		return
	}
	wait := c.rackRTT + c.reorder()
	at := c.lwe
	for _, v := range c.sacked.s {
		c.detectHole(now, wait, at, v.from)
		at = v.to
	}
	c.detectHole(now, wait, at, c.nxt)
}

func (c *Conn) detectHole(now, wait int64, from, to uint32) {
	for n := from; n != to; n++ {
		s := c.out.at(n)
		if s.sent > c.rackSent || s.sent == c.rackSent && !before(n, c.rackSeq) {
			if s.again {
				continue
			}
			return // and so were all behind it, but for those sent again
		}
		switch {
		case s.lost || !s.flying:
		case now >= s.sent+wait:
			c.lose(n, s)
			if !c.recovering {
				c.recovering, c.recover = true, c.nxt
				c.stats.FastRetransmits++
			}
		default:
			c.rackAt = min(c.rackAt, s.sent+wait)
		}
	}
}

// lose marks the packet with number n as lost: it is sent again.
func (c *Conn) lose(n uint32, s *slot) {
	c.leave(s)
	s.lost = true
	if c.lostN == 0 || before(n, c.lostHint) {
		c.lostHint = n
	}
	c.lostN++
	c.model.roundLost += uint64(s.size)
}

// loseAll marks everything on the way as lost: time is up.
func (c *Conn) loseAll() {
	for n := c.lwe; n != c.nxt; n++ {
		if s := c.out.at(n); s.flying && !s.sacked && !s.lost {
			c.lose(n, s)
		}
	}
}

// nextLost is the lowest number that is to be sent again.
func (c *Conn) nextLost() (uint32, bool) {
	if c.lostN == 0 {
		return 0, false
	}
	n := c.lostHint
	if before(n, c.lwe) {
		n = c.lwe
	}
	for ; n != c.nxt; n++ {
		if c.out.at(n).lost {
			c.lostHint = n
			return n, true
		}
	}
	c.lostN = 0 // cannot be
	return 0, false
}

// paced reports whether the model governs what is sent.
func (c *Conn) paced() bool { return c.model != nil && c.ext && c.reliable }

// room reports whether one more packet may be on the way.
func (c *Conn) room() bool {
	if c.backoff > 0 && c.flying >= max(sweepMax>>c.backoff, 1) {
		return false // the path may be cut
	}
	return c.flying < refWindow || c.inFlight < c.model.cwnd()
}

// probeAt is when the last packet goes again because nothing is heard.
func (c *Conn) probeAt() int64 {
	if c.probing || c.lostN > 0 || c.flying == 0 || c.srtt == 0 || c.backoff > 0 {
		return Never
	}
	return max(c.lastSent, c.ackTime) + 2*c.srtt + ackDelay
}

// last is the highest number on the way.
func (c *Conn) last() (uint32, bool) {
	for n := c.nxt; n != c.lwe; n-- {
		if s := c.out.at(n - 1); s.flying {
			return n - 1, true
		}
	}
	return 0, false
}

// timersExt are the timers of a reliable flow between our own ends.
func (c *Conn) timersExt(now int64) {
	if now >= c.rackAt {
		c.detect(now)
	}
	switch {
	case c.flying == 0:
	case now >= c.rtoAt():
		c.stats.RTOs++
		c.loseAll()
		c.backoff = min(c.backoff+1, 16)
		c.probing = false
		c.ackTime = now // counts from here
	case now >= c.probeAt():
		if n, ok := c.last(); ok {
			c.probing, c.probe, c.probeDue = true, n, true
		}
	}
}

// pollExt sends what is lost, else what is new, as the model allows.
func (c *Conn) pollExt(now int64, dst []byte) int {
	if c.probeDue {
		c.probeDue = false
		if s := c.out.at(c.probe); !before(c.probe, c.lwe) && before(c.probe, c.nxt) && s.flying {
			return c.repeat(now, dst, c.probe, true)
		}
	}
	if c.lostN == 0 && c.nxt == c.seqno {
		if c.appLimited() {
			c.model.idle(c.inFlight)
		}
		return 0
	}
	if !c.room() || now < c.model.next() {
		return 0
	}
	if n, ok := c.nextLost(); ok {
		c.lostN--
		c.out.at(n).lost = false
		c.lostHint = n + 1
		return c.repeat(now, dst, n, false)
	}
	if c.nxt != c.seqno {
		return c.sendNext(now, dst)
	}
	return 0
}

// appLimited reports whether there is room for more than the program writes.
func (c *Conn) appLimited() bool {
	return c.flying > 0 && c.room() && before(c.seqno, c.rwe)
}

// deadlineExt is what Deadline adds for a reliable flow between our own ends.
func (c *Conn) deadlineExt() int64 {
	d := Never
	if (c.lostN > 0 || c.nxt != c.seqno) && c.room() {
		d = c.model.next()
	}
	if c.flying > 0 {
		d = min(d, c.rackAt, c.probeAt(), c.rtoAt())
	}
	return d
}
