package unicast

import (
	"time"

	"github.com/o7s/o7s-router/control/linkstate"
	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/ipcp"
)

// newRouting makes the link-state instance for an address.
func (l *Layer) newRouting(cfg ipcp.Config, addr uint64, now time.Time) (*linkstate.Instance, error) {
	u := cfg.Unicast
	return linkstate.New(linkstate.Config{
		Self: addr, Policy: linkstate.Policy(u.Routing),
		TRecalc:    time.Duration(u.TRecalc) * time.Second,
		TUpdate:    time.Duration(u.TUpdate) * time.Second,
		TTimeo:     time.Duration(u.TTimeo) * time.Second,
		NoWithdraw: NoWithdraw, Log: l.log,
	}, now)
}

// NoWithdraw switches link-state withdrawals (spec 50 §1) off in IPC processes
// that start afterwards. For measurements of what loop-free alternates do
// alone; set before the daemon starts.
var NoWithdraw bool

// stepRouting does what routing has due: floods, computes, writes the table.
func (l *Layer) stepRouting(now time.Time) time.Time {
	l.ls.Tick(now)
	l.sendRouting()
	if lsa, ok := l.ls.Conflict(); ok {
		l.conflict(now, "an advertisement from "+addrText(lsa.Src)+" to "+addrText(lsa.Dst))
		return now
	}
	if set, gone := l.ls.Changes(); len(set)+len(gone) > 0 {
		up := make([]uint64, 0, len(set))
		for i := range set {
			up = append(up, set[i].Dst)
		}
		l.writeTable()
		l.changed = now
		l.dir.RouteUp(now, up...)
	}
	return l.ls.NextDeadline()
}

// sendRouting passes on what routing put out.
func (l *Layer) sendRouting() {
	out := l.ls.Output()
	for i := range out {
		if c := l.conns[out[i].Flow]; c != nil {
			c.send(out[i].Bytes())
		}
	}
}

// writeTable puts the routes into the forwarding table, as one change.
func (l *Layer) writeTable() {
	routes := l.ls.Routes()
	table := make([]fastpath.Route, 0, len(routes))
	l.reach = make(map[uint64]struct{}, len(routes))
	for _, r := range routes {
		fr := fastpath.Route{Dst: r.Dst}
		for _, nh := range r.NextHops {
			if w := l.wireTo(nh); w != nil {
				fr.NextHops = append(fr.NextHops, w)
			}
		}
		if r.Alternate != 0 {
			fr.Alternate = l.wireTo(r.Alternate)
		}
		if len(fr.NextHops) == 0 {
			if fr.Alternate == nil {
				continue
			}
			fr.NextHops, fr.Alternate = []*fastpath.Wire{fr.Alternate}, nil
		}
		table = append(table, fr)
		l.reach[r.Dst] = struct{}{}
	}
	if err := l.dt.table.Replace(table); err != nil {
		l.log.Error("forwarding table not written; old routes stay in use", "routes", len(table), "err", err)
	}
}

// wireTo returns the wire to a neighbour.
func (l *Layer) wireTo(peer uint64) *fastpath.Wire {
	id, ok := l.ls.DTFlow(peer)
	if !ok {
		return nil
	}
	if c := l.conns[id]; c != nil {
		return c.wire
	}
	return nil
}
