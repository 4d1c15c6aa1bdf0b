package frcp

import "encoding/binary"

// Between our own ends a packet without data may have a payload behind its
// header: elements of one byte type, two bytes length and a value, big-endian.
// Unknown types are passed over. Reference ends, and old ends of ours, ignore
// such a payload; it is sent only to an end that has shown the Ext bit.
const (
	tlvHeader = 3

	// tlvSack lists what was received beyond the acknowledgement, as pairs
	// of sequence numbers [from, to), lowest first.
	tlvSack = 1
	// tlvProbe fills a packet up to the size that is probed; its value starts
	// with that size (32 bits), the rest is zero.
	tlvProbe = 2
	// tlvProbed answers a probe with its size (32 bits).
	tlvProbed = 3
)

// maxSpans bounds the spans of a packet: 512 bytes. What a window of thousands
// of packets has more, the next acknowledgements tell.
const maxSpans = 64

// appendSack appends the spans. The highest are the newest: when not all fit,
// the lowest, which are needed to send again, go first and the last one ends
// the list.
func appendSack(p []byte, s []span, room int) []byte {
	n := min(len(s), maxSpans, (room-tlvHeader)/8)
	if n <= 0 {
		return p
	}
	p = append(p, tlvSack)
	p = binary.BigEndian.AppendUint16(p, uint16(8*n))
	for i := range n {
		v := s[i]
		if i == n-1 {
			v = s[len(s)-1]
		}
		p = binary.BigEndian.AppendUint32(p, v.from)
		p = binary.BigEndian.AppendUint32(p, v.to)
	}
	return p
}

// appendSize appends an element whose value is a size, padded with zeros to
// length bytes.
func appendSize(p []byte, typ byte, size uint32, length int) []byte {
	p = append(p, typ)
	p = binary.BigEndian.AppendUint16(p, uint16(length))
	p = binary.BigEndian.AppendUint32(p, size)
	for range length - 4 {
		p = append(p, 0)
	}
	return p
}

// nextTLV splits the first element off p; ok is false at the end, and for what
// is no element.
func nextTLV(p []byte) (typ byte, value, rest []byte, ok bool) {
	if len(p) < tlvHeader {
		return 0, nil, nil, false
	}
	n := int(binary.BigEndian.Uint16(p[1:]))
	if len(p) < tlvHeader+n {
		return 0, nil, nil, false
	}
	return p[0], p[tlvHeader : tlvHeader+n], p[tlvHeader+n:], true
}

func be32(p []byte) uint32 { return binary.BigEndian.Uint32(p) }
