package frcp

import (
	"encoding/binary"

	"github.com/o7s/o7s-router/lib/packet"
)

// A packet that was given a sequence number and turns out to be larger than the
// path carries - it was written before the peer was known, or the path has
// become narrower - goes in pieces: control packets with an element tlvPiece.
// Its value is
//
//	sequence number of the packet (32 bits), length of its data (16),
//	offset of the piece (16), flags of the packet (8), the piece
//
// big-endian. Offsets, and the lengths of all pieces but the last, are multiples
// of pieceUnit, so that 64 bits tell which are there. To everything else it is
// one packet, sent with its first piece.

const (
	pieceHeader = 9
	// maxPartial bounds the packets of which some pieces are there.
	maxPartial = 64
	// maxPartialLen is the length of those; of a longer packet pieces are taken
	// only while it is the next in order.
	maxPartialLen = 16384
)

// pieceUnit divides the offsets of the pieces of n bytes.
func pieceUnit(n int) int { return max(64, (n+63)/64) }

// cut is a packet that is being sent in pieces.
type cut struct {
	on    bool
	flags Flags
	seq   uint32
	off   int
}

// cutPacket sends the first piece of a packet.
func (c *Conn) cutPacket(now int64, dst []byte, f Flags, seq uint32) int {
	c.wantLarger(now)
	c.cut = cut{on: true, flags: f, seq: seq}
	return c.nextPiece(now, dst)
}

// nextPiece sends the next one; 0: there is none, the packet has arrived.
func (c *Conn) nextPiece(now int64, dst []byte) int {
	k := &c.cut
	k.on = false
	if k.seq-c.lwe >= c.nxt-c.lwe {
		return 0
	}
	all := payload(c.out.at(k.seq))
	if k.off >= len(all) {
		return 0
	}
	u := pieceUnit(len(all))
	n := min(max((c.mtu.limit-c.overhead()-tlvHeader-pieceHeader)/u, 1)*u, len(all)-k.off)
	h := Header{Flags: k.flags & DRF}
	if h.Flags != 0 {
		h.Seq = k.seq
	}
	p := dst[c.pre+c.hdr:][:tlvHeader+pieceHeader+n]
	p[0] = tlvPiece
	binary.BigEndian.PutUint16(p[1:], uint16(pieceHeader+n))
	binary.BigEndian.PutUint32(p[3:], k.seq)
	binary.BigEndian.PutUint16(p[7:], uint16(len(all)))
	binary.BigEndian.PutUint16(p[9:], uint16(k.off))
	p[11] = byte(k.flags | Ext)
	copy(p[12:], all[k.off:])
	k.off += n
	k.on = k.off < len(all)
	c.sAct = now
	c.stats.Pieces++
	return c.seal(dst, h, p)
}

// onPiece takes a piece; with the last one the packet has arrived.
func (c *Conn) onPiece(now int64, v []byte) {
	if !c.reliable || len(v) <= pieceHeader {
		return
	}
	if !c.rRun || now-c.rData > c.rExpire {
		c.stats.NoRun++
		return
	}
	seq, total, off, f := be32(v), int(binary.BigEndian.Uint16(v[4:])), int(binary.BigEndian.Uint16(v[6:])), Flags(v[8])
	v = v[pieceHeader:]
	u, end := pieceUnit(total), off+len(v)
	if off%u != 0 || end > total || end%u != 0 && end != total || total > c.maxMessage {
		c.stats.Bad++
		return
	}
	d := int32(seq - c.next)
	switch {
	case d < 0:
		c.duplicate(seq)
		return
	case !before(seq, c.rEdge):
		c.stats.OutOfWindow++
		c.ctlDue = true
		return
	}
	c.early.reserve(c.next, uint32(d)+1, uint32(len(c.early.s)))
	a := c.early.at(seq)
	if a.full {
		c.duplicate(seq)
		return
	}
	if a.buf != nil && a.buf.Len() != total {
		c.stats.Bad++
		return
	}
	c.rData = now
	if a.buf == nil {
		if d > 0 && (c.partials >= maxPartial || total > maxPartialLen) {
			c.stats.OutOfWindow++
			return
		}
		a.buf = packet.Get(total)
		c.partials++
	}
	copy(a.buf.Bytes()[off:], v)
	first, n := off/u, (len(v)+u-1)/u
	a.mask |= (1<<n - 1) << first
	if a.mask != 1<<((total+u-1)/u)-1 {
		return
	}
	b := a.buf
	*a = arrival{}
	c.partials--
	c.onData(now, Header{Flags: f&(DRF|fragMask) | Data | Ext, Seq: seq}, b.Bytes(), false)
	b.Release()
}

// dropPartial drops the pieces of the packet seq: it has come whole.
func (c *Conn) dropPartial(seq uint32) {
	if len(c.early.s) == 0 {
		return
	}
	if a := c.early.at(seq); !a.full && a.buf != nil {
		a.buf.Release()
		*a = arrival{}
		c.partials--
	}
}
