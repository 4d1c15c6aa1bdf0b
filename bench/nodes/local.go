package nodes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/o7s/o7s-router/bench/row"
	"github.com/o7s/o7s-router/bench/stream"
	"github.com/o7s/o7s-router/bench/worker"
	"github.com/o7s/o7s-router/deploy/lab"
)

const (
	localRTT    = "local/rtt"
	local64     = "local/64B"
	local1500   = "local/1500B"
	socketRTT   = "seqpacket/rtt"
	socket64    = "seqpacket/64B"
	socket1500  = "seqpacket/1500B"
	localRounds = 5

	// Abstract sockets belong to the namespace, and go with it.
	echoSocket = "@o7s-bench-echo"
	sinkSocket = "@o7s-bench-sink"
)

// localMessages is how many messages a round sends: half a second's worth.
var localMessages = map[string]int64{
	local64: 4_000_000, local1500: 1_500_000, socket64: 400_000, socket1500: 300_000,
}

func localBars() []row.Bar {
	return []row.Bar{
		{Row: localRTT, To: socketRTT, MaxRatio: 0.5, Why: "round trip within the machine, against a unix socket"},
		{Row: local64, To: socket64, MinRatio: 8, Why: "messages of 64 bytes, against a unix socket"},
		{Row: local1500, To: socket1500, MinRatio: 4, Why: "messages of 1500 bytes, against a unix socket"},
	}
}

// local measures two programs on one machine: over a flow, and over a unix
// socket that preserves messages, with package net at both ends.
func (c Config) local(ctx context.Context, names []string) ([]row.Row, func(), error) {
	var down takeDown
	l, err := c.oneHost(ctx, &down)
	if err != nil {
		down.all()
		return nil, nil, err
	}
	ping := func(args ...string) func(context.Context) (float64, error) {
		return func(ctx context.Context) (float64, error) {
			var p worker.Ping
			err := run(ctx, l, "h1", &p, append([]string{"ping", "-for", flood.String()}, args...)...)
			if err == nil && p.Lost > 0 {
				err = fmt.Errorf("%d of %d pings were lost", p.Lost, p.Lost+p.Received)
			}
			return p.Median, err
		}
	}
	var rows []row.Row
	for _, n := range names {
		r := row.Row{Name: n, Unit: "us"}
		network, size := stream.Raw, int64(64)
		switch n {
		case localRTT:
			r.RatioTo, r.Measure = socketRTT, ping("-to", echoName)
			rows = append(rows, r)
			continue
		case socketRTT:
			r.Measure = ping("-net", stream.Unix, "-to", echoSocket)
			rows = append(rows, r)
			continue
		case local64:
			r.RatioTo = socket64
		case local1500:
			r.RatioTo, size = socket1500, 1500
		case socket64:
			network = stream.Unix
		case socket1500:
			network, size = stream.Unix, 1500
		}
		s := &series[stream.Transfer]{measure: func(ctx context.Context) (stream.Transfer, error) {
			return transfer(ctx, l, network, stream.Size{Total: size * localMessages[n], Message: size})
		}}
		r.Unit = "Mmsg/s"
		r.Measure = s.row(func(t stream.Transfer) float64 { return float64(t.Receiver.Messages) / t.Receiver.Seconds / 1e6 })
		r.Note = s.note(allocs("message", func(t stream.Transfer) int64 { return t.Receiver.Messages }))
		rows = append(rows, r)
	}
	return rows, down.all, nil
}

// oneHost is a host with a daemon, and servers of both kinds.
func (c Config) oneHost(ctx context.Context, down *takeDown) (*lab.Lab, error) {
	t, err := lab.Parse("local", []byte("name = 'local'\nhosts = ['h1']\n"))
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir, remove, err := programs(nameOf(stream.Raw), echoName)
	if err != nil {
		return nil, err
	}
	down.add(remove)
	server(t, dir, "h1", stream.Raw)
	echo := filepath.Join(dir, echoName)
	t.Services = append(t.Services, lab.Service{Name: echoName, Host: "h1", Program: echo})
	t.Runs = append(t.Runs,
		lab.Run{Host: "h1", Command: []string{echo, worker.Command, "echo"}},
		lab.Run{Host: "h1", Command: []string{self, worker.Command, "echo", "-net", stream.Unix, "-listen", echoSocket}},
		lab.Run{Host: "h1", Command: []string{self, worker.Command, "serve", "-net", stream.Unix, "-listen", sinkSocket}})
	l, d, err := c.up(ctx, t, true)
	if err != nil {
		return nil, err
	}
	down.add(d)
	// The servers are there when each has answered.
	return l, errors.Join(
		run(ctx, l, "h1", nil, "once", "-to", echoName),
		run(ctx, l, "h1", nil, "once", "-net", stream.Unix, "-to", echoSocket))
}
