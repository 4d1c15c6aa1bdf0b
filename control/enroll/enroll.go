// Package enroll is the exchange by which a new IPC process gets the
// configuration of a layer from one of its members (spec 41). It runs on a flow
// that the handshake of package cacep has opened for the component Enrollment.
//
//	joiner                                      enroller
//	Request()  ------------------------------>  Receive
//	Receive    <------------------------------
//	(starts its components)
//	Ack()      ------------------------------>  ReceiveAck
//	(releases the flow)                         (releases the flow)
//
// Joiner and Enroller stand for one exchange each and share nothing, so a
// member can serve any number of joiners at the same time. They do no input or
// output: the time and random numbers are passed in. They are not safe for
// concurrent use.
package enroll

import (
	"fmt"
	"io"
	"time"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/wire"
)

// Timers of the exchange (spec 41 §2).
const (
	// ResponseTimeout is how long a joiner waits for the configuration.
	ResponseTimeout = 1000 * time.Millisecond
	// ExchangeTimeout is when the tools give up, and so when an enroller need
	// not wait for its joiner any longer.
	ExchangeTimeout = 20 * time.Second
)

// maxClockOffset is the difference of clocks above which a joiner is warned:
// directory entries and flow requests carry absolute times.
const maxClockOffset = 20 * time.Millisecond

// Joiner is the side that wants to become a member.
type Joiner struct {
	kind ipcp.Type
	id   [wire.EnrollIDLen]byte
	sent time.Time
}

// NewJoiner starts an exchange for an IPC process of kind t, Unicast or
// Broadcast. The request is to be sent now.
func NewJoiner(now time.Time, random io.Reader, t ipcp.Type) (*Joiner, error) {
	j := &Joiner{kind: t, sent: now}
	if _, err := io.ReadFull(random, j.id[:]); err != nil {
		return nil, fmt.Errorf("enrolment id: %w", err)
	}
	return j, nil
}

// Request is the message to send first.
func (j *Joiner) Request() []byte { return wire.AppendEnrollReq(nil, &wire.EnrollReq{ID: j.id}) }

// Deadline is when the enrolment has failed unless Receive was called.
func (j *Joiner) Deadline() time.Time { return j.sent.Add(ResponseTimeout) }

// Membership is what a joiner learns.
type Membership struct {
	Config ipcp.Config // complete and valid; Unicast.Peer is the enroller
	// ClockOffset is the enroller's clock less ours. It is known up to half of
	// the time the exchange took.
	ClockOffset time.Duration
	// Warnings are for the operator: they do not hinder the enrolment.
	Warnings []string
}

// Receive takes the enroller's response. After an error the flow is to be
// released without Ack. Errors: ETIMEDOUT after the deadline, EIPCPTYPE for a
// layer of another kind, EINVAL for a configuration we cannot work with, and
// the number that a refusing enroller gave.
func (j *Joiner) Receive(now time.Time, msg []byte) (*Membership, error) {
	elapsed := now.Sub(j.sent)
	if elapsed > ResponseTimeout {
		return nil, o7serr.Wrap(o7serr.ETIMEDOUT, "no response within %v", ResponseTimeout)
	}
	r, err := wire.DecodeEnrollResp(msg)
	switch {
	case err != nil:
		return nil, fmt.Errorf("response: %w", err)
	case r.ID != j.id:
		return nil, fmt.Errorf("response to another request: %w", wire.ErrInvalid)
	case r.Response < 0:
		return nil, fmt.Errorf("enroller refused: %w", o7serr.FromCode(r.Response, ""))
	case r.Conf.Type != uint32(j.kind):
		return nil, o7serr.Wrap(o7serr.EIPCPTYPE, "layer %q is of type %d, not %v", r.Conf.LayerName, r.Conf.Type, j.kind)
	}
	cfg, warnings, err := fromWire(r.Conf)
	if err != nil {
		return nil, fmt.Errorf("layer %q: %w", r.Conf.LayerName, err)
	}
	m := &Membership{Config: cfg, Warnings: warnings}
	// The enroller read its clock between our sending and receiving. (The
	// reference has a slip of sign here, spec 41 §5.1.)
	m.ClockOffset = time.Unix(r.Sec, int64(r.Nsec)).Sub(j.sent.Add(elapsed / 2))
	if off := m.ClockOffset.Abs(); off-elapsed/2 > maxClockOffset {
		m.Warnings = append(m.Warnings, fmt.Sprintf("enroller's clock differs from ours by %v: synchronise them", m.ClockOffset.Round(time.Millisecond)))
	}
	return m, nil
}

// Ack is the message to send once the components run.
func (j *Joiner) Ack() []byte { return wire.AppendEnrollAck(nil, &wire.EnrollAck{ID: j.id}) }

// Enroller is the member that a joiner asks.
type Enroller struct {
	conf     *wire.LayerConfig
	id       [wire.EnrollIDLen]byte
	deadline time.Time
}

// NewEnroller serves one joiner with cfg, which must be valid. self is the
// member's own address, the joiner's first directory contact; 0 in a broadcast
// layer.
func NewEnroller(now time.Time, cfg ipcp.Config, self uint64) *Enroller {
	cfg.Unicast.Peer = self
	return &Enroller{conf: toWire(cfg), deadline: now.Add(ExchangeTimeout)}
}

// Deadline is when a joiner that has not finished is to be given up.
func (e *Enroller) Deadline() time.Time { return e.deadline }

// Receive takes the joiner's request and returns the response to send.
func (e *Enroller) Receive(now time.Time, msg []byte) (response []byte, err error) {
	m, err := wire.DecodeEnrollReq(msg)
	if err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	e.id = m.ID
	return wire.AppendEnrollResp(nil, &wire.EnrollResp{
		ID: m.ID, Sec: now.Unix(), Nsec: int32(now.Nanosecond()), Conf: e.conf,
	}), nil
}

// ReceiveAck takes the joiner's acknowledgement; afterwards the flow is to be
// released. Nil means that the layer has a new member. An id that is not the
// request's is not an error (spec 41 §5.2) but told by idMatches.
func (e *Enroller) ReceiveAck(msg []byte) (idMatches bool, err error) {
	m, err := wire.DecodeEnrollAck(msg)
	if err != nil {
		return false, fmt.Errorf("acknowledgement: %w", err)
	}
	if m.Result != 0 {
		return m.ID == e.id, fmt.Errorf("joiner failed with %d: %w", m.Result, o7serr.EIPCP)
	}
	return m.ID == e.id, nil
}
