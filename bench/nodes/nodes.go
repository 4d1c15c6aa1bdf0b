// Package nodes measures whole nodes: daemons on hosts of a lab, programs that
// talk over them, and the same over UDP beside it.
package nodes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/o7s/o7s-router/bench/row"
	"github.com/o7s/o7s-router/bench/worker"
	"github.com/o7s/o7s-router/deploy/lab"
)

// Config says what the nodes are made of.
type Config struct {
	Router     string // the binary
	Topologies string // directory of line3.toml and so on
}

const (
	rttO7s     = "rtt/o7s-3node"
	rttUDP     = "rtt/udp-3node"
	rttO7sIdle = "rtt/o7s-3node-idle"
	rttUDPIdle = "rtt/udp-3node-idle"
	allocWarm  = "alloc/2hop"
	allocCold  = "alloc/2hop-cold"
	cutLFA     = "cut/lfa"
	cutLS      = "cut/link-state"
	boot       = "boot/3node"
	memory     = "mem/h2"
)

const (
	flood     = 400 * time.Millisecond // of pings, each when the last is back
	idleFor   = 600 * time.Millisecond // of pings at idlePause
	idlePause = 10 * time.Millisecond  // long enough for cores to sleep
	warm      = 50                     // allocations of a known name per round
)

// Groups are the rows of this package.
func Groups(c Config) []row.Group {
	return append([]row.Group{
		{Name: "round trip", Rounds: 5, Setup: c.roundTrip, Rows: []string{rttO7s, rttUDP, rttO7sIdle, rttUDPIdle}},
		{Name: "flow allocation", Rounds: 3, Setup: c.allocation, Rows: []string{allocWarm, allocCold}},
		{Name: "link cut", Rounds: 3, Setup: c.cut, Rows: []string{cutLFA, cutLS}},
		{Name: "boot", Rounds: 5, Setup: c.boot, Rows: []string{boot, memory}},
		{Name: "local flows", Rounds: localRounds, Setup: c.local, Rows: []string{localRTT, socketRTT, local64, socket64, local1500, socket1500}},
		{Name: "idle flows", Rounds: 1, Setup: c.idle, Rows: idleRows()},
	}, reliableGroups(c)...)
}

// Bars is what nodes must reach.
func Bars() []row.Bar {
	return slices.Concat([]row.Bar{
		{Row: rttO7s, To: rttUDP, MaxRatio: 1, Why: "round trip over three nodes, against UDP, flooding"},
		{Row: rttO7sIdle, To: rttUDPIdle, MaxRatio: 1, Why: "the same, idle"},
		{Row: allocWarm, Max: 2, Why: "flow allocation over two hops, name known"},
		{Row: allocCold, Max: 10, Why: "the same when the directory has to be asked"},
		{Row: cutLFA, Max: 50, Why: "longest gap when a link is cut, loop-free alternates alone"},
		{Row: cutLS, Max: 1000, Why: "longest gap when a link is cut, link state"},
		{Row: boot, Max: 3, Why: "from nothing to the first ping over three nodes"},
		{Row: memory, Max: 48, Why: "the middle daemon, without BPF maps and packet memory"},
	}, localBars(), reliableBars(), idleBars())
}

// topology reads one of the shipped topologies for a lab of ours.
func (c Config) topology(name string) (*lab.Topology, error) {
	t, err := lab.Load(filepath.Join(c.Topologies, name+".toml"))
	if err != nil {
		return nil, err
	}
	t.Services, t.Runs, t.Checks = nil, nil, nil
	return t, nil
}

// serve makes an echo server of ours on a host, bound to the names, and lets h1
// know them: a node reaches only names that were created on it.
func serve(t *lab.Topology, host string, names ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, n := range names {
		t.Services = append(t.Services, lab.Service{Name: n, Host: host, Layers: []string{t.Layers[0].Name}, Program: self},
			lab.Service{Name: n, Host: "h1"})
	}
	t.Runs = append(t.Runs, lab.Run{Host: host, Command: []string{self, worker.Command, "echo"}})
	return nil
}

// prefix tells our labs from others of the same topology.
const prefix = "bench."

// up builds a lab. down takes it down, whatever the context says.
func (c Config) up(ctx context.Context, t *lab.Topology, daemons bool) (l *lab.Lab, down func(), err error) {
	if daemons {
		if _, err := os.Stat(c.Router); err != nil {
			return nil, nil, fmt.Errorf("the router is not built (make build): %w", err)
		}
	}
	p := prefix
	if !daemons {
		p += "ip."
	}
	l, err = lab.New(t, lab.Options{Binary: c.Router, Prefix: p, NoDaemons: !daemons})
	if err != nil {
		return nil, nil, err
	}
	if err := l.Up(ctx); err != nil {
		return nil, nil, err
	}
	return l, func() {
		// Nothing waits for this lab any more; the next one removes what is left.
		_ = l.Down(context.WithoutCancel(ctx))
	}, nil
}

// run runs a worker on a host and reads what it printed.
func run(ctx context.Context, l *lab.Lab, host string, result any, args ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var out, msg bytes.Buffer
	err = l.Exec(ctx, host, lab.Streams{Out: &out, Err: &msg}, append([]string{self, worker.Command}, args...)...)
	if err != nil {
		return fmt.Errorf("%s on %s: %w: %s", strings.Join(args, " "), host, err, strings.TrimSpace(msg.String()))
	}
	if result == nil {
		return nil
	}
	return worker.Read(&out, result)
}

// takeDown collects what takes a group's labs down.
type takeDown []func()

func (d *takeDown) add(f func()) { *d = append(*d, f) }

func (d *takeDown) all() {
	for _, f := range slices.Backward(*d) {
		f()
	}
}

// echoName is the name of the echo server.
const echoName = "bench.echo"

// roundTrip pings from h1 to h3 through h2: over the layers, and over the same
// kind of links with the kernel forwarding and no XDP program anywhere.
func (c Config) roundTrip(ctx context.Context, names []string) ([]row.Row, func(), error) {
	var down takeDown
	var rows []row.Row
	o7s, err := c.line(ctx, &down, echoName)
	if err != nil {
		down.all()
		return nil, nil, err
	}
	udp, err := c.ipLine(ctx, &down)
	if err != nil {
		down.all()
		return nil, nil, err
	}
	pinger := func(l *lab.Lab, args ...string) func(context.Context) (float64, error) {
		return func(ctx context.Context) (float64, error) {
			var p worker.Ping
			if err := run(ctx, l, "h1", &p, append([]string{"ping"}, args...)...); err != nil {
				return 0, err
			}
			if p.Lost > 0 {
				return 0, fmt.Errorf("%d of %d pings were lost", p.Lost, p.Lost+p.Received)
			}
			return p.Median, nil
		}
	}
	overO7s, overUDP := []string{"-to", echoName}, []string{"-net", "udp", "-to", udpServer}
	atOnce := []string{"-for", flood.String()}
	idle := []string{"-for", idleFor.String(), "-interval", idlePause.String()}
	for _, n := range names {
		r := row.Row{Name: n, Unit: "us"}
		switch n {
		case rttO7s:
			r.RatioTo, r.Measure = rttUDP, pinger(o7s, slices.Concat(overO7s, atOnce)...)
		case rttUDP:
			r.Measure = pinger(udp, slices.Concat(overUDP, atOnce)...)
		case rttO7sIdle:
			r.RatioTo, r.Measure = rttUDPIdle, pinger(o7s, slices.Concat(overO7s, idle)...)
		case rttUDPIdle:
			r.Measure = pinger(udp, slices.Concat(overUDP, idle)...)
		}
		rows = append(rows, r)
	}
	return rows, down.all, nil
}

// line is the three-node line with an echo server on h3.
func (c Config) line(ctx context.Context, down *takeDown, names ...string) (*lab.Lab, error) {
	t, err := c.topology("line3")
	if err != nil {
		return nil, err
	}
	if err := serve(t, "h3", names...); err != nil {
		return nil, err
	}
	l, d, err := c.up(ctx, t, true)
	if err != nil {
		return nil, err
	}
	down.add(d)
	return l, nil
}

// udpServer is where the UDP echo listens.
const udpServer = "10.201.23.2:7"

// ipLine is the same line without daemons, with the kernel forwarding IPv4.
func (c Config) ipLine(ctx context.Context, down *takeDown) (*lab.Lab, error) {
	t, err := c.topology("line3")
	if err != nil {
		return nil, err
	}
	t.Layers = nil
	for i, nets := range [][]string{{"10.201.12.1/24", "10.201.12.2/24"}, {"10.201.23.1/24", "10.201.23.2/24"}} {
		t.Links[i].Layer, t.Links[i].Addresses = "", nets
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	t.Runs = []lab.Run{{Host: "h3", Command: []string{self, worker.Command, "echo", "-listen", udpServer}}}
	l, d, err := c.up(ctx, t, false)
	if err != nil {
		return nil, err
	}
	down.add(d)
	return l, errors.Join(
		run(ctx, l, "h2", nil, "forward"),
		run(ctx, l, "h1", nil, "route", "-dst", "10.201.23.0/24", "-via", "10.201.12.2"),
		run(ctx, l, "h3", nil, "route", "-dst", "10.201.12.0/24", "-via", "10.201.23.1"))
}

// coldNames is how many names each round asks for once. The directory keeps one
// copy of each entry, so that some are at another member: at least half, since
// h1 is the closest to at most half of the key space.
const coldNames = 12

// allocation measures flow allocations from h1 to h3: of a name that has been
// asked for before, and of names that never have.
func (c Config) allocation(ctx context.Context, names []string) ([]row.Row, func(), error) {
	var down takeDown
	fail := func(err error) ([]row.Row, func(), error) {
		down.all()
		return nil, nil, err
	}
	t, err := c.topology("line3")
	if err != nil {
		return fail(err)
	}
	t.Layers[0].Options = map[string]any{"dht_k": 1}
	served := []string{echoName}
	const most = 20 // rounds
	for i := range most * coldNames {
		served = append(served, fmt.Sprintf("bench.cold%d", i))
	}
	if err := serve(t, "h3", served...); err != nil {
		return fail(err)
	}
	l, d, err := c.up(ctx, t, true)
	if err != nil {
		return fail(err)
	}
	down.add(d)
	if err := run(ctx, l, "h1", nil, "once", "-to", echoName); err != nil {
		return fail(err)
	}
	quantile := func(ctx context.Context, q float64, args ...string) (float64, error) {
		var a worker.Allocs
		if err := run(ctx, l, "h1", &a, append([]string{"alloc"}, args...)...); err != nil {
			return 0, err
		}
		slices.Sort(a.Took)
		return a.Took[int(q*float64(len(a.Took)))], nil
	}
	var rows []row.Row
	asked := served[1:]
	for _, n := range names {
		r := row.Row{Name: n, Unit: "ms"}
		switch n {
		case allocWarm:
			r.Measure = func(ctx context.Context) (float64, error) {
				return quantile(ctx, 0.5, "-count", fmt.Sprint(warm), echoName)
			}
		case allocCold:
			r.RatioTo = allocWarm
			r.Measure = func(ctx context.Context) (float64, error) {
				if len(asked) < coldNames {
					return 0, errors.New("no more names that were never asked for")
				}
				var now []string
				now, asked = asked[:coldNames], asked[coldNames:]
				return quantile(ctx, 0.75, now...) // the median of those that are elsewhere
			}
		}
		rows = append(rows, r)
	}
	return rows, down.all, nil
}
