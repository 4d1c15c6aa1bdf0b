package o7s

import (
	"github.com/o7s/o7s-router/lib/frcp"
	"github.com/o7s/o7s-router/lib/ring"
)

// crcPath puts a checksum behind each packet and drops those whose checksum is
// wrong: flows with ber 0 and without in_order (spec 30 §2). Otherwise it is
// the path below.
type crcPath struct {
	path
	frame []byte // the writer's
}

func newCRCPath(lower path, mtu int) *crcPath {
	return &crcPath{path: lower, frame: make([]byte, 0, mtu)}
}

func (p *crcPath) Next() ([]byte, error) {
	for {
		m, err := p.path.Next()
		if err != nil || len(m) == 0 { // a keep-alive has none
			return m, err
		}
		if m, ok := frcp.CheckCRC(m); ok && len(m) > 0 {
			return m, nil
		}
		p.Skip()
		p.Release()
	}
}

func (p *crcPath) Put(b []byte) error {
	if len(b) == 0 {
		return p.path.Put(b)
	}
	if len(b)+frcp.CRCLen > cap(p.frame) {
		return ring.ErrTooLong
	}
	p.frame = frcp.AppendCRC(append(p.frame[:0], b...))
	return p.path.Put(p.frame)
}
