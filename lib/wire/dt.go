package wire

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
)

// EIDs of a unicast layer (spec 20 §2.3).
const (
	FlowAllocatorEID = 0
	DirectoryEID     = 1
	MinFlowEID       = 64 // smaller ones belong to components
)

// dtFixedLen is the data transfer header without the address: qc, ttl, ecn and
// 8 bytes of EID. No other EID size exists in the field (spec 20 §2.1).
const dtFixedLen = 3 + 8

// DT is the data transfer header (spec 20 §2). On the wire it is little-endian.
type DT struct {
	Dst          uint64 // address of the destination node
	QC, TTL, ECN uint8  // QoS cube, hop limit, congestion mark
	EID          uint64 // endpoint in the destination node
}

// DTLen is the length of the header for addresses of addrSize bytes: 15 for
// the usual 4.
func DTLen(addrSize int) int { return addrSize + dtFixedLen }

// PutDT writes the header into the first DTLen(addrSize) bytes of b, which must
// be that long. addrSize is 1 to 8; only the low bytes of the address are sent.
func PutDT(b []byte, addrSize int, h DT) {
	_ = b[addrSize+dtFixedLen-1]
	for i := range addrSize {
		b[i] = byte(h.Dst >> (8 * i))
	}
	b[addrSize], b[addrSize+1], b[addrSize+2] = h.QC, h.TTL, h.ECN
	binary.LittleEndian.PutUint64(b[addrSize+3:], h.EID)
}

// ParseDT splits a packet into header and payload; ErrShort when the header
// does not fit.
func ParseDT(b []byte, addrSize int) (h DT, payload []byte, err error) {
	n := addrSize + dtFixedLen
	if len(b) < n {
		return DT{}, nil, ErrShort
	}
	for i := range addrSize {
		h.Dst |= uint64(b[i]) << (8 * i)
	}
	h.QC, h.TTL, h.ECN = b[addrSize], b[addrSize+1], b[addrSize+2]
	h.EID = binary.LittleEndian.Uint64(b[addrSize+3:])
	return h, b[n:], nil
}

// AddrString gives the text form of a layer address (spec 20 §2.2): hex bytes
// separated by dots, the least significant first, so 0x0a1b2c3d is
// "3d.2c.1b.0a". Addresses above 32 bits have eight bytes.
func AddrString(addr uint64) string {
	n := 4
	if addr > 0xffffffff {
		n = 8
	}
	const digits = "0123456789abcdef"
	var b [8*3 - 1]byte
	for i := range n {
		v := byte(addr >> (8 * i))
		b[3*i], b[3*i+1] = digits[v>>4], digits[v&15]
		if i < n-1 {
			b[3*i+2] = '.'
		}
	}
	return string(b[:3*n-1])
}

// ParseAddr reads what AddrString writes, and the decimal number that some
// outputs show instead.
func ParseAddr(s string) (uint64, error) {
	if !strings.Contains(s, ".") {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("address %q is neither dotted hex nor a decimal number", s)
		}
		return v, nil
	}
	parts := strings.Split(s, ".")
	if len(parts) != 4 && len(parts) != 8 {
		return 0, fmt.Errorf("address %q has %d bytes, not 4 or 8", s, len(parts))
	}
	var addr uint64
	for i, p := range parts {
		v, err := strconv.ParseUint(p, 16, 8)
		if err != nil || len(p) != 2 {
			return 0, fmt.Errorf("address %q: %q is not a byte of two hex digits", s, p)
		}
		addr |= v << (8 * i)
	}
	return addr, nil
}
