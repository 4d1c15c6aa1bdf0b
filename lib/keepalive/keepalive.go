// Package keepalive decides when a flow needs a keep-alive and when its peer
// has timed out (spec 30 §10). It is a state machine without clock or timer:
// the owner polls it with the time and the flow's packet counters, which may
// come from the kernel, so a flow whose packets all pass in XDP is alive.
//
//	alive  -- nothing sent for more than T/4   --> send an empty packet, alive
//	alive  -- nothing received for more than T --> down (for good)
package keepalive

import "time"

// Conn is the state of one flow. It is not safe for concurrent use.
type Conn struct {
	timeout      time.Duration // T; 0: no keep-alives, no time-out
	rx, tx       uint64        // counters at the last poll
	lastRx, last time.Time     // activity: received, sent
	down         bool
}

// New starts with a flow that was active at now. timeout is the QoS time-out
// of the flow; 0 switches everything off.
func New(now time.Time, timeout time.Duration) *Conn {
	return &Conn{timeout: timeout, lastRx: now, last: now}
}

// Poll takes the flow's packet counters (received and sent, keep-alives and
// undecodable packets included). send asks for an empty packet now, which the
// owner counts as sent; down is
// true once, when the peer has timed out. Activity is dated with the poll that
// sees it, so an owner that polls at Next is late by at most T/4.
func (c *Conn) Poll(now time.Time, rx, tx uint64) (send, down bool) {
	if c.timeout == 0 || c.down {
		return false, false
	}
	if rx != c.rx {
		c.rx, c.lastRx = rx, now
	}
	if tx != c.tx {
		c.tx, c.last = tx, now
	}
	if now.Sub(c.lastRx) > c.timeout {
		c.down = true
		return false, true
	}
	if now.Sub(c.last) > c.timeout/4 {
		c.last, c.tx = now, tx+1 // the keep-alive itself is no news
		return true, false
	}
	return false, false
}

// Down reports whether the peer has timed out.
func (c *Conn) Down() bool { return c.down }

// Next is when Poll must be called again; zero: never.
func (c *Conn) Next() time.Time {
	if c.timeout == 0 || c.down {
		return time.Time{}
	}
	// One tick past the limit: both limits are "more than".
	send, down := c.last.Add(c.timeout/4+1), c.lastRx.Add(c.timeout+1)
	if send.Before(down) {
		return send
	}
	return down
}
