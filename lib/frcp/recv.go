package frcp

import (
	"io"

	"github.com/o7s/o7s-router/lib/packet"
)

// Input takes one packet from the layer. p is not kept, but an encrypted one
// is overwritten. Packets that are not valid are counted and dropped.
func (c *Conn) Input(now int64, p []byte) {
	if len(p) == 0 || c.err != nil {
		return // keep-alives are not ours
	}
	size := len(p)
	sure := true // of the integrity, as far as the flow provides it
	if c.trailer > 0 {
		if q, ok := CheckCRC(p); ok {
			p = q
		} else if len(p) == c.pre+c.hdr+c.suf && !c.ext {
			sure = false // control packets of a reference peer have none (oddity 2)
		} else {
			c.stats.Bad++
			return
		}
	}
	if c.cipher != nil {
		q, err := c.cipher.Open(p)
		if err != nil {
			c.stats.Bad++
			return
		}
		p = q
	}
	h, ok := c.codec.Parse(p)
	if !ok || !sure && h.Flags&Data != 0 {
		c.stats.Bad++
		return
	}
	p = p[c.hdr:]
	c.stats.Received++
	c.lastRx = now
	c.heard, c.announceAt = true, Never
	if h.Flags&Ext != 0 && !c.plain && sure && !c.ext {
		c.meet(now)
	}

	fresh := false
	if !c.rRun || now-c.rData > c.rExpire {
		switch {
		case h.Flags&DRF != 0 && c.rRun && h.Seq == c.next:
			c.rData = now // nothing is missing: the run goes on, and so does a message of which a part is here
		case h.Flags&DRF != 0:
			if !c.newRun(now, h.Seq) {
				return
			}
			fresh = true
		case h.Flags&Data != 0:
			c.stats.NoRun++
			c.pump(now) // the peer may have become known by it
			return
		}
	}
	c.rAct = now
	var more []byte
	if h.Flags&Data == 0 && h.Flags&Ext != 0 && c.ext {
		more = p
	}
	c.onControl(now, h, more)
	if c.ext && c.eos && h.Flags&(Ext|Data|First) == Ext|First {
		c.gone = true
	}
	if c.ext && h.Flags&(Ext|DRF|Data|RDVS) == Ext|DRF {
		switch {
		case h.Flags&Ack == 0:
			c.ctlDue = true // it has not heard of us yet
		case c.eos && h.Seq == c.next && c.eosSent && h.Ack == c.seqno:
			c.quiet = true
		}
	}
	if h.Flags&RDVS != 0 {
		if c.rRun {
			c.growWindow()
			c.ctlDue = true
		}
	} else if h.Flags&Data != 0 {
		c.rData = now
		c.onData(now, h, p, fresh)
	}
	if len(more) > 0 {
		c.onElements(now, more, size)
	}
	c.pump(now)
}

// onElements takes what a control packet of size bytes has behind its header,
// but for what belongs to its acknowledgement (see ackExt).
func (c *Conn) onElements(now int64, p []byte, size int) {
	for typ, v, rest, ok := nextTLV(p); ok && c.err == nil; typ, v, rest, ok = nextTLV(rest) {
		switch typ {
		case tlvProbe:
			c.onProbe(v, size)
		case tlvProbed:
			c.onProbed(now, v)
		case tlvPiece:
			c.onPiece(now, v)
		}
	}
}

// meet notes that the peer is one of ours.
func (c *Conn) meet(now int64) {
	c.ext = true
	if c.reliable {
		c.model = &model{seed: c.seqno}
		c.rackAt, c.high, c.rackSent = Never, c.lwe, 0
		for n := c.lwe; n != c.nxt; n++ {
			c.move(n, c.out.at(n), onWay)
		}
		c.sweep, c.recovering, c.cwnd.refill = c.sweepEnd, false, false
		for i := range uint32(len(c.early.s)) {
			if n := c.next + i; c.early.at(n).full {
				c.ooo.add(n, n+1)
			}
		}
	}
	c.meetMTU(now)
	c.growWindow()
}

// onControl takes the acknowledgement, the edge, and what a control packet of an
// end of ours has behind its header. Without a run of ours they
// mean nothing, and those of a peer in the state of oddity 1 never do.
func (c *Conn) onControl(now int64, h Header, more []byte) {
	if !c.sRun {
		return
	}
	ackOK := h.Flags&Ack != 0 && h.Ack-c.lwe <= c.nxt-c.lwe
	if c.reliable && h.Flags&Ack != 0 && !ackOK {
		// Overtaken by a later one, or made up: its edge is no better.
		if h.Flags&FC != 0 {
			c.noteAnswer(false)
		}
		c.stats.BadControl++
		return
	}
	if ackOK && c.eosSent && !c.reliable && h.Ack == c.seqno {
		c.eosAt, c.eosTries = Never, eosRepeats
	}
	moved := false
	if h.Flags&FC != 0 {
		e := edge(c.rwe, h.Window)
		if e-c.lwe < maxEdge {
			moved = before(c.rwe, e)
			if e-c.lwe <= plausible {
				c.conf = true
			}
		} else if !before(e, c.lwe) {
			c.stats.BadControl++
		}
		if moved {
			c.rwe = e
		}
		c.noteAnswer(moved)
	}
	if ackOK && c.reliable {
		c.conf = true
		switch {
		case c.paced():
			c.ackExt(now, h.Ack, more)
		case c.spec:
			c.specAck(now, h.Ack)
		default:
			c.onAck(now, h.Ack)
		}
	}
	if c.blocked && c.open() && (moved || c.reliable) {
		c.unblock()
	}
}

func (c *Conn) noteAnswer(moved bool) {
	switch {
	case moved:
		c.stale = 0
	case c.rdvsOut:
		c.stale++
	}
	c.rdvsOut = false
}

// newRun begins a run of the peer (spec 30 §5 step 1); false if the flow has
// failed by that.
func (c *Conn) newRun(now int64, seq uint32) bool {
	if c.earlyN > 0 || c.partials > 0 || c.part != nil {
		if c.reliable {
			c.fail(ErrRunLost)
			return false
		}
		c.dropPart()
	}
	c.rRun, c.rData, c.virgin = true, now, true
	c.next, c.acked, c.grown = seq, seq, seq
	c.rEdge = seq + c.grant() - min(c.readyPkts, c.grant())
	c.advEdge = c.rEdge
	c.ackCount, c.endAt = 0, Never
	return true
}

// grant is the window in packets. Between our own ends it doubles with each half
// window of packets that arrives while the program reads, as far as memory allows:
// the sender's model, not this, decides how many are on the way.
func (c *Conn) grant() uint32 {
	if !c.ext {
		return min(refWindow, max(c.window, 1))
	}
	if !c.reliable {
		return c.granted
	}
	top := c.next
	if c.earlyN > 0 {
		top, _ = c.ooo.end()
	}
	if top-c.grown >= c.granted/2 && c.readyPkts <= c.granted/4 {
		c.grown = top
		limit := max(refWindow, uint32(c.buffer/(c.maxPayload+packet.Headroom)))
		c.granted = max(c.granted, min(2*c.granted, c.window, limit))
	}
	return c.granted
}

// growWindow moves the edge as far as the room for packets allows, never back.
func (c *Conn) growWindow() {
	if !c.rRun {
		return
	}
	w := c.grant()
	e := c.next + w - min(c.readyPkts, w)
	if before(c.rEdge, e) {
		c.rEdge = e
	}
	every := max(w/4, 1)
	if !c.reliable {
		every = min(every, updateEvery)
	}
	if c.rEdge-c.advEdge >= every && !(c.spec && c.reliable) {
		c.ctlDue = true
	}
}

func (c *Conn) onData(now int64, h Header, p []byte, fresh bool) {
	ext := c.ext && h.Flags&Ext != 0
	if len(p) == 0 && !ext || len(p) > c.maxMessage {
		c.stats.Bad++
		return
	}
	f := h.Flags & fragMask
	if !ext {
		f = 0
	}
	d := int32(h.Seq - c.next)
	if !c.reliable {
		if d < 0 && d >= -refWindow && c.virgin && h.Flags&DRF != 0 {
			// A packet without data that was sent later began the run.
			d, c.next = 0, h.Seq
		}
		if len(p) == 0 && !c.eos && (d > 0 || d == 0 && c.virgin) {
			c.holdEnd(now, h.Seq)
			return
		}
		c.virgin = false
		switch {
		case d < 0:
			c.stats.Late++
			c.ctlDue = c.ctlDue || c.eos && len(p) == 0 // our acknowledgement was lost
			return
		case len(p) == 0:
		case c.readyPkts >= 2*c.grant():
			// Not a slow reader alone: the peer ignores the window.
			c.stats.OutOfWindow++
			return
		case d > 0:
			c.stats.Gaps += uint64(d)
			c.breakPart()
		}
		c.next = h.Seq + 1
		c.take(f, p)
		c.ctlDue = c.ctlDue || c.eos
		if c.endAt != Never && !before(c.next, c.endSeq) {
			c.endHeld() // nothing is missing
		}
		c.growWindow()
		return
	}
	switch {
	case d < 0:
		c.duplicate(h.Seq) // our acknowledgement was lost
		return
	case !before(h.Seq, c.rEdge):
		c.stats.OutOfWindow++
		c.ctlDue = true
		return
	case d > 0:
		c.early.reserve(c.next, uint32(d)+1, uint32(len(c.early.s)))
		a := c.early.at(h.Seq)
		if a.full {
			c.duplicate(h.Seq)
			return
		}
		c.dropPartial(h.Seq)
		*a = arrival{buf: packet.From(p), flags: f, full: true}
		c.earlyN++
		if !c.ext {
			c.ackAt = min(c.ackAt, now+ackDelay)
			return
		}
		end, _ := c.ooo.end()
		c.ooo.add(h.Seq, h.Seq+1)
		c.growWindow()
		if c.earlyN == 1 || h.Seq != end {
			c.ctlDue = true
			c.recent[c.recentN%len(c.recent)] = h.Seq
			c.recentN = min(c.recentN+1, len(c.recent))
		} else {
			c.countAck(now)
		}
		return
	}
	if c.partials > 0 {
		c.dropPartial(h.Seq)
	}
	c.next++
	c.take(f, p)
	filled := c.earlyN > 0
	for c.earlyN > 0 {
		a := c.early.at(c.next)
		if !a.full {
			break
		}
		f, b := a.flags, a.buf
		*a = arrival{}
		c.earlyN--
		c.next++
		c.accept(f, b)
	}
	if filled && c.ext {
		c.ooo.trim(c.next)
	}
	c.growWindow()
	if filled && !c.spec {
		c.ctlDue = true
		return
	}
	c.countAck(now)
}

// holdEnd keeps the end of stream of an ordered flow for as long as it may have
// overtaken what comes before it.
func (c *Conn) holdEnd(now int64, seq uint32) {
	c.endSeq, c.endAt = seq, min(c.endAt, now+min(c.mpl, endPatience))
}

// endHeld takes the end of stream that was kept.
func (c *Conn) endHeld() {
	if before(c.next, c.endSeq) {
		c.stats.Gaps += uint64(c.endSeq - c.next)
	}
	c.endAt, c.next, c.virgin, c.ctlDue = Never, c.endSeq+1, false, true
	c.take(0, nil)
}

// duplicate notes a packet that came before. The sender is told, so that it
// learns what it repeats for nothing.
func (c *Conn) duplicate(n uint32) {
	c.stats.Duplicate++
	c.twice, c.twiceDue, c.ctlDue = n, true, true
}

// countAck acknowledges one more packet: some at a time, or after a while.
func (c *Conn) countAck(now int64) {
	every := ackEvery
	if c.granted > refWindow {
		every = ackBulk
	}
	if c.ackCount++; c.ackCount >= every && !c.spec {
		c.ctlDue = true
		return
	}
	c.ackAt = min(c.ackAt, now+ackDelay)
}

// take takes the next packet in order.
func (c *Conn) take(f Flags, p []byte) {
	switch {
	case c.eos || c.rclosed && len(p) > 0:
	case len(p) == 0:
		c.breakPart()
		c.eos, c.gone = true, c.reliable && f&First != 0
	case f != 0:
		c.fragment(f, p)
	default:
		c.breakPart()
		c.deliver(packet.From(p), 1)
	}
}

// accept is take for one that has waited; it owns b.
func (c *Conn) accept(f Flags, b *packet.Buf) {
	if f == 0 && b.Len() > 0 && !c.eos && !c.rclosed {
		c.breakPart()
		c.deliver(b, 1)
		return
	}
	c.take(f, b.Bytes())
	b.Release()
}

// breakPart drops a message whose last fragment is missing.
func (c *Conn) breakPart() {
	if c.part != nil {
		c.dropPart()
		c.stats.Fragments++
	}
}

// fragment appends to the partial message.
func (c *Conn) fragment(f Flags, p []byte) {
	if f == fragMask {
		c.breakPart()
		c.part = packet.Get(c.partSize(0))
		c.partLen, c.partPkts = 0, 0
	}
	n := c.partLen + len(p)
	switch {
	case c.part == nil:
		c.stats.Fragments++
		return
	case n > c.maxMessage:
		c.breakPart()
		return
	case n > c.part.Len():
		big := packet.Get(c.partSize(n))
		copy(big.Bytes(), c.part.Bytes()[:c.partLen])
		c.part.Release()
		c.part = big
	}
	copy(c.part.Bytes()[c.partLen:], p)
	c.partLen = n
	c.partPkts++
	if f == First {
		c.part.Trim(n)
		c.partLast = n
		c.deliver(c.part, c.partPkts)
		c.part = nil
	}
}

// partSize is the buffer for a message of which there are n bytes: as the last
// one needed, or the next larger. Sizes are those of pooled buffers.
func (c *Conn) partSize(n int) int {
	if n == 0 {
		n = min(c.partLast, partLarge)
	}
	size := partFirst
	switch {
	case n > partLarge:
		size = c.maxMessage
	case n > partFirst:
		size = partLarge
	}
	return min(size, c.maxMessage)
}

const (
	partFirst = 16384
	partLarge = 65536
)

func (c *Conn) deliver(b *packet.Buf, pkts uint32) {
	n := c.rTail - c.rHead
	c.ready.reserve(c.rHead, n+1, n)
	*c.ready.at(c.rTail) = message{buf: b, pkts: pkts}
	c.rTail++
	c.readyPkts += pkts
}

func (c *Conn) dropPart() {
	if c.part != nil {
		c.part.Release()
		c.part = nil
	}
}

func (c *Conn) dropEarly() {
	if c.earlyN > 0 || c.partials > 0 {
		for i := range c.early.s {
			a := &c.early.s[i]
			if a.buf != nil {
				a.buf.Release()
			}
			*a = arrival{}
		}
	}
	c.earlyN, c.partials = 0, 0
	c.ooo.clear()
}

// Readable reports whether Read would return something other than ErrWouldBlock.
func (c *Conn) Readable() bool {
	return c.cur != nil || c.rHead != c.rTail || c.eos || c.err != nil || c.rclosed
}

// NextSize is the size of the next message, or of the rest of one that was read
// in part, in bytes; -1 if there is none.
func (c *Conn) NextSize() int {
	switch {
	case c.cur != nil:
		return c.cur.Len()
	case c.rHead != c.rTail:
		return c.ready.at(c.rHead).buf.Len()
	}
	return -1
}

// Read copies the next message, or as much of it as fits, into p; more tells
// that the rest of it is still to be read. Errors: ErrWouldBlock, io.EOF after
// the peer's end of stream, ErrClosed, or the failure of the flow once
// everything that arrived before has been read.
func (c *Conn) Read(p []byte) (n int, more bool, err error) {
	if c.cur == nil {
		switch {
		case c.rHead != c.rTail:
		case c.rclosed:
			return 0, false, ErrClosed
		case c.eos:
			return 0, false, io.EOF
		case c.err != nil:
			return 0, false, c.err
		default:
			return 0, false, ErrWouldBlock
		}
		m := c.ready.at(c.rHead)
		c.cur = m.buf
		c.readyPkts -= m.pkts
		*m = message{}
		c.rHead++
		c.stats.Delivered++
		if c.err == nil {
			c.growWindow()
		}
	}
	n = copy(p, c.cur.Bytes())
	c.cur.Pull(n)
	if c.cur.Len() > 0 {
		return n, true, nil
	}
	c.cur.Release()
	c.cur = nil
	return n, false, nil
}
