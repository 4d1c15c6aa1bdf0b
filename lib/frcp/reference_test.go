package frcp

import (
	"bytes"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/qos"
)

// reference models the reference's end as spec 30 §3-§8 describes it, with its
// oddities 1, 2, 5, 7, 13 and 14: the application reads readLag after arrival,
// and may send data of its own.
type reference struct {
	reliable, crc bool
	readLag       int64
	// receiver
	rlwe, rrwe, rack uint32
	ract             int64
	q                map[uint32][]byte
	readAt           map[uint32]int64
	got              [][]byte
	poisoned         bool // a data packet was refused although it starts a run
	// sender
	lwe, seq, rwe uint32
	sact          int64
	unacked       map[uint32][]byte
	sentAt        map[uint32]int64
	toSend        [][]byte
	out           [][]byte
	ackAt         int64
}

func newReference(spec qos.Spec, lag int64) *reference {
	return &reference{reliable: spec.Loss == 0, crc: spec.BER == 0, readLag: lag, rwe: 64, ract: -1000 * second, sact: -1000 * second,
		q: map[uint32][]byte{}, readAt: map[uint32]int64{}, unacked: map[uint32][]byte{}, sentAt: map[uint32]int64{}, ackAt: Never}
}

func (r *reference) active(now int64) bool { return sec(now)-sec(r.ract) <= 131 }

func (r *reference) bareAck(now int64) {
	if before(r.rack, r.rlwe) && now-r.ract <= 10*second && now-r.sact >= 5*ms {
		r.rack = r.rlwe
		r.put(Header{Flags: Ack | FC, Window: r.rrwe & windowMask, Ack: r.rlwe}, nil)
	}
}

func (r *reference) put(h Header, p []byte) {
	b := make([]byte, HeaderLen, HeaderLen+len(p)+4)
	Header12{}.Put(b, h)
	b = append(b, p...)
	if r.crc && len(p) > 0 {
		b = AppendCRC(b)
	}
	r.out = append(r.out, b)
}

func (r *reference) Input(now int64, p []byte) {
	if r.crc {
		var ok bool
		if p, ok = CheckCRC(p); !ok {
			return
		}
	}
	h, ok := Header12{}.Parse(p)
	if !ok {
		return
	}
	p = p[HeaderLen:]
	if !r.active(now) {
		if h.Flags&DRF != 0 {
			r.rlwe, r.rrwe, r.rack = h.Seq, h.Seq+256, h.Seq
		} else if h.Flags&Data != 0 {
			r.bareAck(now)
			return
		}
	}
	r.ract = now
	if h.Flags&RDVS != 0 {
		r.put(Header{Flags: FC, Window: r.rrwe & windowMask}, nil)
		return
	}
	if h.Flags&Ack != 0 && before(r.lwe, h.Ack) {
		for ; r.lwe != h.Ack && r.lwe != r.seq; r.lwe++ {
			delete(r.unacked, r.lwe)
			delete(r.sentAt, r.lwe)
		}
		r.lwe = h.Ack
	}
	if h.Flags&FC != 0 {
		e := r.rwe&0xff000000 | h.Window
		if before(e, r.rwe) && r.rwe-e > 0x7fffff {
			e += 0x01000000
		}
		r.rwe = e
	}
	if h.Flags&Data == 0 {
		r.bareAck(now)
		return
	}
	if before(h.Seq, r.rlwe) {
		if r.rlwe == 0 {
			r.poisoned = true
		}
		r.rack = h.Seq
		r.bareAck(now)
		return
	}
	if r.reliable {
		if !before(h.Seq, r.rrwe) || h.Seq-r.rlwe >= 256 {
			r.poisoned = r.poisoned || r.rrwe == 0
			r.bareAck(now)
			return
		}
		if _, dup := r.q[h.Seq]; dup {
			r.bareAck(now)
			return
		}
		if r.ackAt == Never {
			r.ackAt = now + 12*ms
		}
	} else {
		r.rlwe = h.Seq
		for s := range r.q { // what was not read in time is passed over
			if before(s, h.Seq) {
				delete(r.q, s)
			}
		}
	}
	r.q[h.Seq] = bytes.Clone(p)
	r.readAt[h.Seq] = now + r.readLag
	if r.readLag == 0 {
		r.read(now)
	}
}

// read is the application.
func (r *reference) read(now int64) {
	for {
		p, ok := r.q[r.rlwe]
		if !ok || r.readAt[r.rlwe] > now {
			return
		}
		r.got = append(r.got, p)
		delete(r.q, r.rlwe)
		r.rlwe++
		r.rrwe++
	}
}

func (r *reference) Poll(now int64, dst []byte) int {
	r.read(now)
	if now >= r.ackAt {
		r.ackAt = Never
		r.bareAck(now)
	}
	for len(r.toSend) > 0 {
		if sec(now)-sec(r.sact) > 131 {
			r.seq = 0xfffffff0
			r.lwe, r.rwe = r.seq, r.seq+64
		}
		if !before(r.seq, r.rwe) {
			break
		}
		r.data(now, r.seq, r.toSend[0], true)
		r.toSend = r.toSend[1:]
	}
	for s := r.lwe; r.reliable && s != r.seq; s++ {
		if now-r.sentAt[s] >= second {
			r.data(now, s, r.unacked[s], false)
		}
	}
	if len(r.out) == 0 {
		return 0
	}
	n := copy(dst, r.out[0])
	r.out = r.out[1:]
	return n
}

func (r *reference) data(now int64, seq uint32, p []byte, fresh bool) {
	h := Header{Flags: Data, Seq: seq}
	if seq == r.lwe {
		h.Flags |= DRF
	}
	if r.active(now) {
		h.Flags |= FC
		h.Window = r.rrwe & windowMask
		if r.reliable && now-r.ract <= 10*second {
			h.Flags |= Ack
			h.Ack = r.rlwe
			r.rack = r.rlwe
		}
	}
	if fresh {
		r.seq++
		r.sact = now
		if !r.reliable {
			r.lwe = r.seq
		}
	}
	if r.reliable {
		r.unacked[seq], r.sentAt[seq] = p, now
	}
	r.put(h, p)
}

func (r *reference) Deadline() int64 {
	d := r.ackAt
	if len(r.out) > 0 {
		return 0
	}
	if _, ok := r.q[r.rlwe]; ok {
		d = min(d, r.readAt[r.rlwe])
	}
	for _, at := range r.sentAt {
		d = min(d, at+second)
	}
	return d
}

// Everything that a program sends to a reference end arrives there, whoever
// speaks first and whenever it is read; the reference's receiver never gets
// into the state of oddity 1.
func TestTowardsReference(t *testing.T) {
	type tc struct {
		name    string
		spec    qos.Spec
		lag     int64
		theirs  int // messages that the reference sends first
		wait    int64
		l       link
		mayLose bool
		n       int
	}
	for _, c := range []tc{
		{name: "we speak first", spec: qos.Data, n: 1000, l: link{delay: ms}},
		{name: "answer after our ack", spec: qos.Data, theirs: 1, wait: 100 * ms, n: 300, l: link{delay: ms}},
		{name: "answer much later", spec: qos.Data, theirs: 200, wait: 20 * second, n: 300, l: link{delay: ms}},
		{name: "both at once", spec: qos.Data, theirs: 300, n: 300, l: link{delay: 5 * ms, jitter: 10 * ms}},
		{name: "lossy", spec: qos.Data, theirs: 200, n: 500, l: link{delay: 5 * ms, jitter: 20 * ms, loss: 0.1, dup: 0.1}},
		{name: "very lossy, first packets too", spec: qos.Data, theirs: 20, n: 50, l: link{delay: 5 * ms, jitter: 20 * ms, loss: 0.3}},
		{name: "slow reader", spec: qos.Data, lag: 2 * second, n: 600, l: link{delay: ms}},
		{name: "crc", spec: withCRC(qos.Data), n: 300, l: link{delay: ms, loss: 0.05}},
		{name: "ordered", spec: qos.Video, n: 1000, l: link{delay: ms}},
		{name: "ordered, answer late", spec: qos.Video, theirs: 64, wait: 100 * ms, n: 1000, l: link{delay: ms}},
		{name: "ordered, window leaks", spec: qos.Video, n: 3000, mayLose: true, l: link{delay: ms, loss: 0.2}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for seed := range uint64(8) {
				ref := newReference(c.spec, c.lag)
				ours := newConn(t, Config{QoS: c.spec, Rand: rands(seed, []uint32{0x89abcdef, 0x12345678, 0xffffffe0, 0x00ffffff}[seed%4])})
				w := newNetwork(seed, ours, ref, c.l)
				w.check = 1
				ref.toSend = msgs(seed, c.theirs, 10, 50)
				theirs := ref.toSend
				a := &app{c: ours, readSize: 100}
				all := msgs(seed+9, c.n, 10, 50)
				start := w.now
				w.wake = start + c.wait
				ok := w.run(600*time.Second, func() bool {
					if w.now >= start+c.wait {
						a.out = all
						w.wake = Never
					}
					a.run(w.now)
					return a.err != nil || a.sent == c.n && (len(ref.got) == c.n || c.mayLose) && len(a.got) == c.theirs
				})
				if !ok || a.err != nil || ref.poisoned {
					t.Fatalf("seed %d: sent %d, reference got %d, we got %d, err %v, poisoned %v, %+v", seed, a.sent, len(ref.got), len(a.got), a.err, ref.poisoned, ours.Stats())
				}
				if s := sameSequence(ref.got, all, !c.mayLose); s != "" {
					t.Fatal(s)
				}
				if s := sameSequence(a.got, theirs, !c.mayLose); s != "" {
					t.Fatal(s)
				}
				if err := ours.Write(w.now, make([]byte, 5000)); err != ErrTooLarge {
					t.Fatalf("message above the packet size to a reference peer: %v", err)
				}
				ours.Close(w.now)
				if !w.run(130*time.Second, ours.Done) || ours.Err() != nil {
					t.Fatalf("seed %d: linger: %v", seed, ours.Err())
				}
			}
		})
	}
}

// What a path to a reference end carries is used, without losing much of it in
// queues that are far shorter than the window.
func TestPathToReference(t *testing.T) {
	const n = 20000
	for _, p := range []struct {
		rate, packets int64 // packets/s; that wait
		loss, least   float64
	}{
		{1e6, 1000, 0, 15000}, {5000, 100, 0, 4000}, {5000, 20, 0, 2000}, {20000, 40, 0, 5000}, {500, 10, 0, 350}, {5000, 100, 0.01, 300},
	} {
		ref := newReference(qos.Data, 0)
		ours := newConn(t, Config{QoS: qos.Data, Rand: rands(1)})
		w := newNetwork(1, ours, ref, link{delay: ms / 2})
		w.check = 97
		w.links[0] = link{delay: ms / 2, rate: p.rate * 1012, queue: p.packets * 1012, loss: p.loss}
		msg, sent, start := make([]byte, 1000), 0, w.now
		w.run(100*time.Second, func() bool {
			for sent < n && ours.Write(w.now, msg) == nil {
				sent++
			}
			return len(ref.got) == n
		})
		s, rate := ours.Stats(), float64(len(ref.got))*1e9/float64(w.now-start)
		t.Logf("%d packets/s, %d wait, loss %v: %.0f packets/s, %.1f %% repeated, %d times up", p.rate, p.packets, p.loss, rate, float64(s.Resent)/float64(s.Sent)*100, s.RTOs)
		if rate < p.least || float64(s.Resent)/float64(s.Sent) > 0.07+5*p.loss {
			t.Errorf("%.0f of %d packets/s, %+v", rate, p.rate, s)
		}
	}
}

// After silence longer than Delta-t we draw a new number, and the reference,
// whose receiver has expired by then, follows; packets of the old run do not
// start one.
func TestNewRunAfterSilence(t *testing.T) {
	for _, pause := range []time.Duration{100, 130, 131, 132, 133, 134, 135, 200} {
		ref := newReference(qos.Data, 0)
		ours := newConn(t, Config{QoS: qos.Data, Rand: rands(1, 0x89abcdef, 0x11111111, 0x12222222)})
		w := newNetwork(1, ours, ref, link{delay: 3 * ms})
		w.now += 998 * ms
		for i := range 3 {
			if err := ours.Write(w.now, []byte{byte(i), 1}); err != nil {
				t.Fatal(err)
			}
			if !w.run(10*time.Second, func() bool { return len(ref.got) == i+1 }) {
				t.Fatalf("pause %d s: message %d not delivered", pause, i)
			}
			w.run(pause*time.Second, func() bool { return false })
		}
		if renewed := ours.lwe < 0x20000000; renewed != (pause > 134) && pause != 134 && pause != 133 {
			t.Errorf("pause %d s: sequence number %x", pause, ours.lwe)
		}
	}
}
