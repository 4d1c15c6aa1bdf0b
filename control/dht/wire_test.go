package dht

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/wire"
)

func unhex(t testing.TB, s string) []byte {
	b, err := hex.DecodeString(strings.NewReplacer(" ", "", "\n", "", "\t", "").Replace(s))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const (
	hexA = "0feeddccbbaa99887766554433221100" + "0feeddccbbaa99887766554433221100"
	hexB = "a0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebf"

	addrA, addrB = 0x4f3a21c7, 0x0a0b0c0d
	cookieAB     = 0x0123456789abcdef

	// Spec 43 §10.
	hexStore       = `08 00 1228 0a20` + hexA + `10c7c3e8f904 1a32 0a20 42dee3b0415b4f690fd91cbd99876f1e9bd8d9745ef7fa32b142773af0349d54 1208000000004f3a21c7 18c0c4c2cc06`
	hexFindNode    = `08 01 1228 0a20` + hexA + `10c7c3e8f904 222c 08ef9bafcdf8acd19101 1220` + hexA
	hexFindNodeRsp = `08 02 1227 0a20` + hexB + `108d98ac50 2a56 08ef9bafcdf8acd19101 1220` + hexA + `1a28 0a20` + hexA + `10c7c3e8f904`
	hexOping       = `42dee3b0415b4f690fd91cbd99876f1e9bd8d9745ef7fa32b142773af0349d54`
	hexFindVal     = `08 03 1228 0a20` + hexA + `10c7c3e8f904 222c 08ef9bafcdf8acd19101 1220` + hexOping
	hexFindValRsp  = `08 04 1227 0a20` + hexB + `108d98ac50 2a56 08ef9bafcdf8acd19101 1220` + hexOping + `1a28 0a20` + hexA + `10c7c3e8f904`
)

// twin returns a Node with a given identity.
func twin(t testing.TB, addr, via uint64, nodeID []byte, now time.Time) *Node {
	n, err := New(Config{Self: addr, Peer: via, AddrSize: 4, Rand: newRand(1)}, now)
	if err != nil {
		t.Fatal(err)
	}
	n.self = id(nodeID)
	n.table, n.store = newTable(n.self, n.cfg.K), newStore(n.self)
	return n
}

func one(t *testing.T, n *Node, dst uint64, want []byte) {
	t.Helper()
	m := n.Messages()
	if len(m) == 0 || m[0].Dst != dst || !bytes.Equal(m[0].Payload, want) {
		t.Fatalf("sent %x\nwant one to %x: %x", m, dst, want)
	}
}

func TestWorkedBytes(t *testing.T) {
	now := time.Unix(1771086400-86400, 0)
	a := twin(t, addrA, addrB, unhex(t, hexA), now)
	a.magic = cookieAB
	b := twin(t, addrB, 0, unhex(t, hexB), now)

	a.Tick(now)
	one(t, a, addrB, unhex(t, hexFindNode))
	b.Receive(now, unhex(t, hexFindNode))
	one(t, b, addrA, unhex(t, hexFindNodeRsp))
	a.Receive(now, unhex(t, hexFindNodeRsp))
	a.Messages() // the lookup of its own id
	if a.Contacts() != 1 {
		t.Fatal("the responder is no contact")
	}
	if err := a.Register(now, nameKey("oping")); err != nil {
		t.Fatal(err)
	}
	m := a.Messages()
	at := slices.IndexFunc(m, func(m Message) bool { return m.Payload[1] == 0 })
	if at < 0 || !bytes.Equal(m[at].Payload, unhex(t, hexStore)) {
		t.Fatalf("STORE is not in %x", m)
	}

	// FIND_VALUE without and with a value.
	b.Receive(now, unhex(t, hexFindVal))
	m = b.Messages()
	if len(m) == 0 || !bytes.Equal(m[len(m)-1].Payload, unhex(t, hexFindValRsp+"3200")) {
		t.Fatalf("sent %x", m)
	}
	if err := b.Register(now, nameKey("oping")); err != nil {
		t.Fatal(err)
	}
	b.Messages()
	b.Receive(now, unhex(t, hexFindVal))
	one(t, b, addrA, unhex(t, hexFindValRsp+"320a0a08000000000a0b0c0d"))
}

type captured struct {
	at      time.Time
	dst     uint64
	payload []byte
}

func capture(t testing.TB) (out []captured) {
	f, err := os.Open("testdata/five-hosts-link12.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		var sec, usec int64
		var c captured
		var p string
		if _, err := fmt.Sscanf(s.Text(), "%d.%06d %x %s", &sec, &usec, &c.dst, &p); err != nil {
			t.Fatalf("%q: %v", s.Text(), err)
		}
		c.at, c.payload = time.Unix(sec, usec*1000), unhex(t, p)
		out = append(out, c)
	}
	return out
}

// A Node with the identity of member 1 gets what member 1 got, and answers
// each request with what member 1 answered: the same header, the values it
// should know by then, and contacts.
func TestCapturedExchange(t *testing.T) {
	const self = 0x3b411612
	msgs := capture(t)
	var nodeID []byte
	replies := map[uint64]*wire.DHTMsg{}
	for _, c := range msgs {
		m, err := wire.DecodeDHT(c.payload)
		if err != nil {
			t.Fatal(err)
		}
		if m.Src.Addr != self {
			continue
		}
		nodeID = bytes.Clone(m.Src.ID)
		if m.Node != nil {
			replies[m.Node.Cookie] = m
		}
	}
	n := twin(t, self, 0, nodeID, msgs[0].at)
	n.cfg.Expire, n.cfg.Refresh, n.cfg.Replicate = 120*time.Second, 30*time.Second, 15*time.Second
	// Its own name, registered 2 s before the queries.
	if err := n.Register(msgs[0].at, nameKey("oping.h1")); err != nil {
		t.Fatal(err)
	}
	answered := 0
	for i, c := range msgs {
		if c.dst != self {
			continue
		}
		for !n.NextDeadline().After(c.at) {
			n.Tick(n.NextDeadline())
		}
		n.Messages()
		in, _ := wire.DecodeDHT(c.payload)
		n.Receive(c.at, c.payload)
		if in.Find == nil {
			continue
		}
		var got *wire.DHTMsg
		var raw []byte
		for _, m := range n.Messages() {
			d, err := wire.DecodeDHT(m.Payload)
			if err != nil {
				t.Fatal(err)
			}
			if d.Node != nil && d.Node.Cookie == in.Find.Cookie && m.Dst == in.Src.Addr {
				got, raw = d, m.Payload
			}
		}
		want := replies[in.Find.Cookie]
		if got == nil || want == nil {
			t.Fatalf("message %d: no reply (%v, %v)", i, got, want)
		}
		answered++
		if i == 0 && !bytes.Equal(raw, wire.AppendDHT(nil, want)) {
			t.Errorf("message 0: reply %x\nmember 1 sent %x", raw, wire.AppendDHT(nil, want))
		}
		if got.Code != want.Code || !bytes.Equal(got.Node.Key, want.Node.Key) || !bytes.Equal(got.Src.ID, want.Src.ID) || got.Src.Addr != want.Src.Addr {
			t.Errorf("message %d: reply %+v, member 1 sent %+v", i, got, want)
		}
		if !slices.ContainsFunc(got.Node.Contacts, func(c wire.DHTContact) bool { return c.Addr == in.Src.Addr }) {
			t.Errorf("message %d: the requester is not among the contacts", i)
		}
		if want.Val != nil && !slices.EqualFunc(got.Val.Values, want.Val.Values, bytes.Equal) {
			t.Errorf("message %d: values %x, member 1 sent %x", i, got.Val.Values, want.Val.Values)
		}
	}
	if s := n.Stats(); s.Malformed+s.Unknown+s.Refused > 0 || answered != 4 {
		t.Errorf("%d answered, %+v", answered, s)
	}
}
