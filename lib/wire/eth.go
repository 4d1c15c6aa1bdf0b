package wire

import (
	"encoding/binary"
	"fmt"

	"github.com/o7s/o7s-router/lib/qos"
)

// Ethernet layers (spec 10).
const (
	// DefaultEtherType is what eth-dix uses when nothing is configured.
	DefaultEtherType = 0xA000
	// EthHeaderLen is the length of an Ethernet header.
	EthHeaderLen = 14
	// DIXHeaderLen is the Ethernet header plus EID and length.
	DIXHeaderLen = 18
	// MgmtEID is the destination EID of management frames.
	MgmtEID = 0
	// MinEID and MaxEID bound the endpoints of flows: the reference's flow
	// table has 4096 entries and reserves the first 64 (spec 10 §2.4).
	MinEID = 64
	MaxEID = 4095
)

// Broadcast is the destination of name queries.
var Broadcast = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// DIX is the header of an eth-dix frame (spec 10 §2.1).
type DIX struct {
	Dst, Src  [6]byte
	EtherType uint16
	EID       uint16 // of the destination; MgmtEID for management
	Length    uint16 // of the payload, bytes
}

// AppendDIX appends a frame: header and payload, without padding. The payload
// must fit the layer's MTU less 4 bytes, at most 65535.
func AppendDIX(dst []byte, dstMAC, srcMAC [6]byte, etherType, eid uint16, payload []byte) []byte {
	var h [DIXHeaderLen]byte
	PutDIX(h[:], dstMAC, srcMAC, etherType, eid, len(payload))
	return append(append(dst, h[:]...), payload...)
}

// PutDIX writes the header of a frame with n bytes of payload into the first
// DIXHeaderLen bytes of b, which must be that long.
func PutDIX(b []byte, dstMAC, srcMAC [6]byte, etherType, eid uint16, n int) {
	_ = b[DIXHeaderLen-1]
	copy(b, dstMAC[:])
	copy(b[6:], srcMAC[:])
	binary.BigEndian.PutUint16(b[12:], etherType)
	binary.BigEndian.PutUint16(b[14:], eid)
	binary.BigEndian.PutUint16(b[16:], uint16(n))
}

// ParseDIX splits a frame into header and payload. What follows the payload is
// padding and ignored. A length that does not fit the frame gives ErrShort. The
// EtherType is not checked.
func ParseDIX(frame []byte) (h DIX, payload []byte, err error) {
	if len(frame) < DIXHeaderLen {
		return DIX{}, nil, ErrShort
	}
	copy(h.Dst[:], frame)
	copy(h.Src[:], frame[6:])
	h.EtherType = binary.BigEndian.Uint16(frame[12:])
	h.EID = binary.BigEndian.Uint16(frame[14:])
	h.Length = binary.BigEndian.Uint16(frame[16:])
	end := DIXHeaderLen + int(h.Length)
	if end > len(frame) {
		return DIX{}, nil, ErrShort
	}
	return h, frame[DIXHeaderLen:end:end], nil
}

// Codes of Ethernet management messages (spec 10 §3.3). EthDealloc is our
// extension, which the reference ignores (spec 50 §5).
const (
	FlowReq        uint8 = 0
	FlowReply      uint8 = 1
	NameQueryReq   uint8 = 2
	NameQueryReply uint8 = 3
	EthDealloc     uint8 = 16
)

// dixMgmtLen is the fixed part of a DIX management message.
const dixMgmtLen = 39

// EthMgmt is a management message of an Ethernet layer. The same struct serves
// both framings: only the layout of the fixed part differs (spec 10 §3).
type EthMgmt struct {
	SrcEID, DstEID uint16
	QoS            qos.Spec
	Response       int32
	Code           uint8
	Hash           []byte // FlowReq, NameQueryReq, NameQueryReply
	Data           []byte // FlowReq, FlowReply: the OAP message
}

// hasHash and hasData say what follows the fixed part for a code.
func (m *EthMgmt) hasHash() bool {
	return m.Code == FlowReq || m.Code == NameQueryReq || m.Code == NameQueryReply
}

func (m *EthMgmt) hasData() bool { return m.Code == FlowReq || m.Code == FlowReply }

// AppendDIXMgmt appends the payload of a DIX management frame. Hash and Data
// are written only for the codes that carry them; Hash must have the length of
// the layer's directory hash.
func AppendDIXMgmt(dst []byte, m *EthMgmt) []byte {
	be := binary.BigEndian
	dst = be.AppendUint16(dst, m.SrcEID)
	dst = be.AppendUint16(dst, m.DstEID)
	dst = be.AppendUint32(dst, m.QoS.Loss)
	dst = be.AppendUint64(dst, m.QoS.Bandwidth)
	dst = be.AppendUint32(dst, m.QoS.BER)
	dst = be.AppendUint32(dst, m.QoS.MaxGap)
	dst = be.AppendUint32(dst, m.QoS.Delay)
	dst = be.AppendUint32(dst, m.QoS.Timeout)
	dst = be.AppendUint32(dst, uint32(m.Response))
	dst = append(dst, m.QoS.InOrder, m.Code, m.QoS.Availability)
	if m.hasHash() {
		dst = append(dst, m.Hash...)
	}
	if m.hasData() {
		dst = append(dst, m.Data...)
	}
	return dst
}

// DecodeDIXMgmt decodes the payload of a DIX management frame of a layer whose
// directory hash has hashLen bytes. ErrUnknownCode comes with the fixed part
// filled in. What follows a message that carries no data is ignored.
func DecodeDIXMgmt(b []byte, hashLen int) (EthMgmt, error) {
	if len(b) < dixMgmtLen {
		return EthMgmt{}, fmt.Errorf("%w: %d of %d bytes", ErrShort, len(b), dixMgmtLen)
	}
	be := binary.BigEndian
	m := EthMgmt{
		SrcEID: be.Uint16(b),
		DstEID: be.Uint16(b[2:]),
		QoS: qos.Spec{
			Loss:         be.Uint32(b[4:]),
			Bandwidth:    be.Uint64(b[8:]),
			BER:          be.Uint32(b[16:]),
			MaxGap:       be.Uint32(b[20:]),
			Delay:        be.Uint32(b[24:]),
			Timeout:      be.Uint32(b[28:]),
			InOrder:      b[36],
			Availability: b[38],
		},
		Response: int32(be.Uint32(b[32:])),
		Code:     b[37],
	}
	return m, m.decodeTrailer(b[dixMgmtLen:], hashLen)
}

// decodeTrailer takes hash and data from what follows the fixed part.
func (m *EthMgmt) decodeTrailer(b []byte, hashLen int) error {
	switch m.Code {
	case FlowReq, FlowReply, NameQueryReq, NameQueryReply, EthDealloc:
	default:
		return fmt.Errorf("%w: %d", ErrUnknownCode, m.Code)
	}
	if m.hasHash() {
		if len(b) < hashLen {
			return fmt.Errorf("%w: %d of %d bytes of hash", ErrShort, len(b), hashLen)
		}
		m.Hash, b = b[:hashLen:hashLen], b[hashLen:]
	}
	if m.hasData() {
		m.Data = b
	}
	return nil
}
