package wire_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/wire"
)

func TestAddrText(t *testing.T) { // spec 20 §2.2
	for addr, s := range map[uint64]string{
		0x0a1b2c3d:         "3d.2c.1b.0a",
		0x4F3A21C7:         "c7.21.3a.4f",
		0:                  "00.00.00.00",
		0x0102030405060708: "08.07.06.05.04.03.02.01",
	} {
		if got := wire.AddrString(addr); got != s {
			t.Errorf("AddrString(%#x) = %s, want %s", addr, got, s)
		}
		if got, err := wire.ParseAddr(s); got != addr || err != nil {
			t.Errorf("ParseAddr(%s) = %#x, %v", s, got, err)
		}
	}
	if got, err := wire.ParseAddr("1329209799"); got != 0x4F3A21C7 || err != nil {
		t.Errorf("decimal address: %#x, %v", got, err)
	}
	for _, s := range []string{"", "c7.21.3a", "c7.21.3a.4f.00", "c7.21.3a.4g", "c7.21.3a.4", "0c7.21.3a.4f", "...", "-1", "+c.+d.+e.+f", "18446744073709551616"} {
		if got, err := wire.ParseAddr(s); err == nil {
			t.Errorf("ParseAddr(%q) = %#x", s, got)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		a := rapid.Uint64().Draw(t, "addr")
		if got, err := wire.ParseAddr(wire.AddrString(a)); got != a || err != nil {
			t.Fatalf("%#x -> %s -> %#x, %v", a, wire.AddrString(a), got, err)
		}
	})
}

func TestHashName(t *testing.T) {
	want := map[uint8]string{
		wire.HashSHA3_256: "42dee3b0415b4f690fd91cbd99876f1e9bd8d9745ef7fa32b142773af0349d54",
	}
	for alg := range uint8(5) {
		h, err := wire.HashName(alg, "oping")
		if n := wire.HashLen(alg); len(h) != n || (err == nil) != (n != 0) {
			t.Errorf("algorithm %d: %d bytes, want %d (%v)", alg, len(h), n, err)
		}
		if w := want[alg]; w != "" && hex.EncodeToString(h) != w {
			t.Errorf("algorithm %d: %x", alg, h)
		}
	}
	// spec 43 §10, captured
	if h, _ := wire.HashName(wire.HashSHA3_256, "oping.h3"); !bytes.HasPrefix(h, dump("f5026d3f8e19fda479a32fe85ef23322")) {
		t.Errorf("oping.h3: %x", h)
	}
	if got := []int{wire.HashLen(0), wire.HashLen(1), wire.HashLen(2), wire.HashLen(3)}; got[0] != 28 || got[1] != 32 || got[2] != 48 || got[3] != 64 {
		t.Errorf("lengths %v", got)
	}
}

// Sizes at and around every limit.
func TestLimits(t *testing.T) {
	fa := func(n int, code uint8) error {
		b := make([]byte, n)
		if n > 58 {
			b[58] = code
		}
		_, err := wire.DecodeFA(b, 32)
		return err
	}
	mgmt := func(n int, code uint8) error {
		b := make([]byte, n)
		if n > 37 {
			b[37] = code
		}
		_, err := wire.DecodeDIXMgmt(b, 32)
		return err
	}
	dix := func(n, length int) error {
		b := make([]byte, n)
		if n >= 18 {
			b[16], b[17] = byte(length>>8), byte(length)
		}
		_, _, err := wire.ParseDIX(b)
		return err
	}
	dt := func(n, addr int) error { _, _, err := wire.ParseDT(make([]byte, n), addr); return err }
	lsa := func(n int) error { _, err := wire.ParseLSA(make([]byte, n)); return err }
	oap := func(n int, set map[int]byte, hashLen int) error {
		b := make([]byte, n)
		for i, v := range set {
			b[i] = v
		}
		_, err := wire.DecodeOAPResponse(b, hashLen)
		return err
	}
	for _, tc := range []struct {
		name string
		err  error
		want error
	}{
		{"dix shorter than the header", dix(17, 0), wire.ErrShort},
		{"dix empty", dix(18, 0), nil},
		{"dix length beyond the frame", dix(60, 43), wire.ErrShort},
		{"dix full", dix(60, 42), nil},
		{"dix padding", dix(60, 1), nil},
		{"mgmt short", mgmt(38, 0), wire.ErrShort},
		{"mgmt reply without data", mgmt(39, wire.FlowReply), nil},
		{"mgmt request without hash", mgmt(39, wire.FlowReq), wire.ErrShort},
		{"mgmt request with half a hash", mgmt(39+31, wire.FlowReq), wire.ErrShort},
		{"mgmt request without data", mgmt(39+32, wire.FlowReq), nil},
		{"mgmt query without hash", mgmt(39, wire.NameQueryReq), wire.ErrShort},
		{"mgmt answer without hash", mgmt(39+31, wire.NameQueryReply), wire.ErrShort},
		{"mgmt dealloc", mgmt(39, wire.EthDealloc), nil},
		{"mgmt unknown", mgmt(39, 4), wire.ErrUnknownCode},
		{"dt short", dt(14, 4), wire.ErrShort},
		{"dt empty", dt(15, 4), nil},
		{"dt short with 8 bytes of address", dt(18, 8), wire.ErrShort},
		{"dt empty with 8 bytes of address", dt(19, 8), nil},
		{"fa short", fa(60, wire.FAReply), wire.ErrShort},
		{"fa reply", fa(61, wire.FAReply), nil},
		{"fa request without hash", fa(61+31, wire.FAReq), wire.ErrShort},
		{"fa request", fa(61+32, wire.FAReq), nil},
		{"fa longest", fa(2048, wire.FAReq), nil},
		{"fa long", fa(2049, wire.FAReq), wire.ErrLong},
		{"fa dealloc", fa(61, wire.FADealloc), nil},
		{"fa unknown", fa(61, 3), wire.ErrUnknownCode},
		{"lsa short", lsa(23), wire.ErrShort},
		{"lsa", lsa(24), nil},
		{"lsa between", lsa(25), wire.ErrShort},
		{"lsa unknown kind", lsa(32), wire.ErrUnknownCode},
		{"lsa long", lsa(33), wire.ErrLong},
		{"oap short", oap(35, nil, 0), wire.ErrShort},
		{"oap request", oap(36, nil, 0), nil},
		{"oap bytes after an unsigned request", oap(37, nil, 0), wire.ErrInvalid},
		{"oap response without hash", oap(36, nil, 48), wire.ErrShort},
		{"oap response", oap(84, nil, 48), nil},
		{"oap cert beyond the end", oap(84, map[int]byte{31: 1}, 48), wire.ErrShort},
		{"oap cert, signature", oap(86, map[int]byte{31: 1}, 48), nil},
		{"oap kex beyond the end", oap(84, map[int]byte{33: 1}, 48), wire.ErrShort},
		{"oap data beyond the end", oap(84, map[int]byte{35: 1}, 48), wire.ErrShort},
		{"oap kex flags", oap(36, map[int]byte{32: 0xc0}, 0), nil},
		{"oap unknown cipher", oap(36, map[int]byte{25: 1}, 0), wire.ErrInvalid},
		{"oap unknown kdf", oap(36, map[int]byte{26: 4, 27: 0x48}, 0), wire.ErrInvalid}, // SHA3-224
		{"oap unknown digest", oap(36, map[int]byte{29: 1}, 0), wire.ErrInvalid},
	} {
		if !errors.Is(tc.err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, tc.err, tc.want)
		}
	}
	if wire.MaxFAReqData(32) != 1955 || wire.MaxFAReplyData != 1987 {
		t.Error("piggyback limits of spec 21 §1")
	}
	for name, m := range map[string]wire.OAP{
		"cert": {Cert: make([]byte, 1<<16)},
		"kex":  {Kex: make([]byte, 1<<14)},
		"data": {Data: make([]byte, 1<<16)},
		"sig":  {Sig: []byte{1}},
	} {
		if _, err := wire.AppendOAP(nil, &m); err == nil {
			t.Errorf("oap encodes a message with bad %s", name)
		}
	}
}

// A message with a required field or sub-message left out is refused, whichever
// it is: the reference crashes on some (spec 41 §11.2).
func TestMissingFields(t *testing.T) {
	decoders := map[string]func([]byte) error{
		"cep":    func(b []byte) error { _, err := wire.DecodeCEP(b); return err },
		"req":    func(b []byte) error { _, err := wire.DecodeEnrollReq(b); return err },
		"resp":   func(b []byte) error { _, err := wire.DecodeEnrollResp(b); return err },
		"ack":    func(b []byte) error { _, err := wire.DecodeEnrollAck(b); return err },
		"dht":    func(b []byte) error { _, err := wire.DecodeDHT(b); return err },
		"dhtval": func(b []byte) error { _, err := wire.DecodeDHT(b); return err },
	}
	src := wire.DHTContact{ID: nodeA, Addr: 1}
	messages := map[string][]byte{
		"cep":  wire.AppendCEP(nil, &wire.CEP{}),
		"req":  wire.AppendEnrollReq(nil, &wire.EnrollReq{}),
		"resp": wire.AppendEnrollResp(nil, &wire.EnrollResp{Conf: unicastConf()}),
		"ack":  wire.AppendEnrollAck(nil, &wire.EnrollAck{}),
		"dht":  wire.AppendDHT(nil, &wire.DHTMsg{Src: src, Store: &wire.DHTStore{Key: nodeA, Val: []byte{1}}}),
		"dhtval": wire.AppendDHT(nil, &wire.DHTMsg{
			Code: wire.DHTFindValueRsp, Src: src, Val: &wire.DHTValueRsp{},
			Node: &wire.DHTNodeRsp{Key: nodeA, Contacts: []wire.DHTContact{src}},
		}),
	}
	// The fields that may be absent when everything else is present.
	optional := map[string]bool{"dhtval 5 3": true}
	visited := map[string]bool{}
	for name, b := range messages {
		decode := decoders[name]
		if err := decode(b); err != nil {
			t.Fatalf("%s: complete message: %v", name, err)
		}
		without(b, nil, func(path []protowire.Number, cut []byte) {
			key := name
			for _, p := range path {
				key += " " + string('0'+rune(p))
			}
			visited[key] = true
			if err := decode(cut); (err == nil) != optional[key] {
				t.Errorf("%s left out: %v", key, err)
			}
		})
	}
	for _, key := range []string{"cep 8", "resp 5", "resp 5 3", "resp 5 3 1 4 2", "resp 5 3 1 4 2 4", "resp 5 3 2 2 6", "dht 2 1", "dhtval 6"} {
		if !visited[key] {
			t.Errorf("%s was never left out", key)
		}
	}
}

// without calls f with the message less each of its fields, sub-messages'
// included. A field is taken for a sub-message if it parses as one, except for
// the strings and ids here, which are known by their contents.
func without(b []byte, path []protowire.Number, f func(path []protowire.Number, cut []byte)) {
	for off := 0; off < len(b); {
		num, typ, n := protowire.ConsumeTag(b[off:])
		m := protowire.ConsumeFieldValue(num, typ, b[off+n:])
		end := off + n + m
		p := append(append([]protowire.Number(nil), path...), num)
		f(p, append(append([]byte(nil), b[:off]...), b[end:]...))
		if typ == protowire.BytesType {
			if val, _ := protowire.ConsumeBytes(b[off+n:]); len(val) > 0 && isMessage(val) {
				without(val, p, func(p []protowire.Number, cut []byte) {
					out := append([]byte(nil), b[:off+n]...)
					out = protowire.AppendBytes(out, cut)
					f(p, append(out, b[end:]...))
				})
			}
		}
		off = end
	}
}

func isMessage(b []byte) bool {
	for want := protowire.Number(1); len(b) > 0; {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 || num < want || num > 8 {
			return false
		}
		m := protowire.ConsumeFieldValue(num, typ, b[n:])
		if m < 0 {
			return false
		}
		b, want = b[n+m:], num
	}
	return true
}

func unicastConf() *wire.LayerConfig {
	return &wire.LayerConfig{
		LayerName: "zz", Type: 1, Unicast: &wire.UnicastConfig{LinkState: &wire.LinkStateConfig{}, DHT: &wire.DHTConfig{}},
	}
}

func TestProtobufValidation(t *testing.T) {
	long := strings.Repeat("x", 256)
	conf := unicastConf()
	conf.LayerName = long
	for name, tc := range map[string]struct {
		err  error
		want error
	}{
		"cep of 128 bytes":     {second(wire.DecodeCEP(wire.AppendCEP(nil, &wire.CEP{Component: long[:118]}))), nil},
		"cep of 129 bytes":     {second(wire.DecodeCEP(wire.AppendCEP(nil, &wire.CEP{Component: long[:119]}))), wire.ErrLong},
		"id of 7 bytes":        {second(wire.DecodeEnrollReq(dump("0a 07 01 02 03 04 05 06 07"))), wire.ErrInvalid},
		"id of 9 bytes":        {second(wire.DecodeEnrollReq(dump("0a 09 01 02 03 04 05 06 07 08 09"))), wire.ErrInvalid},
		"ack id of 7 bytes":    {second(wire.DecodeEnrollAck(dump("0a 07 01 02 03 04 05 06 07 10 00"))), wire.ErrInvalid},
		"negative nanoseconds": {second(wire.DecodeEnrollResp(wire.AppendEnrollResp(nil, &wire.EnrollResp{Nsec: -1, Conf: unicastConf()}))), wire.ErrInvalid},
		"too many nanoseconds": {second(wire.DecodeEnrollResp(wire.AppendEnrollResp(nil, &wire.EnrollResp{Nsec: 1e9, Conf: unicastConf()}))), wire.ErrInvalid},
		"layer name":           {second(wire.DecodeEnrollResp(wire.AppendEnrollResp(nil, &wire.EnrollResp{Conf: conf}))), wire.ErrInvalid},
		"refusal without conf": {second(wire.DecodeEnrollResp(wire.AppendEnrollResp(nil, &wire.EnrollResp{Response: -1}))), nil},
		"response of 1025":     {second(wire.DecodeEnrollResp(make([]byte, 1025))), wire.ErrLong},
		"dht without address":  {second(wire.DecodeDHT(wire.AppendDHT(nil, &wire.DHTMsg{Find: &wire.DHTFind{}, Code: 1}))), wire.ErrInvalid},
		"dht empty value":      {second(wire.DecodeDHT(wire.AppendDHT(nil, &wire.DHTMsg{Src: wire.DHTContact{Addr: 1}, Store: &wire.DHTStore{}}))), wire.ErrInvalid},
		"dht unknown code":     {second(wire.DecodeDHT(wire.AppendDHT(nil, &wire.DHTMsg{Code: 9, Src: wire.DHTContact{Addr: 1}}))), nil},
		"garbage":              {second(wire.DecodeDHT([]byte{0xff})), wire.ErrInvalid},
		"unknown field":        {second(wire.DecodeEnrollReq(append(wire.AppendEnrollReq(nil, &wire.EnrollReq{}), 0x78, 1))), nil},
		"fields in any order":  {second(wire.DecodeEnrollAck(dump("10 00 0a 08 01 02 03 04 05 06 07 08"))), nil},
	} {
		if !errors.Is(tc.err, tc.want) {
			t.Errorf("%s: %v, want %v", name, tc.err, tc.want)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// Appending leaves alone what is there, and random values survive a round trip.
func TestRoundTrips(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		spec := qos.Spec{
			Delay: rapid.Uint32().Draw(t, "delay"), Bandwidth: rapid.Uint64().Draw(t, "bandwidth"),
			Availability: rapid.Uint8().Draw(t, "availability"), Loss: rapid.Uint32().Draw(t, "loss"),
			BER: rapid.Uint32().Draw(t, "ber"), InOrder: rapid.Uint8().Draw(t, "in_order"),
			MaxGap: rapid.Uint32().Draw(t, "max_gap"), Timeout: rapid.Uint32().Draw(t, "timeout"),
		}
		hashLen := rapid.SampledFrom([]int{28, 32, 48, 64}).Draw(t, "hash")
		hash := rapid.SliceOfN(rapid.Byte(), hashLen, hashLen).Draw(t, "hash")
		data := rapid.SliceOfN(rapid.Byte(), 0, 64).Draw(t, "data")
		prefix := []byte("prefix")

		e := wire.EthMgmt{
			SrcEID: rapid.Uint16().Draw(t, "src"), DstEID: rapid.Uint16().Draw(t, "dst"), QoS: spec,
			Response: rapid.Int32().Draw(t, "response"), Code: wire.FlowReq, Hash: hash, Data: data,
		}
		b := wire.AppendDIXMgmt(prefix, &e)
		if !bytes.HasPrefix(b, prefix) {
			t.Fatal("prefix lost")
		}
		e2, err := wire.DecodeDIXMgmt(b[len(prefix):], hashLen)
		if err != nil {
			t.Fatal(err)
		}
		same(t, e2, e)

		f := wire.FAMsg{
			Code: wire.FAReq, SrcAddr: rapid.Uint64().Draw(t, "addr"), REID: rapid.Uint64().Draw(t, "reid"),
			SEID: rapid.Uint64().Draw(t, "seid"), QoS: spec, Response: e.Response,
			ECE: rapid.Uint16().Draw(t, "ece"), Hash: hash, Data: data,
		}
		f2, err := wire.DecodeFA(wire.AppendFA(nil, &f), hashLen)
		if err != nil {
			t.Fatal(err)
		}
		same(t, f2, f)

		size := rapid.IntRange(1, 8).Draw(t, "address size")
		h := wire.DT{
			Dst: f.SrcAddr & (1<<(8*size) - 1), QC: e.QoS.InOrder, TTL: e.QoS.Availability,
			ECN: uint8(f.ECE), EID: f.REID,
		}
		b = make([]byte, wire.DTLen(size))
		wire.PutDT(b, size, h)
		h2, rest, err := wire.ParseDT(append(b, data...), size)
		if err != nil || h2 != h || !bytes.Equal(rest, data) {
			t.Fatalf("%+v %x %v, want %+v %x", h2, rest, err, h, data)
		}
	})
}

// The data path does not allocate.
func TestAllocs(t *testing.T) {
	frame := wire.AppendDIX(nil, serverMAC, clientMAC, 0xa000, 64, make([]byte, 100))
	b := make([]byte, 64)
	var sink int
	for name, f := range map[string]func(){
		"dix": func() { h, p, _ := wire.ParseDIX(frame); sink += int(h.EID) + len(p) },
		"dt":  func() { h, p, _ := wire.ParseDT(frame, 4); sink += int(h.TTL) + len(p) },
		"put": func() {
			wire.PutDIX(b, serverMAC, clientMAC, 0xa000, 64, 10)
			wire.PutDT(b[18:], 4, wire.DT{Dst: 1, EID: 2})
		},
		"short": func() { _, _, err := wire.ParseDT(frame[:3], 4); _ = err },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	_ = sink
}
