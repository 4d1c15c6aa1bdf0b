package dht

import (
	"encoding/binary"
	"time"
)

// Entry is a value in our part of the directory, for show.
type Entry struct {
	Key    []byte
	Value  []byte
	Addr   uint64        // of the value; 0 when it is not an address
	Kind   string        // local, stored or cached
	Expiry time.Duration // until it expires; 0 for local ones, which do not
}

// Entries lists what a query for each key could be answered from here.
func (n *Node) Entries(now time.Time) []Entry {
	var out []Entry
	for _, l := range n.names {
		v := encodeAddr(n.cfg.Self)
		out = append(out, Entry{Key: []byte(l.key), Value: []byte(v), Addr: n.cfg.Self, Kind: "local"})
	}
	for _, e := range n.store.entries {
		for _, v := range e.vals {
			a, _ := decodeAddr(v.val)
			out = append(out, Entry{
				Key: []byte(e.key), Value: []byte(v.val), Addr: a, Kind: "stored",
				Expiry: time.Duration(int64(v.exp)-now.Unix()) * time.Second,
			})
		}
	}
	for _, c := range n.cache {
		for _, a := range c.addrs {
			if d := c.until.Sub(now); d > 0 {
				out = append(out, Entry{
					Key: []byte(c.key), Value: binary.BigEndian.AppendUint64(nil, a), Addr: a, Kind: "cached", Expiry: d,
				})
			}
		}
	}
	return out
}
