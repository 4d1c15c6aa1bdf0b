package ovpn

import (
	"encoding/binary"
	"net/netip"
)

// What an IP packet is to the hub.
type packet struct {
	src, dst netip.Addr
	length   int // of the packet, as its header has it
}

const (
	headerV4 = 20 // at least
	headerV6 = 40
	etherLen = 14

	protoICMP   = 1
	protoICMPv6 = 58
	// A hello is an IP header and nothing else, from its sender's address to
	// all hosts of the link, that tells a hub where the address is. Stations
	// without a use for it drop it.
	protoHelloV4 = 253 // for experiments, RFC 3692
	protoHelloV6 = 59  // no next header, RFC 8200 §4.7
)

var (
	allHostsV4 = netip.AddrFrom4([4]byte{224, 0, 0, 1})
	allHostsV6 = netip.AddrFrom16([16]byte{0xff, 2, 15: 1})
)

// parse reads the addresses of an IP packet; false for what is none.
func parse(p []byte) (packet, bool) {
	if len(p) < headerV4 {
		return packet{}, false
	}
	switch p[0] >> 4 {
	case 4:
		n := int(binary.BigEndian.Uint16(p[2:]))
		if hl := int(p[0]&15) * 4; hl < headerV4 || n < hl || n > len(p) {
			return packet{}, false
		}
		return packet{netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), n}, true
	case 6:
		if len(p) < headerV6 {
			return packet{}, false
		}
		n := headerV6 + int(binary.BigEndian.Uint16(p[4:]))
		if n > len(p) {
			return packet{}, false
		}
		return packet{netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])), n}, true
	}
	return packet{}, false
}

// hello makes the hello of an address.
func hello(a netip.Addr) []byte {
	if a.Is4() {
		p := header4(make([]byte, headerV4), a, allHostsV4, protoHelloV4)
		p[8] = 1 // TTL
		sum4(p)
		return p
	}
	return header6(make([]byte, headerV6), a, allHostsV6, protoHelloV6, 1)
}

// isHello reports whether a packet is one.
func isHello(p []byte, h packet) bool {
	return h.dst == allHostsV4 && len(p) == headerV4 && p[9] == protoHelloV4 ||
		h.dst == allHostsV6 && len(p) == headerV6 && p[6] == protoHelloV6
}

// header4 fills in the header of p, which is the whole packet, but for its sum.
func header4(p []byte, src, dst netip.Addr, proto byte) []byte {
	p[0] = 4<<4 | headerV4/4
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	p[8], p[9] = 64, proto
	copy(p[12:], src.AsSlice())
	copy(p[16:], dst.AsSlice())
	return p
}

func header6(p []byte, src, dst netip.Addr, proto, hops byte) []byte {
	p[0] = 6 << 4
	binary.BigEndian.PutUint16(p[4:], uint16(len(p)-headerV6))
	p[6], p[7] = proto, hops
	copy(p[8:], src.AsSlice())
	copy(p[24:], dst.AsSlice())
	return p
}

// sum4 sets the header's sum.
func sum4(p []byte) {
	p[10], p[11] = 0, 0
	binary.BigEndian.PutUint16(p[10:], checksum(0, p[:int(p[0]&15)*4]))
}

// checksum is the Internet checksum (RFC 1071) of p, begun with sum.
func checksum(sum uint32, p []byte) uint16 {
	for ; len(p) > 1; p = p[2:] {
		sum += uint32(p[0])<<8 | uint32(p[1])
	}
	if len(p) > 0 {
		sum += uint32(p[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// The errors that a hub reports.
type trouble int

const (
	tooBig      trouble = iota // RFC 1191, RFC 8201
	unreachable                // host unreachable, RFC 792; no route, RFC 4443
)

// icmp makes the error packet for p, from the address own of the hub or, if
// that is of the other family, from where p was going; nil where there must be
// none (RFC 1122 §3.2.2, RFC 4443 §2.4).
func icmp(what trouble, p []byte, h packet, own netip.Addr, mtu int) []byte {
	if h.dst.IsMulticast() || !h.src.IsValid() || h.src.IsUnspecified() || h.src.IsMulticast() {
		return nil
	}
	if own.Is4() != h.dst.Is4() || !own.IsValid() {
		own = h.dst
	}
	if h.dst.Is4() {
		hl := int(p[0]&15) * 4
		if binary.BigEndian.Uint16(p[6:])&0x1fff != 0 { // not the first fragment
			return nil
		}
		if p[9] == protoICMP && (h.length <= hl || p[hl] != 0 && p[hl] != 8 && p[hl] < 13) { // an error
			return nil
		}
		const head, quote = headerV4 + 8, 576 - headerV4 - 8 // RFC 1812 §4.3.2.3
		q := make([]byte, head+min(h.length, quote))
		copy(q[head:], p)
		q[20] = 3
		switch what {
		case tooBig:
			q[21] = 4
			binary.BigEndian.PutUint16(q[26:], uint16(min(mtu, 65535)))
		case unreachable:
			q[21] = 1
		}
		binary.BigEndian.PutUint16(q[22:], checksum(0, q[20:]))
		header4(q, own, h.src, protoICMP)
		sum4(q)
		return q
	}
	if p[6] == protoICMPv6 && (h.length <= headerV6 || p[headerV6] < 128) { // an error
		return nil
	}
	const head, quote = headerV6 + 8, 1280 - headerV6 - 8
	q := make([]byte, head+min(h.length, quote))
	copy(q[head:], p)
	switch what {
	case tooBig:
		q[40] = 2
		binary.BigEndian.PutUint32(q[44:], uint32(mtu))
	case unreachable:
		q[40] = 1
	}
	header6(q, own, h.src, protoICMPv6, 64)
	// The pseudo-header: addresses, length, next header.
	sum := uint32(len(q)-headerV6) + protoICMPv6
	for i := 8; i < headerV6; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(q[i:]))
	}
	binary.BigEndian.PutUint16(q[42:], checksum(sum, q[headerV6:]))
	return q
}

// mayFragment reports whether a router may split p.
func mayFragment(p []byte, h packet) bool { return h.dst.Is4() && p[6]&0x40 == 0 }

// fragment splits an IPv4 packet into ones of at most mtu bytes (RFC 791 §3.2)
// and hands each to emit, which does not keep it.
func fragment(p []byte, h packet, mtu int, emit func([]byte)) {
	hl := int(p[0]&15) * 4
	room := (mtu - hl) &^ 7
	if room <= 0 {
		return
	}
	buf := make([]byte, hl+room)
	word := binary.BigEndian.Uint16(p[6:])
	for off := hl; off < h.length; off += room {
		n := min(room, h.length-off)
		q := buf[:hl+n]
		copy(q, p[:hl]) // options too: all of them, not only those to be copied
		copy(q[hl:], p[off:off+n])
		binary.BigEndian.PutUint16(q[2:], uint16(len(q)))
		w := word + uint16((off-hl)/8)
		if off+n < h.length {
			w |= 0x2000 // more fragments
		}
		binary.BigEndian.PutUint16(q[6:], w)
		sum4(q)
		emit(q)
	}
}
