package frcp

import (
	"io"

	"github.com/o7s/o7s-router/lib/packet"
)

// Take removes the next message, or the rest of one that was read in part, and
// gives it to the caller, who releases it. Errors are those of Read.
func (c *Conn) Take() (*packet.Buf, error) {
	if b := c.cur; b != nil {
		c.cur = nil
		return b, nil
	}
	switch {
	case c.rHead != c.rTail:
	case c.rclosed:
		return nil, ErrClosed
	case c.eos:
		return nil, io.EOF
	case c.err != nil:
		return nil, c.err
	default:
		return nil, ErrWouldBlock
	}
	m := c.ready.at(c.rHead)
	b := m.buf
	c.readyPkts -= m.pkts
	*m = message{}
	c.rHead++
	c.stats.Delivered++
	if c.err == nil {
		c.growWindow()
	}
	return b, nil
}

// RxLen is the number of messages that wait to be read.
func (c *Conn) RxLen() int {
	n := int(c.rTail - c.rHead)
	if c.cur != nil {
		n++
	}
	return n
}

// TxLen is the number of packets that are not acknowledged, or not sent.
func (c *Conn) TxLen() int { return int(c.seqno - c.lwe) }
