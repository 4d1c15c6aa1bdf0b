package cacep

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/wire"
)

var t0 = time.Unix(1771000000, 0)

const addrA, addrB = 0x77A7EA97, 0x49FCC0D4

func unhex(s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		panic(err)
	}
	return b
}

// What two reference members sent each other (spec 40 §9.6).
func TestCaptured(t *testing.T) {
	for _, tc := range []struct {
		comp             ipcp.Component
		request, reply   string
		requester, other uint64
	}{
		{ipcp.Enrollment, "0a 0a 45 6e 72 6f 6c 6c 6d 65 6e 74 12 03 4f 45 50 18 01 28 00 40 00",
			"0a 0a 45 6e 72 6f 6c 6c 6d 65 6e 74 12 03 4f 45 50 18 01 28 00 40 00", 0, 0},
		{ipcp.Management, "0a 0a 4d 61 6e 61 67 65 6d 65 6e 74 12 03 4c 53 50 18 01 28 00 40 97 d5 9f bd 07",
			"0a 0a 4d 61 6e 61 67 65 6d 65 6e 74 12 03 4c 53 50 18 01 28 00 40 d4 81 f3 cf 04", addrA, addrB},
		{ipcp.DataTransfer, "0a 0d 44 61 74 61 20 54 72 61 6e 73 66 65 72 12 03 64 74 70 18 01 28 02 40 97 d5 9f bd 07",
			"0a 0d 44 61 74 61 20 54 72 61 6e 73 66 65 72 12 03 64 74 70 18 01 28 02 40 d4 81 f3 cf 04", addrA, addrB},
	} {
		i := NewInitiator(t0, string(tc.comp), addrA)
		if got := i.Message(); !bytes.Equal(got, unhex(tc.request)) {
			t.Errorf("%s: request %x, want %s", tc.comp, got, tc.request)
		}
		comp, peer, reply, err := Accept(i.Message(), addrB)
		if comp != tc.comp || peer != tc.requester || err != nil || !bytes.Equal(reply, unhex(tc.reply)) {
			t.Errorf("%s: accepted %q %#x %x %v", tc.comp, comp, peer, reply, err)
		}
		if peer, err := i.Receive(t0, reply); peer != tc.other || err != nil {
			t.Errorf("%s: peer %#x, %v", tc.comp, peer, err)
		}
	}
}

func TestBroadcast(t *testing.T) {
	const dt = "0a 0d 44 61 74 61 20 54 72 61 6e 73 66 65 72 12 00 18 00 28 00 40 00"
	i := NewBroadcastInitiator(t0, string(ipcp.DataTransfer))
	if got := i.Message(); !bytes.Equal(got, unhex(dt)) {
		t.Errorf("request %x", got)
	}
	comp, reply, err := AcceptBroadcast(i.Message())
	if comp != ipcp.DataTransfer || err != nil || !bytes.Equal(reply, unhex(dt)) {
		t.Errorf("accepted %q %x %v", comp, reply, err)
	}
	if _, err := i.Receive(t0, reply); err != nil {
		t.Error(err)
	}
	// The refusal has the same protocol, version and syntax (spec 40 §10.3).
	if _, err := i.Receive(t0, unhex("0a 00 12 00 18 00 28 00 40 00")); !errors.Is(err, ErrRefused) {
		t.Errorf("refusal: %v", err)
	}
	if _, reply, err := AcceptBroadcast(NewInitiator(t0, "Management", addrA).Message()); err == nil || len(reply) != 10 {
		t.Errorf("broadcast layer accepts Management: %x", reply)
	}
	if comp, _, err := AcceptBroadcast(NewBroadcastInitiator(t0, "Enrollment").Message()); comp != ipcp.Enrollment || err != nil {
		t.Errorf("enrolment: %q %v", comp, err)
	}
}

func TestRefused(t *testing.T) {
	i := NewInitiator(t0, "Telepathy", addrA)
	comp, peer, reply, err := Accept(i.Message(), addrB)
	if comp != "" || peer != 0 || err == nil || !bytes.Equal(reply, unhex("0a 00 12 00 18 00 28 00 40 00")) {
		t.Errorf("accepted %q %#x %x %v", comp, peer, reply, err)
	}
	if _, err := i.Receive(t0, reply); !errors.Is(err, ErrRefused) || !errors.Is(err, o7serr.EIPCP) {
		t.Errorf("refusal: %v", err)
	}
	// An empty component name must not match anything.
	if comp, _, reply, err := Accept(wire.AppendCEP(nil, &wire.CEP{}), addrB); comp != "" || len(reply) != 10 || err == nil {
		t.Errorf("empty name: %q %x %v", comp, reply, err)
	}
	// Silence answers garbage.
	for _, b := range [][]byte{nil, {0xff}, bytes.Repeat([]byte{0}, 24), wire.AppendCEP(nil, &wire.CEP{Component: strings.Repeat("x", 200)})} {
		if _, _, reply, err := Accept(b, addrB); reply != nil || err == nil {
			t.Errorf("garbage %x: %x %v", b, reply, err)
		}
		if _, err := i.Receive(t0, b); err == nil {
			t.Errorf("garbage %x passes", b)
		}
	}
}

func TestMismatch(t *testing.T) {
	good := wire.CEP{Component: "Data Transfer", Protocol: "dtp", Version: 1, Syntax: wire.SyntaxFixed, Address: addrB}
	for name, change := range map[string]func(*wire.CEP){
		"protocol":     func(m *wire.CEP) { m.Protocol = "DTP" },
		"version":      func(m *wire.CEP) { m.Version = 2 },
		"syntax":       func(m *wire.CEP) { m.Syntax = wire.SyntaxGPB },
		"no address":   func(m *wire.CEP) { m.Address = 0 },
		"long address": func(m *wire.CEP) { m.Address = 1 << 32 },
	} {
		m := good
		change(&m)
		if _, err := NewInitiator(t0, "Data Transfer", addrA).Receive(t0, wire.AppendCEP(nil, &m)); err == nil {
			t.Errorf("%s: initiator accepts", name)
		}
		comp, _, reply, err := Accept(wire.AppendCEP(nil, &m), addrB)
		if comp != "" || err == nil || !bytes.Equal(reply, wire.AppendCEP(nil, &good)) {
			t.Errorf("%s: acceptor: %q %x %v", name, comp, reply, err)
		}
	}
	// The component name of the reply is not checked (spec 40 §7).
	m := good
	m.Component = "DT"
	if peer, err := NewInitiator(t0, "Data Transfer", addrA).Receive(t0, wire.AppendCEP(nil, &m)); peer != addrB || err != nil {
		t.Errorf("other component name: %#x %v", peer, err)
	}
}

func TestDeadline(t *testing.T) {
	i := NewInitiator(t0, "Management", addrA)
	_, _, reply, _ := Accept(i.Message(), addrB)
	if _, err := i.Receive(i.Deadline(), reply); err != nil {
		t.Errorf("at the deadline: %v", err)
	}
	if _, err := i.Receive(i.Deadline().Add(1), reply); !errors.Is(err, o7serr.ETIMEDOUT) {
		t.Errorf("after the deadline: %v", err)
	}
	if d := i.Deadline().Sub(t0); d != time.Second {
		t.Errorf("deadline after %v", d)
	}
}

// Two members of this implementation always agree, and no message is longer
// than a reference member reads.
func TestAgreement(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := rapid.Uint64Range(1, 1<<32-1).Draw(t, "a")
		b := rapid.Uint64Range(1, 1<<32-1).Draw(t, "b")
		c := rapid.SampledFrom([]ipcp.Component{ipcp.Enrollment, ipcp.Management, ipcp.DataTransfer}).Draw(t, "component")
		i := NewInitiator(t0, string(c), a)
		comp, pa, reply, err := Accept(i.Message(), b)
		if err != nil || comp != c {
			t.Fatalf("%s accepted as %q: %v", c, comp, err)
		}
		pb, err := i.Receive(t0, reply)
		if err != nil {
			t.Fatal(err)
		}
		if c == ipcp.Enrollment {
			a, b = 0, 0
		}
		if pa != a || pb != b {
			t.Fatalf("addresses %#x %#x, want %#x %#x", pa, pb, a, b)
		}
		if n := max(len(i.Message()), len(reply)); n > wire.MaxCEPLen {
			t.Fatalf("message of %d bytes", n)
		}
	})
}

func FuzzHandshake(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(NewInitiator(t0, "Data Transfer", addrA).Message())
	f.Add(wire.AppendCEP(nil, &wire.CEP{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		comp, peer, reply, err := Accept(b, addrB)
		if (err == nil) != (comp != "") || err == nil && reply == nil {
			t.Fatalf("%q %x %v", comp, reply, err)
		}
		if err == nil && comp != ipcp.Enrollment && peer == 0 {
			t.Fatal("peer without address")
		}
		NewInitiator(t0, "Data Transfer", addrA).Receive(t0, b)
	})
}
