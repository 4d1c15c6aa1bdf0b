package worker

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/o7s/o7s-router/bench/stream"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/qos"
)

// Idle is what a program with many idle flows takes.
type Idle struct {
	Flows    int     `json:"flows"`
	Before   Memory  `json:"before"` // connected, without flows
	Memory   Memory  `json:"memory"`
	Own, Set float64 // median round trips, us: of a flow that is read, of one that is waited for in a set of all
}

// Memory is what is resident of a process, in KiB.
type Memory struct {
	RSS int `json:"rss_kib"` // every page, also those shared with the other end of a flow
	PSS int `json:"pss_kib"` // of shared pages a share only
}

// ReadMemory reads a process's, "self" for one's own.
func ReadMemory(pid string) (m Memory, err error) {
	b, err := os.ReadFile("/proc/" + pid + "/smaps_rollup")
	if err != nil {
		return m, err
	}
	s := bufio.NewScanner(strings.NewReader(string(b)))
	for s.Scan() {
		f := strings.Fields(s.Text())
		if len(f) != 3 {
			continue
		}
		var n *int
		switch f[0] {
		case "Rss:":
			n = &m.RSS
		case "Pss:":
			n = &m.PSS
		default:
			continue
		}
		if *n, err = strconv.Atoi(f[1]); err != nil {
			return m, fmt.Errorf("smaps_rollup: %w", err)
		}
	}
	if m.RSS == 0 {
		return m, fmt.Errorf("smaps_rollup of %s: no numbers", pid)
	}
	return m, nil
}

// settled is one's own memory, less what the garbage collector would give back
// a little later.
func settled() (Memory, error) {
	debug.FreeOSMemory()
	return ReadMemory("self")
}

// allocating is how many allocations are under way at once.
const allocating = 16

// idle allocates many flows to a name and looks at what they take.
func idle(ctx context.Context, network, to string, count int) (Idle, error) {
	r := Idle{Flows: count}
	spec := qos.Raw
	if network == stream.Data {
		spec = qos.Data
	}
	c := o7s.New(o7s.Options{})
	defer c.Close()
	if err := c.Connect(ctx); err != nil {
		return r, err
	}
	var err error
	if r.Before, err = settled(); err != nil {
		return r, err
	}
	flows := make([]*o7s.Flow, count)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(allocating)
	for i := range flows {
		g.Go(func() error {
			if gctx.Err() != nil {
				return gctx.Err()
			}
			f, err := c.Alloc(gctx, to, &spec)
			if err != nil {
				return fmt.Errorf("flow %d: %w", i, err)
			}
			flows[i] = f
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return r, err
	}
	r.Memory, err = settled()
	return r, err
}

// hold accepts flows and keeps them.
func hold(ctx context.Context) error {
	var flows []*o7s.Flow
	for {
		f, err := o7s.Accept(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		flows = append(flows, f)
	}
}
