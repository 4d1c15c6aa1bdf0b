// Package oping is the ping tool of the reference (spec 45 §11.1): its options,
// its messages and its output.
//
// A message is 64 to 1500 bytes: the type (0 request, 1 reply) and a number,
// both 32 bits in network order, then the sender's monotonic clock, seconds and
// nanoseconds, 64 bits each in host order, which only the sender reads; zeros.
package oping

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
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

// flow is what the tool needs of one; *o7s.Flow is one.
type flow interface {
	io.ReadWriteCloser
	FD() int
	SetReadTimeout(time.Duration)
	SetFlags(o7s.Flags) error
}

// network is where flows come from.
type network interface {
	Alloc(ctx context.Context, name string, q qos.Spec) (flow, error)
	Accept(ctx context.Context) (flow, error)
}

type library struct{ *o7s.Client }

func (l library) Alloc(ctx context.Context, name string, q qos.Spec) (flow, error) {
	f, err := l.Client.Alloc(ctx, name, &q)
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (l library) Accept(ctx context.Context) (flow, error) {
	f, err := l.Client.Accept(ctx)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Main runs the tool with the arguments after its name and returns its exit
// status. An interrupt ends it; the client prints its statistics then.
func Main(args []string, stdout, stderr io.Writer) int {
	o, err := parse(args)
	if err != nil {
		fmt.Fprintf(stderr, "oping: %v (see oping --help)\n", err)
		return 1
	}
	if o.help {
		fmt.Fprint(stdout, usage)
		return 0
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	c := o7s.New(o7s.Options{RunDir: o.runDir, Prog: "oping", Args: append([]string{"oping"}, args...)})
	defer c.Close()
	return run(ctx, library{c}, o, stdout, stderr)
}

func run(ctx context.Context, n network, o options, stdout, stderr io.Writer) int {
	out := &printer{w: stdout}
	defer out.flush()
	if o.listen {
		return serve(ctx, n, o, out, stderr)
	}
	return ping(ctx, n, o, out, stderr)
}

// explain is the number that the reference prints, and what it means.
func explain(what string, err error) string {
	return fmt.Sprintf("%s: %d. (%v)", what, o7serr.Code(err), err)
}

type options struct {
	name       string
	count      uint32
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

	paced bool // -i was given
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

// long maps the long options to their short forms, or to themselves.
var long = map[string]string{
	"server-name": "n", "count": "c", "duration": "d", "interval": "i", "size": "s", "qos": "q",
	"flood": "f", "flood-busy": "F", "quiet": "Q", "timeofday": "D", "listen": "l",
	"poll": "poll", "busy": "busy", "help": "h", "run-dir": "run-dir",
}

// hasValue reports whether an option has a value.
func hasValue(opt string) bool { return strings.Contains(" n c d i s q run-dir ", " "+opt+" ") }

// parse reads the command line as getopt_long does: short options may be
// joined, with each other and with a value.
func parse(args []string) (options, error) {
	o := options{count: maxCount, interval: time.Second, size: minSize, qos: qos.Raw}
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		next := func(opt string) (string, error) {
			if len(args) == 0 {
				return "", fmt.Errorf("option %s needs a value", opt)
			}
			v := args[0]
			args = args[1:]
			return v, nil
		}
		var err error
		switch {
		case len(arg) > 2 && strings.HasPrefix(arg, "--"):
			word, v, inline := strings.Cut(arg[2:], "=")
			opt, known := long[word]
			switch {
			case !known:
				return o, fmt.Errorf("unknown option --%s", word)
			case inline && !hasValue(opt):
				return o, fmt.Errorf("option --%s has no value", word)
			case !inline && hasValue(opt):
				v, err = next("--" + word)
			}
			if err == nil {
				err = o.set(opt, v)
			}
		case len(arg) > 1 && arg[0] == '-' && arg[1] != '-':
			for rest := arg[1:]; rest != "" && err == nil; {
				opt, v := rest[:1], ""
				rest = rest[1:]
				if hasValue(opt) {
					if v, rest = rest, ""; v == "" {
						v, err = next("-" + opt)
					}
				}
				if err == nil {
					err = o.set(opt, v)
				}
			}
		default:
			err = fmt.Errorf("unexpected argument %q", arg)
		}
		if err != nil {
			return o, err
		}
	}
	switch {
	case o.help:
	case o.listen && o.name != "":
		return o, errors.New("a server (-l) has no server name (-n)")
	case !o.listen && o.name == "":
		return o, errors.New("expected -n NAME for a client or -l for a server")
	}
	if o.flood && !o.paced {
		o.interval = 0
	}
	if o.duration > 0 {
		n := o.duration.Milliseconds() * 10
		if o.interval > 0 {
			n = int64(o.duration / o.interval)
		}
		o.count = uint32(max(min(n, maxCount), 1))
	}
	return o, nil
}

func (o *options) set(opt, v string) (err error) {
	number := func(low, high int64) int64 {
		n, e := strconv.ParseInt(v, 10, 64)
		if e != nil || n < low || n > high {
			err = fmt.Errorf("-%s %s: expected a number from %d to %d", opt, v, low, high)
		}
		return n
	}
	switch opt {
	case "n":
		o.name = v
	case "c":
		o.count = uint32(number(1, maxCount))
	case "d":
		o.duration, err = parseTime(opt, v)
	case "i":
		o.paced = true
		if o.interval, err = parseTime(opt, v); err == nil && o.interval > maxInterval {
			err = fmt.Errorf("-i %s: expected at most 10s", v)
		}
	case "s":
		o.size = int(number(minSize, maxSize))
	case "q":
		o.qos, err = qos.ByName(v)
	case "f":
		o.flood = true
	case "F":
		o.flood, o.busyFlood = true, true
	case "Q":
		o.quiet = true
	case "D":
		o.timeOfDay = true
	case "l":
		o.listen = true
	case "poll":
		o.poll = true
	case "busy":
		o.busy = true
	case "h":
		o.help = true
	case "run-dir":
		o.runDir = v
	default:
		err = fmt.Errorf("unknown option -%s", opt)
	}
	return err
}

func parseTime(opt, v string) (time.Duration, error) {
	digits := strings.TrimRight(v, "abcdefghijklmnopqrstuvwxyz")
	unit := map[string]time.Duration{
		"": time.Millisecond, "ms": time.Millisecond, "s": time.Second,
		"m": time.Minute, "h": time.Hour, "d": 24 * time.Hour,
	}[v[len(digits):]]
	n, err := strconv.ParseUint(digits, 10, 32)
	if err != nil || unit == 0 || n > uint64(1<<62/unit) {
		return 0, fmt.Errorf("-%s %s: expected a time such as 200ms, 3s, 5m, 1h or 1d", opt, v)
	}
	return time.Duration(n) * unit, nil
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
