package frcp

import (
	"fmt"
	"slices"
)

// invariant recomputes from the slots what a Conn keeps count of, and checks
// that it waits for something whenever something is left to do.
func (c *Conn) invariant(now int64) error {
	if c.lwe-c.seqno != 0 && !before(c.lwe, c.seqno) || c.nxt-c.lwe > c.seqno-c.lwe {
		return fmt.Errorf("lwe %d, nxt %d, seqno %d", c.lwe, c.nxt, c.seqno)
	}
	if err := c.senderInvariant(); err != nil {
		return fmt.Errorf("sender: %w", err)
	}
	if err := c.receiverInvariant(); err != nil {
		return fmt.Errorf("receiver: %w", err)
	}
	d := c.Deadline()
	switch {
	case c.err != nil:
		if d != Never {
			return fmt.Errorf("failed, and a deadline of %d", d)
		}
	case c.reliable && c.lwe != c.seqno && d > now+int64(maxRtxTime),
		c.reliable && c.nxt != c.seqno && d > now+int64(maxRtxTime),
		(c.pend != nil || c.ext && c.eosWanted && !c.eosSent) && d > now+int64(maxRtxTime),
		c.paced() && (c.flight.n > 0 || c.lost.n > 0) && d > now+maxRTO+second:
		return fmt.Errorf("deadline is %d away: unacknowledged %d, unsent %d, flight %d, lost %d",
			d-now, c.seqno-c.lwe, c.seqno-c.nxt, c.flight.n, c.lost.n)
	}
	return nil
}

// plainInvariant is of the congestion window towards a reference end.
func (c *Conn) plainInvariant() error {
	w := &c.cwnd
	switch {
	case w.disabled || !c.sRun || c.paced() || c.err != nil:
		return nil
	case w.size < cwndLeast || w.size > refWindow || w.start < cwndLeast || w.start > refWindow:
		return fmt.Errorf("congestion window %+v", *w)
	case w.refill && (!c.recovering || c.lwe == c.nxt || c.recover-c.lwe > c.nxt-c.lwe):
		return fmt.Errorf("refill to %d of %d, recovering %v", c.recover-c.lwe, c.nxt-c.lwe, c.recovering)
	case c.sweep != c.sweepEnd && (before(c.nxt, c.sweepEnd) || before(c.sweepEnd, c.sweep)):
		return fmt.Errorf("to be sent again: %d to %d, %d are out", c.sweep-c.lwe, c.sweepEnd-c.lwe, c.nxt-c.lwe)
	case c.nxt == c.lwe && c.nxt != c.seqno && c.plainAt() == Never:
		return fmt.Errorf("nothing is out, and %d packets must not leave: %+v", c.seqno-c.nxt, *w)
	}
	return nil
}

func (c *Conn) senderInvariant() error {
	if err := c.plainInvariant(); err != nil {
		return err
	}
	if n := int(c.seqno - c.lwe); n > len(c.out.s) {
		return fmt.Errorf("%d packets in %d slots", n, len(c.out.s))
	}
	used := 0
	for i := range c.out.s {
		if c.out.s[i].buf != nil {
			used++
		}
	}
	var sacked, held int
	fates := map[fate]int{}
	var bytes uint64
	var spans []span
	for n := c.lwe; n != c.seqno; n++ {
		s := c.out.at(n)
		if s.buf != nil {
			held++
		}
		fates[s.fate]++
		switch {
		case before(n, c.nxt) && c.paced() && s.fate == unknown:
			return fmt.Errorf("nobody knows of packet %d", n-c.lwe)
		case (!before(n, c.nxt) || !c.paced()) && s.fate != unknown:
			return fmt.Errorf("packet %d, not sent, has fate %d", n-c.lwe, s.fate)
		case s.fate == onWay:
			bytes += uint64(s.size)
		case s.fate == arrived:
			if s.buf != nil {
				return fmt.Errorf("packet %d is kept though it arrived", n-c.lwe)
			}
			sacked++
			if k := len(spans); k > 0 && spans[k-1].to == n {
				spans[k-1].to++
			} else {
				spans = append(spans, span{n, n + 1})
			}
		}
	}
	switch {
	case used != held:
		return fmt.Errorf("%d buffers outside the window", used-held)
	case sacked != c.sackedN || !slices.Equal(spans, c.sacked.s):
		return fmt.Errorf("%d arrived, counted %d; %v, kept %v", sacked, c.sackedN, spans, c.sacked.s)
	case bytes != c.inFlight:
		return fmt.Errorf("%d bytes in flight, counted %d", bytes, c.inFlight)
	}
	for _, l := range []struct {
		chain
		of fate
	}{{c.flight, onWay}, {c.lost, missing}} {
		if l.n != fates[l.of] {
			return fmt.Errorf("%d packets with fate %d, counted %d", fates[l.of], l.of, l.n)
		}
		for n, i := l.head, 0; i < l.n; i++ {
			s := c.out.at(n)
			switch {
			case n-c.lwe >= c.nxt-c.lwe || s.fate != l.of:
				return fmt.Errorf("packet %d in the chain of %d", n-c.lwe, l.of)
			case i == l.n-1 && n != l.tail:
				return fmt.Errorf("the chain of %d ends before its end", l.of)
			case i < l.n-1:
				next := c.out.at(s.next)
				if next.prev != n {
					return fmt.Errorf("the chain of %d is broken at %d", l.of, n-c.lwe)
				}
				if l.of == onWay && next.sent < s.sent && s.deliveredAt != 0 {
					return fmt.Errorf("packet %d is before an older one", n-c.lwe)
				}
			}
			n = s.next
		}
	}
	return nil
}

func (c *Conn) receiverInvariant() error {
	full := 0
	for i := range c.early.s {
		if c.early.s[i].full {
			full++
		}
	}
	if full != c.earlyN {
		return fmt.Errorf("%d early packets, counted %d", full, c.earlyN)
	}
	if c.ext && c.reliable && c.err == nil {
		n := 0
		for _, v := range c.ooo.s {
			if !before(c.next, v.from) || !before(v.from, v.to) || before(c.rEdge, v.to) {
				return fmt.Errorf("span [%d, %d)", int32(v.from-c.next), int32(v.to-c.next))
			}
			for m := v.from; m != v.to; m++ {
				n++
				if !c.early.at(m).full {
					return fmt.Errorf("packet %d is told and not there", m-c.next)
				}
			}
		}
		if n != full {
			return fmt.Errorf("%d packets told, %d there", n, full)
		}
	}
	var pkts uint32
	for i := c.rHead; i != c.rTail; i++ {
		pkts += c.ready.at(i).pkts
	}
	if pkts != c.readyPkts {
		return fmt.Errorf("%d packets ready, counted %d", pkts, c.readyPkts)
	}
	if w := c.rEdge - c.next; c.rRun && c.reliable && w > max(refWindow, c.window) {
		return fmt.Errorf("a window of %d packets", int32(w))
	}
	return nil
}
