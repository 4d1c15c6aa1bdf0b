// Package demo shows a three-node network from nothing to pings that cross the
// middle node in XDP, and says whether everything held.
package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/deploy/lab"
	"github.com/o7s/o7s-router/lib/ipc"
)

// pings is how many pings the demo sends, quick enough for a person to watch.
const (
	pings    = 10
	interval = "100ms"
)

const picture = `
   h1                       h2                       h3
   oping ................................................ oping -l
   [uni]====================[uni]====================[uni]      one unicast layer
   [dix12]-----wire 1-----[dix12]
                          [dix23]-----wire 2-----[dix23]        an eth-dix layer per wire

`

// ErrNotHeld means that the network ran but not as promised.
var ErrNotHeld = errors.New("the demo did not hold")

// Run builds the topology of file, which must be line3 or like it, pings from
// its first host and shows what the middle one did. It cleans up in any case.
func Run(ctx context.Context, file string, opt lab.Options, out io.Writer) (err error) {
	top, err := lab.Load(file)
	if err != nil {
		return err
	}
	if len(top.Hosts) != 3 || len(top.Services) == 0 {
		return fmt.Errorf("%s: the demo wants three hosts and a service, such as deploy/lab/line3.toml", file)
	}
	l, err := lab.New(top, opt)
	if err != nil {
		return err
	}
	h1, h2 := top.Hosts[0], top.Hosts[1]
	name := top.Services[0].Name

	fmt.Fprintf(out, "Building %q: three hosts in network namespaces, one daemon in each.\n%s", l.Name(), picture)
	start := time.Now()
	// The clean-up must also run when ctx has ended.
	defer func() {
		down, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		if e := l.Down(down); e != nil {
			err = errors.Join(err, fmt.Errorf("clean up: %w", e))
		}
	}()
	if err := l.Up(ctx); err != nil {
		return err
	}
	fmt.Fprintf(out, "Up after %.2f s: enrolled, adjacencies made, routes computed.\n", time.Since(start).Seconds())

	// A destination's name must be known where it is used (spec 00 §6).
	cl, err := l.Client(ctx, h1)
	if err != nil {
		return err
	}
	if _, err := cl.Call(ctx, ipc.OpNameCreate, ipc.NameArgs{Name: name}, nil); err != nil {
		return fmt.Errorf("create name %q on %s: %w", name, h1, err)
	}
	before, err := transit(ctx, l, h2)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "\n%s$ irm name create %s\n", h1, name)
	fmt.Fprintf(out, "%s$ oping -n %s -c %d -i %s\n", h1, name, pings, interval)
	var said bytes.Buffer
	err = l.Exec(ctx, h1, lab.Streams{Out: io.MultiWriter(out, &said), Err: os.Stderr}, "oping", "-n", name, "-c", fmt.Sprint(pings), "-i", interval)
	if err != nil {
		return fmt.Errorf("oping on %s: %w", h1, err)
	}
	after, err := transit(ctx, l, h2)
	if err != nil {
		return err
	}
	for _, what := range []string{"routes", "fastpath"} {
		fmt.Fprintf(out, "\n%s$ o7s-router show %s\n", h2, what)
		if err := l.Exec(ctx, h2, lab.Streams{Out: out, Err: os.Stderr}, "o7s-router", "show", what); err != nil {
			return fmt.Errorf("show %s on %s: %w", what, h2, err)
		}
	}
	xdp, user := after.xdp-before.xdp, after.user-before.user
	fmt.Fprintf(out, "\n%s forwarded %d transit packets in XDP and %d in user space.\n", h2, xdp, user)

	var wrong []string
	if want := fmt.Sprintf("%d packets transmitted, %d received", pings, pings); !strings.Contains(said.String(), want) {
		wrong = append(wrong, "pings were lost")
	}
	if xdp < 2*pings {
		wrong = append(wrong, fmt.Sprintf("%d transit packets in XDP, expected at least %d", xdp, 2*pings))
	}
	if user != 0 {
		wrong = append(wrong, fmt.Sprintf("%d transit packets passed through user space", user))
	}
	if len(wrong) > 0 {
		fmt.Fprintf(out, "Verdict: FAILED: %s.\n", strings.Join(wrong, "; "))
		return fmt.Errorf("%w: %s", ErrNotHeld, strings.Join(wrong, "; "))
	}
	fmt.Fprintf(out, "Verdict: OK: %d of %d pings answered, every transit packet forwarded in XDP.\n", pings, pings)
	return nil
}

// counts is how many transit packets a host forwarded, and where.
type counts struct{ xdp, user uint64 }

func transit(ctx context.Context, l *lab.Lab, host string) (c counts, err error) {
	cl, err := l.Client(ctx, host)
	if err != nil {
		return c, err
	}
	var fp irm.FastPathInfo
	if _, err := cl.Call(ctx, ipc.OpShow, ipc.ShowArgs{What: "fastpath"}, &fp); err != nil {
		return c, err
	}
	for _, p := range fp.Ports {
		for _, v := range p.Verdicts {
			switch v.Reason {
			case bpf.Forward.String():
				c.xdp += v.Packets
			case bpf.UserPunt.String():
				c.user += v.Packets
			}
		}
	}
	var layers []irm.LayerInfo
	if _, err := cl.Call(ctx, ipc.OpShow, ipc.ShowArgs{What: "layers"}, &layers); err != nil {
		return c, err
	}
	for _, i := range layers {
		c.user += i.Counters["dt_user_transit"]
	}
	return c, nil
}
