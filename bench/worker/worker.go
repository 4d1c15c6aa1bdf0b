// Package worker is the programs that the benchmark runs on the hosts of a lab:
// echo servers, pinging clients, and what sets a host up as an IPv4 router.
// They are sub-commands of the benchmark itself. Clients print one JSON object.
//
// The two kinds of ping are one program on two connections, so that they differ
// in the network only.
package worker

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime/pprof"
	"slices"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/o7s/o7s-router/bench/live"
	"github.com/o7s/o7s-router/bench/stream"
	o7s "github.com/o7s/o7s-router/lib"
)

// Command is the first argument that makes the benchmark a worker.
const Command = "worker"

// Ping is what pinging gave.
type Ping struct {
	Median   float64 `json:"median_us"` // of the round trips
	Received int     `json:"received"`
	Lost     int     `json:"lost"`
}

// Gap is what pinging through a cut gave.
type Gap struct {
	Longest  float64 `json:"longest_ms"` // between two replies
	Received int     `json:"received"`
}

// Allocs is how long flow allocations took.
type Allocs struct {
	Took []float64 `json:"took_ms"`
}

// Ready is the line that a gap worker prints when replies arrive.
const Ready = "ready"

const (
	size = 64 // payload of a ping, bytes
	lost = time.Second
)

// Main runs a worker; args are those after Command.
func Main(args []string) error {
	if len(args) == 0 {
		return errors.New("worker: which one?")
	}
	f := flag.NewFlagSet(args[0], flag.ContinueOnError)
	var (
		network  = f.String("net", "o7s", "o7s or udp; send and serve: one of package stream")
		to       = f.String("to", "", "name, or address and port")
		listen   = f.String("listen", "", "address and port to serve on; empty: o7s names bound to the program")
		interval = f.Duration("interval", 0, "between pings; 0: the next when the last is back")
		duration = f.Duration("for", time.Second, "how long to ping")
		count    = f.Int("count", 1, "allocations per name")
		dst      = f.String("dst", "", "destination of a route")
		via      = f.String("via", "", "its gateway")
		total    = f.Int64("total", 0, "bytes to send")
		message  = f.Int64("message", 0, "bytes of each message")
		sum      = f.Bool("sum", false, "add all bytes up at both ends")
		profile  = f.String("profile", "", "file for a CPU profile of this worker")
	)
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *profile != "" {
		stop, err := profiled(*profile)
		if err != nil {
			return err
		}
		defer stop()
	}
	switch args[0] {
	case "serve":
		l, err := stream.Listen(ctx, *network, *listen)
		if err != nil {
			return err
		}
		return stream.Serve(ctx, l, func(err error) { fmt.Fprintln(os.Stderr, "transfer:", err) })
	case "send":
		l, err := stream.Dial(ctx, *network, *to)
		if err != nil {
			return err
		}
		defer l.Close()
		t, err := stream.Send(l, stream.Size{Total: *total, Message: *message, Sum: *sum})
		return output(t, err)
	case "echo":
		if *network == stream.Unix {
			return echoUnix(ctx, *listen)
		}
		if *listen != "" {
			return echoUDP(ctx, *listen)
		}
		return echo(ctx)
	case "ping":
		c, err := dial(ctx, *network, *to)
		if err != nil {
			return err
		}
		defer c.Close()
		p, err := ping(c, *interval, *duration)
		return output(p, err)
	case "once":
		c, err := dial(ctx, *network, *to)
		if err != nil {
			return err
		}
		defer c.Close()
		return once(c, *duration)
	case "gap":
		c, err := dial(ctx, *network, *to)
		if err != nil {
			return err
		}
		defer c.Close()
		g, err := gap(c, *interval, *duration)
		return output(g, err)
	case "alloc":
		a, err := alloc(ctx, f.Args(), *count)
		return output(a, err)
	case "idle":
		r, err := idle(ctx, *network, *to, *count)
		return output(r, err)
	case "hold":
		return hold(ctx)
	case "forward":
		return live.EnableForwarding()
	case "route":
		return route(*dst, *via)
	}
	return fmt.Errorf("worker: unknown one %q", args[0])
}

func output(v any, err error) error {
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(v)
}

// dial is for unreliable, message-preserving connections of either kind. A name
// that nobody can reach yet, in a network that has just come up, is tried again.
func dial(ctx context.Context, network, to string) (net.Conn, error) {
	switch network {
	case "udp":
		return net.Dial("udp", to)
	case stream.Unix:
		return net.Dial(network, to)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		f, err := o7s.Alloc(ctx, to, nil)
		if err == nil {
			return f, nil
		}
		select {
		case <-time.After(2 * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// echo serves flows until the context ends.
func echo(ctx context.Context) error {
	for {
		f, err := o7s.Accept(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		go answer(f)
	}
}

// answer sends every message of a flow back.
func answer(f *o7s.Flow) {
	defer f.Close()
	buf := make([]byte, 2048)
	for {
		n, err := f.Read(buf)
		if err != nil {
			return
		}
		if _, err := f.Write(buf[:n]); err != nil {
			return
		}
	}
}

// echoUnix serves one connection after the other.
func echoUnix(ctx context.Context, name string) error {
	l, err := net.Listen(stream.Unix, name)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	buf := make([]byte, 2048)
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		for {
			n, err := c.Read(buf)
			if err == nil {
				_, err = c.Write(buf[:n])
			}
			if err != nil {
				break // the other end has hung up
			}
		}
		_ = c.Close()
	}
}

// profiled starts a profile that the returned function writes.
func profiled(file string) (func(), error) {
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		_ = f.Close()
		return nil, err
	}
	return func() { pprof.StopCPUProfile(); _ = f.Close() }, nil
}

func echoUDP(ctx context.Context, addr string) error {
	a, err := net.ResolveUDPAddr("udp4", addr)
	if err != nil {
		return err
	}
	c, err := net.ListenUDP("udp4", a)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	buf := make([]byte, 2048)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := c.WriteToUDPAddrPort(buf[:n], from); err != nil {
			return err
		}
	}
}

// ping sends one message after the other and waits for each to come back.
func ping(c net.Conn, interval, d time.Duration) (Ping, error) {
	const warmUp = 10 // addresses are resolved, caches filled
	var p Ping
	var rtt []time.Duration
	msg, buf := make([]byte, size), make([]byte, 2*size)
	end := time.Now().Add(d)
	for seq := uint64(1); time.Now().Before(end); seq++ {
		binary.LittleEndian.PutUint64(msg, seq)
		if err := c.SetReadDeadline(time.Now().Add(lost)); err != nil {
			return p, err
		}
		start := time.Now()
		if _, err := c.Write(msg); err != nil {
			return p, err
		}
		for {
			n, err := c.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				p.Lost++
				break
			}
			if err != nil {
				return p, err
			}
			// A reply to an earlier ping, which was given up, may still come.
			if n >= 8 && binary.LittleEndian.Uint64(buf) == seq {
				rtt = append(rtt, time.Since(start))
				break
			}
		}
		if interval > 0 {
			time.Sleep(interval)
		}
	}
	if len(rtt) <= 2*warmUp {
		return p, fmt.Errorf("only %d of %d pings came back", len(rtt), len(rtt)+p.Lost)
	}
	rtt = rtt[warmUp:]
	slices.Sort(rtt)
	p.Median, p.Received = float64(rtt[len(rtt)/2].Nanoseconds())/1e3, len(rtt)
	return p, nil
}

// once returns when the first ping is back.
func once(c net.Conn, d time.Duration) error {
	const again = 10 * time.Millisecond
	buf := make([]byte, size)
	for end := time.Now().Add(d); ; {
		if _, err := c.Write(buf); err != nil {
			return err
		}
		if err := c.SetReadDeadline(time.Now().Add(again)); err != nil {
			return err
		}
		_, err := c.Read(buf)
		if !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(end) {
			return err
		}
	}
}

// gap pings at an interval, whether replies come or not, and returns the
// longest time without one. What is missing at the end counts.
func gap(c net.Conn, interval, d time.Duration) (Gap, error) {
	var g Gap
	start := time.Now()
	end := start.Add(d)
	sent := make(chan error, 1)
	go func() {
		msg := make([]byte, size)
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for now := range tick.C {
			if now.After(end) {
				sent <- nil
				return
			}
			// While the link is cut a flow may refuse to send.
			if _, err := c.Write(msg); errors.Is(err, net.ErrClosed) {
				sent <- err
				return
			}
		}
	}()
	if err := c.SetReadDeadline(end); err != nil {
		return g, err
	}
	const settled = 50 // replies until the path is taken for working
	buf := make([]byte, 2*size)
	var last time.Time
	for {
		_, err := c.Read(buf)
		now := time.Now()
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return g, err
		}
		if g.Received >= settled {
			g.Longest = max(g.Longest, now.Sub(last).Seconds()*1e3)
		}
		if err != nil {
			break
		}
		last = now
		if g.Received++; g.Received == settled {
			fmt.Println(Ready)
		}
	}
	if g.Received < settled {
		return g, fmt.Errorf("only %d pings came back", g.Received)
	}
	return g, <-sent
}

// alloc allocates a flow to each name, so many times, one after the other.
func alloc(ctx context.Context, names []string, count int) (Allocs, error) {
	var a Allocs
	for _, n := range names {
		for range count {
			start := time.Now()
			tctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			f, err := o7s.Alloc(tctx, n, nil)
			cancel()
			if err != nil {
				return a, err
			}
			a.Took = append(a.Took, time.Since(start).Seconds()*1e3)
			if err := f.Close(); err != nil {
				return a, err
			}
		}
	}
	return a, nil
}

func route(dst, via string) error {
	_, d, err := net.ParseCIDR(dst)
	if err != nil {
		return err
	}
	gw := net.ParseIP(via)
	if gw == nil {
		return fmt.Errorf("bad gateway %q", via)
	}
	return netlink.RouteAdd(&netlink.Route{Dst: d, Gw: gw})
}

// Read reads what a client printed.
func Read(r io.Reader, v any) error {
	if err := json.NewDecoder(r).Decode(v); err != nil {
		return fmt.Errorf("worker's output: %w", err)
	}
	return nil
}
