// Package ocbr is the constant bit rate tool of the reference (spec 45 §11.3):
// its options, its messages and its output.
//
// A client sends packets of one size. The first 8 bytes, as far as they go,
// hold the number of the packet from 0, in host order; the rest is zero. The
// server counts and sends nothing.
package ocbr

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

const (
	maxSize  = 524288
	maxFlows = 10
	// Packets that are sent or read at once, and the most memory for them.
	maxBatch    = 64
	batchMemory = 512 << 10
	// maxTime is the longest that an option takes.
	maxTime = 365 * 24 * time.Hour
)

type options struct {
	listen   bool
	interval time.Duration
	timeout  time.Duration
	name     string
	duration time.Duration
	size     int
	rate     float64
	qos      qos.Spec
	flood    bool
	sleep    bool
	spin     bool
	help     bool
	runDir   string
}

const usage = `Usage: ocbr [OPTION]...
Sends packets from a client to a server at a constant bit rate.

  -l, --listen            run as server

Server:
  -i, --interval TIME     interval of the reports (default: 1s)
  -t, --timeout TIME      silence after which a test is over (default: 1s)

Client:
  -n, --server_apn NAME   name of the server
  -d, --duration TIME     how long to send (default: 60s)
  -s, --size N            size of the packets, 1 to 524288 bytes (default: 1000)
  -r, --rate RATE         bit/s; k, M or G may follow (default: 1M)
  -q, --qos QOS           raw, best, video, voice or data (default: raw)
  -f, --flood             send as fast as the flow takes it
      --sleep             sleep between packets (default)
      --spin              keep the processor busy between packets

      --run-dir DIR       run directory of the daemon (default: $O7S_RUN_DIR)
      --help              print this text

TIME is a number with ms, s, m, h or d behind it; without: s.
`

func parse(args []string) (options, error) {
	o := options{interval: time.Second, timeout: time.Second, duration: time.Minute, size: 1000, rate: 1e6, qos: qos.Raw}
	err := kit.Parse(args, []kit.Opt{
		kit.Flag("l", "listen", &o.listen),
		kit.Time("i", "interval", &o.interval, time.Second, 10*time.Millisecond, maxTime),
		kit.Time("t", "timeout", &o.timeout, time.Second, 10*time.Millisecond, maxTime),
		kit.String("n", "server_apn", &o.name),
		kit.Time("d", "duration", &o.duration, time.Second, time.Millisecond, maxTime),
		kit.Int("s", "size", &o.size, 1, maxSize),
		kit.Rate("r", "rate", &o.rate),
		kit.QoS("q", "qos", &o.qos),
		kit.Flag("f", "flood", &o.flood),
		kit.Flag("", "sleep", &o.sleep),
		kit.Flag("", "spin", &o.spin),
		kit.Flag("h", "help", &o.help),
		kit.String("", "run-dir", &o.runDir),
	})
	switch {
	case err != nil || o.help:
	case o.listen && o.name != "":
		err = errors.New("a server (-l) has no server name (-n)")
	case !o.listen && o.name == "":
		err = errors.New("expected -n NAME for a client or -l for a server")
	case o.sleep && o.spin:
		err = errors.New("expected one of --sleep and --spin")
	}
	return o, err
}

// Main runs the tool with the arguments after its name and returns its exit
// status. An interrupt ends it; the client prints its statistics then.
func Main(args []string, stdout, stderr io.Writer) int {
	o, err := parse(args)
	if err != nil {
		return kit.Wrong(stderr, "ocbr", err)
	}
	if o.help {
		fmt.Fprint(stdout, usage)
		return 0
	}
	ctx, stop := kit.Interruptible()
	defer stop()
	n, done := kit.Library(o.runDir, "ocbr", args)
	defer done()
	return run(ctx, n, o, stdout, stderr)
}

func run(ctx context.Context, n kit.Network, o options, stdout, stderr io.Writer) int {
	if o.listen {
		return serve(ctx, n, o, stdout, stderr)
	}
	return send(ctx, n, o, stdout, stderr)
}

// seconds prints a duration as the reference does, and a fraction if need be.
func seconds(d time.Duration) string { return fmt.Sprintf("%g", d.Seconds()) }

// mega is the rate of n bytes in d, Mbit/s; 0 for no time at all.
func mega(n uint64, d time.Duration) float64 { return per(n*8, d) / 1e6 }

// per is n in d for each second.
func per(n uint64, d time.Duration) float64 {
	if d <= 0 {
		return 0
	}
	return float64(n) / d.Seconds()
}

func send(ctx context.Context, n kit.Network, o options, stdout, stderr io.Writer) int {
	fmt.Fprintf(stdout, "Client started, duration %s, rate %.0f b/s, size %d B.\n", seconds(o.duration), o.rate, o.size)
	f, err := n.Alloc(ctx, o.name, o.qos)
	if err != nil {
		fmt.Fprintln(stderr, kit.Explain("Failed to allocate flow", err))
		return 1
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(ctx, o.duration)
	defer cancel()
	// The end of the test ends a write that waits. What was written is sent.
	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Now()) })
	defer stop()
	start := time.Now()
	sent, err := stream(ctx, f, o)
	took := time.Since(start)
	status := 0
	if ctx.Err() == nil {
		fmt.Fprintf(stderr, "ocbr: %v\n", err)
		status = 1
	}
	bytes := sent * uint64(o.size)
	fmt.Fprintf(stdout, "sent statistics: %9d packets, %12d bytes in %9d ms, %4.4f Mb/s\n", sent, bytes, took.Milliseconds(), mega(bytes, took))
	return status
}

// stream sends until ctx ends or the flow fails, and returns how many packets
// and which it was.
func stream(ctx context.Context, f kit.Flow, o options) (sent uint64, err error) {
	batch := make([][]byte, min(max(batchMemory/o.size, 1), maxBatch))
	for i := range batch {
		batch[i] = make([]byte, o.size)
	}
	pacer := kit.NewPacer(o.size, o.rate, o.spin)
	for {
		due := len(batch)
		if o.flood {
			err = ctx.Err()
		} else {
			var all uint64
			all, err = pacer.Wait(ctx, sent)
			due = int(min(all-sent, uint64(due)))
		}
		if err != nil {
			return sent, err
		}
		for i, p := range batch[:due] {
			number(p, sent+uint64(i))
		}
		n, err := f.WriteBatch(batch[:due])
		sent += uint64(n)
		switch {
		case errors.Is(err, o7serr.EMSGSIZE):
			return sent, fmt.Errorf("%w; -s %d fits%s", err, f.MTU(), kit.SplitHint(f))
		case err != nil && !(errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil):
			return sent, err
		}
	}
}

// number numbers a packet.
func number(p []byte, n uint64) {
	if len(p) >= 8 {
		binary.NativeEndian.PutUint64(p, n)
	}
}

func serve(ctx context.Context, n kit.Network, o options, stdout, stderr io.Writer) int {
	out := kit.NewPrinter(stdout)
	defer out.Flush()
	out.Line(fmt.Sprintf("Server started, interval is %s s, timeout is %s s.", seconds(o.interval), seconds(o.timeout)))
	return kit.Serve(ctx, n, maxFlows, "ocbr", kit.After(out, stderr), func(ctx context.Context, f kit.Flow) {
		out.Line("New flow.")
		t := test{fd: f.FD(), out: out}
		err := t.count(f, o)
		switch {
		case ctx.Err() != nil: // interrupted
		case kit.Silent(err):
			out.Line(fmt.Sprintf("Test on flow %d timed out", t.fd))
		case kit.Ended(err):
			out.Line(fmt.Sprintf("Test on flow %d ended", t.fd))
		default:
			fmt.Fprintf(kit.After(out, stderr), "ocbr: flow %d: %v\n", t.fd, err)
		}
		t.finish()
	})
}

// test is what a server counts of one flow.
type test struct {
	fd  int
	out *kit.Printer

	packets, bytes     uint64    // of the interval
	total, totalBytes  uint64    // of those before
	first, begun, last time.Time // the first packet, the interval, the last packet
}

// count counts until the flow ends or is silent for too long.
func (t *test) count(f kit.Flow, o options) error {
	if err := f.SetFlags(o7s.Default | o7s.RNOPART); err != nil {
		return err
	}
	// Only how long packets are counts: what does not fit a buffer is dropped.
	bufs, sizes := make([][]byte, maxBatch), make([]int, maxBatch)
	start := time.Now()
	t.last = start
	for {
		// A read ends for the next report or for silence, whatever comes first.
		until := t.last.Add(o.timeout)
		if !t.begun.IsZero() {
			if report := t.begun.Add(o.interval); report.Before(until) {
				until = report
			}
		}
		if err := f.SetReadDeadline(until); err != nil {
			return err
		}
		var now time.Time
		for now.Before(until) {
			n, err := f.ReadBatch(bufs, sizes)
			now = time.Now()
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded):
				if now.Before(until) {
					now = until
				}
				continue
			case err != nil:
				return err
			}
			if t.begun.IsZero() {
				t.first, t.begun = now, now
				until = now // a report is due from now on
			}
			t.last = now
			t.packets += uint64(n)
			for _, s := range sizes[:n] {
				t.bytes += uint64(s)
			}
		}
		if now.Sub(t.last) >= o.timeout {
			return os.ErrDeadlineExceeded
		}
		if !t.begun.IsZero() && now.Sub(t.begun) >= o.interval {
			t.report(now)
		}
	}
}

// report ends an interval.
func (t *test) report(now time.Time) {
	t.line(t.packets, t.bytes, now.Sub(t.begun), "")
	t.total += t.packets
	t.totalBytes += t.bytes
	t.packets, t.bytes, t.begun = 0, 0, now
}

// finish reports what came since the last report, and everything. Silence at
// the end does not count.
func (t *test) finish() {
	if t.first.IsZero() {
		return
	}
	if t.packets > 0 {
		t.report(t.last)
	}
	t.line(t.total, t.totalBytes, t.last.Sub(t.first), " in total")
}

func (t *test) line(packets, bytes uint64, d time.Duration, what string) {
	t.out.Line(fmt.Sprintf("Flow %4d: %9d packets (%12d bytes) in %9d ms => %9.4f pps, %9.4f Mbps%s",
		t.fd, packets, bytes, d.Milliseconds(), per(packets, d), mega(bytes, d), what))
}
