package worker

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/o7s/o7s-router/bench/stream"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/qos"
)

// Idle is what a program with many idle flows takes.
type Idle struct {
	Flows  int     `json:"flows"`
	Took   float64 `json:"took_s"` // for their allocation
	Before Memory  `json:"before"` // connected, without flows
	Memory Memory  `json:"memory"`
	Own    float64 `json:"own_us"` // median round trip of a flow that is read
	Set    float64 `json:"set_us"` // the same of one that is waited for in a set of all
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

// idle allocates many flows to a name and looks at what they take: memory, and
// time when one of them gets a message.
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
	start := time.Now()
	flows := make([]*o7s.Flow, count)
	// The first is there before the others: hold answers on it.
	if flows[0], err = c.Alloc(ctx, to, &spec); err != nil {
		return r, err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(allocating)
	for i := range flows[1:] {
		g.Go(func() error {
			if gctx.Err() != nil {
				return gctx.Err()
			}
			f, err := c.Alloc(gctx, to, &spec)
			if err != nil {
				return fmt.Errorf("flow %d: %w", i+1, err)
			}
			flows[i+1] = f
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return r, err
	}
	r.Took = time.Since(start).Seconds()
	if r.Memory, err = settled(); err != nil {
		return r, err
	}
	r.Own, r.Set, err = waits(flows)
	return r, err
}

// waits returns the median round trips of flows[0], in microseconds: when a
// goroutine reads it, and when one waits for all flows in a set. The two take
// turns, because what a round trip takes changes with the machine.
func waits(flows []*o7s.Flow) (own, all float64, err error) {
	const (
		turns = 5
		turn  = 200 * time.Millisecond
	)
	set := o7s.NewSet()
	defer set.Close()
	for _, f := range flows[1:] {
		if err := set.Add(f); err != nil {
			return 0, 0, err
		}
	}
	var owns, alls []float64
	for range turns {
		p, err := ping(flows[0], 0, turn)
		if err != nil {
			return 0, 0, fmt.Errorf("reading: %w", err)
		}
		owns = append(owns, p.Median)
		if err := set.Add(flows[0]); err != nil {
			return 0, 0, err
		}
		if p, err = ping(&waited{Flow: flows[0], set: set}, 0, turn); err != nil {
			return 0, 0, fmt.Errorf("waiting: %w", err)
		}
		set.Del(flows[0])
		alls = append(alls, p.Median)
	}
	slices.Sort(owns)
	slices.Sort(alls)
	return owns[turns/2], alls[turns/2], nil
}

// waited is a flow whose messages are waited for in its set.
type waited struct {
	*o7s.Flow
	set *o7s.Set
	evs [16]o7s.SetEvent
}

func (w *waited) Read(b []byte) (int, error) {
	for {
		n, err := w.set.Wait(w.evs[:], lost)
		if err != nil {
			return 0, err
		}
		for _, e := range w.evs[:n] {
			if e.Event == o7s.EventPacket && e.Flow == w.Flow {
				return w.Flow.Read(b)
			}
		}
	}
}

// hold accepts flows and keeps them. It answers on the first.
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
		if flows = append(flows, f); len(flows) == 1 {
			go answer(f)
		}
	}
}
