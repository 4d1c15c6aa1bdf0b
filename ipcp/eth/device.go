package eth

import (
	"github.com/o7s/o7s-router/ipcp/eth/core"
	"github.com/o7s/o7s-router/lib/packet"
)

// Device is the Ethernet port under an IPC process. *fastpath.Port is one
// (NewPlane's), ethtest.Port another. Methods are safe for concurrent use.
type Device interface {
	MAC() core.MAC
	MTU() int // of the interface, bytes
	// Send passes a whole frame to the wire and owns it.
	Send(*packet.Buf) error
	// Claim asks for all frames with the EtherType: rx gets them whole, in
	// batches, from the device's receive goroutines, and owns the buffers.
	Claim(etherType uint16, rx func([]*packet.Buf)) (Block, error)
	// OnState registers f to be called when the interface goes down (or loses
	// its carrier) and up, and at once when it is down.
	OnState(f func(up bool)) (cancel func())
	Close() error
}

// Block is a member's set of endpoints on a device.
type Block interface {
	// SetUser makes the fast path hand the frames of an endpoint to us.
	SetUser(endpoint uint16)
	// Clear makes it drop them.
	Clear(endpoint uint16)
	// Release gives up the claim; no call of rx begins afterwards.
	Release()
}

// Opener opens the interface with a name.
type Opener func(device string) (Device, error)
