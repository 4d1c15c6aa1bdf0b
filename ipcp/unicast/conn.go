package unicast

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/control/cacep"
	"github.com/o7s/o7s-router/control/linkstate"
	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/keepalive"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/qos"
)

// Backoff of the initiator that lost an adjacency and tries to get it back.
const (
	reconnectMin = 200 * time.Millisecond
	reconnectMax = 2 * time.Second
)

// conn is an adjacency: an N-1 flow that a component uses after its handshake.
//
//	handshake -> settling -> up <-> down (interface) -> gone
type conn struct {
	l    *Layer
	id   linkstate.FlowID
	flow ipcp.Flow
	info ipcp.FlowInfo
	comp ipcp.Component
	peer uint64
	dst  string // name it was connected to; "" on the accepting side

	wire *fastpath.Wire // DT only
	// inUser says why packets do not pass in XDP; "" when they do.
	inUser string

	rx, tx atomic.Uint64 // packets that user space received and sent, keep-alives included

	// Owned by the loop.
	alive   keepalive.State
	readyAt time.Time // end of settling
	up      bool      // announced to routing
	down    bool      // the interface below is down
	gone    bool
	lastRx  time.Time
	// Packets seen when alive was told last.
	lastRxCnt, lastTxCnt uint64
	doubt                doubt
}

// Receive is called from the lower layer's receive goroutine.
func (c *conn) Receive(pkts []*packet.Buf) {
	if c.comp == ipcp.DataTransfer {
		c.l.dt.input(c, pkts)
		return
	}
	for _, b := range pkts {
		c.rx.Add(1)
		if b.Len() > 0 {
			msg := append([]byte(nil), b.Bytes()...)
			if !c.l.loop.offer(func(now time.Time) {
				if !c.gone {
					c.l.ls.Receive(now, c.id, msg)
				}
			}) {
				c.l.dt.drops[dropBusy].Add(1)
			}
		}
		b.Release()
	}
}

// FlowEvent acts on what the lower layer reports: a link that is down switches
// the wire at once, in the caller's goroutine; routing follows in the loop.
func (c *conn) FlowEvent(e ipcp.Event) {
	switch e {
	case ipcp.EventDown:
		if c.wire != nil {
			c.wire.SetState(false)
		}
		c.l.loop.post(func(now time.Time) { c.l.linkDown(now, c) })
	case ipcp.EventUp:
		c.l.loop.post(func(now time.Time) { c.l.linkUp(now, c) })
	case ipcp.EventDealloc:
		c.l.loop.post(func(now time.Time) { c.l.lost(now, c, "released by the peer") })
	case ipcp.EventPeer:
		c.l.loop.post(func(now time.Time) { c.l.lost(now, c, "peer timed out") })
	}
}

// send passes a management packet down.
func (c *conn) send(msg []byte) {
	c.tx.Add(1)
	if err := c.flow.Send(packet.From(msg)); err != nil {
		c.l.log.Debug("management packet not sent", "peer", addrText(c.peer), "err", err)
	}
}

// activity returns the packets seen in both directions, those that XDP handled
// included (spec 30 §10: they prove that the neighbour lives).
func (c *conn) activity() (rx, tx uint64) {
	rx, tx = c.rx.Load(), c.tx.Load()
	if c.wire != nil {
		krx, ktx := c.wire.KernelActivity()
		rx, tx = rx+krx, tx+ktx
	}
	return rx, tx
}

// offloader is a flow whose packets XDP can handle.
type offloader interface {
	Wire() (port *fastpath.Port, header [16]byte, mtu int, block *fastpath.EthBlock, localEID uint16, ok bool, reason string)
}

// bindWire makes the adjacency a wire of the fast path.
func (c *conn) bindWire() error {
	spec := fastpath.WireSpec{User: c, MTU: c.info.MTU, Punt: true}
	var (
		block *fastpath.EthBlock
		eid   uint16
	)
	if o, ok := c.flow.(offloader); ok {
		port, header, mtu, b, e, can, reason := o.Wire()
		if can {
			spec.Port, spec.Header, spec.MTU, spec.Punt = port, header, mtu, false
			block, eid = b, e
		}
		c.inUser, spec.Reason = reason, reason
	} else if u, ok := c.flow.(interface{ InUserSpace() string }); ok {
		c.inUser = u.InUserSpace()
		spec.Reason = c.inUser
	} else {
		c.inUser = "lower layer is " + c.info.Type.String()
		spec.Reason = c.inUser
	}
	w, err := c.l.dt.table.NewWire(spec)
	if err != nil {
		return fmt.Errorf("fast path wire: %w", err)
	}
	c.wire = w
	if block != nil {
		block.SetDT(eid, w)
	}
	return nil
}

// connect runs the initiator's side of an adjacency: N-1 flow, handshake.
func (l *Layer) connect(ctx context.Context, dst string, comp ipcp.Component, q qos.Spec) (*conn, error) {
	f, err := l.host.AllocFlow(ctx, l, dst, q)
	if err != nil {
		return nil, err
	}
	p := newPending()
	f.SetSink(p)
	peer, err := l.initiate(ctx, f, p, comp)
	if err != nil {
		f.Close()
		p.drop()
		return nil, fmt.Errorf("handshake for %s with %q: %w", comp, dst, err)
	}
	if peer == l.addr.Load() {
		f.Close()
		p.drop()
		l.loop.post(func(now time.Time) { l.conflict(now, "the handshake of "+dst) })
		return nil, fmt.Errorf("%q has our own address %s; drawing a new one, try again: %w", dst, addrText(peer), o7serr.EAGAIN)
	}
	c := &conn{l: l, flow: f, info: f.Info(), comp: comp, peer: peer, dst: dst}
	if err := l.add(c, p); err != nil {
		return nil, err
	}
	return c, nil
}

func (l *Layer) initiate(ctx context.Context, f ipcp.Flow, p *pending, comp ipcp.Component) (uint64, error) {
	hs := cacep.NewInitiator(time.Now(), string(comp), l.addr.Load())
	if err := f.Send(packet.From(hs.Message())); err != nil {
		return 0, err
	}
	msg, err := p.readCEP(ctx)
	if err != nil {
		return 0, err
	}
	return hs.Receive(time.Now(), msg)
}

// AcceptFlow serves an N-1 flow that a peer allocated. Handshakes run
// concurrently, so a silent initiator delays nobody.
func (l *Layer) AcceptFlow(f ipcp.Flow, name string) {
	p := newPending()
	f.SetSink(p)
	l.mu.Lock()
	if l.state == ipcp.StateShutdown { // Close may wait already
		l.mu.Unlock()
		go f.Close()
		return
	}
	l.wg.Add(1)
	l.mu.Unlock()
	go func() {
		defer l.wg.Done()
		if err := l.accept(f, p); err != nil {
			f.Close()
			p.drop()
			if !errors.Is(err, context.Canceled) {
				l.log.Warn("incoming connection refused", "name", name, "err", err)
			}
		}
	}()
}

func (l *Layer) accept(f ipcp.Flow, p *pending) error {
	msg, err := p.readCEP(l.ctx)
	if err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	comp, peer, reply, err := cacep.Accept(msg, l.addr.Load())
	if err != nil {
		if reply != nil { // the refusal message
			f.Send(packet.From(reply))
		}
		return fmt.Errorf("handshake: %w", err)
	}
	if err := f.Send(packet.From(reply)); err != nil {
		return fmt.Errorf("handshake reply: %w", err)
	}
	if comp == ipcp.Enrollment {
		return l.serveEnrollment(f, p)
	}
	if peer == l.addr.Load() {
		l.loop.post(func(now time.Time) { l.conflict(now, "an incoming handshake") })
		return fmt.Errorf("peer has our own address %s: %w", addrText(peer), o7serr.EAGAIN)
	}
	c := &conn{l: l, flow: f, info: f.Info(), comp: comp, peer: peer}
	return l.add(c, p)
}

// add gives the adjacency to its component.
func (l *Layer) add(c *conn, p *pending) error {
	var err error
	ok := l.loop.call(func(now time.Time) {
		if l.State() != ipcp.StateOperational {
			err = o7serr.EIPCPSTATE
			return
		}
		if c.comp == ipcp.DataTransfer {
			if err = c.bindWire(); err != nil {
				return
			}
		}
		l.nextID++
		c.id = l.nextID
		c.readyAt = now.Add(cacep.Settle)
		c.lastRx = now
		c.alive = keepalive.New(time.Duration(c.info.QoS.Timeout)*time.Millisecond, l.mono(now))
		l.conns[c.id] = c
		if c.comp == ipcp.Management {
			c.up = true
			l.ls.MgmtUp(now, c.id, c.peer)
		}
	})
	if !ok {
		err = o7serr.EIPCPSTATE
	}
	if err != nil {
		c.flow.Close()
		p.drop()
		return err
	}
	p.handOver(c.flow, c)
	path := "xdp"
	if c.inUser != "" {
		path = "user space: " + c.inUser
	}
	attrs := []any{"component", c.comp, "peer", addrText(c.peer), "via", c.info.Layer}
	if c.dst != "" {
		attrs = append(attrs, "dst", c.dst)
	}
	if c.comp == ipcp.DataTransfer {
		attrs = append(attrs, "path", path)
	}
	l.log.Info("adjacency up", attrs...)
	return nil
}

// settled announces a DT adjacency to routing once the peer reads it.
func (l *Layer) settled(now time.Time, c *conn) {
	if c.gone || c.up || c.down || c.comp != ipcp.DataTransfer || now.Before(c.readyAt) {
		return
	}
	c.up = true
	c.wire.SetState(true)
	l.ls.DTUp(now, c.id, c.peer)
}

func (l *Layer) linkDown(now time.Time, c *conn) {
	if c.gone || c.down {
		return
	}
	c.down = true
	if c.comp == ipcp.DataTransfer && c.up {
		c.up = false
		c.wire.SetState(false)
		l.ls.DTDown(now, c.id)
		l.log.Warn("link down", "peer", addrText(c.peer), "via", c.info.Layer)
	}
}

func (l *Layer) linkUp(now time.Time, c *conn) {
	if c.gone || !c.down {
		return
	}
	c.down = false
	if c.comp == ipcp.DataTransfer {
		l.log.Info("link up", "peer", addrText(c.peer), "via", c.info.Layer)
		l.settled(now, c)
	}
}

// remove takes an adjacency out of its component and releases the flow.
func (l *Layer) remove(now time.Time, c *conn) {
	if c.gone {
		return
	}
	c.gone = true
	delete(l.conns, c.id)
	switch {
	case c.comp == ipcp.Management:
		l.ls.MgmtDown(now, c.id)
	case c.up:
		l.ls.DTDown(now, c.id)
	}
	if c.wire != nil {
		c.wire.SetState(false)
		// Routes through it go first: the table still names the wire.
		l.ls.Tick(now)
		l.writeTable()
		if o, ok := c.flow.(offloader); ok {
			if _, _, _, block, eid, _, _ := o.Wire(); block != nil {
				block.SetUser(eid)
			}
		}
		c.wire.Release()
	}
	l.wg.Add(1)
	go func() { // Close may wait for the lower layer's receive goroutine
		defer l.wg.Done()
		c.flow.Close()
	}()
}

// lost handles an adjacency that ended by itself; its initiator reconnects.
func (l *Layer) lost(now time.Time, c *conn, why string) {
	if c.gone {
		return
	}
	l.log.Warn("adjacency lost", "component", c.comp, "peer", addrText(c.peer), "via", c.info.Layer, "reason", why)
	l.remove(now, c)
	if c.dst != "" {
		l.keep(intent{c.dst, c.comp})
	}
}

// keep sees to it that an adjacency that the operator asked for is there, or
// being made. Called in the loop.
func (l *Layer) keep(key intent) {
	q, want := l.wanted[key]
	if !want || l.retrying[key] || l.count(key) > 0 {
		return
	}
	l.retrying[key] = true
	l.wg.Add(1)
	go func() {
		defer l.wg.Done()
		c := l.reconnect(key, q)
		l.loop.post(func(now time.Time) {
			delete(l.retrying, key)
			if _, want := l.wanted[key]; c != nil && (!want || l.count(key) > 1) {
				l.remove(now, c) // disconnected, or connected by hand, while it was made
			}
			l.keep(key) // it may be lost again already
		})
	}()
}

// count is how many adjacencies there are for key.
func (l *Layer) count(key intent) (n int) {
	for _, c := range l.conns {
		if c.dst == key.dst && c.comp == key.comp {
			n++
		}
	}
	return n
}

// reconnect tries until the adjacency is back, the user disconnects it or the
// layer ends; nil then.
func (l *Layer) reconnect(key intent, q qos.Spec) *conn {
	for wait := reconnectMin; ; wait = min(2*wait, reconnectMax) {
		select {
		case <-l.ctx.Done():
			return nil
		case <-time.After(wait):
		}
		want := false
		l.loop.call(func(time.Time) { _, want = l.wanted[key] })
		if !want {
			return nil
		}
		c, err := l.connect(l.ctx, key.dst, key.comp, q)
		if err == nil {
			return c
		}
		if wait < reconnectMax && 2*wait >= reconnectMax { // once
			l.log.Warn("adjacency still not back", "component", key.comp, "dst", key.dst, "err", err)
		}
	}
}

// intent is an adjacency that the operator asked for.
type intent struct {
	dst  string
	comp ipcp.Component
}
