package wire

import (
	"encoding/binary"
	"fmt"

	"github.com/o7s/o7s-router/lib/qos"
)

// Codes of flow allocator messages (spec 21 §1). FADealloc is our extension,
// which the reference ignores (spec 50 §5).
const (
	FAReq     uint8 = 0
	FAReply   uint8 = 1
	FAUpdate  uint8 = 2
	FADealloc uint8 = 16
)

// Sizes of flow allocator messages (spec 21 §1).
const (
	FALen    = 61   // fixed part
	MaxFALen = 2048 // receivers discard what is longer
)

// MaxFAReqData and MaxFAReplyData bound the piggybacked data. The path's MTU
// bounds it too.
func MaxFAReqData(hashLen int) int { return MaxFALen - FALen - hashLen }

// MaxFAReplyData is the limit for replies.
const MaxFAReplyData = MaxFALen - FALen

// FAMsg is a message of the unicast flow allocator.
type FAMsg struct {
	Code     uint8
	SrcAddr  uint64 // FAReq: the requester's
	REID     uint64 // an endpoint of the receiver of the message
	SEID     uint64 // an endpoint of its sender
	QoS      qos.Spec
	Response int32  // FAReply: 0 or a negative error number
	ECE      uint16 // FAUpdate: congestion level
	Hash     []byte // FAReq
	Data     []byte // FAReq, FAReply: the OAP message
}

// AppendFA appends a message. Hash and Data are written only for the codes that
// carry them; the result must not exceed MaxFALen.
func AppendFA(dst []byte, m *FAMsg) []byte {
	be := binary.BigEndian
	dst = be.AppendUint64(dst, m.SrcAddr)
	dst = be.AppendUint64(dst, m.REID)
	dst = be.AppendUint64(dst, m.SEID)
	dst = be.AppendUint64(dst, m.QoS.Bandwidth)
	dst = be.AppendUint32(dst, uint32(m.Response))
	dst = be.AppendUint32(dst, m.QoS.Delay)
	dst = be.AppendUint32(dst, m.QoS.Loss)
	dst = be.AppendUint32(dst, m.QoS.BER)
	dst = be.AppendUint32(dst, m.QoS.MaxGap)
	dst = be.AppendUint32(dst, m.QoS.Timeout)
	dst = be.AppendUint16(dst, m.ECE)
	dst = append(dst, m.Code, m.QoS.Availability, m.QoS.InOrder)
	switch m.Code {
	case FAReq:
		dst = append(append(dst, m.Hash...), m.Data...)
	case FAReply:
		dst = append(dst, m.Data...)
	}
	return dst
}

// DecodeFA decodes a message in a layer whose directory hash has hashLen
// bytes. ErrUnknownCode comes with the fixed part filled in. What follows a
// message that carries no data is ignored.
func DecodeFA(b []byte, hashLen int) (FAMsg, error) {
	switch {
	case len(b) < FALen:
		return FAMsg{}, fmt.Errorf("%w: %d of %d bytes", ErrShort, len(b), FALen)
	case len(b) > MaxFALen:
		return FAMsg{}, fmt.Errorf("%w: %d bytes, at most %d", ErrLong, len(b), MaxFALen)
	}
	be := binary.BigEndian
	m := FAMsg{
		SrcAddr: be.Uint64(b),
		REID:    be.Uint64(b[8:]),
		SEID:    be.Uint64(b[16:]),
		QoS: qos.Spec{
			Bandwidth:    be.Uint64(b[24:]),
			Delay:        be.Uint32(b[36:]),
			Loss:         be.Uint32(b[40:]),
			BER:          be.Uint32(b[44:]),
			MaxGap:       be.Uint32(b[48:]),
			Timeout:      be.Uint32(b[52:]),
			Availability: b[59],
			InOrder:      b[60],
		},
		Response: int32(be.Uint32(b[32:])),
		ECE:      be.Uint16(b[56:]),
		Code:     b[58],
	}
	rest := b[FALen:]
	switch m.Code {
	case FAReq:
		if len(rest) < hashLen {
			return m, fmt.Errorf("%w: %d of %d bytes of hash", ErrShort, len(rest), hashLen)
		}
		m.Hash, m.Data = rest[:hashLen:hashLen], rest[hashLen:]
	case FAReply:
		m.Data = rest
	case FAUpdate, FADealloc:
	default:
		return m, fmt.Errorf("%w: %d", ErrUnknownCode, m.Code)
	}
	return m, nil
}
