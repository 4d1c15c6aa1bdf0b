package wire_test

import (
	"bytes"
	"encoding/hex"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/wire"
)

var offset = regexp.MustCompile(`(?m)^[0-9a-f]{4}  `)

// dump reads a hex dump, with or without offsets.
func dump(s string) []byte {
	s = strings.Join(strings.Fields(offset.ReplaceAllString(s, "")), "")
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// Values that the worked bytes of the specification use.
var (
	clientMAC = [6]byte{2, 0, 0, 0, 1, 2}
	serverMAC = [6]byte{2, 0, 0, 0, 2, 1}
	pingHash  = dump("42dee3b0415b4f690fd91cbd99876f1e9bd8d9745ef7fa32b142773af0349d54")
	oapReq    = dump(`
0000  10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f
0010  18 90 4d 9f 4b cc cd 15 00 00 00 00 00 00 00 00
0020  00 00 00 00`)
	oapRsp = dump(`
0000  10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f
0010  18 90 4d 9f 4c 19 18 55 00 00 00 00 00 00 00 00
0020  00 00 00 00 58 7e 16 97 c0 45 2f 8d 2d 32 7e 33
0030  a2 60 ce 16 ca 78 67 45 a6 13 1c c4 ec f5 ac 15
0040  8a cc e9 09 7f 0c 51 28 58 20 b8 39 c1 59 91 4b
0050  2b 49 4b ca`)
	oapID   = [16]byte(dump("10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f"))
	id8     = [8]byte{0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88}
	nodeA   = dump(strings.Repeat("0feeddccbbaa99887766554433221100", 2))
	nodeB   = dump("a0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebf")
	clientA = uint64(0x0a1b2c3d)
	serverA = uint64(0x4e5f6071)
)

func eq(t *testing.T, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func TestWorkedEthernet(t *testing.T) { // spec 10
	for _, tc := range []struct {
		name, hex string
		h         wire.DIX
		m         wire.EthMgmt
	}{
		{"name query request", `
0000  ff ff ff ff ff ff 02 00 00 00 01 02 a0 00 00 00
0010  00 47 00 00 00 00 00 00 00 00 00 00 00 00 00 00
0020  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
0030  00 00 00 00 00 00 00 02 00 42 de e3 b0 41 5b 4f
0040  69 0f d9 1c bd 99 87 6f 1e 9b d8 d9 74 5e f7 fa
0050  32 b1 42 77 3a f0 34 9d 54`,
			wire.DIX{Dst: wire.Broadcast, Src: clientMAC, EtherType: 0xa000, Length: 0x47},
			wire.EthMgmt{Code: wire.NameQueryReq, Hash: pingHash}},
		{"name query reply", `
0000  02 00 00 00 01 02 02 00 00 00 02 01 a0 00 00 00
0010  00 47 00 00 00 00 00 00 00 00 00 00 00 00 00 00
0020  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
0030  00 00 00 00 00 00 00 03 00 42 de e3 b0 41 5b 4f
0040  69 0f d9 1c bd 99 87 6f 1e 9b d8 d9 74 5e f7 fa
0050  32 b1 42 77 3a f0 34 9d 54`,
			wire.DIX{Dst: clientMAC, Src: serverMAC, EtherType: 0xa000, Length: 0x47},
			wire.EthMgmt{Code: wire.NameQueryReply, Hash: pingHash}},
		{"flow request", `
0000  02 00 00 00 02 01 02 00 00 00 01 02 a0 00 00 00
0010  00 6b 00 40 00 00 00 00 00 01 00 00 00 00 00 00
0020  00 00 00 00 00 01 ff ff ff ff ff ff ff ff 00 01
0030  d4 c0 00 00 00 00 00 00 00 42 de e3 b0 41 5b 4f
0040  69 0f d9 1c bd 99 87 6f 1e 9b d8 d9 74 5e f7 fa
0050  32 b1 42 77 3a f0 34 9d 54 10 11 12 13 14 15 16
0060  17 18 19 1a 1b 1c 1d 1e 1f 18 90 4d 9f 4b cc cd
0070  15 00 00 00 00 00 00 00 00 00 00 00 00`,
			wire.DIX{Dst: serverMAC, Src: clientMAC, EtherType: 0xa000, Length: 0x6b},
			wire.EthMgmt{Code: wire.FlowReq, SrcEID: 64, QoS: qos.Raw, Hash: pingHash, Data: oapReq}},
		{"flow reply", `
0000  02 00 00 00 01 02 02 00 00 00 02 01 a0 00 00 00
0010  00 7b 00 40 00 40 00 00 00 00 00 00 00 00 00 00
0020  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
0030  00 00 00 00 00 00 00 01 00 10 11 12 13 14 15 16
0040  17 18 19 1a 1b 1c 1d 1e 1f 18 90 4d 9f 4c 19 18
0050  55 00 00 00 00 00 00 00 00 00 00 00 00 58 7e 16
0060  97 c0 45 2f 8d 2d 32 7e 33 a2 60 ce 16 ca 78 67
0070  45 a6 13 1c c4 ec f5 ac 15 8a cc e9 09 7f 0c 51
0080  28 58 20 b8 39 c1 59 91 4b 2b 49 4b ca`,
			wire.DIX{Dst: clientMAC, Src: serverMAC, EtherType: 0xa000, Length: 0x7b},
			wire.EthMgmt{Code: wire.FlowReply, SrcEID: 64, DstEID: 64, Data: oapRsp}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := dump(tc.hex)
			h, payload, err := wire.ParseDIX(append(bytes.Clone(b), 0, 0, 0)) // with padding
			if err != nil {
				t.Fatal(err)
			}
			m, err := wire.DecodeDIXMgmt(payload, 32)
			if err != nil {
				t.Fatal(err)
			}
			eq(t, "header", h, tc.h)
			eq(t, "message", m, tc.m)
			again := wire.AppendDIX(nil, tc.h.Dst, tc.h.Src, tc.h.EtherType, tc.h.EID, wire.AppendDIXMgmt(nil, &tc.m))
			eq(t, "frame", again, b)
		})
	}
	b := dump(`
0000  02 00 00 00 02 01 02 00 00 00 01 02 a0 00 00 40
0010  00 05 68 65 6c 6c 6f`)
	h, payload, err := wire.ParseDIX(b)
	if err != nil || h.EID != 64 || string(payload) != "hello" {
		t.Errorf("data frame: %+v %q %v", h, payload, err)
	}
	eq(t, "data frame", wire.AppendDIX(nil, serverMAC, clientMAC, 0xa000, 64, []byte("hello")), b)
}

func TestWorkedDT(t *testing.T) { // spec 20
	for s, want := range map[string]wire.DT{
		"71 60 5f 4e 00 3c 02 43 00 00 00 78 56 34 12 68 65 6c 6c 6f": {Dst: serverA, TTL: 60, ECN: 2, EID: 0x1234567800000043},
		"71 60 5f 4e 00 3b 02 43 00 00 00 78 56 34 12 68 65 6c 6c 6f": {Dst: serverA, TTL: 59, ECN: 2, EID: 0x1234567800000043},
	} {
		h, payload, err := wire.ParseDT(dump(s), 4)
		if err != nil || h != want || string(payload) != "hello" {
			t.Errorf("%+v %q %v, want %+v", h, payload, err, want)
		}
		b := make([]byte, wire.DTLen(4))
		wire.PutDT(b, 4, want)
		eq(t, "header", append(b, "hello"...), dump(s))
	}
	b := make([]byte, wire.DTLen(8))
	wire.PutDT(b, 8, wire.DT{Dst: 0x0102030405060708, QC: 2, TTL: 1, EID: wire.DirectoryEID})
	eq(t, "8-byte address", b, dump("08 07 06 05 04 03 02 01 02 01 00 01 00 00 00 00 00 00 00"))
}

func TestWorkedFA(t *testing.T) { // spec 21
	for _, tc := range []struct {
		name, hex string
		dst       uint64
		m         wire.FAMsg
	}{
		{"request", `
0000  71 60 5f 4e 00 3c 00 00 00 00 00 00 00 00 00 00
0010  00 00 00 0a 1b 2c 3d 00 00 00 00 00 00 00 00 de
0020  ad be ef 00 00 00 41 00 00 00 00 00 00 00 00 00
0030  00 00 00 ff ff ff ff 00 00 00 01 00 00 00 01 ff
0040  ff ff ff 00 01 d4 c0 00 00 00 00 00 42 de e3 b0
0050  41 5b 4f 69 0f d9 1c bd 99 87 6f 1e 9b d8 d9 74
0060  5e f7 fa 32 b1 42 77 3a f0 34 9d 54 10 11 12 13
0070  14 15 16 17 18 19 1a 1b 1c 1d 1e 1f 18 90 4d 9f
0080  4b cc cd 15 00 00 00 00 00 00 00 00 00 00 00 00`, serverA,
			wire.FAMsg{Code: wire.FAReq, SrcAddr: clientA, SEID: 0xdeadbeef00000041, QoS: qos.Raw, Hash: pingHash, Data: oapReq}},
		{"reply", `
0000  3d 2c 1b 0a 00 3c 00 00 00 00 00 00 00 00 00 00
0010  00 00 00 00 00 00 00 de ad be ef 00 00 00 41 12
0020  34 56 78 00 00 00 43 00 00 00 00 00 00 00 00 00
0030  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
0040  00 00 00 00 00 00 00 00 00 01 00 00 10 11 12 13
0050  14 15 16 17 18 19 1a 1b 1c 1d 1e 1f 18 90 4d 9f
0060  4c 19 18 55 00 00 00 00 00 00 00 00 00 00 00 00
0070  58 7e 16 97 c0 45 2f 8d 2d 32 7e 33 a2 60 ce 16
0080  ca 78 67 45 a6 13 1c c4 ec f5 ac 15 8a cc e9 09
0090  7f 0c 51 28 58 20 b8 39 c1 59 91 4b 2b 49 4b ca`, clientA,
			wire.FAMsg{Code: wire.FAReply, REID: 0xdeadbeef00000041, SEID: 0x1234567800000043, Data: oapRsp}},
		{"refusal", `
0000  3d 2c 1b 0a 00 3c 00 00 00 00 00 00 00 00 00 00
0010  00 00 00 00 00 00 00 de ad be ef 00 00 00 41 00
0020  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 ff
0030  ff fc 10 00 00 00 00 00 00 00 00 00 00 00 00 00
0040  00 00 00 00 00 00 00 00 00 01 00 00`, clientA,
			wire.FAMsg{Code: wire.FAReply, REID: 0xdeadbeef00000041, Response: -1008}},
		{"update", `
0000  3d 2c 1b 0a 00 3c 00 00 00 00 00 00 00 00 00 00
0010  00 00 00 00 00 00 00 de ad be ef 00 00 00 41 00
0020  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
0030  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
0040  00 00 00 00 00 00 00 00 25 02 00 00`, clientA,
			wire.FAMsg{Code: wire.FAUpdate, REID: 0xdeadbeef00000041, ECE: 0x25}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := dump(tc.hex)
			h, payload, err := wire.ParseDT(b, 4)
			if err != nil {
				t.Fatal(err)
			}
			eq(t, "header", h, wire.DT{Dst: tc.dst, TTL: 60, EID: wire.FlowAllocatorEID})
			m, err := wire.DecodeFA(payload, 32)
			if err != nil {
				t.Fatal(err)
			}
			eq(t, "message", m, tc.m)
			again := make([]byte, wire.DTLen(4))
			wire.PutDT(again, 4, h)
			eq(t, "packet", wire.AppendFA(again, &tc.m), b)
		})
	}
}

func TestWorkedOAP(t *testing.T) { // spec 32
	x25519 := dump("30 2a 30 05 06 03 2b 65 6e 03 21 00 4b 4f 6d 72 2b 81 a5 9d 7e 9f 9b fa 30 30 f0 6e 18 04 63 41 0e 2e 19 10 fd 2b ae 32 c8 df 8e 43")
	server := dump("30 2a 30 05 06 03 2b 65 6e 03 21 00 de 9e db 7d 7b 7d c1 b4 d3 5b 61 c2 ec e4 35 37 3f 83 43 c8 5b 78 67 4d ad fc 7e 14 6f 88 2b 4f")
	const t0, t1 = 1770000000123456789, 1770000000128456789
	for _, tc := range []struct {
		name    string
		b       []byte
		hashLen int
		m       wire.OAP
	}{
		{"plain request", oapReq, 0, wire.OAP{ID: oapID, Timestamp: t0}},
		{"plain response", oapRsp, 48, wire.OAP{ID: oapID, Timestamp: t1, ReqHash: oapRsp[36:]}},
		{"key exchange request", dump(`
0000  10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f
0010  18 90 4d 9f 4b cc cd 15 03 85 02 a0 02 a0 00 00
0020  00 2c 00 00 30 2a 30 05 06 03 2b 65 6e 03 21 00
0030  4b 4f 6d 72 2b 81 a5 9d 7e 9f 9b fa 30 30 f0 6e
0040  18 04 63 41 0e 2e 19 10 fd 2b ae 32 c8 df 8e 43`), 0,
			wire.OAP{ID: oapID, Timestamp: t0, CipherNID: 901, KDFNID: wire.NIDSHA256, DigestNID: wire.NIDSHA256, Kex: x25519}},
		{"key exchange response", dump(`
0000  10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f
0010  18 90 4d 9f 4c 19 18 55 03 85 02 a0 02 a0 00 00
0020  00 2c 00 00 30 2a 30 05 06 03 2b 65 6e 03 21 00
0030  de 9e db 7d 7b 7d c1 b4 d3 5b 61 c2 ec e4 35 37
0040  3f 83 43 c8 5b 78 67 4d ad fc 7e 14 6f 88 2b 4f
0050  71 a0 81 ca a7 77 18 b8 a7 6f b0 08 6d 1f e3 2c
0060  43 42 61 bd 84 6d 01 52 5a 77 2a 65 e3 04 c8 4c`), 32,
			wire.OAP{
				ID: oapID, Timestamp: t1, CipherNID: 901, KDFNID: wire.NIDSHA256, DigestNID: wire.NIDSHA256, Kex: server,
				ReqHash: dump("71a081caa77718b8a76fb0086d1fe32c434261bd846d01525a772a65e304c84c"),
			}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, err := wire.DecodeOAPResponse(tc.b, tc.hashLen)
			if tc.hashLen == 0 {
				m, err = wire.DecodeOAPRequest(tc.b)
			}
			if err != nil {
				t.Fatal(err)
			}
			eq(t, "message", m, tc.m)
			again, err := wire.AppendOAP(nil, &tc.m)
			if err != nil {
				t.Fatal(err)
			}
			eq(t, "bytes", again, tc.b)
		})
	}
	// The word of flags and key length, for each kind of KEM message.
	for word, m := range map[string]wire.OAP{
		"04b6": {Kex: make([]byte, 1206)},
		"0440": {Kex: make([]byte, 1088)},
		"84c0": {Kex: make([]byte, 1216), KexRaw: true},
		"8460": {Kex: make([]byte, 1120), KexRaw: true},
		"4440": {Kex: make([]byte, 1088), KexClientEncap: true},
		"c460": {Kex: make([]byte, 1120), KexRaw: true, KexClientEncap: true},
	} {
		b, err := wire.AppendOAP(nil, &m)
		if err != nil || hex.EncodeToString(b[32:34]) != word {
			t.Errorf("key word %x, want %s (%v)", b[32:34], word, err)
		}
	}
}

func TestWorkedCEP(t *testing.T) { // spec 40
	const addr = 0x4F3A21C7
	for s, want := range map[string]wire.CEP{
		"0a 0d 44 61 74 61 20 54 72 61 6e 73 66 65 72 12 03 64 74 70 18 01 28 02 40 c7 c3 e8 f9 04": {Component: "Data Transfer", Protocol: "dtp", Version: 1, Syntax: wire.SyntaxFixed, Address: addr},
		"0a 0a 4d 61 6e 61 67 65 6d 65 6e 74 12 03 4c 53 50 18 01 28 00 40 c7 c3 e8 f9 04":          {Component: "Management", Protocol: "LSP", Version: 1, Address: addr},
		"0a 0a 45 6e 72 6f 6c 6c 6d 65 6e 74 12 03 4f 45 50 18 01 28 00 40 00":                      {Component: "Enrollment", Protocol: "OEP", Version: 1},
		"0a 0d 44 61 74 61 20 54 72 61 6e 73 66 65 72 12 00 18 00 28 00 40 00":                      {Component: "Data Transfer"},
		"0a 00 12 00 18 00 28 00 40 00": {},
	} {
		m, err := wire.DecodeCEP(dump(s))
		if err != nil {
			t.Fatal(err)
		}
		eq(t, "message", *m, want)
		eq(t, "bytes", wire.AppendCEP(nil, &want), dump(s))
		if m.Refusal() != (want == wire.CEP{}) {
			t.Errorf("refusal %v of %+v", m.Refusal(), want)
		}
	}
}

func TestWorkedEnroll(t *testing.T) { // spec 41
	const sec, nsec = 1771000000, 123456789
	req := wire.EnrollReq{ID: id8}
	eq(t, "request", wire.AppendEnrollReq(nil, &req), dump("0a 08 11 22 33 44 55 66 77 88"))
	ack := wire.EnrollAck{ID: id8}
	eq(t, "acknowledgement", wire.AppendEnrollAck(nil, &ack), dump("0a 08 11 22 33 44 55 66 77 88 10 00"))
	for _, tc := range []struct {
		name, hex string
		m         wire.EnrollResp
	}{
		{"unicast", `
0a 08 11 22 33 44 55 66 77 88 10 c0 a1 bd cc 06 18 95 9a ef 3a 20 00
2a 41 0a 07 0a 03 4c 41 4e 10 01 10 01
1a 34 0a 14 08 04 10 08 18 3c 22 0c 08 00 12 08 08 00 10 04 18 0f 20 3c
12 18 08 00 12 14 08 03 10 08 18 80 a3 05 20 84 07 28 84 07 30 c7 c3 e8 f9 04
18 00 20 01`,
			wire.EnrollResp{ID: id8, Sec: sec, Nsec: nsec, Conf: &wire.LayerConfig{
				LayerName: "LAN", HashAlg: 1, Type: 1,
				Unicast: &wire.UnicastConfig{
					AddrSize: 4, EIDSize: 8, MaxTTL: 60,
					LinkState:  &wire.LinkStateConfig{TRecalc: 4, TUpdate: 15, TTimeo: 60},
					DHT:        &wire.DHTConfig{Alpha: 3, K: 8, TExpire: 86400, TRefresh: 900, TReplicate: 900, Peer: 0x4F3A21C7},
					Congestion: 1,
				},
			}}},
		{"broadcast", `
0a 08 11 22 33 44 55 66 77 88 10 c0 a1 bd cc 06 18 95 9a ef 3a 20 00
2a 0a  0a 06 0a 02 62 63 10 01  10 02`,
			wire.EnrollResp{ID: id8, Sec: sec, Nsec: nsec, Conf: &wire.LayerConfig{LayerName: "bc", HashAlg: 1, Type: 2}}},
		{"refusal", `
0a 08 11 22 33 44 55 66 77 88 10 c0 a1 bd cc 06 18 95 9a ef 3a
20 ff ff ff ff ff ff ff ff ff 01`,
			wire.EnrollResp{ID: id8, Sec: sec, Nsec: nsec, Response: -1}},
		{"options", `
0a 08 11 22 33 44 55 66 77 88 10 c0 a1 bd cc 06 18 95 9a ef 3a 20 00
2a 3d 0a 07 0a 03 75 6e 69 10 03 10 01 1a 30 0a 14 08 04 10 08 18 05 22 0c 08 00 12 08 08 00 10 01 18 03 20 0a
12 14 08 00 12 10 08 02 10 04 18 3c 20 14 28 0a 30 d4 81 f3 cf 04 18 00 20 00`,
			wire.EnrollResp{ID: id8, Sec: sec, Nsec: nsec, Conf: &wire.LayerConfig{
				LayerName: "uni", HashAlg: 3, Type: 1,
				Unicast: &wire.UnicastConfig{
					AddrSize: 4, EIDSize: 8, MaxTTL: 5,
					LinkState: &wire.LinkStateConfig{TRecalc: 1, TUpdate: 3, TTimeo: 10},
					DHT:       &wire.DHTConfig{Alpha: 2, K: 4, TExpire: 60, TRefresh: 20, TReplicate: 10, Peer: 0x49FCC0D4},
				},
			}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, err := wire.DecodeEnrollResp(dump(tc.hex))
			if err != nil {
				t.Fatal(err)
			}
			eq(t, "message", *m, tc.m)
			eq(t, "bytes", wire.AppendEnrollResp(nil, &tc.m), dump(tc.hex))
		})
	}
}

func TestWorkedLSA(t *testing.T) { // spec 42, spec 50 §1
	const base = "00 00 00 00 0a 0b 0c 0d 00 00 00 00 4f 3a 21 c7 00 00 00 00 00 00 00 03"
	for s, want := range map[string]wire.LSA{
		base:                              {Dst: 0x0a0b0c0d, Src: 0x4f3a21c7, Seqno: 3},
		base + " 00 00 00 00 00 00 00 01": {Dst: 0x0a0b0c0d, Src: 0x4f3a21c7, Seqno: 3, Withdraw: true},
	} {
		m, err := wire.ParseLSA(dump(s))
		if err != nil || m != want {
			t.Errorf("%+v %v, want %+v", m, err, want)
		}
		eq(t, "bytes", wire.AppendLSA(nil, want), dump(s))
	}
}

func TestWorkedDHT(t *testing.T) { // spec 43
	const (
		addrA, addrB = 0x4F3A21C7, 0x0A0B0C0D
		cookie       = 0x0123456789ABCDEF
		hexA         = "0f ee dd cc bb aa 99 88 77 66 55 44 33 22 11 00 0f ee dd cc bb aa 99 88 77 66 55 44 33 22 11 00 "
		hexKey       = "42 de e3 b0 41 5b 4f 69 0f d9 1c bd 99 87 6f 1e 9b d8 d9 74 5e f7 fa 32 b1 42 77 3a f0 34 9d 54 "
		srcA         = "12 28 0a 20 " + hexA + "10 c7 c3 e8 f9 04 "
		srcB         = "12 27 0a 20 a0 a1 a2 a3 a4 a5 a6 a7 a8 a9 aa ab ac ad ae af b0 b1 b2 b3 b4 b5 b6 b7 b8 b9 ba bb bc bd be bf 10 8d 98 ac 50 "
		hexCookie    = "08 ef 9b af cd f8 ac d1 91 01 "
		contactA     = "1a 28 0a 20 " + hexA + "10 c7 c3 e8 f9 04 "
	)
	a, b := wire.DHTContact{ID: nodeA, Addr: addrA}, wire.DHTContact{ID: nodeB, Addr: addrB}
	for _, tc := range []struct {
		name, hex string
		n         int
		m         wire.DHTMsg
	}{
		{"store", "08 00 " + srcA + "1a 32 0a 20 " + hexKey + "12 08 00 00 00 00 4f 3a 21 c7 18 c0 c4 c2 cc 06", 96,
			wire.DHTMsg{Code: wire.DHTStoreCode, Src: a, Store: &wire.DHTStore{Key: pingHash, Val: dump("000000004f3a21c7"), Exp: 1771086400}}},
		{"find node", "08 01 " + srcA + "22 2c " + hexCookie + "12 20 " + hexA, 90,
			wire.DHTMsg{Code: wire.DHTFindNodeReq, Src: a, Find: &wire.DHTFind{Cookie: cookie, Key: nodeA}}},
		{"nodes", "08 02 " + srcB + "2a 56 " + hexCookie + "12 20 " + hexA + contactA, 131,
			wire.DHTMsg{Code: wire.DHTFindNodeRsp, Src: b, Node: &wire.DHTNodeRsp{Cookie: cookie, Key: nodeA, Contacts: []wire.DHTContact{a}}}},
		{"find value", "08 03 " + srcA + "22 2c " + hexCookie + "12 20 " + hexKey, 90,
			wire.DHTMsg{Code: wire.DHTFindValueReq, Src: a, Find: &wire.DHTFind{Cookie: cookie, Key: pingHash}}},
		{"value", "08 04 " + srcB + "2a 56 " + hexCookie + "12 20 " + hexKey + contactA + "32 0a 0a 08 00 00 00 00 0a 0b 0c 0d", 143,
			wire.DHTMsg{
				Code: wire.DHTFindValueRsp, Src: b,
				Node: &wire.DHTNodeRsp{Cookie: cookie, Key: pingHash, Contacts: []wire.DHTContact{a}},
				Val:  &wire.DHTValueRsp{Values: [][]byte{dump("000000000a0b0c0d")}},
			}},
		{"no value", "08 04 " + srcB + "2a 56 " + hexCookie + "12 20 " + hexKey + contactA + "32 00", 133,
			wire.DHTMsg{
				Code: wire.DHTFindValueRsp, Src: b,
				Node: &wire.DHTNodeRsp{Cookie: cookie, Key: pingHash, Contacts: []wire.DHTContact{a}},
				Val:  &wire.DHTValueRsp{},
			}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if n := len(dump(tc.hex)); n != tc.n {
				t.Fatalf("%d bytes, want %d", n, tc.n)
			}
			m, err := wire.DecodeDHT(dump(tc.hex))
			if err != nil {
				t.Fatal(err)
			}
			eq(t, "message", *m, tc.m)
			eq(t, "bytes", wire.AppendDHT(nil, &tc.m), dump(tc.hex))
		})
	}
}
