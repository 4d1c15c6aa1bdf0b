package ordered

import (
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/frcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
)

// checked is a flow whose packets carry a CRC and nothing else (ber 0 without
// in_order, spec 30 §2.1).
type checked struct {
	lower ipcp.Flow
	info  ipcp.FlowInfo
	sink  atomic.Pointer[ipcp.Sink]
	bad   atomic.Uint64
}

var (
	_ ipcp.Flow     = (*checked)(nil)
	_ ipcp.Lingerer = (*checked)(nil)
)

func (f *checked) Info() ipcp.FlowInfo { return f.info }

func (f *checked) InUserSpace() string { return Reason }

func (f *checked) Send(b *packet.Buf) error {
	n := b.Len()
	if n == 0 {
		return f.lower.Send(b)
	}
	if n > f.info.MTU {
		b.Release()
		return o7serr.EMSGSIZE
	}
	c := packet.Get(n + frcp.CRCLen)
	frcp.AppendCRC(append(c.Bytes()[:0], b.Bytes()...))
	b.Release()
	return f.lower.Send(c)
}

func (f *checked) SetSink(s ipcp.Sink) {
	f.sink.Store(&s)
	f.lower.SetSink(f)
}

// Receive passes on the packets whose CRC is right.
func (f *checked) Receive(pkts []*packet.Buf) {
	good := pkts[:0]
	for _, b := range pkts {
		if p := b.Bytes(); len(p) > 0 {
			p, ok := frcp.CheckCRC(p)
			if !ok {
				f.bad.Add(1)
				b.Release()
				continue
			}
			b.Trim(len(p))
		}
		good = append(good, b)
	}
	if len(good) > 0 {
		(*f.sink.Load()).Receive(good)
	}
}

func (f *checked) FlowEvent(e ipcp.Event) { (*f.sink.Load()).FlowEvent(e) }

func (f *checked) Close() error { return f.lower.Close() }

func (f *checked) CloseLinger(d time.Duration) error { return ipcp.CloseLinger(f.lower, d) }
