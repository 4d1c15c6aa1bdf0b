package core

import (
	"encoding/binary"
	"errors"

	"github.com/o7s/o7s-router/lib/wire"
)

// MAC is an Ethernet address.
type MAC = [6]byte

// Framer is what distinguishes the variants of the Ethernet layer: framing,
// management layout and endpoint numbers (spec 10 §2, §3).
type Framer interface {
	// Endpoints are the numbers for flows.
	Endpoints() (first, last uint16)
	// MaxMTU caps the interface's MTU; Overhead is what of it the variant's
	// header takes.
	MaxMTU() int
	Overhead() int
	// Header is the header of data frames to endpoint remote of a member, from
	// endpoint local of ours, but for the length, which SetLength writes.
	Header(to, from MAC, remote, local uint16) []byte
	SetLength(header []byte, payload int)
	// Parse splits a frame; it must not allocate. Management frames have
	// endpoint 0, whatever the variant's number for it is.
	Parse(frame []byte) (Frame, error)
	// MgmtFrame is a whole frame with m. MgmtLen is the fixed part of m.
	MgmtFrame(to, from MAC, m *wire.EthMgmt) []byte
	MgmtLen() int
	// DecodeMgmt decodes the payload of a management frame. Errors:
	// wire.ErrUnknownCode, others for malformed ones.
	DecodeMgmt(payload []byte, hashLen int) (wire.EthMgmt, error)
}

// Frame is a frame as the demultiplexer sees it.
type Frame struct {
	Dst, Src      MAC
	Local         uint16 // endpoint it is for; 0: management
	Offset, Bytes int    // where the payload is
}

// ErrOtherProtocol says that a frame belongs to another layer or protocol.
var ErrOtherProtocol = errors.New("frame of another protocol")

// DIX is Ethernet II framing with an EtherType of the layer (spec 10 §2.1).
type DIX struct{ EtherType uint16 }

// dixOverhead is EID and length, which count as payload for the interface.
const dixOverhead = wire.DIXHeaderLen - wire.EthHeaderLen

// Endpoints implements Framer.
func (DIX) Endpoints() (first, last uint16) { return wire.MinEID, wire.MaxEID }

// MaxMTU implements Framer.
func (DIX) MaxMTU() int { return 65535 }

// Overhead implements Framer.
func (DIX) Overhead() int { return dixOverhead }

// Header implements Framer. There is no source endpoint in a DIX frame.
func (d DIX) Header(to, from MAC, remote, _ uint16) []byte {
	h := make([]byte, wire.DIXHeaderLen)
	wire.PutDIX(h, to, from, d.EtherType, remote, 0)
	return h
}

// SetLength implements Framer.
func (DIX) SetLength(header []byte, payload int) {
	binary.BigEndian.PutUint16(header[16:], uint16(payload))
}

// Parse implements Framer.
func (d DIX) Parse(frame []byte) (Frame, error) {
	h, payload, err := wire.ParseDIX(frame)
	if err != nil {
		return Frame{}, err
	}
	if h.EtherType != d.EtherType {
		return Frame{}, ErrOtherProtocol
	}
	return Frame{Dst: h.Dst, Src: h.Src, Local: h.EID, Offset: wire.DIXHeaderLen, Bytes: len(payload)}, nil
}

// MgmtFrame implements Framer.
func (d DIX) MgmtFrame(to, from MAC, m *wire.EthMgmt) []byte {
	frame := d.Header(to, from, wire.MgmtEID, 0)
	frame = wire.AppendDIXMgmt(frame, m)
	d.SetLength(frame, len(frame)-wire.DIXHeaderLen)
	return frame
}

// MgmtLen implements Framer.
func (DIX) MgmtLen() int { return 39 }

// DecodeMgmt implements Framer.
func (DIX) DecodeMgmt(payload []byte, hashLen int) (wire.EthMgmt, error) {
	return wire.DecodeDIXMgmt(payload, hashLen)
}
