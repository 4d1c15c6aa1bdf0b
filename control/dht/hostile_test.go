package dht

import (
	"encoding/binary"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/wire"
	"pgregory.net/rapid"
)

func TestInvalidMessages(t *testing.T) {
	a := unhex(t, hexA)
	src := wire.DHTContact{ID: a, Addr: addrA}
	key := nameKey("x")
	find := &wire.DHTFind{Cookie: 1, Key: key}
	node := &wire.DHTNodeRsp{Cookie: 1, Key: key, Contacts: []wire.DHTContact{src}}
	for _, c := range []struct {
		what string
		m    wire.DHTMsg
	}{
		{"short id", wire.DHTMsg{Code: 1, Src: wire.DHTContact{ID: a[:31], Addr: 1}, Find: find}},
		{"address 0", wire.DHTMsg{Code: 1, Src: wire.DHTContact{ID: a}, Find: find}},
		{"our address", wire.DHTMsg{Code: 1, Src: wire.DHTContact{ID: a, Addr: addrB}, Find: find}},
		{"address too long", wire.DHTMsg{Code: 1, Src: wire.DHTContact{ID: a, Addr: 1 << 32}, Find: find}},
		{"no find", wire.DHTMsg{Code: 1, Src: src}},
		{"short key", wire.DHTMsg{Code: 3, Src: src, Find: &wire.DHTFind{Cookie: 1, Key: key[:28]}}},
		{"long key", wire.DHTMsg{Code: 3, Src: src, Find: &wire.DHTFind{Cookie: 1, Key: append(slices.Clone(key), 0)}}},
		{"no node", wire.DHTMsg{Code: 2, Src: src}},
		{"no val", wire.DHTMsg{Code: 4, Src: src, Node: node}},
		{"no store", wire.DHTMsg{Code: 0, Src: src}},
		{"empty value", wire.DHTMsg{Code: 0, Src: src, Store: &wire.DHTStore{Key: key, Exp: 1 << 31}}},
		{"unasked answer", wire.DHTMsg{Code: 2, Src: src, Node: node}},
		{"unknown code", wire.DHTMsg{Code: 5, Src: src, Find: find, Store: &wire.DHTStore{Key: key, Val: key[:8], Exp: 1 << 31}}},
	} {
		n := twin(t, addrB, 0, unhex(t, hexB), epoch)
		n.Receive(epoch, wire.AppendDHT(nil, &c.m))
		if s := n.Stats(); s.Malformed+s.Unexpected+s.Unknown != 1 || len(n.Messages()) != 0 || n.Contacts() != 0 {
			t.Errorf("%s: %+v, %d contacts", c.what, s, n.Contacts())
		}
	}
	n := twin(t, addrB, 0, unhex(t, hexB), epoch)
	for _, st := range []wire.DHTStore{
		{Key: key, Val: key[:8], Exp: uint32(epoch.Unix() - 1)},
		{Key: key, Val: make([]byte, maxValueLen+1), Exp: 1 << 31},
	} {
		n.Receive(epoch, wire.AppendDHT(nil, &wire.DHTMsg{Src: src, Store: &st}))
	}
	if s := n.Stats(); s.Refused != 2 || len(n.Entries(epoch)) != 0 {
		t.Errorf("%+v", s)
	}
	// A request of ours, answered by somebody else, with another code, twice.
	n.Receive(epoch, unhex(t, hexFindNode))
	n.Messages()
	n.Query(epoch, key)
	var cookie uint64
	for _, m := range n.Messages() {
		if d, _ := wire.DecodeDHT(m.Payload); d.Code == wire.DHTFindValueReq {
			cookie = d.Find.Cookie
		}
	}
	val := &wire.DHTValueRsp{Values: [][]byte{[]byte(encodeAddr(77))}}
	rsp := &wire.DHTNodeRsp{Cookie: cookie, Key: key, Contacts: []wire.DHTContact{src}}
	n.Receive(epoch, wire.AppendDHT(nil, &wire.DHTMsg{Code: 4, Src: wire.DHTContact{ID: a, Addr: 99}, Node: rsp, Val: val}))
	n.Receive(epoch, wire.AppendDHT(nil, &wire.DHTMsg{Code: 2, Src: src, Node: rsp}))
	if r := n.Results(); len(r) != 0 {
		t.Fatalf("forged answer accepted: %+v", r)
	}
	good := wire.AppendDHT(nil, &wire.DHTMsg{Code: 4, Src: src, Node: rsp, Val: val})
	n.Receive(epoch, good)
	n.Receive(epoch, good)
	if r := n.Results(); len(r) != 1 || !slices.Equal(r[0].Addrs, []uint64{77}) {
		t.Fatalf("%+v", r)
	}
}

// Floods of invented contacts, keys and values: memory and work stay bounded.
func TestFlood(t *testing.T) {
	n := twin(t, addrB, 0, unhex(t, hexB), epoch)
	rnd := newRand(40)
	n.Register(epoch, nameKey("mine"))
	n.Receive(epoch, unhex(t, hexFindNode))
	rndID := func() []byte {
		b := make([]byte, 32)
		for i := 0; i < 32; i += 8 {
			binary.LittleEndian.PutUint64(b[i:], rnd.Uint64())
		}
		copy(b, n.self[:rnd.IntN(4)]) // in deep buckets too
		return b
	}
	now := epoch
	one := rndID()
	for i := range 60000 {
		src := wire.DHTContact{ID: rndID(), Addr: 1 + uint64(rnd.Uint32N(1<<31))}
		m := wire.DHTMsg{Code: 0, Src: src, Store: &wire.DHTStore{Key: rndID(), Val: []byte(encodeAddr(rnd.Uint64())), Exp: 1<<32 - 1}}
		switch i % 4 {
		case 0:
			m.Store.Key = one
		case 1: // answers a guess at the magic cookie, with a list
			m = wire.DHTMsg{Code: 2, Src: src, Node: &wire.DHTNodeRsp{Cookie: n.magic, Key: []byte(n.self)}}
			for range 30 {
				m.Node.Contacts = append(m.Node.Contacts, wire.DHTContact{ID: rndID(), Addr: 1 + uint64(rnd.Uint32N(1<<31))})
			}
		}
		n.Receive(now, wire.AppendDHT(nil, &m))
		if i%16 == 0 {
			now = now.Add(time.Millisecond)
			n.Tick(now)
			n.Messages()
		}
	}
	if len(n.store.entries) > maxKeys || len(n.store.index) != len(n.store.entries) {
		t.Errorf("%d keys", len(n.store.entries))
	}
	if e := n.store.get(id(one)); len(e.vals) > maxValuesPerKey {
		t.Errorf("%d values of one key", len(e.vals))
	}
	if len(n.table.byAddr) > 2*8*64 {
		t.Errorf("%d contacts", len(n.table.byAddr))
	}
	if len(n.pending) > maxPending || len(n.storeq) > maxStoreQueue || len(n.probes) > 8 {
		t.Errorf("%d requests, %d stores, %d probes", len(n.pending), len(n.storeq), len(n.probes))
	}
	if e := n.Entries(now); e[0].Kind != "local" || e[1].Expiry > 3*24*time.Hour {
		t.Errorf("%+v", e[:2])
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range 3000 {
		n.Query(now, rndID())
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if got := int64(after.HeapAlloc) - int64(before.HeapAlloc); got > 64<<20 {
		t.Errorf("3000 queries hold %d MiB", got>>20)
	}
	for range 2000 {
		d := n.NextDeadline()
		if d.After(now.Add(5 * time.Second)) {
			break
		}
		now = d
		n.Tick(now)
		n.Messages()
	}
	if r := n.Results(); len(r) != 3000 {
		t.Errorf("%d of 3000 queries answered", len(r))
	}
	now = now.Add(100 * time.Hour)
	n.Tick(now)
	if len(n.store.entries) != 0 {
		t.Errorf("%d keys after their expiry", len(n.store.entries))
	}
}

// Whatever arrives in whatever order, the invariants of the tables hold.
func TestProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := epoch
		n, err := New(Config{
			Self: 1, Peer: 2, KeyLen: 28, AddrSize: 4, Alpha: rapid.IntRange(1, 4).Draw(t, "alpha"), K: rapid.IntRange(1, 5).Draw(t, "k"),
			Refresh: 30 * time.Second, Replicate: 15 * time.Second, Expire: 60 * time.Second,
			Rand:      newRand(rapid.Uint64().Draw(t, "seed")),
			Reachable: func(a uint64) bool { return a%5 != 0 },
		}, now)
		if err != nil {
			t.Fatal(err)
		}
		// Few ids, keys and addresses, so that they meet.
		mk := func(b byte) []byte { return slices.Concat([]byte{b * 37}, make([]byte, 26), []byte{b}) }
		anID := rapid.Custom(func(t *rapid.T) []byte { return mk(rapid.Byte().Draw(t, "id") % 24) })
		contact := rapid.Custom(func(t *rapid.T) wire.DHTContact {
			return wire.DHTContact{ID: anID.Draw(t, "id"), Addr: rapid.Uint64Range(0, 20).Draw(t, "addr")}
		})
		var asked []struct {
			dst uint64
			m   *wire.DHTMsg
		}
		queries, results := map[QueryID]bool{}, 0
		check := func() {
			for _, m := range n.Messages() {
				d, err := wire.DecodeDHT(m.Payload)
				if err != nil || m.Dst == 1 || m.Dst == 0 || d.Code > 4 || d.Src.Addr != 1 {
					t.Fatalf("sent %+v to %d (%v)", d, m.Dst, err)
				}
				if d.Find != nil {
					asked = append(asked, struct {
						dst uint64
						m   *wire.DHTMsg
					}{m.Dst, d})
				}
				if d.Node != nil && len(d.Node.Contacts) == 0 {
					t.Fatal("reply without contacts")
				}
			}
			for _, r := range n.Results() {
				if !queries[r.ID] {
					t.Fatalf("query %d answered twice or never asked", r.ID)
				}
				delete(queries, r.ID)
				results++
				if slices.Contains(r.Addrs, 1) || slices.Contains(r.Addrs, 0) {
					t.Fatalf("result %v", r.Addrs)
				}
			}
			live := 0
			seen := map[uint64]bool{}
			for i, b := range n.table.buckets {
				if len(b.live) > n.cfg.K || len(b.spare) > n.cfg.K {
					t.Fatalf("bucket of %d and %d", len(b.live), len(b.spare))
				}
				live += len(b.live)
				for _, c := range slices.Concat(b.live, b.spare) {
					if seen[c.addr] || n.table.byAddr[c.addr] != c || commonBits(n.self, c.id) != i || !n.usable(c.addr) {
						t.Fatalf("contact %+v in bucket %d", c, i)
					}
					seen[c.addr] = true
				}
			}
			if live != n.table.nlive || len(seen) != len(n.table.byAddr) {
				t.Fatalf("%d live of %d, %d by address of %d", n.table.nlive, live, len(n.table.byAddr), len(seen))
			}
			for i, e := range n.store.entries {
				if n.store.index[e.key] != i || len(e.vals) == 0 {
					t.Fatalf("entry %d is lost or empty", i)
				}
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"": func(*rapid.T) { check() },
			"request": func(t *rapid.T) {
				m := wire.DHTMsg{Code: uint32(1 + 2*rapid.IntRange(0, 1).Draw(t, "value")), Src: contact.Draw(t, "src"), Find: &wire.DHTFind{Cookie: 7, Key: anID.Draw(t, "key")}}
				n.Receive(now, wire.AppendDHT(nil, &m))
			},
			"store": func(t *rapid.T) {
				v := []byte(encodeAddr(rapid.Uint64Range(0, 20).Draw(t, "val")))
				m := wire.DHTMsg{Src: contact.Draw(t, "src"), Store: &wire.DHTStore{Key: anID.Draw(t, "key"), Val: v, Exp: uint32(now.Unix()) + uint32(rapid.IntRange(0, 90).Draw(t, "exp"))}}
				n.Receive(now, wire.AppendDHT(nil, &m))
			},
			"answer": func(t *rapid.T) {
				if len(asked) == 0 {
					t.Skip("nothing asked")
				}
				a := rapid.SampledFrom(asked).Draw(t, "request")
				m := wire.DHTMsg{Code: a.m.Code + 1, Src: wire.DHTContact{ID: anID.Draw(t, "id"), Addr: a.dst}, Node: &wire.DHTNodeRsp{
					Cookie: a.m.Find.Cookie, Key: a.m.Find.Key, Contacts: rapid.SliceOfN(contact, 0, 12).Draw(t, "contacts"),
				}}
				if m.Code == 4 {
					m.Val = &wire.DHTValueRsp{}
					for _, v := range rapid.SliceOfN(rapid.Uint64Range(0, 20), 0, 3).Draw(t, "values") {
						m.Val.Values = append(m.Val.Values, []byte(encodeAddr(v)))
					}
				}
				n.Receive(now, wire.AppendDHT(nil, &m))
			},
			"register":   func(t *rapid.T) { n.Register(now, anID.Draw(t, "key")) },
			"unregister": func(t *rapid.T) { n.Unregister(now, anID.Draw(t, "key")) },
			"query": func(t *rapid.T) {
				q := n.Query(now, anID.Draw(t, "key"))
				queries[q] = true
			},
			"forget": func(t *rapid.T) {
				n.Forget(now, anID.Draw(t, "key"), rapid.Uint64Range(1, 20).Draw(t, "addr"))
			},
			"route": func(t *rapid.T) {
				n.RouteUp(now, rapid.SliceOfN(rapid.Uint64Range(0, 20), 0, 5).Draw(t, "addrs")...)
			},
			"time": func(t *rapid.T) {
				now = now.Add(time.Duration(rapid.IntRange(1, 5000).Draw(t, "ms")) * time.Millisecond)
				n.Tick(now)
				if !n.NextDeadline().After(now) {
					t.Fatal("deadline in the past")
				}
			},
		})
		end := now.Add(3 * time.Second)
		for d := n.NextDeadline(); d.Before(end); d = n.NextDeadline() {
			now = d
			n.Tick(now)
			check()
		}
		if len(queries) > 0 {
			t.Fatalf("%d queries without an answer", len(queries))
		}
	})
}

func FuzzReceive(f *testing.F) {
	for _, h := range []string{hexStore, hexFindNode, hexFindNodeRsp, hexFindVal, hexFindValRsp + "3200"} {
		f.Add(unhex(f, h))
	}
	for _, c := range capture(f)[:20] {
		f.Add(c.payload)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		n := twin(t, addrB, addrA, unhex(t, hexB), epoch)
		n.Register(epoch, nameKey("mine"))
		in := slices.Clone(p)
		for i := range 3 {
			now := epoch.Add(time.Duration(i) * time.Second)
			n.Receive(now, in)
			n.Tick(now)
			for _, m := range n.Messages() {
				checkMessage(t, addrB, m)
			}
		}
		if !slices.Equal(in, p) {
			t.Error("payload changed")
		}
		clear(in) // no reference is kept
		for _, e := range n.Entries(epoch) {
			if e.Kind == "stored" && !slices.Contains([]int{28, 32, 48, 64}, len(e.Key)) {
				t.Errorf("%+v", e)
			}
		}
	})
}
