// Package ordered gives a flow between two layers of the daemon the end-to-end
// functions of its QoS (spec 30): sequencing, retransmission and the CRC, which
// a program's flow has in the program's library. IPC processes use such flows
// below them when the operator connects them with a QoS other than raw (spec 20
// §7).
//
// The protocol is package frcp, a state machine; here are the clock, one timer
// and the two queues around it. The packets of the flow are those of the
// protocol, so the fast path cannot forward on it.
package ordered

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/inbox"
	"github.com/o7s/o7s-router/lib/frcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
)

const (
	// backlogMax is how many packets wait while the window is closed, in front
	// of the protocol's own queue: about the burst that a next hop of another
	// speed takes. What comes on top is dropped, as by any full queue.
	backlogMax = 512
	// batch is how many packets are taken from the protocol under one lock.
	batch = 32
	// window bounds the packets on the way: an adjacency is one hop.
	window = 2048
	// lingerMax bounds how long Close waits for the last acknowledgements. A
	// neighbour that lives gives them in a round trip.
	lingerMax = 250 * time.Millisecond
)

// Reason is why packets of such a flow are forwarded in user space.
const Reason = "the flow has end-to-end functions (FRCP or CRC)"

// Needed reports whether a flow wants more than bare packets.
func Needed(i ipcp.FlowInfo) bool { return !i.QoS.IsRaw() }

// Wrap takes over lower and returns the flow with the functions of its QoS. The
// sink of lower must not be set by anybody else. On an error lower is closed.
// MTU of the result is what is left for a message of one packet; longer ones
// are not sent.
func Wrap(lower ipcp.Flow) (ipcp.Flow, error) {
	info := lower.Info()
	if frcp.ModeOf(info.QoS) == frcp.Bare {
		info.MTU -= frcp.CRCLen
		f := &checked{lower: lower, info: info}
		return f, nil
	}
	c, err := frcp.New(frcp.Config{
		QoS: info.QoS, MPL: time.Duration(info.MPL) * time.Millisecond, MaxPacket: info.MTU,
		Window: window, Rand: sequence,
	})
	if err != nil {
		_ = lower.Close()
		return nil, fmt.Errorf("end-to-end protocol: %w", err)
	}
	f := &Flow{lower: lower, info: info, packet: info.MTU, epoch: time.Now(), conn: c, idle: make(chan struct{})}
	f.info.MTU = c.MaxPayload()
	f.timer = time.AfterFunc(time.Hour, f.work)
	f.timer.Stop()
	c.Announce()
	lower.SetSink((*below)(f))
	f.work()
	return f, nil
}

func sequence() uint32 {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return binary.NativeEndian.Uint32(b[:])
}

// Flow is one end of an ordered or reliable flow.
//
// Whoever has changed the state of the protocol calls work. One caller at a
// time works: it sends and delivers without holding mu, since what it calls may
// come back into this flow in the same goroutine (a layer inside the machine
// delivers within Send). The others leave a note that there is more.
type Flow struct {
	lower  ipcp.Flow
	info   ipcp.FlowInfo
	packet int // longest packet of lower, bytes
	epoch  time.Time
	box    inbox.Box
	closed atomic.Bool

	dropped, tx, txBytes, rx, rxBytes atomic.Uint64

	mu      sync.Mutex // guards what follows
	conn    *frcp.Conn
	backlog []*packet.Buf // the window is closed for them
	working bool
	again   bool
	told    bool // the user knows that the flow is over
	timer   *time.Timer
	ending  bool          // Close waits
	idle    chan struct{} // closed when the protocol is done
	over    bool          // conn is released
}

var (
	_ ipcp.Flow        = (*Flow)(nil)
	_ ipcp.FlowCounter = (*Flow)(nil)
	_ ipcp.Lingerer    = (*Flow)(nil)
)

// now counts as package frcp wants it: nanoseconds of a monotonic clock.
func (f *Flow) now() int64 { return int64(time.Since(f.epoch)) }

// Info describes the flow.
func (f *Flow) Info() ipcp.FlowInfo { return f.info }

// InUserSpace tells why the fast path does not forward on the flow.
func (f *Flow) InUserSpace() string { return Reason }

// Stat counts messages, not packets of the protocol.
func (f *Flow) Stat() ipcp.FlowStat {
	return ipcp.FlowStat{
		RxPackets: f.rx.Load(), RxBytes: f.rxBytes.Load(), TxPackets: f.tx.Load(), TxBytes: f.txBytes.Load(),
	}
}

// Protocol are the counters of the protocol.
func (f *Flow) Protocol() frcp.Stats {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.conn.Stats()
}

// SetSink says who receives.
func (f *Flow) SetSink(s ipcp.Sink) { f.box.SetSink(s) }

// Send queues a message. A keep-alive goes past the protocol.
func (f *Flow) Send(b *packet.Buf) error {
	n := b.Len()
	switch {
	case f.closed.Load():
		b.Release()
		return o7serr.ENOTALLOC
	case n == 0:
		return f.lower.Send(b)
	case n > f.info.MTU:
		b.Release()
		return o7serr.EMSGSIZE
	}
	f.mu.Lock()
	if f.over || f.conn.Err() != nil {
		f.mu.Unlock()
		b.Release()
		return o7serr.EFLOWDOWN
	}
	var err error
	switch {
	case len(f.backlog) == 0 && f.conn.Write(f.now(), b.Bytes()) == nil:
		b.Release()
	case len(f.backlog) < backlogMax:
		f.backlog = append(f.backlog, b)
	default:
		b.Release()
		f.dropped.Add(1)
		err = o7serr.EAGAIN
	}
	f.mu.Unlock()
	if err == nil {
		f.tx.Add(1)
		f.txBytes.Add(uint64(n))
	}
	f.work()
	return err
}

// below is the sink of the lower flow.
type below Flow

// Receive takes packets of the protocol.
func (s *below) Receive(pkts []*packet.Buf) {
	f := (*Flow)(s)
	// Keep-alives are for the user, who must not be called with mu held.
	for len(pkts) > 0 {
		n := 0
		for n < len(pkts) && pkts[n].Len() > 0 {
			n++
		}
		f.input(pkts[:n])
		if pkts = pkts[n:]; len(pkts) > 0 {
			f.box.DeliverOne(pkts[0])
			pkts = pkts[1:]
		}
	}
	f.work()
}

func (f *Flow) input(pkts []*packet.Buf) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.now()
	for _, b := range pkts {
		if !f.over {
			f.conn.Input(t, b.Bytes())
		}
		b.Release()
	}
}

// FlowEvent passes events on. A link that is down does not end the flow: what
// is missing is sent again when it is back.
func (s *below) FlowEvent(e ipcp.Event) {
	f := (*Flow)(s)
	if e == ipcp.EventDealloc || e == ipcp.EventPeer {
		f.work() // what has arrived comes first
		f.mu.Lock()
		f.told = true
		if !f.over {
			f.conn.Abort(o7serr.EFLOWDOWN)
		}
		f.mu.Unlock()
	}
	f.box.Event(e)
	f.work()
}

// work sends and delivers what there is.
func (f *Flow) work() {
	var (
		out, in [batch]*packet.Buf
		send    []*packet.Buf
		deliver []*packet.Buf
	)
	f.mu.Lock()
	if f.working {
		f.again = true
		f.mu.Unlock()
		return
	}
	f.working = true
	for {
		f.again = false
		send, deliver = f.poll(out[:0]), f.take(in[:0])
		event := f.outcome(len(deliver))
		if len(send)+len(deliver) == 0 && event == 0 && !f.again {
			break
		}
		f.mu.Unlock()
		for _, b := range send {
			// What is lost here is sent again, as if the network had lost it.
			_ = f.lower.Send(b)
		}
		if len(deliver) > 0 {
			f.box.Deliver(deliver)
			clear(deliver)
		}
		if event != 0 {
			f.box.Event(event)
		}
		f.mu.Lock()
	}
	f.working = false
	f.arm()
	f.mu.Unlock()
}

// poll takes packets from the protocol. mu is held.
func (f *Flow) poll(out []*packet.Buf) []*packet.Buf {
	if f.over {
		return out
	}
	t := f.now()
	for len(out) < batch {
		b := packet.Get(f.packet)
		n := f.conn.Poll(t, b.Bytes())
		if n > 0 {
			b.Trim(n)
			out = append(out, b)
			continue
		}
		b.Release()
		if !f.refill(t) {
			break
		}
	}
	return out
}

// refill moves packets from the backlog into the window. mu is held.
func (f *Flow) refill(t int64) bool {
	n := 0
	for n < len(f.backlog) && f.conn.Write(t, f.backlog[n].Bytes()) == nil {
		f.backlog[n].Release()
		n++
	}
	if n > 0 {
		rest := copy(f.backlog, f.backlog[n:])
		clear(f.backlog[rest:])
		f.backlog = f.backlog[:rest]
	}
	return n > 0
}

// take takes messages from the protocol. mu is held.
func (f *Flow) take(in []*packet.Buf) []*packet.Buf {
	for !f.over && len(in) < batch {
		b, err := f.conn.Take()
		if err != nil {
			break
		}
		f.rx.Add(1)
		f.rxBytes.Add(uint64(b.Len()))
		in = append(in, b)
	}
	return in
}

// outcome returns the event that ends the flow, once, when nothing is left to
// be delivered; and lets Close go on. mu is held.
func (f *Flow) outcome(delivering int) ipcp.Event {
	if f.over {
		return 0
	}
	if f.ending && f.conn.Done() {
		f.finish()
		return 0
	}
	if f.told || f.ending || delivering > 0 || !f.conn.Readable() {
		return 0
	}
	// Readable without a message: the end of the peer's stream, or a failure.
	f.told = true
	if f.conn.Err() != nil {
		return ipcp.EventPeer
	}
	return ipcp.EventDealloc
}

// arm sets the timer. mu is held.
func (f *Flow) arm() {
	if f.over {
		f.timer.Stop()
		return
	}
	if d := f.conn.Deadline(); d != frcp.Never {
		f.timer.Reset(max(0, time.Duration(d-f.now())))
	} else {
		f.timer.Stop()
	}
}

// finish ends the protocol. mu is held.
func (f *Flow) finish() {
	f.over = true
	for _, b := range f.backlog {
		b.Release()
	}
	f.backlog = nil
	close(f.idle)
}

// Close is CloseLinger without a time of the user's own.
func (f *Flow) Close() error { return f.CloseLinger(0) }

// CloseLinger sends what was written, for a quarter of a second at most, and
// releases the flow. The endpoint below stays in quarantine as long as the
// protocol wants, and at least d.
func (f *Flow) CloseLinger(d time.Duration) error {
	if f.closed.Swap(true) {
		return nil
	}
	clean := f.box.Close()
	f.mu.Lock()
	f.ending = true
	f.conn.Close(f.now())
	f.mu.Unlock()
	f.work()
	wait := time.NewTimer(lingerMax)
	defer wait.Stop()
	select {
	case <-f.idle:
	case <-wait.C:
	}
	f.mu.Lock()
	if !f.over {
		f.finish()
	}
	d = max(d, f.conn.Quarantine(f.now()))
	f.timer.Stop()
	f.mu.Unlock()
	err := ipcp.CloseLinger(f.lower, d) // no call of ours runs after it
	f.mu.Lock()
	f.conn.Release()
	f.mu.Unlock()
	if !clean {
		return o7serr.Wrap(o7serr.EINVAL, "flow closed from its own sink")
	}
	return err
}
