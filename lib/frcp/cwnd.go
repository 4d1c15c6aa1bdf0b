package frcp

// The congestion window of a reliable flow to a reference end, which says
// nothing of the packets that it has behind one that is missing: slow start,
// then a packet more for each window, half of it when time was up (RFC 5681
// §3.1), and no bursts, since a reference end acknowledges much at once. The
// reference itself always sends what the peer's window of 256 packets allows,
// which is more than its own receiver keeps up with.

const (
	cwndStart = 16 // packets: RFC 6928's ten, and one acknowledgement of the reference more often than not
	cwndLeast = 2
	// A window is spread over two thirds of a round trip, or half of one in
	// slow start, so that the pace does not limit it; a burst is a sixteenth.
	spread      = 2. / 3
	spreadStart = 1. / 2
	paceShare   = 16
)

// cwnd is such a window.
type cwnd struct {
	size     uint32 // packets
	start    uint32 // slow start ends there
	counted  uint32 // acknowledged since it grew last
	refill   bool   // time was up: everything before recover goes again, as the window allows
	limited  bool   // it kept something back since the last acknowledgement
	disabled bool   // Config.Spec, and flows without retransmission
	at       int64  // ns, the next packet's turn
}

func (w *cwnd) reset() {
	*w = cwnd{size: cwndStart, start: refWindow, disabled: w.disabled}
}

// acknowledged notes that n packets more have arrived.
func (w *cwnd) acknowledged(n uint32) {
	if !w.limited && !w.refill {
		return // the program sends less: nothing is learnt of the path
	}
	w.limited = false
	if w.size < w.start {
		w.size = min(w.size+n, w.start)
	} else if w.counted += n; w.counted >= w.size {
		w.counted -= w.size
		w.size++
	}
	w.size = min(w.size, refWindow)
}

// timeUp notes that nothing was acknowledged for long, with out packets on the
// way; again: nothing has been since the last time.
func (w *cwnd) timeUp(out uint32, again bool) {
	if !again {
		// What is on the way is more than the path takes if the window was
		// full; otherwise the window is all that is known.
		w.start = max(out, w.size) / 2
		w.start = max(w.start, cwndLeast)
	}
	w.size, w.counted, w.refill = cwndLeast, 0, true
}

// sent notes that a packet left, with round trips of rtt ns.
func (w *cwnd) sent(now, rtt int64) {
	over := spread
	if w.size < w.start {
		over = spreadStart
	}
	w.at = max(w.at, now-rtt/paceShare) + int64(float64(rtt)*over)/int64(w.size)
}

// plainAt is when a new packet may leave towards a peer that is not known to be
// one of ours.
func (c *Conn) plainAt() int64 {
	switch w := &c.cwnd; {
	case c.nxt == c.seqno:
		return Never
	case w.disabled:
		return 0
	case c.nxt-c.lwe >= w.size || w.refill:
		w.limited = true
		return Never
	default:
		return w.at
	}
}

// refill lets what was sent before time was up go again, as far as the window
// allows: most of it was lost, as a rule.
func (c *Conn) refill() {
	if !c.cwnd.refill {
		return
	}
	if !before(c.lwe, c.recover) {
		c.cwnd.refill = false
		return
	}
	end := c.lwe + min(c.cwnd.size, c.recover-c.lwe)
	if before(c.sweep, c.lwe) {
		c.sweep = c.lwe
	}
	if before(c.sweepEnd, end) {
		c.sweepEnd = end
	}
	if !before(c.sweep, c.sweepEnd) {
		c.sweepEnd = c.sweep
	}
}
