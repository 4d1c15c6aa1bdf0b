package nodes

import (
	"context"
	"fmt"
	"path/filepath"

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
)

func idleBars() []row.Bar {
	const why = "resident for each of 10 000 idle flows, rings included, "
	return []row.Bar{
		{Row: idleLocal, Max: 16, Why: why + "within the machine"},
		{Row: idleUnicast, Max: 16, Why: why + "reliable, over a unicast layer"},
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

// idle measures programs with ten thousand flows that nothing happens on. What
// counts is everything resident of the larger of the two ends, divided by the
// number: the program itself is in it, and the pages that both ends share.
func (c Config) idle(_ context.Context, names []string) ([]row.Row, func(), error) {
	var rows []row.Row
	for _, n := range names {
		r := row.Row{Name: n, Unit: "KiB"}
		var last worker.Idle
		var other worker.Memory
		r.Measure = func(ctx context.Context) (float64, error) {
			var err error
			if last, other, err = c.idleOnce(ctx, n == idleUnicast); err != nil {
				return 0, err
			}
			return float64(max(last.Memory.RSS, other.RSS)) / idleFlows, nil
		}
		r.Note = func() string {
			return fmt.Sprintf("KiB: %d of the allocating program (%d before; %d when shared pages are divided), %d of the accepting one",
				last.Memory.RSS, last.Before.RSS, last.Memory.PSS, other.RSS)
		}
		rows = append(rows, r)
	}
	return rows, func() {}, nil
}

func (c Config) idleOnce(ctx context.Context, unicast bool) (r worker.Idle, other worker.Memory, err error) {
	var down takeDown
	defer down.all()
	t, err := lab.Parse("idle", []byte(idleTopology))
	if err != nil {
		return r, other, err
	}
	dir, remove, err := programs(holdName)
	if err != nil {
		return r, other, err
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
		return r, other, err
	}
	down.add(d)
	pid, err := processOf(func(argv []string) bool { return argv[0] == service.Program })
	if err != nil {
		return r, other, fmt.Errorf("%s: %w", holdName, err)
	}
	// A flow stays the accepting end's until it closes it.
	if err := run(ctx, l, "h1", &r, "idle", "-net", network, "-to", holdName, "-count", fmt.Sprint(idleFlows)); err != nil {
		return r, other, err
	}
	other, err = worker.ReadMemory(fmt.Sprint(pid))
	return r, other, err
}
