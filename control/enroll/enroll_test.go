package enroll

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/wire"
)

var t0 = time.Unix(1771000000, 123456789)

const self = 0x4F3A21C7

func unhex(s string) []byte {
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		panic(err)
	}
	return b
}

func lan() ipcp.Config {
	return ipcp.Config{Type: ipcp.Unicast, LayerName: "LAN", Hash: ipcp.SHA3_256, Unicast: ipcp.DefaultUnicast()}
}

func joiner(t testing.TB, kind ipcp.Type) *Joiner {
	t.Helper()
	j, err := NewJoiner(t0, bytes.NewReader(unhex("11 22 33 44 55 66 77 88")), kind)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// The worked exchange of spec 41 §10.
func TestWorked(t *testing.T) {
	for _, tc := range []struct {
		cfg  ipcp.Config
		self uint64
		rsp  string
	}{
		{lan(), self, `
			0a 08 11 22 33 44 55 66 77 88 10 c0 a1 bd cc 06 18 95 9a ef 3a 20 00
			2a 41 0a 07 0a 03 4c 41 4e 10 01 10 01 1a 34 0a 14 08 04 10 08 18 3c
			22 0c 08 00 12 08 08 00 10 04 18 0f 20 3c 12 18 08 00 12 14 08 03 10 08
			18 80 a3 05 20 84 07 28 84 07 30 c7 c3 e8 f9 04 18 00 20 01`},
		{ipcp.Config{Type: ipcp.Broadcast, LayerName: "bc", Hash: ipcp.SHA3_256}, 0, `
			0a 08 11 22 33 44 55 66 77 88 10 c0 a1 bd cc 06 18 95 9a ef 3a 20 00
			2a 0a 0a 06 0a 02 62 63 10 01 10 02`},
	} {
		j := joiner(t, tc.cfg.Type)
		if want := unhex("0a 08 11 22 33 44 55 66 77 88"); !bytes.Equal(j.Request(), want) {
			t.Errorf("request %x", j.Request())
		}
		e := NewEnroller(t0, tc.cfg, tc.self)
		rsp, err := e.Receive(t0, j.Request())
		if err != nil || !bytes.Equal(rsp, unhex(tc.rsp)) {
			t.Errorf("response %x, %v", rsp, err)
		}
		m, err := j.Receive(t0.Add(time.Millisecond), rsp)
		if err != nil {
			t.Fatal(err)
		}
		want := tc.cfg
		want.Unicast.Peer = tc.self
		if diff := cmp.Diff(&Membership{Config: want, ClockOffset: -500 * time.Microsecond}, m); diff != "" {
			t.Errorf("membership (-want +got):\n%s", diff)
		}
		if want := unhex("0a 08 11 22 33 44 55 66 77 88 10 00"); !bytes.Equal(j.Ack(), want) {
			t.Errorf("acknowledgement %x", j.Ack())
		}
		if same, err := e.ReceiveAck(j.Ack()); !same || err != nil {
			t.Errorf("acknowledged %v, %v", same, err)
		}
	}
}

// What a reference enroller sent (spec 41 §10).
func TestCaptured(t *testing.T) {
	j, err := NewJoiner(time.Unix(1795187953, 498831000), bytes.NewReader(unhex("fd a5 88 33 a2 19 94 a5")), ipcp.Unicast)
	if err != nil {
		t.Fatal(err)
	}
	m, err := j.Receive(j.sent.Add(time.Millisecond), unhex(`
		0a 08 fd a5 88 33 a2 19 94 a5 10 f1 c9 81 d8 06 18 91 e1 eb ed 01 20 00
		2a 41 0a 07 0a 03 75 6e 69 10 01 10 01 1a 34 0a 14 08 04 10 08 18 3c 22 0c 08 00 12 08 08 00 10 04 18 0f 20 3c
		12 18 08 00 12 14 08 03 10 08 18 80 a3 05 20 84 07 28 84 07 30 d4 81 f3 cf 04 18 00 20 01`))
	if err != nil {
		t.Fatal(err)
	}
	want := lan()
	want.LayerName, want.Unicast.Peer = "uni", 0x49FCC0D4
	if diff := cmp.Diff(want, m.Config); diff != "" || len(m.Warnings) > 0 {
		t.Errorf("%v (-want +got):\n%s", m.Warnings, diff)
	}
	j.id = [8]byte(unhex("1122334455667788"))
	m, err = j.Receive(j.sent, unhex(`
		0a 08 11 22 33 44 55 66 77 88 10 f1 c9 81 d8 06 18 91 e1 eb ed 01 20 00
		2a 3d 0a 07 0a 03 75 6e 69 10 03 10 01 1a 30 0a 14 08 04 10 08 18 05 22 0c 08 00 12 08 08 00 10 01 18 03 20 0a
		12 14 08 00 12 10 08 02 10 04 18 3c 20 14 28 0a 30 d4 81 f3 cf 04 18 00 20 00`))
	if err != nil {
		t.Fatal(err)
	}
	want.Hash = ipcp.SHA3_512
	want.Unicast = ipcp.UnicastConfig{
		AddrSize: 4, EIDSize: 8, MaxTTL: 5, TRecalc: 1, TUpdate: 3, TTimeo: 10,
		DHTAlpha: 2, DHTK: 4, DHTExpire: 60, DHTRefresh: 20, DHTRep: 10, Peer: 0x49FCC0D4,
	}
	if diff := cmp.Diff(want, m.Config); diff != "" {
		t.Errorf("options (-want +got):\n%s", diff)
	}
}

// response encodes a response to joiner's request with a changed configuration.
func response(change func(*wire.EnrollResp)) []byte {
	c := lan()
	c.Unicast.Peer = self
	r := wire.EnrollResp{ID: [8]byte(unhex("1122334455667788")), Sec: t0.Unix(), Nsec: int32(t0.Nanosecond()), Conf: toWire(c)}
	change(&r)
	return wire.AppendEnrollResp(nil, &r)
}

func TestJoinerRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*wire.EnrollResp)
		want   error
	}{
		"refusal":         {func(r *wire.EnrollResp) { r.Response, r.Conf = -1, nil }, o7serr.EPERM},
		"refusal, conf":   {func(r *wire.EnrollResp) { r.Response = -1003 }, o7serr.EIPCP},
		"refusal, lowest": {func(r *wire.EnrollResp) { r.Response = -1 << 31 }, nil},
		"other id":        {func(r *wire.EnrollResp) { r.ID[7]++ }, wire.ErrInvalid},
		"no conf":         {func(r *wire.EnrollResp) { r.Conf = nil }, wire.ErrInvalid},
		"other type":      {func(r *wire.EnrollResp) { r.Conf.Type, r.Conf.Unicast = 2, nil }, o7serr.EIPCPTYPE},
		"type 257":        {func(r *wire.EnrollResp) { r.Conf.Type = 257 }, o7serr.EIPCPTYPE},
		"no unicast":      {func(r *wire.EnrollResp) { r.Conf.Unicast = nil }, wire.ErrInvalid},
		"no link state":   {func(r *wire.EnrollResp) { r.Conf.Unicast.LinkState = nil }, wire.ErrInvalid},
		"no dht":          {func(r *wire.EnrollResp) { r.Conf.Unicast.DHT = nil }, wire.ErrInvalid},
		"no name":         {func(r *wire.EnrollResp) { r.Conf.LayerName = "" }, o7serr.EINVAL},
		"name with nul":   {func(r *wire.EnrollResp) { r.Conf.LayerName = "a\x00b" }, o7serr.EINVAL},
		"hash":            {func(r *wire.EnrollResp) { r.Conf.HashAlg = 4 }, o7serr.EINVAL},
		"hash 256":        {func(r *wire.EnrollResp) { r.Conf.HashAlg = 256 }, o7serr.EINVAL},
		"addr_size":       {func(r *wire.EnrollResp) { r.Conf.Unicast.AddrSize = 8 }, o7serr.EINVAL},
		"addr_size 260":   {func(r *wire.EnrollResp) { r.Conf.Unicast.AddrSize = 260 }, o7serr.EINVAL},
		"ttl 0":           {func(r *wire.EnrollResp) { r.Conf.Unicast.MaxTTL = 0 }, o7serr.EINVAL},
		"ttl 256":         {func(r *wire.EnrollResp) { r.Conf.Unicast.MaxTTL = 256 }, o7serr.EINVAL},
		"routing":         {func(r *wire.EnrollResp) { r.Conf.Unicast.RoutingPolicy = 1 }, o7serr.EINVAL},
		"routing, no ls":  {func(r *wire.EnrollResp) { r.Conf.Unicast.RoutingPolicy, r.Conf.Unicast.LinkState = 1, nil }, o7serr.EINVAL},
		"ls policy":       {func(r *wire.EnrollResp) { r.Conf.Unicast.LinkState.Policy = 3 }, o7serr.EINVAL},
		"ls policy 256":   {func(r *wire.EnrollResp) { r.Conf.Unicast.LinkState.Policy = 256 }, o7serr.EINVAL},
		"recalc":          {func(r *wire.EnrollResp) { r.Conf.Unicast.LinkState.TRecalc = 0 }, o7serr.EINVAL},
		"update":          {func(r *wire.EnrollResp) { r.Conf.Unicast.LinkState.TUpdate = 0 }, o7serr.EINVAL},
		"timeout":         {func(r *wire.EnrollResp) { r.Conf.Unicast.LinkState.TTimeo = 1 << 31 }, o7serr.EINVAL},
		"directory":       {func(r *wire.EnrollResp) { r.Conf.Unicast.DirectoryPolicy = 1 }, o7serr.EINVAL},
		"alpha":           {func(r *wire.EnrollResp) { r.Conf.Unicast.DHT.Alpha = 0 }, o7serr.EINVAL},
		"k":               {func(r *wire.EnrollResp) { r.Conf.Unicast.DHT.K = 1 << 30 }, o7serr.EINVAL},
		"expire":          {func(r *wire.EnrollResp) { r.Conf.Unicast.DHT.TExpire = 0 }, o7serr.EINVAL},
		"refresh":         {func(r *wire.EnrollResp) { r.Conf.Unicast.DHT.TRefresh = 0 }, o7serr.EINVAL},
		"replicate":       {func(r *wire.EnrollResp) { r.Conf.Unicast.DHT.TReplicate = 0 }, o7serr.EINVAL},
		"peer":            {func(r *wire.EnrollResp) { r.Conf.Unicast.DHT.Peer = 1 << 32 }, o7serr.EINVAL},
		"addr auth":       {func(r *wire.EnrollResp) { r.Conf.Unicast.AddrAuth = 1 }, o7serr.EINVAL},
		"congestion":      {func(r *wire.EnrollResp) { r.Conf.Unicast.Congestion = 2 }, o7serr.EINVAL},
	} {
		m, err := joiner(t, ipcp.Unicast).Receive(t0, response(tc.change))
		if err == nil || m != nil || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	j := joiner(t, ipcp.Unicast)
	good := response(func(*wire.EnrollResp) {})
	if _, err := j.Receive(j.Deadline(), good); err != nil {
		t.Errorf("at the deadline: %v", err)
	}
	if _, err := j.Receive(j.Deadline().Add(1), good); !errors.Is(err, o7serr.ETIMEDOUT) {
		t.Errorf("after the deadline: %v", err)
	}
	if _, err := NewJoiner(t0, bytes.NewReader(nil), ipcp.Unicast); err == nil {
		t.Error("joiner without randomness")
	}
}

func TestWarnings(t *testing.T) {
	at := func(d time.Duration) func(*wire.EnrollResp) {
		return func(r *wire.EnrollResp) { r.Sec, r.Nsec = t0.Add(d).Unix(), int32(t0.Add(d).Nanosecond()) }
	}
	for name, tc := range map[string]struct {
		change  func(*wire.EnrollResp)
		elapsed time.Duration
		want    string
	}{
		"same clock":           {at(0), 0, ""},
		"20 ms ahead":          {at(20 * time.Millisecond), 0, ""},
		"21 ms ahead":          {at(21 * time.Millisecond), 0, "by 21ms"},
		"21 ms behind":         {at(-21 * time.Millisecond), 0, "by -21ms"},
		"a slow answer":        {at(40 * time.Millisecond), 40 * time.Millisecond, ""},
		"slow, and far ahead":  {at(61 * time.Millisecond), 40 * time.Millisecond, "by 41ms"},
		"slow, and far behind": {at(-21 * time.Millisecond), 40 * time.Millisecond, "by -41ms"},
		"the end of time":      {func(r *wire.EnrollResp) { r.Sec = 1<<63 - 1 }, 0, "clock"},
		"its beginning":        {func(r *wire.EnrollResp) { r.Sec = -1 << 63 }, 0, "clock"},
		"eid_size":             {func(r *wire.EnrollResp) { r.Conf.Unicast.EIDSize = 4 }, 0, "eid_size 4 replaced by 8"},
		"no contact":           {func(r *wire.EnrollResp) { r.Conf.Unicast.DHT.Peer = 0 }, 0, "no first contact"},
	} {
		m, err := joiner(t, ipcp.Unicast).Receive(t0.Add(tc.elapsed), response(tc.change))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := strings.Join(m.Warnings, "; "); (tc.want == "") != (got == "") || !strings.Contains(got, tc.want) {
			t.Errorf("%s: warnings %q, want %q", name, got, tc.want)
		}
		if m.Config.Unicast.EIDSize != 8 {
			t.Errorf("%s: eid size %d", name, m.Config.Unicast.EIDSize)
		}
	}
}

func TestEnroller(t *testing.T) {
	e := NewEnroller(t0, lan(), self)
	if d := e.Deadline().Sub(t0); d != 20*time.Second {
		t.Errorf("deadline after %v", d)
	}
	for _, b := range []string{"", "0a 07 11 22 33 44 55 66 77", "0a 09 11 22 33 44 55 66 77 88 99", "ff"} {
		if rsp, err := e.Receive(t0, unhex(b)); rsp != nil || err == nil {
			t.Errorf("%q answered with %x", b, rsp)
		}
	}
	if _, err := e.Receive(t0, unhex("0a 08 11 22 33 44 55 66 77 88")); err != nil {
		t.Fatal(err)
	}
	for b, want := range map[string]struct{ same, ok bool }{
		"0a 08 11 22 33 44 55 66 77 88 10 00":                            {true, true},
		"0a 08 11 22 33 44 55 66 77 99 10 00":                            {false, true},
		"0a 08 11 22 33 44 55 66 77 88 10 01":                            {true, false},
		"0a 08 11 22 33 44 55 66 77 88 10 ff ff ff ff ff ff ff ff ff 01": {true, false},
		"0a 08 11 22 33 44 55 66 77 88":                                  {false, false},
	} {
		if same, err := e.ReceiveAck(unhex(b)); same != want.same || (err == nil) != want.ok {
			t.Errorf("%s: %v, %v", b, same, err)
		}
	}
	// Exchanges do not disturb each other, and the configuration is not shared.
	cfg := lan()
	a, b := NewEnroller(t0, cfg, self), NewEnroller(t0, cfg, self+1)
	ra, _ := a.Receive(t0, joiner(t, ipcp.Unicast).Request())
	rb, _ := b.Receive(t0, joiner(t, ipcp.Unicast).Request())
	ma, err := joiner(t, ipcp.Unicast).Receive(t0, ra)
	if err != nil {
		t.Fatal(err)
	}
	mb, err := joiner(t, ipcp.Unicast).Receive(t0, rb)
	if err != nil {
		t.Fatal(err)
	}
	if ma.Config.Unicast.Peer != self || mb.Config.Unicast.Peer != self+1 || cfg.Unicast.Peer != 0 {
		t.Errorf("peers %#x, %#x, %#x", ma.Config.Unicast.Peer, mb.Config.Unicast.Peer, cfg.Unicast.Peer)
	}
}

// Every valid configuration arrives unchanged but for the peer, in a message
// that a reference member can read, and is handed on by the new member in turn.
func TestAnyConfig(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seconds := rapid.Uint32Range(1, 1<<31-1)
		c := ipcp.Config{
			Type:      rapid.SampledFrom([]ipcp.Type{ipcp.Unicast, ipcp.Broadcast}).Draw(t, "type"),
			LayerName: rapid.StringN(1, 64, 255).Filter(func(s string) bool { return !strings.Contains(s, "\x00") }).Draw(t, "name"),
			Hash:      ipcp.HashAlg(rapid.Uint8Range(0, 3).Draw(t, "hash")),
		}
		if c.Type == ipcp.Unicast {
			c.Unicast = ipcp.UnicastConfig{
				AddrSize: 4, EIDSize: 8, MaxTTL: rapid.Uint8Range(1, 255).Draw(t, "ttl"),
				Routing: ipcp.RoutingPolicy(rapid.Uint8Range(0, 2).Draw(t, "routing")),
				TRecalc: seconds.Draw(t, "recalc"), TUpdate: seconds.Draw(t, "update"), TTimeo: seconds.Draw(t, "timeo"),
				DHTAlpha: rapid.Uint32Range(1, maxFanout).Draw(t, "alpha"), DHTK: rapid.Uint32Range(1, maxFanout).Draw(t, "k"),
				DHTExpire: seconds.Draw(t, "expire"), DHTRefresh: seconds.Draw(t, "refresh"), DHTRep: seconds.Draw(t, "replicate"),
				Congestion: rapid.Uint32Range(0, 1).Draw(t, "congestion"),
			}
		}
		if err := Validate(c); err != nil {
			t.Fatal(err)
		}
		for hop := range uint64(3) {
			j, err := NewJoiner(t0, bytes.NewReader(rapid.SliceOfN(rapid.Byte(), 8, 8).Draw(t, "id")), c.Type)
			if err != nil {
				t.Fatal(err)
			}
			addr := uint64(0)
			if c.Type == ipcp.Unicast {
				addr = self + hop
			}
			rsp, err := NewEnroller(t0, c, addr).Receive(t0, j.Request())
			if err != nil {
				t.Fatal(err)
			}
			if len(rsp) > wire.MaxEnrollLen {
				t.Fatalf("response of %d bytes", len(rsp))
			}
			m, err := j.Receive(t0, rsp)
			if err != nil {
				t.Fatal(err)
			}
			c.Unicast.Peer = addr
			if diff := cmp.Diff(c, m.Config); diff != "" || len(m.Warnings) > 0 {
				t.Fatalf("hop %d: %v (-want +got):\n%s", hop, m.Warnings, diff)
			}
		}
	})
}

func TestValidateType(t *testing.T) {
	c := lan()
	c.Type = ipcp.EthDIX
	if err := Validate(c); !errors.Is(err, o7serr.EINVAL) {
		t.Errorf("eth-dix: %v", err)
	}
	c = lan()
	c.Unicast.EIDSize = 4 // an operator gets told; a peer's is replaced
	if err := Validate(c); !errors.Is(err, o7serr.EINVAL) || !strings.Contains(err.Error(), "eid_size 4") {
		t.Errorf("eid_size: %v", err)
	}
}

func FuzzJoiner(f *testing.F) {
	f.Add(response(func(*wire.EnrollResp) {}))
	f.Add(response(func(r *wire.EnrollResp) { r.Response, r.Conf = -1, nil }))
	f.Add(response(func(r *wire.EnrollResp) { r.Conf.Unicast.DHT.K = 0 }))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := joiner(t, ipcp.Unicast).Receive(t0, b)
		if err != nil {
			return
		}
		if err := Validate(m.Config); err != nil {
			t.Fatalf("joined an invalid layer: %v", err)
		}
		NewEnroller(t0, m.Config, self).Receive(t0, joiner(t, ipcp.Unicast).Request())
	})
}
