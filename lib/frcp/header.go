package frcp

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/o7s/o7s-router/lib/qos"
)

// Flags is the first byte of a header.
type Flags uint8

// Flags of spec 30 §2.1, and Ext of spec 50 §2. First and More mark fragments
// between our own ends (spec 50 §4) and mean nothing otherwise.
const (
	Data  Flags = 0x01 // carries data: the sequence number is valid
	DRF   Flags = 0x02 // data run flag: nothing is outstanding before this packet
	Ack   Flags = 0x04 // the ack field is valid
	FC    Flags = 0x08 // the window field is valid
	RDVS  Flags = 0x10 // rendez-vous: the sender's window is closed
	First Flags = 0x20
	More  Flags = 0x40
	Ext   Flags = 0x80 // the sender is one of ours
)

const fragMask = First | More

// Header is the content of a header, whatever its encoding.
type Header struct {
	Flags  Flags
	Window uint32 // low 24 bits of the right window edge
	Seq    uint32
	Ack    uint32 // everything before it was received
}

// Codec is the encoding of a header: the 12 bytes of spec 30, and later the
// longer one that is announced. Implementations are stateless.
type Codec interface {
	// Len is the length of an encoded header in bytes.
	Len() int
	// Put encodes h into the first Len bytes of p.
	Put(p []byte, h Header)
	// Parse decodes the header at the start of p; false if p is too short.
	Parse(p []byte) (Header, bool)
}

// Header12 is the encoding of spec 30 §2.1, big-endian. Fields whose flag is
// not set are parsed as they are; Conn ignores them.
type Header12 struct{}

// HeaderLen is the length of a Header12.
const HeaderLen = 12

// Len is 12.
func (Header12) Len() int { return HeaderLen }

// Put implements Codec. Bits of Window above the 24th are cut off.
func (Header12) Put(p []byte, h Header) {
	_ = p[HeaderLen-1]
	binary.BigEndian.PutUint32(p, uint32(h.Flags)<<24|h.Window&windowMask)
	binary.BigEndian.PutUint32(p[4:], h.Seq)
	binary.BigEndian.PutUint32(p[8:], h.Ack)
}

// Parse implements Codec.
func (Header12) Parse(p []byte) (Header, bool) {
	if len(p) < HeaderLen {
		return Header{}, false
	}
	w := binary.BigEndian.Uint32(p)
	return Header{
		Flags:  Flags(w >> 24),
		Window: w & windowMask,
		Seq:    binary.BigEndian.Uint32(p[4:]),
		Ack:    binary.BigEndian.Uint32(p[8:]),
	}, true
}

const windowMask = 1<<24 - 1

// CRCLen is the length of the trailer of flows with ber 0.
const CRCLen = 4

// AppendCRC appends the trailer over all of p, big-endian (spec 30 §2.1). Flows
// without FRCP (Bare) whose ber is 0 use it directly.
func AppendCRC(p []byte) []byte {
	return binary.BigEndian.AppendUint32(p, crc32.ChecksumIEEE(p))
}

// CheckCRC returns p without its trailer; false if that does not fit.
func CheckCRC(p []byte) ([]byte, bool) {
	n := len(p) - CRCLen
	if n < 0 || crc32.ChecksumIEEE(p[:n]) != binary.BigEndian.Uint32(p[n:]) {
		return nil, false
	}
	return p[:n], true
}

// Mode is the machinery that a specification asks for (spec 30 §1).
type Mode uint8

// Modes.
const (
	Bare     Mode = iota // no FRCP: packets travel as they are
	Ordered              // sequence numbers and flow control, losses stay lost
	Reliable             // retransmission as well
)

func (m Mode) String() string { return [...]string{"bare", "ordered", "reliable"}[m] }

// ModeOf tells which machinery s asks for. Both ends of a flow have the same s.
func ModeOf(s qos.Spec) Mode {
	switch {
	case s.InOrder == 0:
		return Bare
	case s.Loss == 0:
		return Reliable
	}
	return Ordered
}

// before reports whether a is before b, modulo 2^32.
func before(a, b uint32) bool { return int32(a-b) < 0 }

// edge rebuilds the 32-bit edge nearest to near whose low 24 bits are w.
func edge(near, w uint32) uint32 {
	return near + uint32(int32((w-near)<<8)>>8)
}
