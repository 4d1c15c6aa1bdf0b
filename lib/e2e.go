package o7s

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/lib/frcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/ring"
)

// e2ePath is the end-to-end protocol (package frcp) as a path on top of the one
// that carries its packets. The state machine is under mu; this is the clock,
// the packets and the waits around it.
//
// Somebody has to take in what the lower path has, and look at the time. Of
// the goroutines that wait on the flow, the reader and the writer, one drives:
// it waits for the lower path, no longer than to the protocol's next deadline,
// and wakes the other when that can go on. While nobody waits the session's
// tender does it (see tender).
type e2ePath struct {
	lower  path
	direct framer // lower, if it takes packets where they are built
	t      *tender
	spec   bool
	mpl    time.Duration
	mtu    int // longest message in one packet

	mu       sync.Mutex // guards what follows, and the lower path but for the driver's wait
	conn     *frcp.Conn
	frame    []byte // a packet that is being built
	held     int    // length of a packet in frame that the lower path had no room for
	driving  int8   // who drives: a ring.Dir, or nobody
	until    int64  // the driver waits until then, ns of nanotime
	dl       [2]int64
	kicked   [2]bool
	waiting  [2]bool // follows the driver
	down     error   // the flow ended: to be told to conn once everything that arrived was taken in
	large    bool    // the writer waits to learn whether the peer takes more than a packet
	largeBy  int64   // and no longer than until then
	released bool

	// Messages that the reader has taken; its own.
	taken []*packet.Buf
	head  int

	listed atomic.Bool // with the tender
	armed  atomic.Bool // notify is to be called
	notify atomic.Pointer[func(lead bool)]

	shut  atomic.Bool
	sig   [2]chan struct{} // to followers
	timer [2]*time.Timer   // of followers
}

// framer is a path that sends packets from a buffer of its own.
type framer interface {
	// Frame is where the packet is to be built; it is for one sender at a time.
	Frame() []byte
	// Send sends the first n bytes of it. Errors are those of Put.
	Send(n int) error
}

// settler is a path whose packets others may be handing out at the moment.
type settler interface {
	// Settle returns when those that have arrived are there for Next.
	Settle()
}

const (
	nobody = int8(-1)
	// inputBatch is how many packets are taken in before those that they cause
	// are sent: acknowledgements must not wait for the end of a burst.
	inputBatch = 32
	// takeBatch is how many messages a reader takes at a time: as many as one
	// more batch of packets may bring.
	takeBatch = 32
	// roomRetry is when a lower path that was full is tried again.
	roomRetry = int64(200 * time.Microsecond)
	// meetTime bounds how long the first message larger than a packet waits for
	// the peer to say what it is. Ours do so as soon as the flow is there.
	meetTime = int64(time.Second)
	// maxWait bounds a wait on the lower path, which begins anew then: it keeps a
	// far deadline within what a time.Time of a poller takes.
	maxWait = int64(time.Hour)
)

func newE2EPath(lower path, info *ipc.FlowResult, spec bool, t *tender) (*e2ePath, error) {
	conn, err := frcp.New(frcp.Config{
		QoS: info.QoS, MPL: time.Duration(info.MPL) * time.Millisecond, MaxPacket: info.MTU,
		Rand: sequence, Spec: spec,
	})
	if err != nil {
		return nil, err
	}
	p := &e2ePath{
		lower: lower, t: t, spec: spec, mtu: conn.MaxPayload(), mpl: max(time.Duration(info.MPL), 100) * time.Millisecond, conn: conn, driving: nobody,
		dl: [2]int64{frcp.Never, frcp.Never}, sig: [2]chan struct{}{make(chan struct{}, 1), make(chan struct{}, 1)},
	}
	if p.direct, _ = lower.(framer); p.direct != nil {
		p.frame = p.direct.Frame()[:info.MTU]
	} else {
		p.frame = make([]byte, info.MTU)
	}
	p.conn.Announce()
	lower.OnRing(p.rung)
	p.mu.Lock()
	p.advance(nanotime(), true)
	p.mu.Unlock()
	t.add(p)
	return p, nil
}

// sequence draws the first sequence number of a run.
func sequence() uint32 {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return binary.NativeEndian.Uint32(b[:])
}

// advance takes in what has arrived, unless a driver does, and sends what is to
// be sent. p.mu is held.
func (p *e2ePath) advance(now int64, take bool) {
	if p.released {
		return
	}
	for more := (take || p.down != nil) && p.driving == nobody; more; {
		more = p.take(now)
		p.pump(now)
	}
	if p.down != nil && p.driving == nobody {
		// While somebody drives there may be packets that he has not taken in yet.
		p.conn.Abort(p.down)
	}
	p.pump(now)
	p.tell()
}

// take takes packets in, and reports whether there may be more.
func (p *e2ePath) take(now int64) bool {
	defer p.lower.Release()
	for range inputBatch {
		m, err := p.lower.Next()
		if err != nil {
			if !errors.Is(err, ring.ErrEmpty) {
				p.conn.Abort(err)
			}
			return false
		}
		p.conn.Input(now, m)
		p.lower.Skip()
	}
	return true
}

// pump sends what the protocol has to send, as far as there is room.
func (p *e2ePath) pump(now int64) {
	sent := false
	for {
		if p.held == 0 {
			if p.held = p.conn.Poll(now, p.frame); p.held == 0 {
				break
			}
		}
		var err error
		if p.direct != nil {
			err = p.direct.Send(p.held)
		} else {
			err = p.lower.Put(p.frame[:p.held])
		}
		if errors.Is(err, ring.ErrFull) {
			break // the deadline comes back to it
		}
		// Another error loses the packet, as a network may; what is wrong for
		// good is told by an event.
		p.held, sent = 0, true
	}
	if sent {
		p.lower.Flush()
	}
}

// deadline is when advance is to be called at the latest.
func (p *e2ePath) deadline(now int64) int64 {
	if p.held > 0 {
		return now + roomRetry
	}
	d := p.conn.Deadline()
	if p.large && now < p.largeBy { // later nobody waits for it, who wrote may have given up
		d = min(d, p.largeBy)
	}
	return d
}

// meeting reports whether a message larger than a packet has to wait until the
// peer is heard of.
func (p *e2ePath) meeting(now int64) bool {
	if p.spec || p.conn.Heard() || p.conn.Err() != nil {
		return false
	}
	if p.largeBy == 0 {
		p.largeBy = now + meetTime
	}
	return now < p.largeBy
}

// ready reports whether a wait of direction d is over.
func (p *e2ePath) ready(d ring.Dir) bool {
	if d == ring.DirRead {
		return p.conn.Readable()
	}
	if p.large && p.meeting(nanotime()) {
		return false
	}
	return p.conn.Writable()
}

// tell wakes the followers that can go on, and makes the driver look at an
// earlier deadline.
func (p *e2ePath) tell() {
	for d := range ring.Dir(2) {
		if p.waiting[d] && p.ready(d) {
			p.wake(d)
		}
	}
	if p.armed.Load() && p.conn.Readable() {
		p.tellOf(false)
	}
	if p.driving != nobody {
		if next := p.deadline(nanotime()); next < p.until {
			p.until = next
			p.setLower(next)
		}
		if d := ring.Dir(p.driving); p.ready(d) {
			p.lower.Kick(ring.DirRead)
		}
	}
}

func (p *e2ePath) wake(d ring.Dir) {
	select {
	case p.sig[d] <- struct{}{}:
	default:
	}
}

// setLower sets the deadline of the driver's wait.
func (p *e2ePath) setLower(t int64) {
	var at time.Time
	if t != frcp.Never {
		at = epoch.Add(time.Duration(min(t, nanotime()+maxWait)))
	}
	_ = p.lower.SetDeadline(ring.DirRead, at)
}

// wait blocks until direction d can go on. Errors as those of path.WaitRead.
func (p *e2ePath) wait(d ring.Dir) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		now := nanotime()
		p.advance(now, true)
		switch {
		case p.shut.Load():
			return net.ErrClosed
		case p.kicked[d]:
			p.kicked[d] = false
			return nil
		case p.ready(d):
			return nil
		case now >= p.dl[d]:
			return os.ErrDeadlineExceeded
		case p.driving != nobody:
			p.follow(d, now)
			continue
		}
		if p.lead(d, now) {
			return nil // an event: the caller looks
		}
	}
}

// lead drives until something happened. It reports whether the lower path is
// no good any more for waiting.
func (p *e2ePath) lead(d ring.Dir, now int64) (ended bool) {
	p.until = min(p.deadline(now), p.dl[d])
	if p.until <= now {
		p.until = now + 1
	}
	p.setLower(p.until)
	p.driving = int8(d)
	p.mu.Unlock()
	err := p.lower.WaitRead()
	p.mu.Lock()
	p.driving = nobody
	p.t.add(p)
	other := 1 - d
	if p.waiting[other] {
		p.wake(other) // takes over, if it is not for it to go on
	}
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		// A wait on a path whose other end is closed returns at once, for
		// ever: the caller finds the reason.
		return err == nil && p.lower.Peer()&ring.Closed != 0 && p.conn.Err() == nil && p.down == nil
	}
	return true
}

// follow waits while another goroutine drives.
func (p *e2ePath) follow(d ring.Dir, now int64) {
	p.waiting[d] = true
	dl := p.dl[d]
	p.mu.Unlock()
	if dl == frcp.Never {
		<-p.sig[d]
	} else {
		t := p.timer[d]
		if t == nil {
			t = time.NewTimer(time.Duration(dl - now))
			p.timer[d] = t // only the one goroutine of this direction is here
		} else {
			t.Reset(time.Duration(dl - now))
		}
		select {
		case <-p.sig[d]:
			t.Stop()
		case <-t.C:
		}
	}
	p.mu.Lock()
	p.waiting[d] = false
}

// Receiving.

// Next takes messages from the protocol many at a time, so that most calls need
// no lock.
func (p *e2ePath) Next() ([]byte, error) {
	if p.head == len(p.taken) {
		if err := p.refill(); err != nil {
			return nil, err
		}
	}
	return p.taken[p.head].Bytes(), nil
}

// refill takes what there is.
func (p *e2ePath) refill() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken, p.head = p.taken[:0], 0
	b, err := p.conn.Take()
	if err == frcp.ErrWouldBlock { //nolint:errorlint // exactly what it returns
		p.advance(nanotime(), true)
		b, err = p.conn.Take()
	}
	switch err {
	case nil:
	case frcp.ErrWouldBlock:
		return ring.ErrEmpty
	default:
		return err
	}
	for {
		p.taken = append(p.taken, b)
		if len(p.taken) == takeBatch {
			return nil
		}
		if b, err = p.conn.Take(); err != nil {
			return nil // found again once these are read
		}
	}
}

func (p *e2ePath) Skip() {
	p.taken[p.head].Release()
	p.taken[p.head] = nil
	p.head++
}

// Release lets the peer know of the room, when it is worth a packet.
func (p *e2ePath) Release() {
	if p.head < len(p.taken) {
		return
	}
	p.mu.Lock()
	p.settle(nanotime())
	p.mu.Unlock()
}

// drop releases what was taken and not read.
func (p *e2ePath) drop() {
	for ; p.head < len(p.taken); p.head++ {
		p.taken[p.head].Release()
	}
	p.taken, p.head = nil, 0
}

// settle sends what is due after a call, and sees to it that somebody comes
// back when more is.
func (p *e2ePath) settle(now int64) {
	p.advance(now, false)
	p.t.add(p)
}

func (p *e2ePath) WaitRead() error { return p.wait(ring.DirRead) }

func (p *e2ePath) RxLen(limit int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.advance(nanotime(), true)
	return min(len(p.taken)-p.head+p.conn.RxLen(), limit)
}

// Sending.

func (p *e2ePath) Put(b []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(b) == 0 { // a keep-alive is not the protocol's
		if p.held > 0 {
			return ring.ErrFull
		}
		return p.lower.Put(b)
	}
	now := nanotime()
	if p.large = len(b) > p.mtu && len(b) <= frcp.DefaultMaxMessage && p.meeting(now); p.large {
		p.advance(now, true)
		if p.large = p.meeting(now); p.large {
			p.settle(now)
			return ring.ErrFull
		}
	}
	err := p.conn.Write(now, b)
	if err != nil && errors.Is(err, frcp.ErrWouldBlock) {
		p.advance(now, true) // the window may have opened
		err = p.conn.Write(now, b)
	}
	switch {
	case err == nil:
		p.settle(now)
	case errors.Is(err, frcp.ErrWouldBlock):
		p.settle(now)
		return ring.ErrFull
	case errors.Is(err, frcp.ErrTooLarge):
		return ring.ErrTooLong
	}
	return err
}

func (p *e2ePath) Flush() {
	p.mu.Lock()
	p.lower.Flush()
	p.mu.Unlock()
}

func (p *e2ePath) WaitWrite() error { return p.wait(ring.DirWrite) }

// cancelWrite tells that a writer does not wait for the window any longer.
func (p *e2ePath) cancelWrite() {
	p.mu.Lock()
	p.conn.CancelWrite()
	p.large = false
	p.mu.Unlock()
}

func (p *e2ePath) TxLen(limit int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return min(p.conn.TxLen(), limit)
}

// closeWrite ends this end's direction.
func (p *e2ePath) closeWrite() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := nanotime()
	p.conn.CloseWrite(now)
	p.settle(now)
	return nil
}

// At any time.

func (p *e2ePath) SetDeadline(d ring.Dir, t time.Time) error {
	if p.shut.Load() {
		return net.ErrClosed
	}
	at := frcp.Never
	if !t.IsZero() {
		at = int64(t.Sub(epoch))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dl[d] = at
	if p.waiting[d] {
		p.wake(d)
	}
	if p.driving == int8(d) && at < p.until {
		p.until = at
		p.setLower(at)
	}
	return nil
}

func (p *e2ePath) Kick(d ring.Dir) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kicked[d] = true
	p.stir(d)
}

// stir makes a wait of direction d look.
func (p *e2ePath) stir(d ring.Dir) {
	if p.waiting[d] {
		p.wake(d)
	}
	if p.driving == int8(d) {
		p.lower.Kick(ring.DirRead)
	}
}

func (p *e2ePath) Peer() ring.State      { return p.lower.Peer() }
func (p *e2ePath) Own() ring.State       { return p.lower.Own() }
func (p *e2ePath) SetState(s ring.State) { p.lower.SetState(s) }

func (p *e2ePath) Progress() (received, sent uint64, full bool) { return p.lower.Progress() }

// fail ends the flow with err once everything that has arrived was taken in.
func (p *e2ePath) fail(err error) {
	if l, ok := p.lower.(settler); ok {
		l.Settle()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.down == nil {
		p.down = err
	}
	p.advance(nanotime(), true)
	p.stir(ring.DirRead)
	p.stir(ring.DirWrite)
}

// Shut ends the waits. The lower path goes on: what was written is still to be
// delivered.
func (p *e2ePath) Shut() {
	p.shut.Store(true)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stir(ring.DirRead)
	p.stir(ring.DirWrite)
}

// finish ends the protocol (spec 30 §9): it returns once everything that was
// written is acknowledged, or the flow has failed, or at the deadline. It
// returns for how long the flow's endpoint must not be used again. Nobody waits
// on the path any more.
func (p *e2ePath) finish(deadline int64) time.Duration {
	p.drop()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conn.Close(nanotime())
	for {
		now := nanotime()
		p.advance(now, true)
		if p.conn.Done() && p.held == 0 {
			break
		}
		if now >= deadline {
			p.conn.Abort(o7serr.ETIMEDOUT)
			break
		}
		p.dl[ring.DirRead] = deadline
		if p.lead(ring.DirRead, now) {
			break
		}
	}
	p.released = true
	q := p.conn.Quarantine(nanotime())
	if p.down == errDealloc { //nolint:errorlint // our own
		// The other end has gone, and repeats nothing any more.
		q = min(q, 2*p.mpl)
	}
	p.conn.Release()
	return q
}

func (p *e2ePath) Close() error {
	p.Shut()
	p.drop()
	p.mu.Lock()
	if !p.released {
		p.released = true
		p.conn.Release()
	}
	p.mu.Unlock()
	return p.lower.Close()
}

// maxMessage is the longest message that the peer can take, as far as is known.
func (p *e2ePath) maxMessage() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn.PeerExt() {
		return frcp.DefaultMaxMessage
	}
	return p.mtu
}

// stats are the counters of the protocol.
func (p *e2ePath) stats() frcp.Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conn.Stats()
}

// OnRing and Arm are for sets of flows. What arrives is taken in by whoever
// looks next.
func (p *e2ePath) OnRing(f func(lead bool)) {
	if f == nil {
		p.notify.Store(nil)
		return
	}
	p.notify.Store(&f)
}

func (p *e2ePath) Arm() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.advance(nanotime(), true)
	p.armed.Store(true)
	return !p.conn.Readable() && p.lower.Arm()
}

// rung is called when something arrived on the lower path while nobody drives.
func (p *e2ePath) rung(lead bool) {
	p.t.add(p)
	p.tellOf(lead)
}

func (p *e2ePath) tellOf(lead bool) {
	if p.armed.Load() && p.armed.Swap(false) {
		if f := p.notify.Load(); f != nil {
			(*f)(lead)
		}
	}
}

// tender looks after the flows that no goroutine waits on: it takes in what has
// arrived, so that it is acknowledged, and sends again what was lost. A flow on
// which nothing is under way is left alone until its lower path rings.
type tender struct {
	hub func() *ring.Hub // has a goroutine of its own once there is a flow

	mu    sync.Mutex // guards what follows
	fresh []*e2ePath // listed since run took them
	timer *time.Timer
	busy  bool // the timer runs, or run does

	paths []*e2ePath // run's
}

// tendEvery is how often it looks: as often as the reference (spec 30 §6).
const tendEvery = 5 * time.Millisecond

// add lists p, unless it is. It does not block, and needs no lock of p.
func (t *tender) add(p *e2ePath) {
	if p.listed.Swap(true) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.timer == nil {
		t.timer = time.AfterFunc(time.Hour, t.run)
		t.timer.Stop()
		t.hub().Serve()
	}
	t.fresh = append(t.fresh, p)
	if !t.busy {
		t.busy = true
		t.timer.Reset(tendEvery)
	}
}

func (t *tender) run() {
	t.mu.Lock()
	t.paths = append(t.paths, t.fresh...)
	clear(t.fresh)
	t.fresh = t.fresh[:0]
	t.mu.Unlock()
	t.paths = slices.DeleteFunc(t.paths, func(p *e2ePath) bool { return !p.tend() })
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.busy = len(t.paths)+len(t.fresh) > 0; t.busy {
		t.timer.Reset(tendEvery)
	}
}

// tend looks at p if nobody drives, and reports whether it has to be looked at
// again.
func (p *e2ePath) tend() bool {
	if !p.mu.TryLock() {
		return true
	}
	defer p.mu.Unlock()
	if p.released {
		return false
	}
	if p.driving != nobody {
		p.listed.Store(false) // who drives lists it again when he leaves
		return false
	}
	p.advance(nanotime(), true)
	if p.held > 0 || p.conn.Deadline() != frcp.Never {
		return true
	}
	p.conn.Trim()
	// From here on it rings. What it would ring for may be there already.
	p.listed.Store(false)
	if p.lower.Arm() {
		return false
	}
	return !p.listed.Swap(true)
}
