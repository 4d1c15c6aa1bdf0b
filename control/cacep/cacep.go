// Package cacep is the handshake that opens every flow between two members of
// a layer (spec 40): it says which component the flow is for and exchanges the
// members' addresses. One message goes each way.
//
// The package does no input or output: it takes received messages and the
// time, and gives messages to send and a deadline. An Initiator is not safe for
// concurrent use; the functions are.
package cacep

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/wire"
)

// Timeout is how long each side waits for the other's message (spec 40 §2).
const Timeout = 1000 * time.Millisecond

// Settle is how long both sides must stay silent on a Management or Data
// Transfer flow after the handshake. A reference peer raises a single event for
// all packets that are queued when its component takes the flow, so every
// packet that comes earlier makes it lag by one for the rest of the flow's life
// (spec 40 §10.7, 42 §12.0). Enrolment needs no pause: there the peer reads
// without events.
const Settle = 100 * time.Millisecond

// ErrRefused means that the peer does not have the component.
var ErrRefused = errors.New("peer refused the connection")

// info returns what a member of a layer of kind t sends for a component (spec
// 40 §4), and whether members of such layers have it.
func info(t ipcp.Type, c ipcp.Component, addr uint64) (wire.CEP, bool) {
	switch {
	case c == ipcp.Enrollment:
		return wire.CEP{Component: string(c), Protocol: "OEP", Version: 1, Syntax: wire.SyntaxGPB}, true
	case t == ipcp.Broadcast && c == ipcp.DataTransfer:
		return wire.CEP{Component: string(c)}, true
	case t == ipcp.Unicast && c == ipcp.DataTransfer:
		return wire.CEP{Component: string(c), Protocol: "dtp", Version: 1, Syntax: wire.SyntaxFixed, Address: addr}, true
	case t == ipcp.Unicast && c == ipcp.Management:
		// Its packets are 24 binary bytes; GPB is announced all the same.
		return wire.CEP{Component: string(c), Protocol: "LSP", Version: 1, Syntax: wire.SyntaxGPB, Address: addr}, true
	}
	return wire.CEP{Component: string(c)}, false
}

// compatible says why what the peer announces does not go with own.
func compatible(t ipcp.Type, own, peer *wire.CEP) error {
	switch {
	case peer.Protocol != own.Protocol, peer.Version != own.Version, peer.Syntax != own.Syntax:
		return o7serr.Wrap(o7serr.EIPCP, "peer speaks %q version %d syntax %d for %s, not %q version %d syntax %d",
			peer.Protocol, peer.Version, peer.Syntax, own.Component, own.Protocol, own.Version, own.Syntax)
	case t == ipcp.Unicast && own.Component != string(ipcp.Enrollment) && (peer.Address == 0 || peer.Address > math.MaxUint32):
		return o7serr.Wrap(o7serr.EIPCP, "peer announces %#x, which is no layer address", peer.Address)
	}
	return nil
}

// Initiator is the side that allocated the flow.
type Initiator struct {
	kind     ipcp.Type
	own      wire.CEP
	deadline time.Time
}

// NewInitiator starts a handshake for a component of a unicast layer, which
// must not be empty, on a flow that exists. addr is the member's own layer
// address; Enrollment sends none.
func NewInitiator(now time.Time, comp string, addr uint64) *Initiator {
	return newInitiator(now, ipcp.Unicast, comp, addr)
}

// NewBroadcastInitiator is NewInitiator for a broadcast layer.
func NewBroadcastInitiator(now time.Time, comp string) *Initiator {
	return newInitiator(now, ipcp.Broadcast, comp, 0)
}

func newInitiator(now time.Time, t ipcp.Type, comp string, addr uint64) *Initiator {
	own, _ := info(t, ipcp.Component(comp), addr) // a component nobody has gets refused
	return &Initiator{kind: t, own: own, deadline: now.Add(Timeout)}
}

// Message is the packet to send first.
func (i *Initiator) Message() []byte { return wire.AppendCEP(nil, &i.own) }

// Deadline is when the handshake has failed unless Receive was called.
func (i *Initiator) Deadline() time.Time { return i.deadline }

// Receive takes the peer's answer and returns the peer's layer address, 0 for
// components without. On error the flow is to be released: ErrRefused when the
// peer does not have the component, ETIMEDOUT after the deadline.
func (i *Initiator) Receive(now time.Time, msg []byte) (peer uint64, err error) {
	if now.After(i.deadline) {
		return 0, o7serr.Wrap(o7serr.ETIMEDOUT, "no answer within %v", Timeout)
	}
	m, err := wire.DecodeCEP(msg)
	if err != nil {
		return 0, fmt.Errorf("answer: %w", err)
	}
	if m.Refusal() {
		return 0, fmt.Errorf("no component %q there: %w (%w)", i.own.Component, ErrRefused, o7serr.EIPCP)
	}
	return m.Address, compatible(i.kind, &i.own, m)
}

// Accept answers the message of an initiator in a unicast layer whose own
// address is addr. reply is to be sent if it is not nil, also with an error,
// after which the flow is to be released. Handshakes do not depend on each
// other, so a caller may serve several at the same time.
func Accept(msg []byte, addr uint64) (comp ipcp.Component, peer uint64, reply []byte, err error) {
	return accept(ipcp.Unicast, msg, addr)
}

// AcceptBroadcast is Accept for a broadcast layer.
func AcceptBroadcast(msg []byte) (comp ipcp.Component, reply []byte, err error) {
	comp, _, reply, err = accept(ipcp.Broadcast, msg, 0)
	return comp, reply, err
}

func accept(t ipcp.Type, msg []byte, addr uint64) (ipcp.Component, uint64, []byte, error) {
	m, err := wire.DecodeCEP(msg)
	if err != nil {
		return "", 0, nil, err // spec 40 §6: silence
	}
	own, ok := info(t, ipcp.Component(m.Component), addr)
	if !ok || m.Refusal() {
		return "", 0, wire.AppendCEP(nil, &wire.CEP{}), o7serr.Wrap(o7serr.EIPCP, "peer asks for component %q, which a %v layer has not", m.Component, t)
	}
	// The initiator compares too, so our own message tells it what is wrong.
	reply := wire.AppendCEP(nil, &own)
	if err := compatible(t, &own, m); err != nil {
		return "", 0, reply, err
	}
	return ipcp.Component(m.Component), m.Address, reply, nil
}
