package oap

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/wire"
)

var t0 = time.Unix(0, 1770000000123456789)

func unhex(s string) []byte {
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		panic(err)
	}
	return b
}

var id = unhex("10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f")

func client(t testing.TB, now time.Time, data []byte) *Client {
	t.Helper()
	c, err := NewClient(now, bytes.NewReader(id), data)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// The worked bytes of spec 32, produced by both ends.
func TestWorked(t *testing.T) {
	c := client(t, t0, nil)
	if want := unhex(`
		10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f
		18 90 4d 9f 4b cc cd 15 00 00 00 00 00 00 00 00
		00 00 00 00`); !bytes.Equal(c.Request(), want) {
		t.Errorf("request %x", c.Request())
	}
	r, err := NewServer().Receive(t0.Add(5*time.Millisecond), c.Request())
	if err != nil {
		t.Fatal(err)
	}
	rsp, err := r.Respond(t0.Add(5*time.Millisecond), nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := unhex(`
		10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f
		18 90 4d 9f 4c 19 18 55 00 00 00 00 00 00 00 00
		00 00 00 00 58 7e 16 97 c0 45 2f 8d 2d 32 7e 33
		a2 60 ce 16 ca 78 67 45 a6 13 1c c4 ec f5 ac 15
		8a cc e9 09 7f 0c 51 28 58 20 b8 39 c1 59 91 4b
		2b 49 4b ca`); !bytes.Equal(rsp, want) {
		t.Errorf("response %x", rsp)
	}
	if data, err := c.Complete(rsp); len(data) != 0 || err != nil {
		t.Errorf("completed with %x, %v", data, err)
	}
}

// The request hash follows the request's digest (spec 32 §3, worked bytes 3, 4).
func TestRequestHash(t *testing.T) {
	req := unhex(`
		10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f
		18 90 4d 9f 4b cc cd 15 03 85 02 a0 02 a0 00 00
		00 2c 00 00 30 2a 30 05 06 03 2b 65 6e 03 21 00
		4b 4f 6d 72 2b 81 a5 9d 7e 9f 9b fa 30 30 f0 6e
		18 04 63 41 0e 2e 19 10 fd 2b ae 32 c8 df 8e 43`)
	if got := requestHash(wire.NIDSHA256, req); !bytes.Equal(got, unhex("71a081caa77718b8a76fb0086d1fe32c434261bd846d01525a772a65e304c84c")) {
		t.Errorf("hash %x", got)
	}
	for _, nid := range []uint16{wire.NIDSHA256, wire.NIDSHA384, wire.NIDSHA512, wire.NIDSHA3256, wire.NIDSHA3384, wire.NIDSHA3512, wire.NIDBLAKE2b, wire.NIDBLAKE2s} {
		if n := len(requestHash(nid, req)); n != wire.DigestLen(nid) {
			t.Errorf("digest %d: %d bytes, want %d", nid, n, wire.DigestLen(nid))
		}
		// A plain request may name a digest for its hash.
		b, err := wire.AppendOAP(nil, &wire.OAP{Timestamp: uint64(t0.UnixNano()), DigestNID: nid})
		if err != nil {
			t.Fatal(err)
		}
		r, err := NewServer().Receive(t0, b)
		if err != nil {
			t.Fatal(err)
		}
		rsp, err := r.Respond(t0, nil)
		if err != nil {
			t.Fatal(err)
		}
		m, err := wire.DecodeOAPResponse(rsp, wire.DigestLen(nid))
		if err != nil || !bytes.Equal(m.ReqHash, requestHash(nid, b)) {
			t.Errorf("digest %d: %v", nid, err)
		}
	}
}

// Freshness, at the limits (spec 32 §7).
func TestFreshness(t *testing.T) {
	for age, ok := range map[time.Duration]bool{
		-101 * time.Millisecond:     false,
		-100 * time.Millisecond:     true,
		0:                           true,
		20 * time.Second:            true,
		20001 * time.Millisecond:    false,
		-100 * 365 * 24 * time.Hour: false,
		30 * 365 * 24 * time.Hour:   false,
	} {
		_, err := NewServer().Receive(t0, client(t, t0.Add(-age), nil).Request())
		if (err == nil) != ok || err != nil && !errors.Is(err, o7serr.EAUTH) {
			t.Errorf("age %v: %v", age, err)
		}
	}
	for _, ts := range []uint64{0, 1<<63 - 1, 1 << 63, 1<<64 - 1} {
		b, _ := wire.AppendOAP(nil, &wire.OAP{Timestamp: ts})
		if _, err := NewServer().Receive(t0, b); !errors.Is(err, o7serr.EAUTH) {
			t.Errorf("time stamp %d: %v", ts, err)
		}
	}
}

func TestReplay(t *testing.T) {
	s := NewServer()
	req := client(t, t0, nil).Request()
	if _, err := s.Receive(t0, req); err != nil {
		t.Fatal(err)
	}
	for _, later := range []time.Duration{0, time.Second, 20 * time.Second} {
		if _, err := s.Receive(t0.Add(later), req); !errors.Is(err, o7serr.EAUTH) {
			t.Errorf("replay after %v: %v", later, err)
		}
	}
	// The same id at another time, and another id at the same time, are new.
	if _, err := s.Receive(t0, client(t, t0.Add(1), nil).Request()); err != nil {
		t.Error(err)
	}
	other, _ := NewClient(t0, bytes.NewReader(make([]byte, 16)), nil)
	if _, err := s.Receive(t0, other.Request()); err != nil {
		t.Error(err)
	}
	if s.n != 3 {
		t.Errorf("%d requests remembered", s.n)
	}
	if s.purge(t0.Add(22 * time.Second).UnixNano()); s.n != 0 || len(s.seen) != 0 {
		t.Errorf("%d requests remembered after 22 s", s.n)
	}
	s.n = maxRemembered
	if _, err := s.Receive(t0, client(t, t0, nil).Request()); !errors.Is(err, o7serr.EAGAIN) {
		t.Errorf("full: %v", err)
	}
}

// Against a slow oracle: a request passes once, and only while it is fresh.
func TestReplayOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := NewServer()
		now := t0
		passed := map[string]bool{}
		type request struct {
			at time.Time
			b  []byte
		}
		var sent []request
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.Int64Range(0, int64(6*time.Second)).Draw(t, "pause")))
			var r request
			if len(sent) > 0 && rapid.Bool().Draw(t, "again") {
				r = rapid.SampledFrom(sent).Draw(t, "which")
			} else {
				r.at = now.Add(time.Duration(rapid.Int64Range(int64(-25*time.Second), int64(time.Second)).Draw(t, "skew")))
				c, _ := NewClient(r.at, bytes.NewReader(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "id")), nil)
				r.b = c.Request()
				sent = append(sent, r)
			}
			age := now.Sub(r.at)
			want := age >= -maxAhead && age <= maxAge && !passed[string(r.b)]
			_, err := s.Receive(now, r.b)
			if (err == nil) != want {
				t.Fatalf("age %v, passed before %v: %v", age, passed[string(r.b)], err)
			}
			passed[string(r.b)] = passed[string(r.b)] || err == nil
		}
		total := 0
		for _, m := range s.seen {
			total += len(m)
		}
		if total != s.n || len(s.seen) > 23 {
			t.Fatalf("%d remembered in %d sets, counted %d", total, len(s.seen), s.n)
		}
	})
}

// What this node cannot do it refuses with the number of spec 32 §6.
func TestServerRefuses(t *testing.T) {
	fresh := wire.OAP{Timestamp: uint64(t0.UnixNano())}
	for name, tc := range map[string]struct {
		change func(*wire.OAP)
		want   o7serr.Errno
	}{
		"key exchange":                 {func(m *wire.OAP) { m.Kex, m.CipherNID = []byte{1}, 901 }, o7serr.ECRYPT},
		"certificate":                  {func(m *wire.OAP) { m.Cert, m.Sig = []byte{1}, []byte{2} }, o7serr.EAUTH},
		"certificate and key exchange": {func(m *wire.OAP) { m.Cert, m.Kex = []byte{1}, []byte{2} }, o7serr.EAUTH},
		"unknown cipher":               {func(m *wire.OAP) { m.CipherNID = 1 }, o7serr.EAUTH},
	} {
		m := fresh
		tc.change(&m)
		b, err := wire.AppendOAP(nil, &m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := NewServer().Receive(t0, b); o7serr.Code(err) != tc.want.Code() {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, b := range [][]byte{nil, make([]byte, 35)} {
		if _, err := NewServer().Receive(t0, b); !errors.Is(err, o7serr.EAUTH) {
			t.Errorf("%d bytes: %v", len(b), err)
		}
	}
	// Without key there is nothing to exchange: the flow stays in clear text.
	m := fresh
	m.CipherNID = 901
	b, _ := wire.AppendOAP(nil, &m)
	if _, err := NewServer().Receive(t0, b); err != nil {
		t.Errorf("cipher without key: %v", err)
	}
}

func TestClientRefuses(t *testing.T) {
	c := client(t, t0, []byte("ask"))
	r, err := NewServer().Receive(t0, c.Request())
	if err != nil || string(r.Data) != "ask" {
		t.Fatalf("%q %v", r.Data, err)
	}
	good, err := r.Respond(t0, []byte("answer"))
	if err != nil {
		t.Fatal(err)
	}
	if data, err := c.Complete(good); string(data) != "answer" || err != nil {
		t.Fatalf("%q %v", data, err)
	}
	for name, change := range map[string]func(m *wire.OAP){
		"id":          func(m *wire.OAP) { m.ID[3]++ },
		"hash":        func(m *wire.OAP) { m.ReqHash[47]++ },
		"certificate": func(m *wire.OAP) { m.Cert, m.Sig = []byte{1}, []byte{2} },
		"short hash":  func(m *wire.OAP) { m.ReqHash = m.ReqHash[:32] },
		"digest":      func(m *wire.OAP) { m.DigestNID = 5 },
	} {
		m, err := wire.DecodeOAPResponse(bytes.Clone(good), 48)
		if err != nil {
			t.Fatal(err)
		}
		change(&m)
		b, err := wire.AppendOAP(nil, &m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Complete(b); !errors.Is(err, o7serr.ECRYPT) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, n := range []int{0, 35, 36, len(good) - 1} {
		if _, err := c.Complete(good[:n]); !errors.Is(err, o7serr.ECRYPT) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	// The server's clock does not matter, nor what it says of ciphers.
	m, _ := wire.DecodeOAPResponse(bytes.Clone(good), 48)
	m.Timestamp, m.CipherNID = 0, 901
	b, _ := wire.AppendOAP(nil, &m)
	if _, err := c.Complete(b); err != nil {
		t.Errorf("other clock: %v", err)
	}
	if _, err := NewClient(t0, bytes.NewReader(nil), nil); err == nil {
		t.Error("client without randomness")
	}
	if _, err := NewClient(t0, bytes.NewReader(id), make([]byte, 1<<16)); err == nil {
		t.Error("64 KiB of data")
	}
}

func FuzzServer(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(client(f, t0, nil).Request())
	f.Add(client(f, t0, []byte("data")).Request())
	f.Fuzz(func(t *testing.T, b []byte) {
		s := NewServer()
		r, err := s.Receive(t0, b)
		if err != nil {
			if c := o7serr.Code(err); c != -1008 && c != -1009 {
				t.Fatalf("code %d: %v", c, err)
			}
			return
		}
		if _, err := r.Respond(t0, r.Data); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Receive(t0, b); err == nil {
			t.Fatal("replay passes")
		}
	})
}

func FuzzClient(f *testing.F) {
	c := client(f, t0, nil)
	r, _ := NewServer().Receive(t0, c.Request())
	good, _ := r.Respond(t0, nil)
	f.Add(good)
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := c.Complete(b); err != nil && !errors.Is(err, o7serr.ECRYPT) {
			t.Fatal(err)
		}
	})
}

func BenchmarkServer(b *testing.B) {
	s := NewServer()
	req := client(b, t0, nil).Request()
	now := t0
	for b.Loop() {
		now = now.Add(time.Millisecond)
		m, _ := wire.DecodeOAPRequest(req)
		m.Timestamp = uint64(now.UnixNano())
		req, _ = wire.AppendOAP(req[:0], &m)
		if _, err := s.Receive(now, req); err != nil {
			b.Fatal(err)
		}
	}
}
