// Package wire holds the codecs of everything O7s puts on a wire: Ethernet
// framing, the data transfer header, flow allocator and OAP messages, and the
// messages of the control plane. They are pure functions from bytes to structs
// and back.
//
// Decoders accept any input: they never panic and never read beyond it, and
// check what the specification lets them check without state. Slices in a
// decoded struct point into the input unless the function says otherwise.
// Encoders append to a slice they are given and write the bytes the reference
// writes. Integers are big-endian except in the data transfer header, which is
// little-endian (spec 20 §2).
//
// All functions are safe for concurrent use; those for packets on the data
// path do not allocate.
package wire

import "errors"

// Reasons a decoder refuses its input. They may come wrapped with the detail;
// those of the data path are returned bare.
var (
	ErrShort       = errors.New("message is shorter than its format requires")
	ErrLong        = errors.New("message is longer than its format allows")
	ErrInvalid     = errors.New("message has a missing or invalid field")
	ErrUnknownCode = errors.New("message code is unknown") // to be ignored, not an attack
)
