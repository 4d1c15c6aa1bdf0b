package frcp

import "io"

// Next is the next message, or the rest of one that was read in part, where it
// is: valid until Skip, Read, Close or Release. Other calls leave it alone, so
// a shell may read it without its lock as long as only one goroutine reads.
// Errors are those of Read.
func (c *Conn) Next() ([]byte, error) {
	switch {
	case c.cur != nil:
	case c.rHead != c.rTail:
		m := c.ready.at(c.rHead)
		c.cur = m.buf
		c.readyPkts -= m.pkts
		*m = message{}
		c.rHead++
		c.stats.Delivered++
	case c.rclosed:
		return nil, ErrClosed
	case c.eos:
		return nil, io.EOF
	case c.err != nil:
		return nil, c.err
	default:
		return nil, ErrWouldBlock
	}
	return c.cur.Bytes(), nil
}

// Skip passes over the message that Next returned, and opens the window by it.
func (c *Conn) Skip() {
	if c.cur == nil {
		return
	}
	c.cur.Release()
	c.cur = nil
	if c.err == nil {
		c.growWindow()
	}
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
