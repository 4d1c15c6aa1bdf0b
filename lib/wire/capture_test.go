package wire_test

import (
	"bytes"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket/pcapgo"

	"github.com/o7s/o7s-router/lib/wire"
)

// frames returns the Ethernet frames of a capture in testdata.
func frames(t testing.TB, name string) [][]byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := pcapgo.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var out [][]byte
	for {
		b, _, err := r.ReadPacketData()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b)
	}
}

// walker follows the flows of one captured link, as far as needed to know what
// each packet is, and decodes and encodes it again.
type walker struct {
	t       *testing.T
	hashLen int // of the unicast layer
	n       int // of the frame, from 1
	seen    map[string]int
	flows   map[end]*ethFlow
	pending map[end]*ethFlow
	oap     map[uint64]oapRequest // unicast flow requests by the requester's EID
}

type end struct {
	mac [6]byte
	eid uint16
}

type oapRequest struct {
	raw    []byte
	digest uint16
}

type ethFlow struct {
	requester [6]byte
	oap       oapRequest
	comp      [2]*wire.CEP // by direction: 0 from the requester
	enroll    [2]int       // messages seen
}

// same fails the test if a message does not encode to the bytes it came from.
func (w *walker) same(kind string, got, want []byte, err error) {
	w.t.Helper()
	if err != nil {
		w.t.Errorf("frame %d: %s: %v", w.n, kind, err)
		return
	}
	if !bytes.Equal(got, want) {
		w.t.Errorf("frame %d: %s encodes to\n%x, captured\n%x", w.n, kind, got, want)
	}
	w.seen[kind]++
}

func (w *walker) frame(b []byte) {
	h, payload, err := wire.ParseDIX(b)
	if h.EtherType != wire.DefaultEtherType {
		w.seen["foreign"]++ // the hosts speak IPv6 too
		return
	}
	again := wire.AppendDIX(nil, h.Dst, h.Src, h.EtherType, h.EID, payload)
	w.same("dix", again, b[:min(len(b), len(again))], err)
	if h.EID == wire.MgmtEID {
		w.mgmt(h, payload)
		return
	}
	f := w.flows[end{h.Dst, h.EID}]
	switch {
	case len(payload) == 0:
		w.seen["keep-alive"]++
	case f == nil:
		w.seen["stray"]++
	default:
		dir := 0
		if h.Dst == f.requester {
			dir = 1
		}
		w.flow(f, dir, payload)
	}
}

func (w *walker) mgmt(h wire.DIX, b []byte) {
	const hashLen = 32 // of the Ethernet layers in all captures
	m, err := wire.DecodeDIXMgmt(b, hashLen)
	w.same(fmt.Sprintf("mgmt-%d", m.Code), wire.AppendDIXMgmt(nil, &m), b, err)
	switch m.Code {
	case wire.FlowReq:
		w.pending[end{h.Src, m.SrcEID}] = &ethFlow{requester: h.Src, oap: w.oapReq(m.Data)}
	case wire.FlowReply:
		e := end{h.Dst, m.DstEID}
		f := w.pending[e]
		if f == nil {
			w.t.Errorf("frame %d: flow reply without request", w.n)
			return
		}
		delete(w.pending, e)
		w.oapRsp(f.oap, m.Data, m.Response)
		w.flows[e], w.flows[end{h.Src, m.SrcEID}] = f, f
	}
}

func (w *walker) oapReq(b []byte) oapRequest {
	m, err := wire.DecodeOAPRequest(b)
	var again []byte
	if err == nil {
		again, err = wire.AppendOAP(nil, &m)
	}
	w.same("oap-req", again, b, err)
	if len(m.Kex) > 0 {
		w.seen["oap-kex"]++
	}
	return oapRequest{b, m.DigestNID}
}

func (w *walker) oapRsp(req oapRequest, b []byte, response int32) {
	if response != 0 {
		w.seen["oap-refused"]++
		if len(b) != 0 {
			w.t.Errorf("frame %d: refusal with piggyback", w.n)
		}
		return
	}
	hashLen := 48
	if req.digest != 0 {
		hashLen = wire.DigestLen(req.digest)
	}
	m, err := wire.DecodeOAPResponse(b, hashLen)
	var again []byte
	if err == nil {
		again, err = wire.AppendOAP(nil, &m)
	}
	w.same("oap-rsp", again, b, err)
	if req.digest == 0 {
		if h := sha512.Sum384(req.raw); !bytes.Equal(m.ReqHash, h[:]) {
			w.t.Errorf("frame %d: request hash %x, want %x", w.n, m.ReqHash, h)
		}
	}
	if len(m.Cert) > 0 {
		w.seen["oap-cert"]++
		if len(m.Sig) == 0 {
			w.t.Errorf("frame %d: certificate without signature", w.n)
		}
	}
}

// flow handles a packet of an Ethernet flow: the first of each direction is a
// connection establishment message if the flow is one between two members.
func (w *walker) flow(f *ethFlow, dir int, b []byte) {
	if f.comp[dir] == nil {
		m, err := wire.DecodeCEP(b)
		if err != nil || m.Protocol == "" && m.Component != "Data Transfer" {
			w.seen["application"]++
			return
		}
		w.same("cep-"+m.Component[:4], wire.AppendCEP(nil, m), b, nil)
		f.comp[dir] = m
		return
	}
	switch c := f.comp[0]; {
	case c.Component == "Enrollment":
		w.enroll(f, dir, b)
	case c.Component == "Management":
		m, err := wire.ParseLSA(b)
		w.same("lsa", wire.AppendLSA(nil, m), b, err)
	case c.Protocol == "dtp":
		w.dt(b)
	default:
		w.seen["broadcast"]++
	}
}

func (w *walker) enroll(f *ethFlow, dir int, b []byte) {
	defer func() { f.enroll[dir]++ }()
	switch {
	case dir == 1:
		m, err := wire.DecodeEnrollResp(b)
		if err != nil {
			w.t.Fatalf("frame %d: %v", w.n, err)
		}
		w.same("enroll-resp", wire.AppendEnrollResp(nil, m), b, nil)
	case f.enroll[0] == 0:
		m, err := wire.DecodeEnrollReq(b)
		if err != nil {
			w.t.Fatalf("frame %d: %v", w.n, err)
		}
		w.same("enroll-req", wire.AppendEnrollReq(nil, m), b, nil)
	default:
		m, err := wire.DecodeEnrollAck(b)
		if err != nil {
			w.t.Fatalf("frame %d: %v", w.n, err)
		}
		w.same("enroll-ack", wire.AppendEnrollAck(nil, m), b, nil)
	}
}

func (w *walker) dt(b []byte) {
	h, payload, err := wire.ParseDT(b, 4)
	again := make([]byte, wire.DTLen(4))
	wire.PutDT(again, 4, h)
	w.same("dt", append(again, payload...), b, err)
	switch {
	case h.EID == wire.FlowAllocatorEID:
		m, err := wire.DecodeFA(payload, w.hashLen)
		w.same(fmt.Sprintf("fa-%d", m.Code), wire.AppendFA(nil, &m), payload, err)
		switch m.Code {
		case wire.FAReq:
			w.oap[m.SEID] = w.oapReq(m.Data)
		case wire.FAReply:
			w.oapRsp(w.oap[m.REID], m.Data, m.Response)
		}
	case h.EID == wire.DirectoryEID:
		m, err := wire.DecodeDHT(payload)
		if err != nil {
			w.t.Errorf("frame %d: %v", w.n, err)
			return
		}
		if len(m.Src.ID) != w.hashLen {
			w.t.Errorf("frame %d: node id of %d bytes", w.n, len(m.Src.ID))
		}
		w.same(fmt.Sprintf("dht-%d", m.Code), wire.AppendDHT(nil, m), payload, nil)
	case h.EID >= wire.MinFlowEID:
		w.seen["dt-data"]++
	default:
		w.t.Errorf("frame %d: endpoint %d", w.n, h.EID)
	}
}

// Every packet of the captures decodes, and encodes to the same bytes.
func TestCaptures(t *testing.T) {
	for _, tc := range captures {
		t.Run(tc.file, func(t *testing.T) {
			w := &walker{
				t: t, hashLen: tc.hashLen, seen: map[string]int{},
				flows: map[end]*ethFlow{}, pending: map[end]*ethFlow{}, oap: map[uint64]oapRequest{},
			}
			for i, b := range frames(t, tc.file) {
				w.n = i + 1
				w.frame(b)
			}
			var got []string
			for _, kind := range slices.Sorted(maps.Keys(w.seen)) {
				got = append(got, fmt.Sprintf("%s=%d", kind, w.seen[kind]))
			}
			if diff := cmp.Diff(strings.Fields(tc.seen), got); diff != "" {
				t.Errorf("kinds of packets seen (-want +got):\n%s\n%s", diff, strings.Join(got, " "))
			}
		})
	}
}

var captures = []struct {
	file    string
	hashLen int
	seen    string
}{
	{"ethdix-2host-oping.pcap", 32, "application=112 dix=128 mgmt-0=7 mgmt-1=6 mgmt-2=2 mgmt-3=1 oap-req=7 oap-rsp=6"},
	{"unicast-3host-over-ethdix-oping-link12.pcap", 32, "cep-Data=2 cep-Enro=2 cep-Mana=2 dht-0=3 dht-1=2 dht-2=2 dix=82 dt=47 dt-data=30 enroll-ack=1 enroll-req=1 enroll-resp=1 fa-0=5 fa-1=5 lsa=16 mgmt-0=3 mgmt-1=3 mgmt-2=2 mgmt-3=2 oap-req=8 oap-rsp=8"},
	{"unicast-3host-over-ethdix-oping-link23.pcap", 32, "cep-Data=2 cep-Enro=2 cep-Mana=2 dht-0=3 dht-1=2 dht-2=2 dix=74 dt=39 dt-data=24 enroll-ack=1 enroll-req=1 enroll-resp=1 fa-0=4 fa-1=4 lsa=16 mgmt-0=3 mgmt-1=3 mgmt-2=2 mgmt-3=2 oap-req=7 oap-rsp=7"},
	{"unicast-3host-encrypted-link12.pcap", 32, "cep-Data=2 cep-Enro=2 cep-Mana=2 dht-0=7 dht-1=2 dht-2=2 dix=85 dt=55 dt-data=30 enroll-ack=1 enroll-req=1 enroll-resp=1 fa-0=7 fa-1=7 lsa=11 mgmt-0=3 mgmt-1=3 mgmt-2=2 mgmt-3=2 oap-cert=1 oap-kex=5 oap-refused=1 oap-req=10 oap-rsp=9"},
	{"unicast-3host-encrypted-link23.pcap", 32, "cep-Data=2 cep-Enro=2 cep-Mana=2 dht-0=14 dht-1=2 dht-2=2 dix=90 dt=60 dt-data=30 enroll-ack=1 enroll-req=1 enroll-resp=1 fa-0=6 fa-1=6 lsa=11 mgmt-0=3 mgmt-1=3 mgmt-2=2 mgmt-3=2 oap-cert=1 oap-kex=5 oap-req=9 oap-rsp=9"},
	{"unicast-2host-reliable-control.pcap", 32, "cep-Data=2 cep-Enro=2 cep-Mana=2 dht-0=4 dht-1=2 dht-2=2 dix=77 dt=41 dt-data=14 enroll-ack=1 enroll-req=1 enroll-resp=1 fa-0=7 fa-1=7 fa-2=5 keep-alive=2 lsa=10 mgmt-0=3 mgmt-1=3 mgmt-2=7 mgmt-3=2 oap-req=10 oap-rsp=10"},
	{"unicast-2host-options.pcap", 64, "cep-Data=2 cep-Enro=2 cep-Mana=2 dht-0=6 dht-1=2 dht-2=2 dix=70 dt=22 dt-data=8 enroll-ack=1 enroll-req=1 enroll-resp=1 fa-0=2 fa-1=2 lsa=29 mgmt-0=3 mgmt-1=3 mgmt-2=2 mgmt-3=2 oap-req=5 oap-rsp=5"},
	{"dht-5host-register-lookup-link12.pcap", 32, "cep-Data=2 cep-Enro=2 cep-Mana=2 dht-0=52 dht-1=2 dht-2=2 dht-3=5 dht-4=5 dix=348 dt=87 dt-data=12 enroll-ack=1 enroll-req=1 enroll-resp=1 fa-0=5 fa-1=4 keep-alive=2 lsa=239 mgmt-0=3 mgmt-1=3 mgmt-2=3 mgmt-3=2 oap-req=8 oap-rsp=7"},
	{"dht-5host-register-lookup-link23.pcap", 32, "cep-Data=2 cep-Enro=2 cep-Mana=2 dht-0=65 dht-1=1 dht-2=1 dht-3=5 dht-4=5 dix=367 dt=110 dt-data=20 enroll-ack=1 enroll-req=1 enroll-resp=1 fa-0=7 fa-1=6 lsa=238 mgmt-0=3 mgmt-1=3 mgmt-2=2 mgmt-3=2 oap-req=10 oap-rsp=9"},
	{"dht-5host-register-lookup-link34.pcap", 32, "cep-Data=2 cep-Enro=2 cep-Mana=2 dht-0=65 dht-1=2 dht-2=2 dht-3=5 dht-4=5 dix=360 dt=105 dt-data=16 enroll-ack=1 enroll-req=1 enroll-resp=1 fa-0=5 fa-1=5 lsa=236 mgmt-0=3 mgmt-1=3 mgmt-2=2 mgmt-3=2 oap-req=8 oap-rsp=8"},
	{"dht-5host-register-lookup-link45.pcap", 32, "cep-Data=2 cep-Enro=2 cep-Mana=2 dht-0=43 dht-1=2 dht-2=2 dht-3=4 dht-4=4 dix=323 dt=70 dt-data=8 enroll-ack=1 enroll-req=1 enroll-resp=1 fa-0=4 fa-1=3 lsa=233 mgmt-0=3 mgmt-1=3 mgmt-2=3 mgmt-3=2 oap-req=7 oap-rsp=6"},
	{"broadcast-3host-link12.pcap", 32, "broadcast=3 cep-Data=2 cep-Enro=2 dix=18 enroll-ack=1 enroll-req=1 enroll-resp=1 mgmt-0=2 mgmt-1=2 mgmt-2=2 mgmt-3=2 oap-req=2 oap-rsp=2"},
	{"broadcast-3host-link23.pcap", 32, "broadcast=3 cep-Data=2 cep-Enro=2 dix=18 enroll-ack=1 enroll-req=1 enroll-resp=1 mgmt-0=2 mgmt-1=2 mgmt-2=2 mgmt-3=2 oap-req=2 oap-rsp=2"},
}
