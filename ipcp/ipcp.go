// Package ipcp defines what the resource manager and the layers know of each
// other: the Layer that an IPC process implements, the Flow that is one end of
// a flow between two layers of one daemon, and the Host upcalls.
//
// Recursion is this one interface: an IPC process uses the same Flow towards
// the layer below as a program's end does. A flow inside the daemon is a
// direct call, never a socket.
package ipcp

import (
	"context"
	"fmt"
	"time"

	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/qos"
)

// Type is the kind of an IPC process; the values are those of the
// configuration message (spec 90 §1) and the resource manager's order of
// preference (spec 47 §2).
type Type uint8

// Kinds of IPC processes.
const (
	Local Type = iota
	Unicast
	Broadcast
	EthLLC
	EthDIX
	UDP4
	UDP6
)

var typeNames = [...]string{"local", "unicast", "broadcast", "eth-llc", "eth-dix", "udp4", "udp6"}

func (t Type) String() string {
	if int(t) < len(typeNames) {
		return typeNames[t]
	}
	return fmt.Sprintf("type-%d", uint8(t))
}

// State is the life of an IPC process (spec 47 §3).
type State string

// States an IPC process goes through.
const (
	StateBoot        State = "boot"        // created, not a member of a layer
	StateOperational State = "operational" // member of a layer
	StateShutdown    State = "shutdown"
)

// HashAlg is the directory hash of a layer, numbered as in spec 45 §2.
type HashAlg uint8

// Directory hash algorithms.
const (
	SHA3_224 HashAlg = iota
	SHA3_256
	SHA3_384
	SHA3_512
)

// Event is something that happens to a flow besides a packet (spec 33 §8).
type Event uint8

// Flow events.
const (
	EventDown    Event = iota + 1 // the N-1 flow or the interface went down
	EventUp                       // and came back
	EventDealloc                  // the other end, or the layer, released the flow
	EventPeer                     // nothing heard from the peer for the QoS time-out
)

// Sink receives what comes up a flow. Both methods are called from the lower
// layer's receive goroutine and must not block; Receive takes ownership of the
// buffers (not of the slice). Packets of length 0 are keep-alives.
type Sink interface {
	Receive(pkts []*packet.Buf)
	FlowEvent(Event)
}

// FlowInfo describes a flow; it does not change while the flow lives.
type FlowInfo struct {
	Layer  string // name of the layer that carries it
	IPCP   string // name of the IPC process that carries it
	Type   Type
	QoS    qos.Spec
	MTU    int    // largest packet Send takes, bytes
	MPL    uint32 // maximum packet lifetime, ms
	Local  string // this end's endpoint, for show
	Remote string // the other end's endpoint, for show
}

// Flow is one end of a flow, in the hands of its user (the layer above or the
// resource manager for a program). Methods are safe for concurrent use.
type Flow interface {
	Info() FlowInfo
	// Send passes one packet down and takes ownership of b, also on error.
	// A packet of length 0 is a keep-alive. Errors: o7serr.EFLOWDOWN when the
	// flow is down, EMSGSIZE above the MTU, EAGAIN when queues are full.
	Send(b *packet.Buf) error
	// SetSink says who receives. Packets that arrived before (a layer keeps at
	// most 64) are delivered to it first. Calling it again replaces the sink.
	SetSink(Sink)
	// Close releases this end. The sink is not called after Close returned:
	// Close waits for a call that is running, so the sink must not call it
	// itself (it may start a goroutine that does).
	Close() error
}

// Lingerer is a flow whose endpoint the layer can keep from being used again
// for a while: packets for it may still be on the way (spec 30 §9).
type Lingerer interface {
	// CloseLinger is Close; the endpoint is given to no other flow for d more,
	// unless no other is left.
	CloseLinger(d time.Duration) error
}

// CloseLinger closes f, with a quarantine of d where the layer has that.
func CloseLinger(f Flow, d time.Duration) error {
	if l, ok := f.(Lingerer); ok && d > 0 {
		return l.CloseLinger(d)
	}
	return f.Close()
}

// AllocRequest is a request to a layer for a flow to the service with Hash.
type AllocRequest struct {
	Hash []byte
	QoS  qos.Spec
	Data []byte // piggyback: the OAP request
	// Renew yields a fresh OAP request for a new allocation when no reply came
	// within about a second, and again at growing intervals (spec 10 oddity 10;
	// an identical request must never be repeated). It may be called from any
	// goroutine and must not block; the reply that Alloc returns belongs to the
	// request that Renew returned last. Nil: one attempt only.
	Renew func() []byte
}

// Incoming is a flow request from a peer that waits for an answer. Exactly one
// of Accept and Refuse must be called, once.
type Incoming interface {
	QoS() qos.Spec
	Hash() []byte
	Data() []byte // piggyback: the OAP request; valid until answered
	// Accept sends the positive reply with the OAP response and returns this end.
	Accept(data []byte) (Flow, error)
	// Refuse sends a negative reply (code < 0) where the layer can.
	Refuse(code int32)
}

// Layer is an IPC process: a member of one layer on this machine. Blocking
// methods take a context; all methods are safe for concurrent use.
type Layer interface {
	Type() Type
	Name() string      // of the IPC process
	LayerName() string // "" before bootstrap or enrolment
	State() State
	HashAlg() HashAlg
	Bootstrap(ctx context.Context, cfg Config) error
	// Register makes a service known in the layer's directory from this member.
	Register(hash []byte) error
	Unregister(hash []byte) error
	// Query reports nil when the directory knows the hash. It returns as soon
	// as it is certain and never waits for a local time-out longer than ctx.
	Query(ctx context.Context, hash []byte) error
	// Alloc asks for a flow and waits for the reply: the flow and the reply's
	// piggyback. A refusal is an error that wraps the peer's o7serr.Errno.
	Alloc(ctx context.Context, req AllocRequest) (Flow, []byte, error)
	// Close leaves the layer: flows get EventDealloc.
	Close() error
}

// Component selects what a connection between two members is for (spec 40).
type Component string

// Components of a member.
const (
	Management   Component = "Management"
	DataTransfer Component = "Data Transfer"
	Enrollment   Component = "Enrollment"
)

// Member is a Layer whose members enrol and connect over N-1 flows.
type Member interface {
	Layer
	Enroll(ctx context.Context, dst string) error
	Connect(ctx context.Context, dst string, c Component, q qos.Spec) error
	Disconnect(ctx context.Context, dst string, c Component) error
	// AcceptFlow hands over an N-1 flow that a peer allocated to a name this
	// IPC process is bound to. It must not block.
	AcceptFlow(f Flow, name string)
}

// Host is what a layer asks of the resource manager.
type Host interface {
	// FlowArrived announces a request from a peer. It does not block; the
	// request is answered later, from another goroutine.
	FlowArrived(l Layer, in Incoming)
	// AllocFlow allocates an N-1 flow to name on behalf of IPC process l.
	AllocFlow(ctx context.Context, l Layer, name string, q qos.Spec) (Flow, error)
}

// Config is what a layer is bootstrapped with (spec 47 §1).
type Config struct {
	Type      Type
	LayerName string
	Hash      HashAlg
	Eth       EthConfig
	Unicast   UnicastConfig
}

// EthConfig configures an Ethernet layer.
type EthConfig struct {
	Device    string
	EtherType uint16 // DIX only; 0 means the default 0xA000
}

// RoutingPolicy is the link-state policy of a unicast layer.
type RoutingPolicy uint8

// Link-state policies, numbered as on the wire (spec 41 §4).
const (
	LinkState RoutingPolicy = iota
	LFA
	ECMP
)

func (p RoutingPolicy) String() string {
	return [...]string{"link-state", "lfa", "ecmp"}[p%3]
}

// UnicastConfig configures a unicast layer; members get it at enrolment.
// Times are seconds. DefaultUnicast gives the reference's values.
type UnicastConfig struct {
	AddrSize, EIDSize, MaxTTL     uint8
	Routing                       RoutingPolicy
	TRecalc, TUpdate, TTimeo      uint32
	DHTAlpha, DHTK                uint32
	DHTExpire, DHTRefresh, DHTRep uint32
	Congestion                    uint32 // 0 none, 1 multi-bit ECN
	Peer                          uint64 // enroller's address, 0 at bootstrap
}

// DefaultUnicast returns the defaults of spec 90 §4.
func DefaultUnicast() UnicastConfig {
	return UnicastConfig{
		AddrSize: 4, EIDSize: 8, MaxTTL: 60,
		TRecalc: 4, TUpdate: 15, TTimeo: 60,
		DHTAlpha: 3, DHTK: 8, DHTExpire: 86400, DHTRefresh: 900, DHTRep: 900,
		Congestion: 1,
	}
}
