package unicast

import (
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/wire"
)

// dataTransfer is the user-space half of the data transfer component (spec 20):
// packets that XDP did not finish pass here. It runs in the receive goroutines
// of the lower flows and in the senders' goroutines; it takes no lock and
// allocates nothing per packet.
type dataTransfer struct {
	self  atomic.Uint64
	asize int   // address size, bytes
	hlen  int   // header length, bytes
	ttl   uint8 // initial TTL
	table *fastpath.Layer
	l     *Layer

	drops   [numDrops]atomic.Uint64
	stray   atomic.Int64  // when data without a flow was looked at last, ns since 1970
	transit atomic.Uint64 // packets forwarded here instead of in XDP
}

// Reasons why user space dropped a packet; disjoint.
const (
	dropShort   = iota // shorter than the header
	dropCube           // QoS cube above 2
	dropTTL            // TTL exhausted in transit
	dropNoRoute        // no next hop
	dropSend           // the outgoing N-1 flow refused it
	dropEID            // no endpoint with this EID
	dropComp           // no component with this EID
	dropBusy           // control messages come faster than they are handled
	numDrops
)

var dropNames = [numDrops]string{"dt_short", "dt_cube", "dt_ttl", "dt_no_route", "dt_send", "dt_eid", "dt_component", "control_busy"}

// input takes a batch from DT neighbour c.
func (d *dataTransfer) input(c *conn, pkts []*packet.Buf) {
	var (
		runFlow *flow // N+1 flow that the packets from runStart on belong to
		start   int
	)
	flush := func(end int) {
		if runFlow != nil {
			runFlow.deliver(pkts[start:end])
			runFlow = nil
		}
	}
	for i, b := range pkts {
		f := d.one(c, b)
		if f == runFlow && f != nil {
			continue
		}
		flush(i)
		if f != nil {
			runFlow, start = f, i
		}
	}
	flush(len(pkts))
}

// one handles a packet and returns the N+1 flow that it is for, with the
// header stripped; nil when it was consumed otherwise.
func (d *dataTransfer) one(c *conn, b *packet.Buf) *flow {
	c.rx.Add(1)
	if b.Len() == 0 { // keep-alive
		b.Release()
		return nil
	}
	h, payload, err := wire.ParseDT(b.Bytes(), d.asize)
	if err != nil {
		return d.drop(b, dropShort)
	}
	if h.QC > 2 {
		return d.drop(b, dropCube)
	}
	n := b.Len()
	c.wire.CountRcvd(h.QC, n)
	if h.Dst != d.self.Load() {
		if h.TTL <= 1 { // 0 would wrap in the reference; we drop it (spec 20 oddity 3)
			c.wire.CountTTL(h.QC, n)
			return d.drop(b, dropTTL)
		}
		out := d.next(h.Dst, h.EID)
		if out == nil {
			c.wire.CountNhop(h.QC, n)
			return d.drop(b, dropNoRoute)
		}
		b.Bytes()[d.asize+1] = h.TTL - 1
		d.transit.Add(1)
		d.sendOn(out, b, h.QC)
		return nil
	}
	return d.local(c, h, b, payload)
}

func (d *dataTransfer) local(c *conn, h wire.DT, b *packet.Buf, payload []byte) *flow {
	switch {
	case h.EID >= wire.MinFlowEID:
		f := d.l.lookup(h.EID)
		if f == nil {
			d.strayData(h.EID)
			return d.drop(b, dropEID)
		}
		b.Pull(d.hlen)
		return f
	case h.EID == wire.FlowAllocatorEID, h.EID == wire.DirectoryEID:
		c.wire.CountLocalRcvd(h.QC, b.Len())
		msg := append([]byte(nil), payload...)
		b.Release()
		if !d.l.loop.offer(func(now time.Time) { d.l.component(now, h.EID, msg) }) {
			d.drops[dropBusy].Add(1)
		}
		return nil
	}
	return d.drop(b, dropComp)
}

// strayEvery bounds how often data for EIDs without a flow is looked at: it may
// come at any rate.
const strayEvery = int64(5 * time.Millisecond)

// strayData sees to it that a peer learns of a release that it has missed.
func (d *dataTransfer) strayData(eid uint64) {
	now, last := time.Now().UnixNano(), d.stray.Load()
	if now-last < strayEvery && now >= last || !d.stray.CompareAndSwap(last, now) {
		return
	}
	d.l.loop.offer(func(now time.Time) { d.l.fa.Stray(now, eid) })
}

func (d *dataTransfer) drop(b *packet.Buf, why int) *flow {
	d.drops[why].Add(1)
	b.Release()
	return nil
}

// next returns the adjacency that leads to dst.
func (d *dataTransfer) next(dst, eid uint64) *conn {
	w, ok := d.table.Lookup(dst, eid)
	if !ok {
		return nil
	}
	c, _ := w.User().(*conn)
	return c
}

func (d *dataTransfer) sendOn(out *conn, b *packet.Buf, qc uint8) error {
	n := b.Len()
	if err := out.flow.Send(b); err != nil {
		out.wire.CountFailed(qc, n)
		d.drops[dropSend].Add(1)
		return err
	}
	out.tx.Add(1)
	out.wire.CountSent(qc, n)
	return nil
}

// send originates a packet whose payload is b (spec 20 §3). It takes the
// ownership of b.
func (d *dataTransfer) send(dst, eid uint64, b *packet.Buf) error {
	out := d.next(dst, eid)
	if out == nil {
		b.Release()
		d.drops[dropNoRoute].Add(1)
		return o7serr.Wrap(o7serr.EIPCP, "no route to %s", wire.AddrString(dst))
	}
	h := b.Push(d.hlen)
	if h == nil {
		b.Release()
		d.drops[dropSend].Add(1)
		return o7serr.EMSGSIZE
	}
	wire.PutDT(h, d.asize, wire.DT{Dst: dst, TTL: d.ttl, EID: eid})
	if eid < wire.MinFlowEID {
		out.wire.CountLocalSent(0, b.Len())
	}
	return d.sendOn(out, b, 0)
}

// sendComponent sends a control message. Control has no use for the error: a
// lost message is what its timers are for.
func (d *dataTransfer) sendComponent(dst, eid uint64, msg []byte) error {
	return d.send(dst, eid, packet.From(msg))
}

var _ ipcp.Sink = (*conn)(nil)
