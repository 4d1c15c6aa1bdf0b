package nodes

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/o7s/o7s-router/bench/row"
	"github.com/o7s/o7s-router/bench/worker"
	"github.com/o7s/o7s-router/deploy/lab"
)

const (
	// gapFor is how long pings go on. The cut is early in it, so that more than
	// what the bar allows is left.
	gapFor = 1500 * time.Millisecond
	// pingEvery is the interval of the pings during a cut.
	pingEvery = time.Millisecond
)

// cut measures the longest gap in pings from h1 to its neighbour h2 when the
// link between them is cut and the way round takes over. Each round has a lab
// of its own.
func (c Config) cut(_ context.Context, names []string) ([]row.Row, func(), error) {
	var rows []row.Row
	for _, n := range names {
		r := row.Row{Name: n, Unit: "ms"}
		switch n {
		case cutLFA:
			// Without withdrawals: nothing but the alternate can help in time.
			r.Measure = func(ctx context.Context) (float64, error) { return c.cutOnce(ctx, "mesh4", "--no-withdraw") }
		case cutLS:
			r.Measure = func(ctx context.Context) (float64, error) { return c.cutOnce(ctx, "ring4") }
		}
		rows = append(rows, r)
	}
	return rows, func() {}, nil
}

func (c Config) cutOnce(ctx context.Context, topology string, daemon ...string) (float64, error) {
	t, err := c.topology(topology)
	if err != nil {
		return 0, err
	}
	t.Defaults.Daemon = append(t.Defaults.Daemon, daemon...)
	if err := serve(t, "h2", echoName); err != nil {
		return 0, err
	}
	l, down, err := c.up(ctx, t, true)
	if err != nil {
		return 0, err
	}
	defer down()
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	out, in := io.Pipe()
	end := make(chan error, 1)
	var msg strings.Builder
	go func() {
		err := l.Exec(ctx, "h1", lab.Streams{Out: in, Err: &msg}, self, worker.Command,
			"gap", "-to", echoName, "-interval", pingEvery.String(), "-for", gapFor.String())
		_ = in.CloseWithError(io.EOF) // never fails
		if err != nil {
			err = fmt.Errorf("pings: %w: %s", err, strings.TrimSpace(msg.String()))
		}
		end <- err
	}()
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != worker.Ready {
		return 0, errors.Join(errors.New("pings did not start"), <-end)
	}
	if err := l.SetLink("h1", "h2", false); err != nil {
		return 0, err
	}
	var g worker.Gap
	for lines.Scan() {
		if err := json.Unmarshal(lines.Bytes(), &g); err != nil {
			return 0, fmt.Errorf("worker's output: %w", err)
		}
	}
	if err := <-end; err != nil {
		return 0, err
	}
	if g.Received == 0 {
		return 0, errors.New("no pings came back")
	}
	return g.Longest, nil
}
