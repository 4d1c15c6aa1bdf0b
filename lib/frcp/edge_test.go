package frcp

import (
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// Two of ours on a perfect path, known to each other.
func ourPair(t testing.TB, spec qos.Spec, window int) (*Conn, *Conn, *network) {
	t.Helper()
	a := newConn(t, Config{QoS: spec, Rand: rands(1), Window: window})
	b := newConn(t, Config{QoS: spec, Rand: rands(2), Window: window})
	w := newNetwork(1, a, b, link{delay: ms})
	a.Announce()
	b.Announce()
	w.run(time.Second, func() bool { return a.PeerExt() && b.PeerExt() && len(w.q) == 0 })
	if !a.PeerExt() || !b.PeerExt() {
		t.Fatal("the ends do not recognise each other")
	}
	return a, b, w
}

func TestHalfClose(t *testing.T) {
	for _, spec := range []qos.Spec{qos.Data, qos.Voice} {
		a, b, w := ourPair(t, spec, 0)
		big := msgs(1, 1, 20000, 20001)[0]
		if err := a.Write(w.now, big); err != nil {
			t.Fatal(err)
		}
		a.CloseWrite(w.now)
		if err := a.Write(w.now, big); !errors.Is(err, o7serr.EPIPE) {
			t.Fatal(err)
		}
		pa, pb := &app{c: a, readSize: 70000}, &app{c: b, readSize: 70000}
		w.run(time.Second, func() bool { pa.run(w.now); pb.run(w.now); return pb.eof })
		if !pb.eof || len(pb.got) != 1 || string(pb.got[0]) != string(big) {
			t.Fatalf("%v: eof %v, %d messages", ModeOf(spec), pb.eof, len(pb.got))
		}
		pb.out = msgs(2, 10, 8, 100)
		pb.closeEnd = true
		w.run(time.Second, func() bool { pa.run(w.now); pb.run(w.now); return pa.eof })
		if s := sameSequence(pa.got, pb.out, true); s != "" || !pa.eof || len(pa.got) != 10 {
			t.Fatalf("%v: other direction: %q %d", ModeOf(spec), s, len(pa.got))
		}
		if _, _, err := b.Read(nil); err != io.EOF {
			t.Fatal(err)
		}
	}
}

// One lost packet of many is repeated after duplicate acknowledgements, long
// before any timer; towards a reference end only a timer repeats.
func TestFastRetransmit(t *testing.T) {
	a, b, w := ourPair(t, qos.Data, 0)
	w.links[0].delay, w.links[1].delay = 20*ms, 20*ms
	pa, pb := &app{c: a, out: msgs(1, 400, 8, 100)}, &app{c: b, readSize: 2000}
	w.run(time.Second, func() bool { pa.run(w.now); pb.run(w.now); return len(pb.got) >= 100 })
	n, base := 0, a.Stats()
	w.links[0].cut = func(int64) bool { n++; return n == 5 }
	start := w.now
	pa.out = append(pa.out, msgs(1, 400, 8, 100)...)
	w.run(5*time.Second, func() bool { pa.run(w.now); pb.run(w.now); return len(pb.got) == 800 })
	s := a.Stats()
	if len(pb.got) != 800 || s.FastRetransmits != base.FastRetransmits+1 || s.RTOs != 0 {
		t.Fatalf("%d delivered in %v, %+v", len(pb.got), time.Duration(w.now-start), s)
	}
}

func TestHostileControl(t *testing.T) {
	now := 1000 * second
	c := newConn(t, Config{QoS: qos.Data, Rand: rands(1, 1000)})
	for range 10 {
		_ = c.Write(now, []byte("x"))
	}
	for poll(c, now) != "" {
	}
	in := func(h Header) {
		var b [HeaderLen]byte
		Header12{}.Put(b[:], h)
		c.Input(now, b[:])
	}
	for _, h := range []Header{
		{Flags: Ack | FC, Ack: 1011, Window: 5000},       // not sent yet
		{Flags: Ack | FC, Ack: 999, Window: 5000},        // before the run
		{Flags: Ack | FC, Ack: 1 << 31, Window: 5000},    // nonsense
		{Flags: FC, Window: 999},                         // behind
		{Flags: FC, Window: 1000 + maxEdge},              // too far
		{Flags: FC, Window: 1005},                        // would take back
		{Flags: 0, Ack: 1005, Window: 70},                // flags not set
		{Flags: Data, Seq: 77, Ack: 1005, Window: 70},    // no run, nothing valid
		{Flags: First | More, Ack: 1005, Window: 0x1234}, // reserved bits alone
	} {
		in(h)
		if c.lwe != 1000 || c.rwe != 1064 {
			t.Fatalf("%+v: lwe %d rwe %d", h, c.lwe, c.rwe)
		}
	}
	in(Header{Flags: Ack | FC, Ack: 1010, Window: 1266})
	if c.lwe != 1010 || c.rwe != 1266 {
		t.Fatal("a valid acknowledgement was refused")
	}
}

// A peer that ignores the window cannot make us store more than it grants.
func TestHostileFlood(t *testing.T) {
	for _, spec := range []qos.Spec{qos.Data, qos.Video} {
		c := newConn(t, Config{QoS: spec})
		p := make([]byte, HeaderLen+10)
		r := rand.New(rand.NewPCG(1, 1))
		for i := range 20000 {
			seq := uint32(i)
			if i%3 == 0 {
				seq = r.Uint32()
			}
			Header12{}.Put(p, Header{Flags: Data | DRF | Ext | Flags(r.Uint32())&fragMask, Seq: seq})
			c.Input(second, p)
			poll(c, second)
		}
		if len(c.early.s) > refWindow || len(c.ready.s) > 2*refWindow {
			t.Fatalf("%v: %d early, %d ready", ModeOf(spec), len(c.early.s), len(c.ready.s))
		}
		c.Release()
	}
}

func TestEdge(t *testing.T) {
	for _, c := range []struct{ near, w, want uint32 }{
		{0x00ffff00, 0x000010, 0x01000010},
		{0x01000010, 0xffff00, 0x00ffff00},
		{0xfffffff0, 0x000001, 0x00000001},
		{0x89abcdef, 0xabcef0, 0x89abcef0},
	} {
		if got := edge(c.near, c.w); got != c.want {
			t.Errorf("edge(%x, %x) = %x, want %x", c.near, c.w, got, c.want)
		}
	}
}

func TestConfig(t *testing.T) {
	r := rands(1)
	for _, c := range []Config{
		{QoS: qos.Raw, Rand: r, MaxPacket: 1000},
		{QoS: qos.Data, MaxPacket: 1000},
		{QoS: qos.Data, Rand: r, MaxPacket: 12},
		{QoS: qos.Data, Rand: r, MaxPacket: 1000, Window: maxWindow + 1},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%+v accepted", c)
		}
	}
}

// roundTrip sends n messages and everything that follows from them.
func roundTrip(now *int64, a, b *Conn, n int, msg, buf []byte) {
	for range n {
		if err := a.Write(*now, msg); err != nil {
			panic(err)
		}
	}
	for k := 0; k < 2; k++ {
		*now += 20 * ms
		for l := a.Poll(*now, buf); l > 0; l = a.Poll(*now, buf) {
			b.Input(*now, buf[:l])
		}
		for b.Readable() {
			if _, _, err := b.Read(buf); err != nil {
				panic(err)
			}
		}
		for l := b.Poll(*now, buf); l > 0; l = b.Poll(*now, buf) {
			a.Input(*now, buf[:l])
		}
	}
}

func TestNoAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool drop buffers at random")
	}
	for _, spec := range []qos.Spec{qos.Data, qos.Video, withCRC(qos.Data)} {
		a, b, w := ourPair(t, spec, 0)
		msg, big, buf := make([]byte, 1400), make([]byte, 9000), make([]byte, 16384)
		now := w.now
		one := func() { roundTrip(&now, a, b, 20, msg, buf); roundTrip(&now, a, b, 1, big, buf) }
		for range 50 {
			one()
		}
		if n := testing.AllocsPerRun(200, one); n != 0 {
			t.Errorf("%v: %v allocations per 20 packets and a fragmented message", ModeOf(spec), n)
		}
	}
}

// Losses and what mends them allocate nothing either: holes, selective
// acknowledgements, repetitions, probes.
func TestNoAllocationsWithLosses(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool drop buffers at random")
	}
	a, b, w := ourPair(t, qos.Data, 0)
	msg, buf := make([]byte, 1400), make([]byte, 4096)
	now, n := w.now, 0
	one := func() {
		left := 60
		for left > 0 || a.TxLen() > 0 {
			for left > 0 && a.Write(now, msg) == nil {
				left--
			}
			now += 5 * ms
			for l := a.Poll(now, buf); l > 0; l = a.Poll(now, buf) {
				if n++; n%7 != 0 {
					b.Input(now, buf[:l])
				}
			}
			for b.Readable() {
				if _, _, err := b.Read(buf); err != nil {
					panic(err)
				}
			}
			for l := b.Poll(now, buf); l > 0; l = b.Poll(now, buf) {
				if n++; n%5 != 0 {
					a.Input(now, buf[:l])
				}
			}
		}
	}
	for range 100 {
		one()
	}
	base := a.Stats()
	if n := testing.AllocsPerRun(200, one); n != 0 {
		t.Errorf("%v allocations per 60 packets", n)
	}
	if s := a.Stats(); s.Resent-base.Resent < 200 {
		t.Fatalf("hardly anything was lost: %+v", s)
	}
}

// The same with messages of 32 KiB, in 23 fragments.
func BenchmarkTransferMessages(b *testing.B) {
	x, y, w := ourPair(b, qos.Data, 0)
	msg, buf := make([]byte, 32<<10), make([]byte, 64<<10)
	now := w.now
	b.SetBytes(int64(len(msg)))
	b.ReportAllocs()
	for b.Loop() {
		roundTrip(&now, x, y, 1, msg, buf)
	}
}

// The core alone: 32 packets of 1400 bytes there, the acknowledgements back.
func BenchmarkTransfer(b *testing.B) {
	for _, m := range []struct {
		name string
		spec qos.Spec
	}{{"reliable", qos.Data}, {"ordered", qos.Video}, {"reliable-crc", withCRC(qos.Data)}} {
		b.Run(m.name, func(b *testing.B) {
			x, y, w := ourPair(b, m.spec, 0)
			msg, buf := make([]byte, 1400), make([]byte, 4096)
			now := w.now
			b.SetBytes(32 * 1400)
			b.ReportAllocs()
			for b.Loop() {
				roundTrip(&now, x, y, 32, msg, buf)
			}
		})
	}
}

// The first packets of a flow may take another way than those that follow: what
// a packet without data has overtaken is still the beginning.
func TestOvertakenStart(t *testing.T) {
	a := newConn(t, Config{QoS: qos.Voice, Rand: rands(1, 5)})
	b := newConn(t, Config{QoS: qos.Voice, Rand: rands(2, 5)})
	now, buf := 1000*second, make([]byte, 1500)
	var sent [][]byte
	poll := func() {
		for n := a.Poll(now, buf); n > 0; n = a.Poll(now, buf) {
			sent = append(sent, append([]byte(nil), buf[:n]...))
		}
	}
	a.Announce()
	b.Announce()
	for i := range 3 {
		if err := a.Write(now, []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	poll()
	n := b.Poll(now, buf)
	a.Input(now, buf[:n]) // asks for an answer, which comes last
	first := len(sent)
	poll()
	if first != 4 || len(sent) != 5 {
		t.Fatalf("%d and %d packets", first, len(sent))
	}
	b.Input(now, sent[4])
	for _, p := range sent[:4] {
		b.Input(now, p)
	}
	for i := range 3 {
		if n, _, err := b.Read(buf); err != nil || n != 1 || buf[0] != byte(i) {
			t.Fatalf("message %d: % x, %v, %+v", i, buf[:n], err, b.Stats())
		}
	}
	// Once something was delivered, what was before it comes too late.
	if _, _, err := b.Read(buf); !errors.Is(err, ErrWouldBlock) {
		t.Fatal(err)
	}
	b.Input(now, sent[1])
	if s := b.Stats(); s.Late+s.Duplicate != 1 {
		t.Fatalf("%+v", s)
	}
}
