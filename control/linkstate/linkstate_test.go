package linkstate

import (
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/o7s/o7s-router/lib/wire"
)

var t0 = time.Date(2026, 11, 20, 15, 24, 35, 0, time.UTC)

func mustNew(t testing.TB, cfg Config) *Instance {
	t.Helper()
	in, err := New(cfg, t0)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func lsa(src, dst, seq uint64) []byte {
	return wire.LSA{Src: src, Dst: dst, Seqno: seq}.AppendTo(nil)
}

func withdraw(src, dst, seq uint64) []byte {
	return wire.LSA{Src: src, Dst: dst, Seqno: seq, Withdraw: true}.AppendTo(nil)
}

// out ticks and returns "flow: src>dst seq" for every packet that came out; a
// withdrawal has an x in front of its seq.
func out(in *Instance, now time.Time) []string {
	in.Tick(now)
	var s []string
	for _, p := range in.Output() {
		m, err := wire.ParseLSA(p.Bytes())
		if err != nil {
			panic(err)
		}
		x := ""
		if m.Withdraw {
			x = "x"
		}
		s = append(s, fmt.Sprintf("%d: %d>%d %s%d", p.Flow, m.Src, m.Dst, x, m.Seqno))
	}
	return s
}

func wantOut(t *testing.T, in *Instance, now time.Time, want ...string) {
	t.Helper()
	if d := cmp.Diff(want, out(in, now)); d != "" {
		t.Errorf("output at %v (-want +got):\n%s", now.Sub(t0), d)
	}
}

func TestNew(t *testing.T) {
	for _, cfg := range []Config{{}, {Self: 1, Policy: 3}, {Self: 1, TTimeo: -1}} {
		if _, err := New(cfg, t0); err == nil {
			t.Errorf("New(%+v) gave no error", cfg)
		}
	}
	in := mustNew(t, Config{Self: 1})
	if d := in.NextDeadline(); !d.IsZero() {
		t.Errorf("idle instance wants a Tick at %v", d)
	}
}

// Spec 42 §11, derived bytes.
func TestWorkedBytes(t *testing.T) {
	in := mustNew(t, Config{Self: 0x4f3a21c7})
	in.MgmtUp(t0, 1, 0x0a0b0c0d)
	in.DTUp(t0, 2, 0x0a0b0c0d)
	want := "000000000a0b0c0d 000000004f3a21c7 "
	for seq, now := 0, t0; seq <= 3; seq, now = seq+1, now.Add(DefaultTUpdate) {
		in.Tick(now)
		ps := in.Output()
		if len(ps) != 1 {
			t.Fatalf("%d packets at refresh %d, want 1", len(ps), seq)
		}
		w := strings.ReplaceAll(want, " ", "") + fmt.Sprintf("%016x", seq)
		if got := hex.EncodeToString(ps[0].Bytes()); got != w {
			t.Errorf("refresh %d\n got %s\nwant %s", seq, got, w)
		}
		if again := in.Output(); again != nil {
			t.Errorf("output given twice")
		}
	}
}

// Spec 42 §11, captured: A–B is up, then C joins at B.
func TestCapturedSequence(t *testing.T) {
	const (
		a, b, c = 0x49fcc0d4, 0x77a7ea97, 0x4c0526d3
		fa, fc  = 1, 2
	)
	in := mustNew(t, Config{Self: b})
	now := t0
	in.MgmtUp(now, fa, a)
	wantOut(t, in, now)
	now = now.Add(time.Second)
	in.DTUp(now, 10, a)
	wantOut(t, in, now, fmt.Sprintf("1: %d>%d 0", b, a))
	in.Receive(now, fa, unhex(t, "0000000077a7ea970000000049fcc0d40000000000000000"))
	wantOut(t, in, now)

	now = now.Add(time.Second)
	in.MgmtUp(now, fc, c)
	// One packet at once, the rest when C's reader certainly runs; order by dst.
	wantOut(t, in, now, fmt.Sprintf("2: %d>%d 0", b, a))
	now = now.Add(DefaultSettle)
	wantOut(t, in, now, fmt.Sprintf("2: %d>%d 0", a, b))

	now = now.Add(time.Second)
	in.DTUp(now, 11, c)
	wantOut(t, in, now, fmt.Sprintf("1: %d>%d 0", b, c), fmt.Sprintf("2: %d>%d 0", b, c))
	in.Receive(now, fc, unhex(t, "0000000077a7ea97000000004c0526d30000000000000000"))
	wantOut(t, in, now, fmt.Sprintf("1: %d>%d 0", c, b))
	in.Tick(now.Add(HoldMin))
	want := []Route{
		{Dst: a, NextHops: []uint64{a}, Cost: 1},
		{Dst: c, NextHops: []uint64{c}, Cost: 1},
	}
	if d := cmp.Diff(want, in.Routes()); d != "" {
		t.Errorf("routes (-want +got):\n%s", d)
	}
}

func unhex(t *testing.T, s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A reference peer must not get a second packet before its reader runs.
func TestSettle(t *testing.T) {
	load := func() *Instance {
		in := mustNew(t, Config{Self: 1})
		in.MgmtUp(t0, 9, 99)
		for i := uint64(2); i < 6; i++ {
			in.Receive(t0, 9, lsa(i, i+1, 7))
		}
		wantOut(t, in, t0)
		in.MgmtUp(t0, 1, 50)
		wantOut(t, in, t0, "1: 2>3 7")
		return in
	}
	t.Run("silent peer", func(t *testing.T) {
		in := load()
		if d := in.NextDeadline().Sub(t0); d != DefaultSettle {
			t.Errorf("next deadline %v, want %v", d, DefaultSettle)
		}
		wantOut(t, in, t0.Add(DefaultSettle-1))
		wantOut(t, in, t0.Add(DefaultSettle), "1: 3>4 7", "1: 4>5 7", "1: 5>6 7")
	})
	t.Run("peer speaks", func(t *testing.T) {
		in := load()
		in.Receive(t0.Add(time.Millisecond), 1, lsa(4, 5, 7)) // and needs no copy
		wantOut(t, in, t0.Add(time.Millisecond), "1: 3>4 7", "1: 5>6 7")
	})
	t.Run("keep-alive proves nothing", func(t *testing.T) {
		in := load()
		in.Receive(t0.Add(time.Millisecond), 1, nil)
		wantOut(t, in, t0.Add(time.Millisecond))
	})
	t.Run("replaced flow starts over", func(t *testing.T) {
		in := load()
		now := t0.Add(DefaultSettle)
		in.MgmtUp(now, 2, 50)
		wantOut(t, in, now, "2: 2>3 7")
		in.Receive(now, 1, lsa(7, 8, 1)) // the old flow still delivers
		wantOut(t, in, now, "9: 7>8 1")
		in.MgmtDown(now, 2)
		wantOut(t, in, now, "1: 2>3 7")
		in.MgmtDown(now, 1)
		in.MgmtDown(now, 1)
		wantOut(t, in, now.Add(time.Second))
	})
}

func TestPacing(t *testing.T) {
	in := mustNew(t, Config{Self: 1})
	in.MgmtUp(t0, 1, 2)
	const n = 10000
	for i := uint64(0); i < n; i++ {
		in.Receive(t0, 1, lsa(10+i, 11+i, i))
	}
	in.Tick(t0)
	in.Output()
	in.MgmtUp(t0, 3, 3)
	seen, ticks := 0, 0
	now := t0.Add(DefaultSettle)
	for ; seen < n; ticks++ {
		in.Tick(now)
		ps := in.Output()
		if len(ps) > burst {
			t.Fatalf("%d packets in one burst", len(ps))
		}
		seen += len(ps)
		if seen < n {
			now = in.NextDeadline()
		}
	}
	if d := now.Sub(t0); d > 400*time.Millisecond {
		t.Errorf("replication of %d LSAs took %v", n, d)
	}
	if s := in.Stats(); s.Entries != n {
		t.Errorf("%d entries, want %d", s.Entries, n)
	}
}

// line makes an instance 1 that knows 1-2, 2-3 and its neighbour 2 on flow 1
// (management) and 11 (data).
func line(t *testing.T, cfg Config) *Instance {
	cfg.Self = 1
	in := mustNew(t, cfg)
	in.MgmtUp(t0, 1, 2)
	in.DTUp(t0, 11, 2)
	for _, l := range [][2]uint64{{2, 1}, {2, 3}, {3, 2}} {
		in.Receive(t0, 1, lsa(l[0], l[1], 5))
	}
	in.Tick(t0)
	in.Output()
	in.Tick(t0.Add(HoldMin))
	if len(in.Routes()) != 2 {
		t.Fatalf("routes %v", in.Routes())
	}
	return in
}

func TestWithdrawal(t *testing.T) {
	now := t0.Add(time.Second)
	in := line(t, Config{})
	in.MgmtUp(now, 4, 4)
	in.Receive(now, 4, lsa(8, 9, 0))
	out(in, now)

	in.Receive(now, 1, withdraw(3, 2, 4)) // older than what we have
	wantOut(t, in, now)
	in.Receive(now, 1, withdraw(3, 2, 5))
	wantOut(t, in, now, "4: 3>2 x5")
	if r := in.Routes(); len(r) != 1 || r[0].Dst != 2 {
		t.Errorf("routes after withdrawal: %v", r)
	}
	set, gone := in.Changes()
	if len(set) != 1 || len(gone) != 0 { // first call: only what is there now
		t.Errorf("changes %v %v", set, gone)
	}
	// The old announcement does not resurrect it, and its sender is told.
	in.Receive(now, 4, lsa(3, 2, 5))
	wantOut(t, in, now, "4: 3>2 x5")
	in.Receive(now, 4, withdraw(3, 2, 5))
	wantOut(t, in, now)
	// A newer one does.
	now = now.Add(time.Second)
	in.Receive(now, 4, lsa(3, 2, 6))
	wantOut(t, in, now, "1: 3>2 6")
	if r := in.Routes(); len(r) != 2 {
		t.Errorf("routes after new announcement: %v", r)
	}
	// A withdrawal can overtake its announcement.
	in.Receive(now, 4, withdraw(20, 21, 3))
	wantOut(t, in, now, "1: 20>21 x3")
	in.Receive(now, 1, lsa(20, 21, 3))
	wantOut(t, in, now, "1: 20>21 x3")
}

func TestOwnLinkLost(t *testing.T) {
	in := line(t, Config{})
	now := t0.Add(time.Second)
	in.MgmtUp(now, 4, 4)
	in.Receive(now, 4, lsa(8, 9, 0))
	out(in, now)
	in.DTUp(now, 12, 2) // a second flow to the same neighbour
	if f, ok := in.DTFlow(2); !ok || f != 12 {
		t.Errorf("flow to 2 is %d, want the newest", f)
	}
	in.DTDown(now, 12)
	in.DTDown(now, 77)
	wantOut(t, in, now)
	in.DTDown(now, 11)
	wantOut(t, in, now, "1: 1>2 x0", "4: 1>2 x0")
	if r := in.Routes(); len(r) != 0 {
		t.Errorf("table not flushed with the last link: %v", r)
	}
	// An echo of what we withdrew is refused, and no conflict.
	in.Receive(now, 4, lsa(1, 2, 0))
	wantOut(t, in, now, "4: 1>2 x0")
	if c, ok := in.Conflict(); ok {
		t.Errorf("conflict %v", c)
	}
	// Back again: the sequence numbers continue.
	now = now.Add(time.Second)
	in.DTUp(now, 13, 2)
	wantOut(t, in, now, "1: 1>2 1", "4: 1>2 1")
	if r := in.Routes(); len(r) != 2 {
		t.Errorf("routes %v", r)
	}
	in.Leave(now)
	wantOut(t, in, now, "1: 1>2 x1", "4: 1>2 x1")
}

func TestNoWithdraw(t *testing.T) {
	in := line(t, Config{NoWithdraw: true})
	now := t0.Add(time.Second)
	in.Receive(now, 1, withdraw(3, 2, 9))
	in.DTDown(now, 11)
	wantOut(t, in, now)
	if s := in.Stats(); s.Malformed != 1 {
		t.Errorf("withdrawal accepted: %+v", s)
	}
}

func TestAgeing(t *testing.T) {
	in := line(t, Config{})
	// 2 goes on refreshing its LSAs; 3 is silent.
	for s := 15; s <= 60; s += 15 {
		now := t0.Add(time.Duration(s) * time.Second)
		in.Receive(now, 1, lsa(2, 1, uint64(5+s/15)))
		in.Receive(now, 1, lsa(2, 3, uint64(5+s/15)))
		in.Tick(now)
		in.Output()
	}
	if len(in.Routes()) != 2 {
		t.Fatalf("aged too early: %v", in.Routes())
	}
	d := in.NextDeadline()
	if want := t0.Add(DefaultTTimeo + 1); !d.Equal(want) {
		t.Fatalf("next deadline %v, want %v", d.Sub(t0), want.Sub(t0))
	}
	in.Tick(d)
	if r := in.Routes(); len(r) != 1 || r[0].Dst != 2 {
		t.Errorf("no computation after ageing: %v", r)
	}
	runs := in.Runs()
	last := runs[len(runs)-1]
	if last.Trigger != "age" || last.Src != 3 || last.Dst != 2 {
		t.Errorf("last run %+v", last)
	}
	// Everything goes in the end but our own.
	for i := 0; i < 200; i++ {
		if d = in.NextDeadline(); d.After(t0.Add(time.Hour)) {
			break
		}
		in.Tick(d)
		in.Output()
	}
	if db := in.LSDB(d); len(db) != 1 || !db[0].Own || db[0].Usable {
		t.Errorf("database after an hour: %+v", db)
	}
	if len(in.db.vertexIndex) != 2 || len(in.Routes()) != 0 {
		t.Errorf("vertices %v, routes %v", in.db.vertexIndex, in.Routes())
	}
}

func TestConflict(t *testing.T) {
	for _, tc := range []struct {
		name string
		pkt  []byte
		want bool
	}{
		{"echo of our own", lsa(1, 2, 0), false},
		{"link we never had", lsa(1, 7, 0), true},
		{"newer than we sent", lsa(1, 2, 4), true},
		{"withdrawal newer than we sent", withdraw(1, 2, 4), true},
		{"withdrawal as old as ours", withdraw(1, 2, 0), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := line(t, Config{})
			in.Receive(t0, 1, tc.pkt)
			m, ok := in.Conflict()
			if ok != tc.want {
				t.Errorf("conflict %v %v, want %v", m, ok, tc.want)
			}
			if _, again := in.Conflict(); again {
				t.Error("told twice")
			}
			if len(in.Routes()) != 2 {
				t.Errorf("routes %v", in.Routes())
			}
		})
	}
	t.Run("jump above", func(t *testing.T) {
		in := line(t, Config{})
		in.Receive(t0, 1, lsa(1, 2, 40))
		wantOut(t, in, t0)
		wantOut(t, in, t0.Add(DefaultTRecalc), "1: 1>2 41")
		now := t0.Add(DefaultTRecalc + time.Second)
		in.DTDown(now, 11)
		wantOut(t, in, now, "1: 1>2 x41")
		in.Receive(now, 1, lsa(1, 2, 50))
		wantOut(t, in, now)
		wantOut(t, in, now.Add(DefaultTRecalc), "1: 1>2 x51")
	})
	t.Run("neighbour has our address", func(t *testing.T) {
		in := line(t, Config{})
		in.DTUp(t0, 50, 1)
		if _, ok := in.Conflict(); !ok {
			t.Error("not told")
		}
		in.MgmtUp(t0, 51, 1)
		if _, ok := in.Conflict(); !ok {
			t.Error("not told")
		}
		wantOut(t, in, t0)
	})
}

func TestMalformed(t *testing.T) {
	in := line(t, Config{})
	bad := [][]byte{
		make([]byte, 1), make([]byte, 23), make([]byte, 25), make([]byte, 31), make([]byte, 33), make([]byte, 1500),
		lsa(0, 1, 1), lsa(5, 0, 1), lsa(5, 5, 1),
		append(lsa(5, 6, 1), 0, 0, 0, 0, 0, 0, 0, 2),
	}
	for _, p := range bad {
		in.Receive(t0, 1, p)
	}
	in.Receive(t0, 999, lsa(5, 6, 1))
	s := in.Stats()
	if s.Malformed != uint64(len(bad)) || s.UnknownFlow != 1 || s.Entries != 4 {
		t.Errorf("stats %+v", s)
	}
	wantOut(t, in, t0)
}

func TestFull(t *testing.T) {
	in := mustNew(t, Config{Self: 1, MaxEntries: 10})
	in.MgmtUp(t0, 1, 2)
	for i := uint64(10); i < 40; i++ {
		in.Receive(t0, 1, lsa(i, i+1, 0))
		in.Receive(t0, 1, withdraw(i+1, i, 0))
	}
	if s := in.Stats(); s.Entries+s.Withdrawn != 10 || s.Refused != 50 {
		t.Errorf("stats %+v", s)
	}
	in.DTUp(t0, 3, 2) // our own always has room
	if s := in.Stats(); s.Entries+s.Withdrawn != 11 {
		t.Errorf("stats %+v", s)
	}
}

// A burst of changes is computed few times, and a lone change at once.
func TestHoldDown(t *testing.T) {
	in := line(t, Config{})
	now := t0.Add(time.Second)
	runs := in.Stats().Runs
	n := 0
	for d := time.Duration(0); d < 2*time.Second; d += time.Millisecond {
		if d%(2*time.Millisecond) == 0 {
			x := uint64(100 + n)
			in.Receive(now.Add(d), 1, lsa(x, 2, 0))
			in.Receive(now.Add(d), 1, lsa(2, x, 0))
			n++
		}
		in.Tick(now.Add(d))
		in.Output()
		if d == 0 && in.Stats().Runs != runs+1 {
			t.Error("first change not computed at once")
		}
	}
	if r := in.Stats().Runs - runs; r < 5 || r > 14 {
		t.Errorf("%d computations for %d changes in 2 s", r, n)
	}
	in.Tick(in.NextDeadline())
	now = now.Add(4 * time.Second)
	runs = in.Stats().Runs
	in.Receive(now, 1, withdraw(100, 2, 0))
	in.Tick(now)
	if in.Stats().Runs != runs+1 {
		t.Error("after a quiet time a change is not computed at once")
	}
	if len(in.Runs()) > logRuns {
		t.Errorf("%d runs remembered", len(in.Runs()))
	}
}
