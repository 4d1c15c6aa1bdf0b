// Package progrun measures what the transit program costs for one packet, as
// the kernel's program-run facility sees it: no device, no driver, destinations
// in random order, and the headers written anew before each run.
package progrun

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/o7s/o7s-router/bench/live"
	"github.com/o7s/o7s-router/bench/router"
	"github.com/o7s/o7s-router/bench/row"
	"github.com/o7s/o7s-router/bpf"
)

// repeat is how often a program runs in one measurement: under 100 ms.
const repeat = 1 << 20

// headerWords of a frame are written before each run.
const headerWords = 5

// empty is what the facility takes to run a program that does nothing. It is
// part of the other rows, and differs a lot between machines.
const empty = "progrun/empty"

var sizes = map[string]uint32{"progrun/1k": 1000, "progrun/1M": 1_000_000}

// Group is the rows of this package.
func Group() row.Group {
	return row.Group{
		Name: "program run", Rounds: 15, Setup: setup,
		Rows: []string{empty, "progrun/1k", "progrun/1M"}, Always: []string{empty},
	}
}

// Bars is what a run may cost, writing the headers included.
func Bars() []row.Bar {
	return []row.Bar{
		{Row: "progrun/1k", Max: 35, Why: "one run of the program, 1 000 destinations"},
		{Row: "progrun/1M", Max: 100, Why: "one run of the program, 1 000 000 destinations"},
	}
}

func setup(_ context.Context, names []string) ([]row.Row, func(), error) {
	var rows []row.Row
	var downs []func()
	down := func() {
		for i := len(downs) - 1; i >= 0; i-- {
			downs[i]()
		}
	}
	for i, n := range names {
		if n == empty {
			prog, err := nothing()
			if err != nil {
				down()
				return nil, nil, err
			}
			downs = append(downs, func() { prog.Close() })
			rows = append(rows, row.Row{Name: n, Unit: "ns", Measure: func(context.Context) (float64, error) {
				return run(prog, make([]byte, live.FrameLen))
			}})
			continue
		}
		p, err := live.NewPath("r" + fmt.Sprint(i))
		if err != nil {
			down()
			return nil, nil, err
		}
		downs = append(downs, p.Close)
		r, prog, err := prepare(p, sizes[n])
		if err != nil {
			down()
			return nil, nil, fmt.Errorf("%s: %w", n, err)
		}
		downs = append(downs, func() { prog.Close(); r.Close() })
		frame := router.Frame(live.MAC(p.In))
		rows = append(rows, row.Row{Name: n, Unit: "ns", Measure: func(context.Context) (float64, error) {
			return measure(r, prog, frame[:])
		}, RatioTo: empty})
	}
	return rows, down, nil
}

// nothing is a program that drops the packet.
func nothing() (*ebpf.Program, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "nothing", Type: ebpf.XDP, License: "BSD",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, int32(bpf.XDPDrop)), asm.Return()},
	})
	if err != nil {
		return nil, fmt.Errorf("load empty program: %w", err)
	}
	return p, nil
}

func prepare(p *live.Path, n uint32) (*router.Router, *ebpf.Program, error) {
	r, err := router.New(p.In.Attrs().Name, int(n))
	if err != nil {
		return nil, nil, err
	}
	w, err := r.Wire(p.Out.Attrs().Name, live.MAC(p.Far))
	if err == nil {
		err = r.Layer.Replace(router.Routes(n, w, nil))
	}
	if err != nil {
		r.Close()
		return nil, nil, err
	}
	frame := router.Frame(live.MAC(p.In))
	var header [headerWords]uint64
	for i := range header {
		header[i] = binary.LittleEndian.Uint64(frame[8*i:])
	}
	prog, err := r.Plane.Program("xdp_run", r.In.Slot(), map[string]any{
		"run_header": header, "run_count": n, "run_random": uint32(1), "run_what": uint32(0),
	})
	if err != nil {
		r.Close()
		return nil, nil, err
	}
	return r, prog, nil
}

// measure runs the program and checks that every packet was forwarded.
func measure(r *router.Router, prog *ebpf.Program, frame []byte) (float64, error) {
	forwarded, other := r.Verdicts()
	ns, err := run(prog, frame)
	if err != nil {
		return 0, err
	}
	f, o := r.Verdicts()
	if f-forwarded < repeat || o != other {
		return 0, fmt.Errorf("%d of %d packets forwarded, %d met another end", f-forwarded, repeat, o-other)
	}
	return ns, nil
}

// run returns the cost of one run; the kernel reports whole nanoseconds.
func run(prog *ebpf.Program, frame []byte) (float64, error) {
	done, err := live.Pin(0)
	if err != nil {
		return 0, err
	}
	defer done()
	_, d, err := prog.Benchmark(frame, repeat, nil)
	if err != nil {
		return 0, fmt.Errorf("program run: %w", err)
	}
	return float64(d.Nanoseconds()), nil
}
