// Package oping is the ping tool of the reference (spec 45 §11.1): its options,
// its messages and its output.
//
// A message is 64 to 1500 bytes: the type (0 request, 1 reply) and a number,
// both 32 bits in kit.Network order, then the sender's monotonic clock, seconds and
// nanoseconds, 64 bits each in host order, which only the sender reads; zeros.
package oping

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	"github.com/o7s/o7s-router/lib/qos"
)

const (
	minSize     = 64
	maxSize     = 1500
	maxInterval = 10 * time.Second
	maxCount    = 1<<31 - 1

	echoRequest = 0
	echoReply   = 1

	offID, offSec, offNsec = 4, 8, 16
)

// Main runs the tool with the arguments after its name and returns its exit
// status. An interrupt ends it; the client prints its statistics then.
func Main(args []string, stdout, stderr io.Writer) int {
	o, err := parse(args)
	if err != nil {
		return kit.Wrong(stderr, "oping", err)
	}
	if o.help {
		fmt.Fprint(stdout, usage)
		return 0
	}
	ctx, stop := kit.Interruptible()
	defer stop()
	n, done := kit.Library(o.runDir, "oping", args)
	defer done()
	return run(ctx, n, o, stdout, stderr)
}

func run(ctx context.Context, n kit.Network, o options, stdout, stderr io.Writer) int {
	out := kit.NewPrinter(stdout)
	defer out.Flush()
	if o.listen {
		return serve(ctx, n, o, out, stderr)
	}
	return ping(ctx, n, o, out, stderr)
}

type options struct {
	name       string
	count      int
	duration   time.Duration
	interval   time.Duration
	size       int
	qos        qos.Spec
	flood      bool
	busyFlood  bool
	quiet      bool
	timeOfDay  bool
	listen     bool
	poll, busy bool
	help       bool
	runDir     string
}

const usage = `Usage: oping [OPTION]...
Checks liveness between a client and a server and reports the round-trip time.

Client:
  -n, --server-name NAME  name of the server
  -c, --count N           number of packets (default: until interrupted)
  -d, --duration TIME     duration of the test (default: 0, off)
  -i, --interval TIME     interval, at most 10s (default: 1000ms)
  -s, --size N            size of the packets, 64 to 1500 bytes (default: 64)
  -q, --qos QOS           raw, best, video, voice or data (default: raw)
  -f, --flood             send when the reply to the last packet is there
  -F, --flood-busy        the same with busy polling
  -Q, --quiet             print the statistics only
  -D, --timeofday         print the time before each line

Server:
  -l, --listen            run as server
  -Q, --quiet             print nothing about flows and packets
      --poll              poll the flows
      --busy              busy-poll a single flow

      --run-dir DIR       run directory of the daemon (default: $O7S_RUN_DIR)
      --help              print this text

TIME is a number with ms, s, m, h or d behind it; without: ms.
`

func parse(args []string) (options, error) {
	o := options{count: maxCount, interval: -1, size: minSize, qos: qos.Raw}
	err := kit.Parse(args, []kit.Opt{
		kit.String("n", "server-name", &o.name),
		kit.Int("c", "count", &o.count, 1, maxCount),
		kit.Time("d", "duration", &o.duration, time.Millisecond, 0, 0),
		kit.Time("i", "interval", &o.interval, time.Millisecond, 0, maxInterval),
		kit.Int("s", "size", &o.size, minSize, maxSize),
		kit.QoS("q", "qos", &o.qos),
		kit.Flag("f", "flood", &o.flood),
		kit.Flag("F", "flood-busy", &o.busyFlood),
		kit.Flag("Q", "quiet", &o.quiet),
		kit.Flag("D", "timeofday", &o.timeOfDay),
		kit.Flag("l", "listen", &o.listen),
		kit.Flag("", "poll", &o.poll),
		kit.Flag("", "busy", &o.busy),
		kit.Flag("h", "help", &o.help),
		kit.String("", "run-dir", &o.runDir),
	})
	o.flood = o.flood || o.busyFlood
	switch {
	case err != nil:
		return o, err
	case o.help:
	case o.listen && o.name != "":
		return o, errors.New("a server (-l) has no server name (-n)")
	case !o.listen && o.name == "":
		return o, errors.New("expected -n NAME for a client or -l for a server")
	}
	switch {
	case o.interval >= 0:
	case o.flood:
		o.interval = 0
	default:
		o.interval = time.Second
	}
	if o.duration > 0 {
		n := o.duration.Milliseconds() * 10
		if o.interval > 0 {
			n = int64(o.duration / o.interval)
		}
		o.count = int(max(min(n, maxCount), 1))
	}
	return o, nil
}

// clock is the monotonic clock that messages carry.
type clock struct {
	start time.Time
	at    int64 // CLOCK_MONOTONIC at start, ns
}

func newClock() clock {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail
	return clock{time.Now(), ts.Nano()}
}

func (c clock) now() int64 { return c.at + int64(time.Since(c.start)) }

// stamp makes b request number id, sent at now.
func stamp(b []byte, id uint32, now int64) {
	binary.BigEndian.PutUint32(b, echoRequest)
	binary.BigEndian.PutUint32(b[offID:], id)
	binary.NativeEndian.PutUint64(b[offSec:], uint64(now/1e9))
	binary.NativeEndian.PutUint64(b[offNsec:], uint64(now%1e9))
}

// sentAt is the time in a reply.
func sentAt(b []byte) int64 {
	return int64(binary.NativeEndian.Uint64(b[offSec:]))*1e9 + int64(binary.NativeEndian.Uint64(b[offNsec:]))
}
