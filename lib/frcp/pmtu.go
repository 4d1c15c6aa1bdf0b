package frcp

import "encoding/binary"

// The largest packet that a path carries is known for its first hop only. Our
// own ends find it as RFC 8899 says: with packets that are filled up to a size
// (tlvProbe) and answered (tlvProbed), so that no data is lost to the search.
// With each goes a small one, the check: if that alone is answered, the path is
// there and too narrow; if neither is, it says nothing about sizes.
//
//	       first large message            probe answered
//	hope ------------------------> hope ------------------> largest <--+
//	      probe of the first hop's  |                          |       |
//	      size goes ahead of it     | only the check           |       |
//	                                v                          |       |
//	      large packets stop       base <----------------------+       |
//	      arriving (black hole)     |                                  |
//	                                +--> search: the first hop's size, |
//	                                     then bisection ---------------+
//
// A reliable flow begins with hope: packets of the first hop's size, because
// that is nearly always right. Should it be wrong, that is known a round trip
// later, and what was sent meanwhile is sent again in pieces (see piece.go), as
// is everything else that has a sequence number and does not fit. An ordered
// flow, which sends nothing again, begins with pmtuBase.
//
// A flow that sends nothing larger than pmtuBase is not probed.
type pmtu struct {
	limit int  // longest packet that is sent, bytes
	most  int  // the first hop's
	hope  bool // limit is not proven yet

	size    int // being probed; 0: nothing
	high    int // the largest that may pass
	tries   uint8
	silent  uint8 // times that not even the check was answered
	checked bool  // the check was answered since the probe left
	waits   bool  // for a sign of life, before it goes on
	due     uint8 // probes to send now
	at      int64 // then the probe is lost
	next    int64 // no search before

	lowered int64 // time of the last black hole
	confirm int64 // time of the next confirmation, of an ordered flow
	arrived int64 // when the newest large packet was sent that arrived

	answers int // sizes to be told to the peer
	answer  [2]uint32
}

const (
	// pmtuBase is the packet that any path is taken to carry (RFC 8899 §5.1.2).
	pmtuBase = 1200
	// pmtuLeast is what is tried when it does not: below a path of IPv6 or
	// Ethernet through a dozen layers.
	pmtuLeast = 256
	// pmtuMost: larger packets stay within a machine.
	pmtuMost = 65535
	// pmtuTries is how often a size has to be lost (MAX_PROBES).
	pmtuTries = 3
	// pmtuLate is how much later than the check's the answer to a probe may come.
	pmtuLate = int64(10e6)
	// pmtuStep ends the search: less is not worth a probe.
	pmtuStep = 16
	// pmtuSilent bounds the probes on a path that is dead.
	pmtuSilent = 8
	// pmtuPause follows that.
	pmtuPause = int64(5e9)
	// pmtuRaise is when a larger size is looked for again (PMTU_RAISE_TIMER).
	pmtuRaise = int64(600e9)
	// pmtuConfirm is how often an ordered flow, which gets no
	// acknowledgements, confirms its size (CONFIRMATION_TIMER).
	pmtuConfirm = int64(15e9)

	dueProbe = 1
	dueCheck = 2
)

// overhead is what a packet has besides its data, in bytes.
func (c *Conn) overhead() int { return c.mtu.most - c.maxPayload }

// checkSize is the size of the small probe that goes with each: if that one
// is answered and the other is not, the path is there and too narrow.
func (c *Conn) checkSize() int { return c.overhead() + tlvHeader + 4 }

// leastMTU is the smallest limit: the pieces of the largest packet have to fit.
func (c *Conn) leastMTU() int {
	return max(pmtuLeast, c.overhead()+tlvHeader+pieceHeader+pieceUnit(c.maxPayload))
}

func (c *Conn) probeable() bool {
	return c.ext && c.mtu.most > pmtuBase && c.mtu.most <= pmtuMost && c.leastMTU() <= pmtuBase
}

// meetMTU is the beginning: the peer is one of ours.
func (c *Conn) meetMTU(now int64) {
	switch {
	case !c.probeable():
	case c.reliable:
		c.mtu.hope = true
		for n := c.lwe; n != c.nxt; n++ {
			if c.out.at(n).size > pmtuBase {
				c.wantLarger(now)
				break
			}
		}
	default:
		c.setLimit(pmtuBase)
	}
}

func (c *Conn) setLimit(n int) {
	c.mtu.limit, c.mtu.hope = n, false
	c.fragMax = n - c.overhead()
}

// wantLarger begins a search, unless one is under way or has ended not long ago:
// there is data that would use it.
func (c *Conn) wantLarger(now int64) {
	if m := &c.mtu; c.ext && (m.limit < m.most || m.hope) && m.size == 0 && now >= m.next {
		m.high = m.most
		m.try(m.most)
	}
}

// confirmLarge sees to it that an ordered flow learns when packets of n bytes of
// data do not arrive any more.
func (c *Conn) confirmLarge(now int64, n int) {
	if m := &c.mtu; m.size == 0 && n+c.overhead() > pmtuBase && m.limit > pmtuBase && now >= m.confirm && c.probeable() {
		m.high = m.limit
		m.try(m.limit)
	}
}

func (m *pmtu) try(size int) {
	m.size, m.tries, m.silent, m.checked, m.waits = size, 0, 0, false, false
	m.due, m.at = dueProbe|dueCheck, Never
}

func (m *pmtu) stop() {
	m.size, m.due, m.at, m.waits = 0, 0, Never, false
}

// probePacket builds the probe, then the check.
func (c *Conn) probePacket(now int64, dst []byte) int {
	m := &c.mtu
	size := m.size
	if m.due&dueProbe != 0 {
		m.due &^= dueProbe
		c.stats.Probes++
		wait := firstRTO
		if c.srtt > 0 {
			wait = c.rto
		}
		m.at = now + min(wait<<m.silent, maxRTO)
	} else {
		m.due, size = 0, c.checkSize()
	}
	p := dst[c.pre+c.hdr : size-c.suf-c.trailer]
	p[0] = tlvProbe
	binary.BigEndian.PutUint16(p[1:], uint16(len(p)-tlvHeader))
	binary.BigEndian.PutUint32(p[tlvHeader:], uint32(size))
	clear(p[tlvHeader+4:])
	return c.seal(dst, Header{}, p)
}

// probeTimeout takes in that the probe was not answered in time.
func (c *Conn) probeTimeout(now int64) {
	m := &c.mtu
	m.at = Never
	switch {
	case m.size == 0 || c.rclosed:
		m.stop()
	case !m.checked:
		// The path may be cut: that says nothing about sizes.
		if m.silent++; m.silent >= pmtuSilent {
			m.stop()
			m.next, m.confirm, m.waits = now+pmtuPause, now+pmtuPause, true
			return
		}
		m.due = dueProbe | dueCheck
	default:
		m.checked, m.silent = false, 0
		if m.tries++; m.tries < pmtuTries {
			m.due = dueProbe | dueCheck
			return
		}
		if m.size <= m.limit {
			c.blackHole(now)
			return
		}
		m.high = m.size - 1
		c.bisect(now)
	}
}

// bisect tries the next size, or ends the search.
func (c *Conn) bisect(now int64) {
	m := &c.mtu
	if m.high-m.limit < pmtuStep {
		m.stop()
		m.next = now + pmtuRaise
		return
	}
	m.try((m.limit + m.high + 1) / 2)
}

// alive notes that something sent was acknowledged: if the path was dead, the
// search goes on at once.
func (m *pmtu) alive() {
	switch {
	case m.waits:
		m.waits, m.next, m.confirm = false, 0, 0
	case m.silent > 0 && m.size != 0 && m.at != Never:
		m.silent, m.due = 0, dueProbe|dueCheck
	}
}

// onProbe notes a probe in a packet of n bytes, to be answered.
func (c *Conn) onProbe(v []byte, n int) {
	if m := &c.mtu; len(v) >= 4 && be32(v) == uint32(n) && m.answers < len(m.answer) {
		m.answer[m.answers] = uint32(n)
		m.answers++
	}
}

// appendAnswers appends the answers to probes.
func (c *Conn) appendAnswers(p []byte) []byte {
	m := &c.mtu
	for i := 0; i < m.answers && len(p)+tlvHeader+4 <= c.fragMax; i++ {
		p = appendSize(p, tlvProbed, m.answer[i], 4)
	}
	m.answers = 0
	return p
}

// onProbed takes the answer to a probe.
func (c *Conn) onProbed(now int64, v []byte) {
	m := &c.mtu
	if len(v) != 4 || m.size == 0 {
		return
	}
	switch n := int(be32(v)); {
	case n == c.checkSize():
		m.checked = true
		if m.at != Never {
			m.at = min(m.at, now+pmtuLate)
		}
		if m.hope && m.due&dueProbe == 0 {
			c.setLimit(pmtuBase) // at once; should the probe just be lost, the next one puts it right
		}
	case n == m.size || n > m.limit && n <= m.most: // or an earlier one, late
		m.confirm = now + pmtuConfirm
		if n >= m.limit {
			c.setLimit(n)
		}
		m.high = max(m.high, n)
		if n < m.size {
			return
		}
		if m.high > n {
			c.bisect(now)
			return
		}
		m.stop()
		if m.limit < m.most {
			m.next = now + pmtuRaise
		}
	}
}

// large is what a packet has to be larger than to tell something about the
// limit.
func (c *Conn) large() int {
	if c.mtu.limit > pmtuBase {
		return pmtuBase
	}
	return c.leastMTU()
}

// tells reports whether the fate of the packet in s, or of the pieces that it
// goes in, tells something about the limit.
func (c *Conn) tells(s *slot) bool {
	n := min(int(s.size), c.mtu.limit)
	return n > pmtuLeast && n > c.large()
}

// gotLarge notes that the packet in s arrived.
func (c *Conn) gotLarge(s *slot) {
	if c.tells(s) {
		c.mtu.arrived = max(c.mtu.arrived, s.sent)
	}
}

// sentAgain notes that the packet in s goes once more. If it went several times
// and nothing as large has arrived since it went first, large packets do not
// arrive any more.
func (c *Conn) sentAgain(now int64, s *slot) {
	if !c.tells(s) {
		return
	}
	if s.tries < 255 {
		s.tries++
	}
	if s.tries >= pmtuTries && c.mtu.arrived <= s.first && now-c.mtu.lowered >= c.rto && c.probeable() {
		s.tries = 0
		c.blackHole(now)
	}
}

// timeUpMTU is called when time was up for everything on the way. Each second
// time in a row the limit is lowered, if that may be the reason: were the path
// dead, the search puts it right.
func (c *Conn) timeUpMTU(now int64) {
	if c.backoff%2 != 0 || !c.probeable() {
		return
	}
	for n := c.lwe; n != c.nxt; n++ {
		if s := c.out.at(n); s.fate == missing && c.tells(s) && c.mtu.arrived <= s.first {
			c.blackHole(now)
			return
		}
	}
}

// blackHole lowers the limit, and begins a search.
func (c *Conn) blackHole(now int64) {
	m := &c.mtu
	m.stop()
	if m.limit <= c.leastMTU() {
		return
	}
	n := pmtuBase
	if m.limit <= pmtuBase {
		n = max(m.limit/2, c.leastMTU())
	}
	c.stats.BlackHoles++
	c.setLimit(n)
	m.next, m.arrived, m.lowered = 0, 0, now
	c.wantLarger(now)
}
