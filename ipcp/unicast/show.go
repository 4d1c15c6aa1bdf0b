package unicast

import (
	"encoding/hex"
	"iter"
	"sort"
	"time"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/wire"
)

// Address returns our address in the layer, 0 before bootstrap or enrolment.
func (l *Layer) Address() uint64 { return l.addr.Load() }

// Neighbors lists the adjacencies.
func (l *Layer) Neighbors() []ipcp.Neighbor {
	var out []ipcp.Neighbor
	l.inLoop(func(now time.Time) error {
		for _, c := range l.conns {
			rx, tx := c.activity()
			n := ipcp.Neighbor{
				IPCP: l.name, Layer: l.cfg.LayerName, Address: c.peer, Component: "mgmt", Dst: c.dst, Via: c.info.Layer,
				State: "up", Path: "user", RxPackets: rx, TxPackets: tx, Silent: now.Sub(c.lastRx).Seconds(),
			}
			if rx != c.lastRxCnt { // since keep-alives looked last
				n.Silent = 0
			}
			if c.comp == ipcp.DataTransfer {
				n.Component = "dt"
				n.Path = c.path()
				if !c.up {
					n.State = "settling"
				}
			}
			if c.down {
				n.State = "down"
			}
			out = append(out, n)
		}
		return nil
	})
	sort.Slice(out, func(i, j int) bool {
		a, b := &out[i], &out[j]
		if a.Address != b.Address {
			return a.Address < b.Address
		}
		return a.Component < b.Component
	})
	return out
}

// path says how packets to the neighbour travel.
func (c *conn) path() string {
	if ok, why := c.wire.Path(); !ok {
		return "user: " + why
	}
	return "xdp"
}

// LSDB lists the link-state database.
func (l *Layer) LSDB() []ipcp.LSA {
	var out []ipcp.LSA
	l.inLoop(func(now time.Time) error {
		for _, e := range l.ls.LSDB(now) {
			if e.Withdrawn {
				continue
			}
			out = append(out, ipcp.LSA{
				IPCP: l.name, Layer: l.cfg.LayerName, Src: e.Src, Dst: e.Dst, Seqno: e.Seqno,
				Age: e.Age.Seconds(), Own: e.Own, Usable: e.Usable,
			})
		}
		return nil
	})
	return out
}

// Routes lists the forwarding table.
func (l *Layer) Routes() []ipcp.Route {
	var out []ipcp.Route
	l.inLoop(func(time.Time) error {
		for _, r := range l.ls.Routes() {
			row := ipcp.Route{
				IPCP: l.name, Layer: l.cfg.LayerName, Dst: r.Dst, Alternate: r.Alternate, Cost: r.Cost,
				NextHops: append([]uint64(nil), r.NextHops...), Path: "xdp",
			}
			for _, nh := range r.NextHops {
				via := ""
				if id, ok := l.ls.DTFlow(nh); ok {
					if c := l.conns[id]; c != nil {
						via = c.info.Layer
						if ok, _ := c.wire.Path(); !ok {
							row.Path = "user"
						}
					}
				}
				row.Via = append(row.Via, via)
			}
			out = append(out, row)
		}
		return nil
	})
	return out
}

// Directory lists our part of the directory.
func (l *Layer) Directory() []ipcp.DirEntry {
	var out []ipcp.DirEntry
	l.inLoop(func(now time.Time) error {
		for _, e := range l.dir.Entries(now) {
			d := ipcp.DirEntry{
				IPCP: l.name, Layer: l.cfg.LayerName, Key: hex.EncodeToString(e.Key), Kind: e.Kind,
				Value: hex.EncodeToString(e.Value), Expiry: e.Expiry.Seconds(),
			}
			if e.Addr != 0 {
				d.Value = wire.AddrString(e.Addr)
			}
			out = append(out, d)
		}
		return nil
	})
	sort.Slice(out, func(i, j int) bool {
		a, b := &out[i], &out[j]
		if a.Key != b.Key {
			return a.Key < b.Key
		}
		return a.Value < b.Value
	})
	return out
}

// DTStats gives the statistics of the data-transfer adjacencies.
func (l *Layer) DTStats() []ipcp.DTStat {
	var out []ipcp.DTStat
	l.inLoop(func(time.Time) error {
		for _, c := range l.conns {
			if c.wire == nil {
				continue
			}
			s := ipcp.DTStat{IPCP: l.name, Layer: l.cfg.LayerName, Address: c.peer}
			for cube, n := range c.wire.Counters() {
				s.Cubes = append(s.Cubes, ipcp.DTCube{
					Cube: uint8(cube), Rcvd: ipcp.DTCount(n.Rcvd), Sent: ipcp.DTCount(n.Sent),
					LocalRcvd: ipcp.DTCount(n.LocalRcvd), LocalSent: ipcp.DTCount(n.LocalSent),
					TTL: ipcp.DTCount(n.TTL), Nhop: ipcp.DTCount(n.Nhop), Failed: ipcp.DTCount(n.Failed),
				})
			}
			out = append(out, s)
		}
		return nil
	})
	sort.Slice(out, func(i, j int) bool { return out[i].Address < out[j].Address })
	return out
}

// Counters counts what happened in user space; names ending in _dropped are
// disjoint.
func (l *Layer) Counters() iter.Seq2[string, uint64] {
	return func(yield func(string, uint64) bool) {
		if !yield("dt_user_transit", l.dt.transit.Load()) {
			return
		}
		for i, n := range dropNames {
			if !yield(n+"_dropped", l.dt.drops[i].Load()) {
				return
			}
		}
		var rows []struct {
			name string
			n    uint64
		}
		add := func(name string, n uint64) {
			rows = append(rows, struct {
				name string
				n    uint64
			}{name, n})
		}
		l.inLoop(func(time.Time) error {
			ls, dir, fa := l.ls.Stats(), l.dir.Stats(), l.fa.Counts()
			add("lsa_received", ls.RxLSA+ls.RxWithdraw)
			add("lsa_sent", ls.TxLSA+ls.TxWithdraw)
			add("lsa_duplicate", ls.Duplicate)
			add("lsa_malformed_dropped", ls.Malformed)
			add("lsa_refused_dropped", ls.Refused)
			add("lsa_aged", ls.Aged)
			add("spf_runs", ls.Runs)
			add("lsdb_entries", uint64(ls.Entries))
			add("routes", uint64(len(l.ls.Routes())))
			add("dht_received", dir.Received)
			add("dht_sent", dir.Sent)
			add("dht_malformed_dropped", dir.Malformed)
			add("dht_unexpected_dropped", dir.Unexpected)
			add("fa_requests_sent", fa.RequestsSent)
			add("fa_requests_received", fa.RequestsReceived)
			add("fa_accepts_sent", fa.AcceptsSent)
			add("fa_refusals_sent", fa.RefusalsSent)
			add("fa_refusals_received", fa.RefusalsReceived)
			add("fa_deallocs_sent", fa.DeallocsSent)
			add("fa_deallocs_received", fa.DeallocsReceived)
			add("fa_deallocs_repeated", fa.DeallocsRepeated)
			add("fa_unexpected_dropped", fa.Unexpected)
			add("fa_malformed_dropped", fa.Malformed)
			add("fa_unknown_eid_dropped", fa.UnknownEID)
			add("fa_flows_open", fa.FlowsOpen)
			return nil
		})
		for _, r := range rows {
			if !yield(r.name, r.n) {
				return
			}
		}
	}
}
