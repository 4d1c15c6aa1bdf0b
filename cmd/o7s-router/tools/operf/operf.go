// Package operf measures bandwidth, loss and round-trip times, with the
// options, the messages and the output of the reference (spec 45 §11.4).
//
// A client sends its configuration, 4 bytes in host order: 0 for a
// unidirectional test, 1 for a bidirectional one. Packets of one size follow,
// numbered from 0 in their first 4 bytes, host order, the rest zero. In a
// bidirectional test the server sends each back unchanged.
//
// Between our own ends there is more (control.go): the server of a
// unidirectional test tells what it received.
package operf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	"github.com/o7s/o7s-router/lib/qos"
)

const (
	minSize = 64
	maxSize = 1048576
	// defaultSize is the reference's. On Ethernet a flow carries a little less.
	defaultSize = 1500
	maxTime     = 365 * 24 * time.Hour
	// headStart is how long a client waits before it sends: the server may
	// need it to get ready, as the reference's does.
	headStart = time.Second
	// Packets that are read or sent at once, and the most memory for them.
	maxBatch    = 32
	batchMemory = 512 << 10
)

// silence is after how long without a packet an end gives a test up. Where
// losses are made good, a packet may take a few round trips more.
func silence(q qos.Spec) time.Duration {
	if q.InOrder != 0 {
		return 5 * time.Second
	}
	return time.Second
}

// batch is how many packets of a size are handled at once.
func batch(size int) int { return min(max(batchMemory/size, 1), maxBatch) }

type options struct {
	listen   bool
	name     string
	bi       bool
	duration time.Duration
	rate     float64
	size     int
	// defaultSize: nobody asked for the size, it may be less if the flow needs that.
	defaultSize bool
	qos         qos.Spec
	qosName     string
	flood       bool
	sleep       bool
	spin        bool
	json        bool
	quiet       bool
	help        bool
	runDir      string
}

const usage = `Usage: operf [OPTION]...
Measures bandwidth, loss and round-trip times between a client and a server.

  -l, --listen            run as server

Client:
  -n, --server-name NAME  name of the server
  -t, --test uni|bi       one way, or there and back (default: uni)
  -d, --duration TIME     how long to send (default: 60s)
  -r, --rate RATE         bit/s; k, M or G may follow (default: 1M)
  -s, --size N            size of the packets, 64 to 1048576 bytes (default: 1500,
                          or what the flow carries if that is less)
  -q, --qos QOS           raw, best, video, voice or data (default: raw)
  -f, --flood             send as fast as the flow takes it
      --sleep             sleep between packets (default)
      --spin              keep the processor busy between packets
  -j, --json              print the result as JSON, and nothing else

Server:
  -Q, --quiet             print nothing about single packets

      --run-dir DIR       run directory of the daemon (default: $O7S_RUN_DIR)
      --help              print this text

TIME is a number with ms, s, m, h or d behind it; without: ms.
`

func parse(args []string) (options, error) {
	o := options{duration: time.Minute, rate: 1e6}
	err := kit.Parse(args, []kit.Opt{
		kit.Flag("l", "listen", &o.listen),
		kit.String("n", "server-name", &o.name),
		{Short: "t", Long: "test", Value: true, Set: func(v string) error {
			if v != "uni" && v != "bi" {
				return errors.New("expected uni or bi")
			}
			o.bi = v == "bi"
			return nil
		}},
		kit.Time("d", "duration", &o.duration, time.Millisecond, time.Millisecond, maxTime),
		kit.Rate("r", "rate", &o.rate),
		kit.Int("s", "size", &o.size, minSize, maxSize),
		kit.String("q", "qos", &o.qosName),
		kit.Flag("f", "flood", &o.flood),
		kit.Flag("", "sleep", &o.sleep),
		kit.Flag("", "spin", &o.spin),
		kit.Flag("j", "json", &o.json),
		kit.Flag("Q", "quiet", &o.quiet),
		kit.Flag("h", "help", &o.help),
		kit.String("", "run-dir", &o.runDir),
	})
	if err != nil || o.help {
		return o, err
	}
	if o.qos, err = qos.ByName(o.qosName); err != nil {
		return o, fmt.Errorf("-q %s: %w", o.qosName, err)
	}
	if o.qosName == "" {
		o.qosName = "raw"
	}
	if o.size == 0 {
		o.size, o.defaultSize = defaultSize, true
	}
	gap := time.Duration(float64(o.size) * 8e9 / o.rate)
	switch {
	case o.listen && o.name != "":
		err = errors.New("a server (-l) has no server name (-n)")
	case !o.listen && o.name == "":
		err = errors.New("expected -n NAME for a client or -l for a server")
	case o.sleep && o.spin:
		err = errors.New("expected one of --sleep and --spin")
	case !o.flood && gap >= time.Second:
		err = fmt.Errorf("a packet of %d bytes every %v: expected more than one in a second, or the server gives up", o.size, gap)
	}
	return o, err
}

// Main runs the tool with the arguments after its name and returns its exit
// status. An interrupt ends it; the client prints its statistics then.
func Main(args []string, stdout, stderr io.Writer) int {
	o, err := parse(args)
	if err != nil {
		return kit.Wrong(stderr, "operf", err)
	}
	if o.help {
		fmt.Fprint(stdout, usage)
		return 0
	}
	ctx, stop := kit.Interruptible()
	defer stop()
	n, done := kit.Library(o.runDir, "operf", args)
	defer done()
	return run(ctx, n, o, stdout, stderr)
}

func run(ctx context.Context, n kit.Network, o options, stdout, stderr io.Writer) int {
	if o.listen {
		return serve(ctx, n, o, stdout, stderr)
	}
	return measure(ctx, n, o, stdout, stderr)
}
