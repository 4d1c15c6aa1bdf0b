package nodes

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/o7s/o7s-router/bench/row"
	"github.com/o7s/o7s-router/bench/stream"
	"github.com/o7s/o7s-router/deploy/lab"
	"github.com/o7s/o7s-router/deploy/lab/impair"
)

// Rows of the clean link. goodputTCP is goodput once more, beside TCP.
const (
	goodput     = "frcp/goodput"
	goodputTCP  = "frcp/goodput-tcp"
	quicGoodput = "quic/goodput"
	tcpGoodput  = "tcp/goodput"
	frcpCPU     = "frcp/cpu"
	quicCPU     = "quic/cpu"
	tcpCPU      = "tcp/cpu"
)

// goodputSize is the payload on the clean link.
var goodputSize = stream.Size{Total: 128 << 20, Message: 32 << 10, Sum: true}

func reliableGroups(c Config) []row.Group {
	return []row.Group{
		{Name: "reliable flow", Rounds: 5, Setup: c.clean,
			Rows: []string{goodput, quicGoodput, tcpGoodput, goodputTCP, frcpCPU, quicCPU, tcpCPU}},
		{Name: "reliable flow, 1 % loss", Rounds: 3, Setup: c.lossy(lossy1), Rows: lossy1.rows()},
		{Name: "reliable flow, 5 % loss", Rounds: 3, Setup: c.lossy(lossy5), Rows: lossy5.rows()},
	}
}

func reliableBars() []row.Bar {
	bars := []row.Bar{
		{Row: goodput, To: quicGoodput, MinRatio: 2, Why: "reliable flow over one link, against quic-go"},
	}
	for _, p := range []lossiness{lossy1, lossy5} {
		bars = append(bars,
			row.Bar{Row: p.row(stream.Data), To: p.row(stream.QUIC), MinRatio: 1.5, Why: p.text() + ", against quic-go"},
			row.Bar{Row: p.row(stream.Data), To: p.row(stream.Spec), MinRatio: 3, Why: p.text() + ", against the specification's algorithm"})
	}
	return bars
}

// clean measures a reliable transfer over one link, and what it takes of the
// processors, beside QUIC and TCP on such a link.
func (c Config) clean(ctx context.Context, names []string) ([]row.Row, func(), error) {
	var down takeDown
	flows, err := c.pair(ctx, &down, "goodput", "", stream.Data)
	if err != nil {
		down.all()
		return nil, nil, err
	}
	ip, err := c.pair(ctx, &down, "goodput.ip", "", stream.TCP, stream.QUIC)
	if err != nil {
		down.all()
		return nil, nil, err
	}
	of := map[string]*series[stream.Transfer]{
		stream.Data: {measure: func(ctx context.Context) (stream.Transfer, error) {
			return withDaemons(ctx, flows, stream.Data, goodputSize)
		}},
		stream.QUIC: {measure: func(ctx context.Context) (stream.Transfer, error) { return transfer(ctx, ip, stream.QUIC, goodputSize) }},
		stream.TCP:  {measure: func(ctx context.Context) (stream.Transfer, error) { return transfer(ctx, ip, stream.TCP, goodputSize) }},
	}
	var rows []row.Row
	for _, n := range names {
		r := row.Row{Name: n, Unit: "Gbit/s"}
		value := func(t stream.Transfer) float64 { return megabits(t) / 1000 }
		var s *series[stream.Transfer]
		switch n {
		case goodput:
			s, r.RatioTo = of[stream.Data], quicGoodput
		case goodputTCP:
			s, r.RatioTo = of[stream.Data], tcpGoodput
		case quicGoodput:
			s = of[stream.QUIC]
		case tcpGoodput:
			s = of[stream.TCP]
		case frcpCPU, quicCPU, tcpCPU:
			s = of[map[string]string{frcpCPU: stream.Data, quicCPU: stream.QUIC, tcpCPU: stream.TCP}[n]]
			r.Unit, value = "s/GB", cpuPerGB
		}
		r.Measure = s.row(value)
		if n == goodput || n == quicGoodput || n == tcpGoodput {
			// Packets, not messages: a message is many of them.
			heap := allocs("packet of 1448 bytes", func(t stream.Transfer) int64 { return t.Receiver.Bytes / 1448 })
			r.Note = s.note(heap)
			if n == goodput {
				r.Note = s.note(func(t stream.Transfer) string { return heap(t) + "; " + repeated(t) })
			}
		}
		rows = append(rows, r)
	}
	return rows, down.all, nil
}

func megabits(t stream.Transfer) float64 { return float64(t.Receiver.Bytes) * 8 / 1e6 / t.Seconds }

func cpuPerGB(t stream.Transfer) float64 {
	return (t.Sender.CPU + t.Receiver.CPU) / float64(t.Receiver.Bytes) * 1e9
}

// withDaemons is transfer with what the daemons of both hosts use counted as
// the receiver's: packets that the fast path does not carry are their work.
func withDaemons(ctx context.Context, l *lab.Lab, network string, s stream.Size) (stream.Transfer, error) {
	before, err := daemonsCPU(l)
	if err != nil {
		return stream.Transfer{}, err
	}
	t, err := transfer(ctx, l, network, s)
	if err != nil {
		return t, err
	}
	after, err := daemonsCPU(l)
	t.Receiver.CPU += after - before
	return t, err
}

// lossiness is a bad link.
type lossiness struct {
	percent int
	total   int64 // bytes that are sent through it
}

var (
	lossy1 = lossiness{1, 3 << 20}
	lossy5 = lossiness{5, 3 << 19}
)

const (
	lossDelay   = 20 * time.Millisecond // each way
	lossSeed    = 4711
	lossMessage = 1400 // bytes: the specification's algorithm knows no fragments
)

var lossNetworks = []string{stream.Data, stream.QUIC, stream.TCP, stream.Spec}

func (p lossiness) row(network string) string {
	who := network
	switch network {
	case stream.Data:
		who = "frcp"
	case stream.Spec:
		who = "frcp-spec"
	}
	return fmt.Sprintf("%s/loss-%d", who, p.percent)
}

func (p lossiness) rows() (rows []string) {
	for _, n := range lossNetworks {
		rows = append(rows, p.row(n))
	}
	return rows
}

func (p lossiness) text() string {
	return fmt.Sprintf("reliable flow with %d %% loss and 20 ms delay", p.percent)
}

// lossy measures a reliable transfer through a relay that loses frames at
// random, beside QUIC, TCP and our own protocol as the specification has it,
// each through a relay of the same kind.
func (c Config) lossy(p lossiness) func(context.Context, []string) ([]row.Row, func(), error) {
	return func(ctx context.Context, names []string) ([]row.Row, func(), error) {
		var down takeDown
		bad := fmt.Sprintf("impair = { loss = %g, delay = '%v', seed = %d }", float64(p.percent)/100, lossDelay, lossSeed)
		flows, err := c.pair(ctx, &down, "loss", bad, stream.Data, stream.Spec)
		if err != nil {
			down.all()
			return nil, nil, err
		}
		ip, err := c.pair(ctx, &down, "loss.ip", bad, stream.TCP, stream.QUIC)
		if err != nil {
			down.all()
			return nil, nil, err
		}
		var rows []row.Row
		for _, network := range lossNetworks {
			l := flows
			if ports[network] != "" {
				l = ip
			}
			r := row.Row{Name: p.row(network), Unit: "Mbit/s"}
			if network == stream.Data {
				r.RatioTo = p.row(stream.QUIC)
			}
			var last stream.Transfer
			r.Measure = func(ctx context.Context) (_ float64, err error) {
				last, err = through(ctx, l, network, stream.Size{Total: p.total, Message: lossMessage, Sum: true})
				return megabits(last), err
			}
			if l == flows {
				r.Note = func() string { return repeated(last) }
			}
			rows = append(rows, r)
		}
		return rows, down.all, nil
	}
}

// transferTimeout is how long a transfer over a bad link may take.
const transferTimeout = 60 * time.Second

// through is transfer, and a check that the relay did what it was told to.
func through(ctx context.Context, l *lab.Lab, network string, s stream.Size) (stream.Transfer, error) {
	ctx, cancel := context.WithTimeout(ctx, transferTimeout)
	defer cancel()
	relay, err := l.Relay("h1", "h2")
	if err != nil {
		return stream.Transfer{}, err
	}
	before := relay.Stats()
	t, err := transfer(ctx, l, network, s)
	if ctx.Err() != nil {
		err = errors.Join(fmt.Errorf("not complete after %v", transferTimeout), err)
	}
	if err != nil {
		return t, err
	}
	return t, checkRelay(before, relay.Stats())
}

// checkRelay makes sure that nothing was lost on the way to the relay: then its
// chances would not be the whole loss.
func checkRelay(before, after impair.Stats) error {
	for i := range after.Kernel {
		got, lost := after.Lines[i].Received-before.Lines[i].Received, after.Kernel[i]-before.Kernel[i]
		const negligible = 1000
		if lost*negligible > got {
			return fmt.Errorf("the relay got %d frames and missed %d", got, lost)
		}
	}
	return nil
}
