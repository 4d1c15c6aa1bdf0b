package frcp

import (
	"time"

	"github.com/o7s/o7s-router/lib/packet"
)

// Write queues one message; p is copied. ErrWouldBlock: the window is closed,
// and the peer is asked to open it until Writable or CancelWrite.
func (c *Conn) Write(now int64, p []byte) error {
	switch {
	case c.err != nil:
		return c.err
	case c.wclosed:
		return ErrClosed
	case len(p) == 0:
		return ErrEmpty
	case len(p) > c.maxPayload && (!c.ext || len(p) > c.maxMessage):
		return ErrTooLarge
	}
	c.startRun(now)
	if c.pend != nil || !c.open() {
		c.block(now)
		return ErrWouldBlock
	}
	if !c.reliable && c.ext {
		c.confirmLarge(now, len(p))
	}
	if c.mtu.hope && len(p)+c.overhead() > pmtuBase {
		c.wantLarger(now)
	}
	if len(p) > c.fragMax {
		c.wantLarger(now)
		if n := c.fragments(p, false); n < len(p) {
			c.pend, c.pendOff, c.begun = packet.From(p[n:]), 0, n > 0
			c.block(now)
		}
		return nil
	}
	c.queue(packet.From(p), 0)
	return nil
}

// Writable reports whether Write would take a message.
func (c *Conn) Writable() bool {
	return c.err != nil || c.wclosed || c.pend == nil && (!c.sRun || c.open())
}

// CancelWrite tells that the writer which was refused does not wait any longer.
func (c *Conn) CancelWrite() {
	if c.pend == nil && (!c.eosWanted || c.eosSent || !c.ext) {
		c.unblock()
	}
}

// CloseWrite ends our direction: after all that was written the peer reads an
// end of stream, if it is one of ours. A reference peer learns of the end by
// its time-out only. The other direction stays open.
func (c *Conn) CloseWrite(now int64) {
	if c.wclosed {
		return
	}
	c.wclosed, c.eosWanted = true, true
	c.pump(now)
}

// Announce sends a control packet at the next Poll: a peer of ours learns what
// we are before it has to send a large message, and answers; any peer learns
// where our numbers begin. It goes again some times while nothing is heard.
func (c *Conn) Announce() { c.announceDue = c.err == nil }

// startRun draws a new sequence number when there is none or it is too old
// (spec 30 §4 step 3). It comes before any look at the window (oddity 13).
func (c *Conn) startRun(now int64) {
	if c.sRun && (c.lwe != c.seqno || sec(now)-sec(c.sAct) <= c.sInact+runSlack) {
		return
	}
	s := c.rand()
	c.lwe, c.nxt, c.seqno, c.rwe = s, s, s, s+startWindow
	c.sRun, c.conf, c.known, c.sAct, c.ackTime = true, false, false, now, now
	c.backoff, c.recovering = 0, false
	c.clearFlight()
	c.stale, c.rdvsOut, c.sweep, c.sweepEnd = 0, false, s, s
	c.cwnd.reset()
	c.unblock()
}

func (c *Conn) open() bool {
	if !before(c.seqno, c.rwe) {
		return false
	}
	if !c.paced() {
		return c.seqno-c.lwe < refWindow
	}
	// What waits for the pacer is bounded, so that a program is not ahead of
	// the path by a window of thousands of packets. Once that is full it has
	// to be half empty, so that the writer does not wake for each packet.
	limit := uint32(unsentMax)
	if c.blocked {
		limit /= 2
	}
	return c.seqno-c.nxt < limit && c.seqno-c.lwe < c.window
}

// clearFlight forgets what is on the way.
func (c *Conn) clearFlight() {
	c.sacked.clear()
	c.sackedN, c.inFlight, c.flight, c.lost = 0, 0, chain{}, chain{}
	c.recovering = false
	c.high, c.rackSent, c.rackAt = c.seqno, 0, Never
	c.probing, c.probeDue = false, false
	c.cut.on = false
}

func (c *Conn) block(now int64) {
	if !c.blocked {
		c.blocked, c.blockedAt, c.rdvsAt = true, now, now+rdvsEvery
	}
}

func (c *Conn) unblock() {
	c.blocked, c.rdvsDue, c.rdvsAt = false, false, Never
}

func (c *Conn) queue(b *packet.Buf, frag Flags) {
	n := c.seqno - c.lwe
	c.out.reserve(c.lwe, n+1, n)
	f := Data | frag
	if n == 0 || !c.reliable {
		f |= DRF
	}
	size := c.pre + c.hdr + c.suf + c.trailer
	if b != nil {
		size += b.Len()
	}
	*c.out.at(c.seqno) = slot{buf: b, flags: f, size: uint32(size)}
	c.seqno++
}

// fragments queues as much of a message as the window takes, in fragments, and
// returns how much that is; begun: there were some before.
func (c *Conn) fragments(p []byte, begun bool) (n int) {
	for n < len(p) && c.open() {
		rest := p[n:]
		f := More
		if !begun {
			f = First | More
		}
		if len(rest) <= c.fragMax {
			f = First
			if !begun {
				f = 0 // more fits than when it was written
			}
		} else {
			rest = rest[:c.fragMax]
		}
		c.queue(packet.From(rest), f)
		n += len(rest)
		begun = true
	}
	return n
}

// pump queues what waits for the window: fragments, then the end of stream.
func (c *Conn) pump(now int64) {
	if c.err != nil || c.pend == nil && (!c.eosWanted || c.eosSent || !c.ext) {
		return
	}
	c.startRun(now)
	if c.pend != nil {
		rest := c.pend.Bytes()[c.pendOff:]
		n := c.fragments(rest, c.begun)
		c.pendOff += n
		c.begun = c.begun || n > 0
		if n == len(rest) {
			c.pend.Release()
			c.pend = nil
		}
	}
	if c.pend == nil && c.eosWanted && !c.eosSent && c.ext && c.open() {
		c.eosSent = true
		f := Flags(0)
		if !c.reliable {
			c.eosLeft = eosCopies - 1
		} else if c.rclosed {
			f = First // we have closed: see Conn.gone
		}
		c.queue(nil, f)
	}
	if c.pend != nil || c.eosWanted && !c.eosSent {
		c.block(now)
	}
}

// Poll writes the next packet to send into dst, which must have room for
// MaxPacket bytes, and returns its length; 0: nothing to send before Deadline.
// It never allocates.
func (c *Conn) Poll(now int64, dst []byte) int {
	if c.err != nil {
		return 0
	}
	c.timers(now)
	if c.err != nil {
		return 0
	}
	if c.finalAck {
		c.finalAck = false
		// Without the run at the peer it would do harm, and the packets that
		// are still outstanding carry the same.
		if c.lwe == c.nxt || c.ext || c.conf || !c.reliable {
			c.stats.Control++
			c.acknowledged()
			return c.seal(dst, Header{Flags: Ack, Ack: c.ackNext()}, nil)
		}
	}
	if c.ctlDue && c.earlyN > 0 && c.ext {
		// What is missing must not wait for data of this direction.
		c.ctlDue = false
		if n := c.control(now, dst, 0); n > 0 {
			return n
		}
	}
	if c.mtu.answers > 0 {
		return c.control(now, dst, 0)
	}
	if c.mtu.due != 0 {
		return c.probePacket(now, dst)
	}
	if c.paced() {
		if n := c.pollExt(now, dst); n > 0 {
			return n
		}
	} else if n := c.pollPlain(now, dst); n > 0 {
		return n
	}
	if c.eosLeft > 0 {
		if c.eosLeft--; c.eosLeft == 0 && c.eosTries < eosRepeats {
			c.eosAt = now + eosEvery<<c.eosTries
			c.eosTries++
		}
		return c.seal(dst, c.dataHeader(now, Data|DRF, c.nxt-1), nil)
	}
	if c.rdvsDue {
		c.rdvsDue = false
		if n := c.control(now, dst, RDVS); n > 0 {
			c.rdvsOut = true
			return n
		}
	}
	if c.farewell() {
		c.byes++
		c.ctlDue = false
		return c.control(now, dst, 0)
	}
	if c.ctlDue || c.announceDue {
		if c.announceDue && !c.heard && !c.plain && c.announced < announces {
			c.announceAt = now + announceIn<<c.announced
			c.announced++
		}
		c.ctlDue, c.announceDue = false, false
		return c.control(now, dst, 0)
	}
	return 0
}

// pollPlain sends data as the specification has it: what was lost, then what is
// new.
func (c *Conn) pollPlain(now int64, dst []byte) int {
	if c.spec && c.reliable {
		if n := c.specPoll(now, dst); n > 0 {
			return n
		}
	}
	if c.sweep != c.sweepEnd {
		if before(c.sweep, c.lwe) {
			c.sweep = c.lwe
		}
		if before(c.sweep, c.sweepEnd) {
			c.sweep++
			return c.repeat(now, dst, c.sweep-1, true)
		}
		c.sweep = c.sweepEnd
	}
	if now >= c.plainAt() {
		return c.sendNext(now, dst)
	}
	return 0
}

func (c *Conn) timers(now int64) {
	if now >= c.ackAt {
		c.ackAt = Never
		if c.ackNext() != c.acked || c.rEdge != c.advEdge {
			c.ctlDue = true
		}
	}
	if now >= c.mtu.at {
		c.probeTimeout(now)
	}
	if now >= c.eosAt {
		c.eosAt, c.eosLeft = Never, 1
	}
	if now >= c.endAt {
		c.endHeld()
	}
	if now >= c.announceAt {
		c.announceAt, c.announceDue = Never, c.announced < announces
	}
	if c.endUnheard() && now >= c.endGivenUp() {
		c.gaveUp = true
		c.move(c.lwe, c.out.at(c.lwe), unknown)
		c.free(c.lwe)
		c.lwe = c.seqno
	}
	if c.rclosed && now-c.closedAt >= int64(maxRtxTime) && !c.Done() {
		c.fail(ErrDown)
		return
	}
	if c.blocked {
		switch {
		case now-max(c.lastRx, c.blockedAt) >= int64(maxRtxTime):
			c.fail(ErrDown)
			return
		case now >= c.rdvsAt:
			c.rdvsAt = now + rdvsEvery
			// A window that only our own limit closes opens by itself.
			c.rdvsDue = !before(c.seqno, c.rwe)
			if !c.reliable && c.stale >= staleAnswers {
				c.rwe = c.seqno + staleCredit
				c.blocked, c.rdvsAt = false, Never
				c.pump(now)
			}
		}
	}
	if c.reliable && c.lwe != c.nxt {
		switch s := c.out.at(c.lwe); {
		case now-s.first >= int64(maxRtxTime):
			c.fail(ErrDown)
		case c.spec:
		case c.paced():
			c.timersExt(now)
		case now >= c.rtoAt() && c.sweep == c.sweepEnd:
			c.stats.RTOs++
			c.recovering, c.recover = true, c.nxt
			c.cwnd.timeUp(c.nxt-c.lwe, c.backoff > 0)
			c.backoff = min(c.backoff+1, 16)
			c.sweep, c.sweepEnd = c.lwe, c.lwe
			c.refill()
		}
	}
}

// endUnheard reports that our end of stream alone is unacknowledged, by a peer
// that has closed: it may have left, and does not need it.
func (c *Conn) endUnheard() bool {
	return c.gone && c.eosSent && c.paced() && c.seqno-c.lwe == 1 && c.nxt == c.seqno
}

func (c *Conn) endGivenUp() int64 { return max(c.lastRx, c.out.at(c.lwe).first) + lastWords }

func (c *Conn) rtoAt() int64 {
	rto := min(c.rto<<c.backoff, maxRTO)
	return max(c.out.at(c.lwe).sent, c.ackTime) + rto
}

// dataHeader fills in what is known of the peer's direction.
func (c *Conn) dataHeader(now int64, f Flags, seq uint32) Header {
	h := Header{Flags: f, Seq: seq}
	if c.active(now) {
		h.Flags |= FC
		h.Window = c.rEdge & windowMask
		if c.reliable && now-c.rAct <= int64(maxAckTime) {
			h.Flags |= Ack
			h.Ack = c.ackNext()
			c.acknowledged()
		}
		c.advEdge = c.rEdge
	}
	c.sAct = now
	return h
}

// active reports whether control fields may speak of the peer's run: any
// packet keeps it alive in this respect (spec 30 §4 step 5).
func (c *Conn) active(now int64) bool { return c.rRun && now-c.rAct <= c.rExpire }

func (c *Conn) acknowledged() {
	c.acked, c.ackCount, c.ackAt, c.ctlDue = c.ackNext(), 0, Never, false
}

// ackNext is what is acknowledged: everything that arrived in order or, with
// Config.Spec, what the program has read of it.
func (c *Conn) ackNext() uint32 {
	if c.spec {
		return c.next - c.readyPkts
	}
	return c.next
}

func (c *Conn) sendNext(now int64, dst []byte) int {
	seq := c.nxt
	s := c.out.at(seq)
	s.first, s.sent = now, now
	c.nxt++
	c.stats.Sent++
	switch {
	case c.paced():
		c.fly(now, seq, s)
		if c.blocked && c.open() {
			c.unblock()
		}
	case c.spec && c.reliable:
		c.specSent(now, seq, s)
	case c.reliable:
		c.cwnd.sent(now, c.srtt)
	}
	n := c.emit(now, dst, s.flags, seq, s)
	if !c.reliable {
		c.free(seq)
		c.lwe = c.nxt
	}
	if c.pend != nil || c.eosWanted && !c.eosSent {
		c.pump(now)
	}
	return n
}

// fly notes that a packet is on the way.
func (c *Conn) fly(now int64, n uint32, s *slot) {
	c.model.sent(now, s, c.flight.n == 0)
	c.move(n, s, onWay)
	c.lastSent = now
}

// repeat sends an outstanding packet again, with fresh control fields
// and, if the flow is encrypted, freshly encrypted.
func (c *Conn) repeat(now int64, dst []byte, seq uint32, vague bool) int {
	s := c.out.at(seq)
	s.vague = s.again || vague || !c.ext
	s.sent, s.again = now, true
	if c.paced() {
		c.fly(now, seq, s)
	}
	c.stats.Resent++
	if c.paced() {
		c.sentAgain(now, s)
	}
	f := s.flags
	if c.paced() && c.known && s.first-c.ackTime < runSure {
		f &^= DRF
	}
	return c.emit(now, dst, f, seq, s)
}

// emit builds a data packet.
func (c *Conn) emit(now int64, dst []byte, f Flags, seq uint32, s *slot) int {
	if int(s.size) > c.mtu.limit && c.paced() {
		return c.cutPacket(now, dst, f, seq)
	}
	return c.seal(dst, c.dataHeader(now, f, seq), payload(s))
}

// runSure is how long after an acknowledgement the peer has our run for all the
// time that a packet is repeated. A repetition then need not begin it, and must
// not, should the peer's endpoint belong to another flow by now.
const runSure = int64(5 * time.Second)

func payload(s *slot) []byte {
	if s.buf == nil {
		return nil
	}
	return s.buf.Bytes()
}

// control builds a packet without data. While nothing is outstanding it also
// starts our run at the peer, because a reference peer that sees anything else
// first never accepts a run (oddity 1). If something is outstanding and the
// peer may not have it, the packet that starts the run goes again instead.
func (c *Conn) control(now int64, dst []byte, f Flags) int {
	c.startRun(now)
	if c.lwe != c.nxt && !c.ext && !c.conf {
		if s := c.out.at(c.lwe); now-s.sent < carrierGap {
			c.ackAt = min(c.ackAt, s.sent+carrierGap)
			return 0
		}
		return c.repeat(now, dst, c.lwe, true)
	}
	h := Header{Flags: f}
	if c.lwe == c.nxt {
		h.Flags |= DRF
		h.Seq = c.nxt
	}
	if f != RDVS && c.active(now) {
		h.Flags |= FC
		h.Window = c.rEdge & windowMask
		c.advEdge = c.rEdge
		if now-c.rAct <= int64(maxAckTime) {
			h.Flags |= Ack
			h.Ack = c.ackNext()
			c.acknowledged()
		}
	}
	if h.Flags == 0 && c.mtu.answers == 0 {
		return 0 // nothing to say
	}
	c.sAct = now
	c.stats.Control++
	if c.ext && c.rclosed {
		h.Flags |= First // as in an end of stream
	}
	if !c.ext {
		return c.seal(dst, h, nil)
	}
	c.tlv = c.appendAnswers(c.tlv[:0])
	if !c.reliable || h.Flags&Ack == 0 {
		return c.seal(dst, h, c.tlv)
	}
	if c.twiceDue && c.fragMax >= tlvHeader+4 {
		c.tlv = appendSize(c.tlv, tlvTwice, c.twice, 4)
	}
	if c.earlyN > 0 {
		c.tlv = appendSack(c.tlv, c.ooo, c.recent[:c.recentN], c.fragMax)
	}
	c.recentN, c.twiceDue = 0, false
	return c.seal(dst, h, c.tlv)
}

// seal builds the packet: header and data, encryption, CRC (spec 30 §2).
func (c *Conn) seal(dst []byte, h Header, p []byte) int {
	if !c.plain {
		h.Flags |= Ext
	}
	c.codec.Put(dst[c.pre:], h)
	n := c.pre + c.hdr
	n += copy(dst[n:], p)
	n += c.suf
	if c.cipher != nil {
		if err := c.cipher.Seal(dst[:n]); err != nil {
			c.fail(err)
			return 0
		}
	}
	if c.trailer > 0 {
		n = len(AppendCRC(dst[:n:cap(dst)]))
	}
	return n
}

func (c *Conn) free(seq uint32) {
	s := c.out.at(seq)
	if s.buf != nil {
		s.buf.Release()
	}
	*s = slot{}
}

// onAck takes an acknowledgement of a peer that says no more than that.
func (c *Conn) onAck(now int64, a uint32) {
	if a == c.lwe {
		return
	}
	sample := int64(-1)
	// A packet that was repeated because the peer missed it, not because
	// time was up, gives a sample; those behind it waited for it.
	hole := c.out.at(c.lwe).again
	for s := c.lwe; s != a; s++ {
		switch sl := c.out.at(s); {
		case sl.vague || sl.again && s != c.lwe:
			sample = -2
		case sample > -2 && (!hole || s == c.lwe):
			sample = now - sl.sent
		}
		c.free(s)
	}
	if sample >= 0 {
		c.sampleRTT(sample)
	}
	c.cwnd.acknowledged(a - c.lwe)
	c.lwe, c.ackTime, c.backoff, c.conf = a, now, 0, true
	c.recovering = c.recovering && before(a, c.recover)
	c.refill()
}

func (c *Conn) sampleRTT(m int64) {
	if c.srtt == 0 {
		c.srtt, c.mdev = m, m/2
	} else {
		d := m - c.srtt
		c.srtt += d >> 3
		if d < 0 {
			d = -d
		}
		e := (d - c.mdev) >> 2
		if e < 0 {
			e >>= 3
		}
		c.mdev += e
	}
	c.srtt, c.mdev = max(c.srtt, 1000), max(c.mdev, 100)
	c.rto = min(c.srtt+max(minRTO, 4*c.mdev), maxRTO)
}
