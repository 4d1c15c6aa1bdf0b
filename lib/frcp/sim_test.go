package frcp

import (
	"bytes"
	"container/heap"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/qos"
)

const (
	ms     = int64(time.Millisecond)
	second = int64(time.Second)
)

// end is what the simulated network carries packets for: a Conn or the model
// of a reference end.
type end interface {
	Input(now int64, p []byte)
	Poll(now int64, dst []byte) int
	Deadline() int64
}

// link impairs one direction.
type link struct {
	loss, dup, flip float64
	delay, jitter   int64
	cut             func(now int64) bool // true: nothing passes
	rate            int64                // bytes/s that pass; 0: any
	queue           int64                // bytes that wait for that, what is more is lost
	free            int64                // when what waits has passed
}

type transit struct {
	at, order int64
	to        int
	p         []byte
}

type inFlight []transit

func (q inFlight) Len() int { return len(q) }
func (q inFlight) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].order < q[j].order
}
func (q inFlight) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *inFlight) Push(x any)   { *q = append(*q, x.(transit)) }
func (q *inFlight) Pop() any {
	o := *q
	x := o[len(o)-1]
	*q = o[:len(o)-1]
	return x
}

// network joins two ends in virtual time.
type network struct {
	now   int64
	rng   *rand.Rand
	ends  [2]end
	links [2]link // from end i
	q     inFlight
	n     int64
	wake  int64 // an application wants to run then
	tap   func(from int, p []byte)
	buf   [4096]byte
	down  [2]bool
	check int // the invariants every so many steps, of one end
	steps int
}

func newNetwork(seed uint64, a, b end, l link) *network {
	return &network{now: 1000 * second, rng: rand.New(rand.NewPCG(seed, 7)), ends: [2]end{a, b}, links: [2]link{l, l}, wake: Never}
}

func (w *network) send(from int, p []byte) {
	if w.tap != nil {
		w.tap(from, p)
	}
	l := &w.links[from]
	if l.cut != nil && l.cut(w.now) {
		return
	}
	for copies := 1; copies > 0; copies-- {
		if w.rng.Float64() < l.dup {
			copies++
		}
		if w.rng.Float64() < l.loss {
			continue
		}
		q := bytes.Clone(p)
		if w.rng.Float64() < l.flip {
			q[w.rng.IntN(len(q))] ^= 1 << w.rng.IntN(8)
			if w.rng.IntN(4) == 0 {
				q = q[:w.rng.IntN(len(q))]
			}
		}
		at := w.now + l.delay
		if l.rate > 0 {
			l.free = max(l.free, w.now)
			if (l.free-w.now)*l.rate/second > l.queue {
				continue
			}
			l.free += int64(len(p)) * second / l.rate
			at = l.free + l.delay
		}
		if l.jitter > 0 {
			at += w.rng.Int64N(l.jitter)
		}
		w.n++
		heap.Push(&w.q, transit{at, w.n, 1 - from, q})
	}
}

// step lets everybody send, then advances to the next event; false when there
// is none before limit.
func (w *network) step(limit int64) bool {
	next := w.wake
	for i, e := range w.ends {
		c, _ := e.(*Conn)
		full, empty := c != nil && !c.Writable(), c != nil && !c.Readable()
		if w.steps++; c != nil && w.check > 0 && w.steps%w.check == 0 {
			if err := c.invariant(w.now); err != nil {
				panic(err)
			}
		}
		for k := 0; ; k++ {
			n := e.Poll(w.now, w.buf[:])
			if n == 0 {
				break
			}
			if k > 100000 {
				panic("an end sends without end")
			}
			w.send(i, w.buf[:n])
		}
		if c != nil && (full && c.Writable() || empty && c.Readable() || c.err != nil && !w.down[i]) {
			w.down[i] = c.err != nil // the application is to see that at once
			return true
		}
		d := e.Deadline()
		if d <= w.now {
			d = w.now + 1 // a deadline that Poll did not consume must not stop time
		}
		next = min(next, d)
	}
	if len(w.q) > 0 {
		next = min(next, w.q[0].at)
	}
	if next > limit {
		w.now = limit
		return false
	}
	w.now = max(w.now, next)
	for len(w.q) > 0 && w.q[0].at <= w.now {
		x := heap.Pop(&w.q).(transit)
		w.ends[x.to].Input(w.now, x.p)
	}
	return true
}

// run steps until done or the virtual time has passed.
func (w *network) run(d time.Duration, done func() bool) bool {
	limit := w.now + int64(d)
	for !done() {
		if !w.step(limit) {
			return done()
		}
	}
	return true
}

// rands returns a random source that begins with the given numbers.
func rands(seed uint64, first ...uint32) func() uint32 {
	r := rand.New(rand.NewPCG(seed, 1))
	return func() uint32 {
		if len(first) > 0 {
			x := first[0]
			first = first[1:]
			return x
		}
		return r.Uint32()
	}
}

func newConn(t testing.TB, cfg Config) *Conn {
	t.Helper()
	if cfg.MaxPacket == 0 {
		cfg.MaxPacket = 1496
	}
	if cfg.Rand == nil {
		cfg.Rand = rands(1)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// app sends messages and collects what arrives.
type app struct {
	c        *Conn
	out      [][]byte
	sent     int
	closeEnd bool // CloseWrite after the last message
	got      [][]byte
	part     []byte
	eof      bool
	err      error
	readSize int
	pause    func(now int64) bool // does not read
	buf      []byte
}

func (a *app) run(now int64) {
	for a.err == nil && a.sent < len(a.out) {
		err := a.c.Write(now, a.out[a.sent])
		if errors.Is(err, ErrWouldBlock) {
			break
		}
		if err != nil {
			a.err = err
			break
		}
		a.sent++
	}
	if a.sent == len(a.out) && a.closeEnd {
		a.c.CloseWrite(now)
	}
	if a.pause != nil && a.pause(now) {
		return
	}
	if a.buf == nil {
		a.buf = make([]byte, max(a.readSize, 1))
	}
	if a.eof && a.err == nil {
		a.err = a.c.Err()
	}
	for !a.eof {
		n, more, err := a.c.Read(a.buf)
		if errors.Is(err, ErrWouldBlock) {
			return
		}
		if err == io.EOF {
			a.eof = true
			return
		}
		if err != nil {
			a.err = err
			return
		}
		a.part = append(a.part, a.buf[:n]...)
		if !more {
			a.got = append(a.got, a.part)
			a.part = nil
		}
	}
}

// msgs makes n distinguishable messages of lo..hi bytes, at least 8.
func msgs(seed uint64, n, lo, hi int) [][]byte {
	r := rand.New(rand.NewPCG(seed, 3))
	m := make([][]byte, n)
	for i := range m {
		m[i] = make([]byte, max(8, lo)+r.IntN(max(1, hi-lo)))
		binary.BigEndian.PutUint64(m[i], uint64(i))
		for j := 8; j < len(m[i]); j++ {
			m[i][j] = byte(i*31 + j)
		}
	}
	return m
}

// sameSequence checks that got is want (reliable) or a subsequence of it.
func sameSequence(got, want [][]byte, whole bool) string {
	j := 0
	for i, g := range got {
		if whole && (i >= len(want) || !bytes.Equal(g, want[i])) {
			return "delivered messages differ from those sent"
		}
		for j < len(want) && !bytes.Equal(g, want[j]) {
			j++
		}
		if j == len(want) {
			return "delivered a message that was not sent, twice or out of order"
		}
		j++
	}
	return ""
}

func withCRC(s qos.Spec) qos.Spec { s.BER = 0; return s }

// xor is a Cipher whose nonce and checksum the tests can follow.
type xor struct{ n byte }

func (*xor) Overhead() (int, int) { return 12, 16 }
func (x *xor) Seal(p []byte) error {
	x.n++
	sum := uint64(x.n)
	for i := range p[:12] {
		p[i] = x.n
	}
	body := p[12 : len(p)-16]
	for i := range body {
		sum = sum*31 + uint64(body[i])
		body[i] ^= x.n
	}
	tag := p[len(p)-16:]
	clear(tag)
	binary.BigEndian.PutUint64(tag, sum)
	return nil
}
func (x *xor) Open(p []byte) ([]byte, error) {
	if len(p) < 28 {
		return nil, io.ErrUnexpectedEOF
	}
	sum := uint64(p[0])
	for _, b := range p[:12] {
		if b != p[0] {
			return nil, io.ErrUnexpectedEOF
		}
	}
	body := p[12 : len(p)-16]
	for i := range body {
		body[i] ^= p[0]
		sum = sum*31 + uint64(body[i])
	}
	if binary.BigEndian.Uint64(p[len(p)-16:]) != sum {
		return nil, io.ErrUnexpectedEOF
	}
	for _, b := range p[len(p)-8:] {
		if b != 0 {
			return nil, io.ErrUnexpectedEOF
		}
	}
	return body, nil
}
