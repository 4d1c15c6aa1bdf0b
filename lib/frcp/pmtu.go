package frcp

import "time"

// What the path carries, between our own ends (spec 50 §4): the largest packet is
// known for the first hop only. Messages are cut for a size that every layer
// carries, until a probe of the first hop's size, padded and without data, was
// answered (packetization layer path MTU discovery, RFC 8899). That takes a round
// trip. When it is not answered, the size is searched for; meanwhile, and when
// all fails, everything works with small packets.
//
// What was sent before the peer was known travels whole, as the specification has
// it, and cannot be cut later: a packet has one sequence number.

const (
	basePacket  = 1200                    // bytes: BASE_PLPMTU of RFC 8899
	sizeTries   = 3                       // MAX_PROBES
	sizeEnough  = 16                      // bytes: the search is not finer
	sizeTimeout = int64(time.Second / 2)  // at least, of a probe
	sizeAgain   = int64(10 * time.Minute) // PMTU_RAISE_TIMER
)

// pmtu is the search. Zero: nothing to search for.
type pmtu struct {
	carries  int // bytes of a packet that the path is known to carry; 0: what the first hop does
	fails    int // the smallest that it does not carry, as far as is known
	size     int // is being probed; 0: none
	tries    int
	due      bool
	at       int64 // then the probe is lost
	answer   int   // a probe of the peer that is to be answered
	searched int64 // not to be searched for before; 0: was not yet
}

// meetSize begins with what is safe.
func (c *Conn) meetSize() {
	c.size.at = Never
	if c.maxPacket > basePacket && c.payloadOf(basePacket) > 0 {
		c.size.carries, c.size.fails = basePacket, c.maxPacket+1
	}
}

// payloadOf is the payload of a packet of n bytes.
func (c *Conn) payloadOf(n int) int { return n - c.pre - c.hdr - c.suf - c.trailer }

// fit is the largest payload of a packet.
func (c *Conn) fit() int {
	if c.size.carries == 0 {
		return c.maxPayload
	}
	return c.payloadOf(c.size.carries)
}

// wantSize notes that larger packets would be of use.
func (c *Conn) wantSize(now int64) {
	p := &c.size
	if p.carries == 0 || p.size != 0 || now < p.searched {
		return
	}
	if p.searched != 0 {
		p.searched, p.fails = 0, c.maxPacket+1 // the path may be another by now
	}
	c.tryNext()
}

// tryNext begins with the next size: all that the first hop carries, then the
// middle of what is not known.
func (c *Conn) tryNext() {
	p := &c.size
	p.size, p.tries, p.due, p.at = 0, 0, false, Never
	switch {
	case p.fails > c.maxPacket:
		p.size = c.maxPacket
	case p.fails-p.carries > sizeEnough:
		p.size = (p.carries + p.fails) / 2
	}
	p.due = p.size != 0
}

// carried notes that a packet of n bytes has arrived at the peer.
func (c *Conn) carried(now int64, n int) {
	p := &c.size
	if n <= p.carries {
		return
	}
	p.carries = n
	switch {
	case n >= c.maxPacket:
		*p = pmtu{at: Never, answer: p.answer}
	case p.size != 0 && n >= p.size:
		c.tryNext()
		if p.size == 0 {
			p.searched = now + sizeAgain
		}
	}
}

// sizeTimer gives up a probe that is not answered.
func (c *Conn) sizeTimer(now int64) {
	p := &c.size
	if p.at > now || p.carries == 0 {
		return
	}
	p.at = Never
	switch {
	case p.tries < sizeTries:
		p.due = true
	default:
		p.fails = p.size
		if c.tryNext(); p.size == 0 {
			p.searched = now + sizeAgain
		}
	}
}

// sizeSuspect is called when time is up again and again: the path may have
// become one that does not carry large packets.
func (c *Conn) sizeSuspect() {
	if c.maxPacket > basePacket && c.fit() > c.payloadOf(basePacket) {
		answer := c.size.answer
		c.size = pmtu{answer: answer}
		c.meetSize()
	}
}

// pollSize sends the probe that is due, or an answer.
func (c *Conn) pollSize(now int64, dst []byte) int {
	p := &c.size
	n := 0
	switch {
	case p.answer != 0:
		n = tlvHeader + 4
	case p.due && p.size != 0:
		n = c.payloadOf(p.size)
	}
	if n < tlvHeader+4 {
		p.answer, p.due = 0, false
		return 0
	}
	body := dst[c.pre+c.hdr:][:n]
	if p.answer != 0 {
		appendSize(body[:0], tlvProbed, uint32(p.answer), 4)
		p.answer = 0
	} else {
		appendSize(body[:0], tlvProbe, uint32(p.size), n-tlvHeader)
		p.due = false
		p.tries++
		p.at = now + max(sizeTimeout, 3*c.srtt)
	}
	return c.seal(dst, c.controlHeader(now, 0), body)
}

// onSize takes the elements of a control packet of length bytes that are about
// sizes.
func (c *Conn) onSize(now int64, more []byte, length int) {
	for typ, v, rest, ok := nextTLV(more); ok; typ, v, rest, ok = nextTLV(rest) {
		if len(v) < 4 {
			continue
		}
		switch n := int(be32(v)); {
		case typ == tlvProbe && n == length:
			c.size.answer = n
		case typ == tlvProbed && n == c.size.size && n != 0:
			c.carried(now, n)
		}
	}
}
