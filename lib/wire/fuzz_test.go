package wire_test

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/o7s/o7s-router/lib/wire"
)

type fataler interface {
	Helper()
	Fatalf(string, ...any)
}

func same[T any](t fataler, got, want T) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("differs (-want +got):\n%s", diff)
	}
}

// stable checks that what decodes, decodes to the same after being encoded.
func stable[T any](t *testing.T, b []byte, decode func([]byte) (T, error), encode func(T) []byte) {
	t.Helper()
	m, err := decode(b)
	if err != nil {
		return
	}
	again, err := decode(encode(m))
	if errors.Is(err, wire.ErrLong) {
		return // a negative int32 may come in 5 bytes, but goes out in 10
	}
	if err != nil {
		t.Fatalf("%+v does not survive encoding: %v", m, err)
	}
	same(t, again, m)
}

func FuzzDIX(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		h, payload, err := wire.ParseDIX(b)
		if err != nil {
			return
		}
		if int(h.Length) != len(payload) || len(payload) > len(b)-wire.DIXHeaderLen {
			t.Fatalf("length %d, payload %d, frame %d", h.Length, len(payload), len(b))
		}
		again := wire.AppendDIX(nil, h.Dst, h.Src, h.EtherType, h.EID, payload)
		same(t, again, b[:len(again)])
	})
}

func FuzzDIXMgmt(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte, hash uint8) {
		n := wire.HashLen(hash % 4)
		stable(t, b, func(b []byte) (wire.EthMgmt, error) { return wire.DecodeDIXMgmt(b, n) },
			func(m wire.EthMgmt) []byte { return wire.AppendDIXMgmt(nil, &m) })
	})
}

func FuzzDT(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte, size uint8) {
		n := int(size%8) + 1
		h, payload, err := wire.ParseDT(b, n)
		if (err != nil) != (len(b) < wire.DTLen(n)) {
			t.Fatalf("%d bytes: %v", len(b), err)
		}
		if err != nil {
			return
		}
		again := make([]byte, wire.DTLen(n))
		wire.PutDT(again, n, h)
		same(t, append(again, payload...), b)
	})
}

func FuzzFA(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte, hash uint8) {
		n := wire.HashLen(hash % 4)
		stable(t, b, func(b []byte) (wire.FAMsg, error) { return wire.DecodeFA(b, n) },
			func(m wire.FAMsg) []byte { return wire.AppendFA(nil, &m) })
	})
}

func FuzzOAP(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte, hashLen uint8) {
		m, err := wire.DecodeOAPResponse(b, int(hashLen))
		if err != nil {
			return
		}
		again, err := wire.AppendOAP(nil, &m)
		if err != nil {
			t.Fatal(err)
		}
		same(t, again, b) // no byte is without meaning
	})
}

func FuzzCEP(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		stable(t, b, wire.DecodeCEP, func(m *wire.CEP) []byte { return wire.AppendCEP(nil, m) })
	})
}

func FuzzEnroll(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		stable(t, b, wire.DecodeEnrollReq, func(m *wire.EnrollReq) []byte { return wire.AppendEnrollReq(nil, m) })
		stable(t, b, wire.DecodeEnrollAck, func(m *wire.EnrollAck) []byte { return wire.AppendEnrollAck(nil, m) })
		stable(t, b, wire.DecodeEnrollResp, func(m *wire.EnrollResp) []byte { return wire.AppendEnrollResp(nil, m) })
	})
}

func FuzzLSA(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := wire.ParseLSA(b)
		if err != nil {
			return
		}
		same(t, wire.AppendLSA(nil, m), b)
	})
}

func FuzzDHT(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		stable(t, b, wire.DecodeDHT, func(m *wire.DHTMsg) []byte { return wire.AppendDHT(nil, m) })
	})
}

func FuzzAddr(f *testing.F) {
	f.Fuzz(func(t *testing.T, s string) {
		a, err := wire.ParseAddr(s)
		if err != nil {
			return
		}
		if b, err := wire.ParseAddr(wire.AddrString(a)); b != a || err != nil {
			t.Fatalf("%q: %#x, then %#x, %v", s, a, b, err)
		}
	})
}
