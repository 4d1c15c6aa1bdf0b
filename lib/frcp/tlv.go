package frcp

import "encoding/binary"

// Between our own ends a packet without data may have a payload behind its
// header: elements of one byte type, two bytes length and a value, big-endian.
// Unknown types are passed over. Reference ends, and old ends of ours, ignore
// such a payload; it is sent only to an end that has shown the Ext bit.
const (
	tlvHeader = 3

	// tlvSack lists what was received beyond the acknowledgement, as pairs
	// of sequence numbers [from, to), in any order.
	tlvSack = 1
	// tlvProbe fills a packet up to the size that is probed; its value starts
	// with that size (32 bits), the rest is zero.
	tlvProbe = 2
	// tlvProbed answers a probe with its size (32 bits).
	tlvProbed = 3
	// tlvTwice tells a sequence number that arrived more than once.
	tlvTwice = 4
	// tlvPiece is a part of a packet of data, see piece.go.
	tlvPiece = 5
)

// maxSpans bounds the spans of a packet: 512 bytes. What a window of thousands
// of packets has more, the next acknowledgements tell.
const maxSpans = 64

// appendSack appends the spans of t. When there are more than fit, those of the
// recent numbers come first, then the highest, which are the newest, and the
// lowest, which are needed first to go on.
func appendSack(p []byte, t spanSet, recent []uint32, room int) []byte {
	n := min(len(t.s), maxSpans, (room-len(p)-tlvHeader)/8)
	if n <= 0 {
		return p
	}
	p = append(p, tlvSack)
	p = binary.BigEndian.AppendUint16(p, uint16(8*n))
	put := func(v span) {
		if n > 0 {
			p = binary.BigEndian.AppendUint32(p, v.from)
			p = binary.BigEndian.AppendUint32(p, v.to)
			n--
		}
	}
	if n < len(t.s) {
		for _, x := range recent {
			if i := t.find(x); i < len(t.s) {
				put(t.s[i])
			}
		}
		for i, half := len(t.s)-1, n/2; n > half; i-- {
			put(t.s[i])
		}
	}
	for i := 0; n > 0; i++ {
		put(t.s[i])
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
