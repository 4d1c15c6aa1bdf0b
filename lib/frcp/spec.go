package frcp

// The sender of Config.Spec: spec 30 §8 as it stands. Each packet has a
// retransmission timer of its own, one packet at a time measures the round
// trip.

// specMinRTO is the shortest retransmission time there.
const specMinRTO = int64(250_000)

// specSent notes that the packet with number n left for the first time.
func (c *Conn) specSent(now int64, n uint32, s *slot) {
	s.due = now + c.rto
	if !c.probing {
		c.probing, c.probe, c.lastSent = true, n, now
	}
}

// specAck takes an acknowledgement of everything before a.
func (c *Conn) specAck(now int64, a uint32) {
	if a == c.lwe {
		return
	}
	for s := c.lwe; s != a; s++ {
		c.free(s)
	}
	if c.probing && before(c.probe, a) {
		c.probing = false
		c.sampleRTT(now - c.lastSent)
		c.rto = max(specMinRTO, c.srtt+4*c.mdev)
	}
	c.lwe, c.ackTime, c.conf = a, now, true
}

// specAt is when the next packet is to be sent again.
func (c *Conn) specAt() int64 {
	d := Never
	for n := c.lwe; n != c.nxt; n++ {
		d = min(d, c.out.at(n).due)
	}
	return d
}

// specPoll sends a packet again whose time is up.
func (c *Conn) specPoll(now int64, dst []byte) int {
	for n := c.lwe; n != c.nxt; n++ {
		s := c.out.at(n)
		if s.due > now {
			continue
		}
		if c.probing && n == c.probe {
			c.probing = false // Karn
			c.rto = min(2*c.rto, maxRTO)
		}
		s.due = now + c.rto
		return c.repeat(now, dst, n, true)
	}
	return 0
}
