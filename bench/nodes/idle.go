package nodes

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/o7s/o7s-router/bench/row"
	"github.com/o7s/o7s-router/bench/stream"
	"github.com/o7s/o7s-router/bench/worker"
	"github.com/o7s/o7s-router/deploy/lab"
)

const (
	idleLocal   = "idle/10k"
	idleUnicast = "idle/10k-unicast"
	idleFlows   = 10_000
	holdName    = "bench.hold"

	// Of the same programs: the round trip of one of the flows, and the same
	// waited for in a set of all.
	idleRTT  = "-rtt"
	idleWait = "-wait"
)

// idleRows are the rows' names.
func idleRows() (names []string) {
	for _, n := range []string{idleLocal, idleUnicast} {
		names = append(names, n, n+idleRTT, n+idleWait)
	}
	return names
}

func idleBars() []row.Bar {
	const (
		why  = "resident for each of 10 000 idle flows, rings included, "
		wait = "round trip waited for in a set of 10 000 flows, against one read, "
	)
	return []row.Bar{
		{Row: idleLocal, Max: 16, Why: why + "within the machine"},
		{Row: idleUnicast, Max: 16, Why: why + "reliable, over a unicast layer"},
		{Row: idleLocal + idleWait, To: idleLocal + idleRTT, MaxRatio: 1.5, Why: wait + "within the machine"},
		{Row: idleUnicast + idleWait, To: idleUnicast + idleRTT, MaxRatio: 1.5, Why: wait + "reliable, over a unicast layer"},
	}
}

const idleTopology = `
name = "idle"
hosts = ["h1", "h2"]
[[link]]
ends = ["h1", "h2"]
layer = "dix12"
[[layer]]
name = "uni"
member = [{ host = "h1" }, { host = "h2", enroll = "h1" }]
`

// manyFlows is what one measurement of idle flows gave.
type manyFlows struct {
	worker.Idle               // of the allocating program
	other       worker.Memory // of the accepting one
	daemons     int           // KiB resident of the daemons together
}

// idle measures programs with ten thousand flows that nothing happens on. What
// counts is everything resident of the larger of the two ends, divided by the
// number: the program itself is in it, and the pages that both ends share. Then
// something happens on one of them.
func (c Config) idle(_ context.Context, names []string) ([]row.Row, func(), error) {
	var rows []row.Row
	for _, base := range []string{idleLocal, idleUnicast} {
		s := &series[manyFlows]{measure: func(ctx context.Context) (manyFlows, error) {
			return c.idleOnce(ctx, base == idleUnicast)
		}}
		for _, n := range []string{base, base + idleRTT, base + idleWait} {
			if !slices.Contains(names, n) {
				continue
			}
			r := row.Row{Name: n, Unit: "us"}
			switch n {
			case base:
				r.Unit = "KiB"
				r.Measure = s.row(func(m manyFlows) float64 { return float64(max(m.Memory.RSS, m.other.RSS)) / idleFlows })
				r.Note = s.note(func(m manyFlows) string {
					return fmt.Sprintf("KiB: %d of the allocating program (%d before; %d when shared pages are divided), %d of the accepting one, %d of the daemons; allocated in %.1f s",
						m.Memory.RSS, m.Before.RSS, m.Memory.PSS, m.other.RSS, m.daemons, m.Took)
				})
			case base + idleRTT:
				r.Measure = s.row(func(m manyFlows) float64 { return m.Own })
			case base + idleWait:
				r.RatioTo = base + idleRTT
				r.Measure = s.row(func(m manyFlows) float64 { return m.Set })
			}
			rows = append(rows, r)
		}
	}
	return rows, func() {}, nil
}

func (c Config) idleOnce(ctx context.Context, unicast bool) (r manyFlows, err error) {
	var down takeDown
	defer down.all()
	t, err := lab.Parse("idle", []byte(idleTopology))
	if err != nil {
		return r, err
	}
	dir, remove, err := programs(holdName)
	if err != nil {
		return r, err
	}
	down.add(remove)
	host, network := "h1", stream.Raw
	service := lab.Service{Name: holdName, Program: filepath.Join(dir, holdName)}
	if unicast {
		host, network = "h2", stream.Data
		service.Layers = []string{"uni"}
		t.Services = append(t.Services, lab.Service{Name: holdName, Host: "h1"})
	}
	service.Host = host
	t.Services = append(t.Services, service)
	t.Runs = append(t.Runs, lab.Run{Host: host, Command: []string{service.Program, worker.Command, "hold"}})
	l, d, err := c.up(ctx, t, true)
	if err != nil {
		return r, err
	}
	down.add(d)
	pid, err := processOf(func(argv []string) bool { return argv[0] == service.Program })
	if err != nil {
		return r, fmt.Errorf("%s: %w", holdName, err)
	}
	// A flow stays the accepting end's until it closes it.
	if err := run(ctx, l, "h1", &r.Idle, "idle", "-net", network, "-to", holdName, "-count", fmt.Sprint(idleFlows)); err != nil {
		return r, err
	}
	if r.other, err = worker.ReadMemory(fmt.Sprint(pid)); err != nil {
		return r, err
	}
	// They have let go of half of the flows only now, and their memory stays.
	for _, h := range l.Topology().Hosts {
		pid, err := daemonOf(l, h)
		if err != nil {
			return r, err
		}
		m, err := worker.ReadMemory(fmt.Sprint(pid))
		if err != nil {
			return r, err
		}
		r.daemons += m.RSS
	}
	return r, nil
}
