package wire

import (
	"encoding/binary"
	"fmt"
)

// Lengths of link-state packets: an announcement (spec 42 §2), and the
// withdrawal that is ours (spec 50 §1) and that the reference drops.
const (
	LSALen      = 24
	WithdrawLen = 32
)

// kindWithdraw follows the LSA in a withdrawal.
const kindWithdraw = 1

// LSA announces, or withdraws, the adjacency from Src to Dst.
type LSA struct {
	Dst      uint64 // far end of the adjacency
	Src      uint64 // originator
	Seqno    uint64
	Withdraw bool
}

// AppendTo appends the packet: 24 bytes, or 32 for a withdrawal.
func (l LSA) AppendTo(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint64(dst, l.Dst)
	dst = binary.BigEndian.AppendUint64(dst, l.Src)
	dst = binary.BigEndian.AppendUint64(dst, l.Seqno)
	if l.Withdraw {
		dst = binary.BigEndian.AppendUint64(dst, kindWithdraw)
	}
	return dst
}

// AppendLSA appends the packet of l to dst.
func AppendLSA(dst []byte, l LSA) []byte { return l.AppendTo(dst) }

// ParseLSA decodes a packet of a management flow. Addresses are not checked. An
// extension of unknown kind gives ErrUnknownCode.
func ParseLSA(b []byte) (LSA, error) {
	switch {
	case len(b) == LSALen, len(b) == WithdrawLen:
	case len(b) < WithdrawLen:
		return LSA{}, fmt.Errorf("%w: %d bytes, not %d or %d", ErrShort, len(b), LSALen, WithdrawLen)
	default:
		return LSA{}, fmt.Errorf("%w: %d bytes, not %d or %d", ErrLong, len(b), LSALen, WithdrawLen)
	}
	l := LSA{
		Dst:   binary.BigEndian.Uint64(b),
		Src:   binary.BigEndian.Uint64(b[8:]),
		Seqno: binary.BigEndian.Uint64(b[16:]),
	}
	if len(b) == WithdrawLen {
		if k := binary.BigEndian.Uint64(b[LSALen:]); k != kindWithdraw {
			return LSA{}, fmt.Errorf("%w: link-state kind %d", ErrUnknownCode, k)
		}
		l.Withdraw = true
	}
	return l, nil
}
