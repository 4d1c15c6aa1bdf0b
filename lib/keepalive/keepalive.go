// Package keepalive decides when a flow with a peer time-out sends a
// keep-alive and when its peer counts as gone (spec 30 §10). It is a state
// machine without a clock: the program's library runs it for its flows, the
// daemon for the flows that its layers use.
package keepalive

import "time"

// Action is what Advance asks the caller to do.
type Action uint8

// Actions.
const (
	None Action = iota
	Send        // send a packet of length 0
	Down        // the peer is gone: tell the user of the flow; nothing is sent from now on
)

// Grain is the fraction of the time-out by which activity may be noticed late:
// the packet path only leaves a mark, that is cheaper than reading the clock,
// and Advance takes it for an activity of that moment.
const Grain = 64

// MinTick keeps short time-outs from waking too often; the reference looks
// every 5 ms as well.
const MinTick = 5 * time.Millisecond

// Never is what Next returns when nothing is due any more.
const Never = int64(1<<63 - 1)

// State of one flow. Times are nanoseconds of a monotonic clock. The zero
// value does nothing, for ever: a flow without a time-out. Not safe for
// concurrent use.
type State struct {
	timeout int64 // T; 0: none, or the peer is down
	rx, tx  int64 // last activity
	tick    int64 // last Advance
}

// New returns the state of a flow allocated now with the QoS time-out t.
func New(t time.Duration, now int64) State {
	if t <= 0 {
		return State{}
	}
	return State{timeout: int64(t), rx: now, tx: now, tick: now}
}

// Advance tells that it is now, and whether anything was received, keep-alives
// and undecodable packets included, or sent since the last call. It may be
// called at any time, and has to be at Next. A Send that the caller cannot do
// because packets are being sent, or the queue is full, counts as done.
func (s *State) Advance(now int64, rx, tx bool) Action {
	if s.timeout == 0 {
		return None
	}
	s.tick = now
	if rx {
		s.rx = now
	}
	if tx {
		s.tx = now
	}
	switch {
	case now-s.rx >= s.timeout:
		s.timeout = 0
		return Down
	case now-s.tx >= s.timeout/4:
		s.tx = now
		return Send
	}
	return None
}

// Next is when Advance is to be called at the latest.
func (s *State) Next() int64 {
	if s.timeout == 0 {
		return Never
	}
	next := min(s.rx+s.timeout, s.tx+s.timeout/4)
	// Look soon again, to notice activity when it happens.
	return min(next, s.tick+max(s.timeout/Grain, int64(MinTick)))
}

// Timeout is the time-out, 0 when there is none or the peer is down.
func (s *State) Timeout() time.Duration { return time.Duration(s.timeout) }
