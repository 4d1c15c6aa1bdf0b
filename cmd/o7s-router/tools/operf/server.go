package operf

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
)

const (
	maxFlows    = 256
	reportEvery = 200 * time.Millisecond
)

func serve(ctx context.Context, n kit.Network, o options, stdout, stderr io.Writer) int {
	out := kit.NewPrinter(stdout)
	defer out.Flush()
	out.Line("Ouroboros perf server started.")
	return kit.Serve(ctx, n, maxFlows, "operf", kit.After(out, stderr), func(ctx context.Context, f kit.Flow) {
		fd := f.FD()
		out.Line(fmt.Sprintf("New flow %d.", fd))
		s := session{f: f, fd: fd, out: out, quiet: o.quiet}
		err := s.serve()
		s.summary()
		switch {
		case ctx.Err() != nil: // interrupted
		case kit.Silent(err):
			out.Line(fmt.Sprintf("Flow %d timed out.", fd))
		case kit.Ended(err):
			out.Line(fmt.Sprintf("Flow %d closed.", fd))
		default:
			fmt.Fprintf(kit.After(out, stderr), "operf: flow %d: %v\n", fd, err)
		}
	})
}

// session is one test.
type session struct {
	f     kit.Flow
	fd    int
	out   *kit.Printer
	quiet bool
	ours  bool // the client wants reports

	track       track
	bytes       uint64
	first, last time.Time // packets
	gaps        *hdrhistogram.Histogram
	told        time.Time // the last report
}

func (s *session) serve() error {
	if err := s.f.SetFlags(o7s.Default | o7s.RNOPART); err != nil {
		return err
	}
	patience := silence(s.f.QoS())
	// The client may take its time before it begins; and it is not there for
	// echoes that it does not read.
	s.f.SetReadTimeout(patience + headStart)
	s.f.SetWriteTimeout(patience)
	var conf [confLen]byte
	n, err := s.f.Read(conf[:])
	switch {
	case err == nil && n == confLen:
	case err == nil, errors.Is(err, o7serr.EMSGSIZE):
		return errors.New("the flow does not begin with a configuration")
	default:
		return err
	}
	w := binary.NativeEndian.Uint32(conf[:])
	if w == confBi {
		s.out.Line("Doing a bidirectional test.")
		return s.echo(patience)
	}
	s.out.Line("Doing a unidirectional test.")
	if s.ours = w&confOurs != 0; s.ours {
		if err := s.report(false); err != nil {
			return err
		}
	}
	return s.sink(patience)
}

// report tells the client how things are.
func (s *session) report(final bool) error {
	r := report{Final: final, Packets: s.track.packets, Bytes: s.bytes, Late: s.track.late, Duplicates: s.track.dup, Elapsed: s.last.Sub(s.first)}
	if s.gaps != nil {
		r.Gap = spreadOf(s.gaps)
	}
	s.told = time.Now()
	_, err := s.f.Write(r.encode())
	return err
}

// control handles what is no data packet.
func (s *session) control(p []byte) error {
	if s.ours && len(p) == confLen && binary.NativeEndian.Uint32(p)&confEnd != 0 {
		return s.report(true)
	}
	return nil
}

// sink counts packets, and prints the number of each for a client that is not
// told otherwise.
func (s *session) sink(patience time.Duration) error {
	s.gaps = newHistogram()
	print := !s.ours && !s.quiet
	const head = confLen // all that is of interest
	bufs, sizes := make([][]byte, maxBatch), make([]int, maxBatch)
	for i := range bufs {
		bufs[i] = make([]byte, head)
	}
	for {
		n, err := s.f.ReadBatch(bufs, sizes)
		if err != nil {
			return err
		}
		now := time.Now()
		for i, p := range bufs[:n] {
			if sizes[i] < minSize {
				if err := s.control(p[:min(sizes[i], head)]); err != nil {
					return err
				}
				continue
			}
			if s.first.IsZero() {
				s.first = now
				s.f.SetReadTimeout(patience)
			} else {
				note(s.gaps, now.Sub(s.last))
			}
			s.last = now
			seq := binary.NativeEndian.Uint32(p)
			if s.track.add(seq) {
				s.bytes += uint64(sizes[i])
			}
			if print {
				s.print(seq, now)
			}
		}
		if s.ours && now.Sub(s.told) >= reportEvery {
			if err := s.report(false); err != nil {
				return err
			}
		}
	}
}

func (s *session) print(seq uint32, now time.Time) {
	us := strconv.AppendInt(make([]byte, 0, 8), int64(1e6+now.Nanosecond()/1e3), 10)[1:]
	s.out.Begin().Str("Seqno ").Num(int(seq)).Str(" from fd ").Num(s.fd).Str(": ").Num(int(now.Unix())).Str(".").Str(string(us)).End()
}

// echo sends packets back.
func (s *session) echo(patience time.Duration) error {
	p := make([]byte, maxSize) // the first tells how large they are
	for {
		n, err := s.f.Read(p)
		if err != nil {
			return err
		}
		if n < minSize {
			continue
		}
		s.f.SetReadTimeout(patience)
		if err := s.back(p[:n]); err != nil {
			return err
		}
		return s.echoAll(n)
	}
}

// back sends one packet back. The time-out of a write means that the client
// does not read.
func (s *session) back(p []byte) error {
	s.bytes += uint64(len(p))
	s.track.packets++
	now := time.Now()
	if s.first.IsZero() {
		s.first = now
	}
	s.last = now
	_, err := s.f.Write(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("the client does not read: %w", os.ErrDeadlineExceeded)
	}
	return err
}

// echoAll sends packets of size bytes back, several at once.
func (s *session) echoAll(size int) error {
	bufs := make([][]byte, batch(size))
	memory := make([]byte, len(bufs)*size)
	for i := range bufs {
		bufs[i] = memory[i*size : (i+1)*size]
	}
	sizes, msgs := make([]int, len(bufs)), make([][]byte, 0, len(bufs))
	for {
		n, err := s.f.ReadBatch(bufs, sizes)
		if err != nil {
			return err
		}
		msgs = msgs[:0]
		for i, k := range sizes[:n] {
			if k >= minSize && k <= size { // of a longer one a part is gone: no echo is better than a wrong one
				msgs = append(msgs, bufs[i][:k])
				s.bytes += uint64(k)
			}
		}
		s.track.packets += uint64(len(msgs))
		s.last = time.Now()
		if _, err := s.f.WriteBatch(msgs); err != nil {
			return err
		}
	}
}

// summary prints what came.
func (s *session) summary() {
	if s.first.IsZero() || s.quiet {
		return
	}
	d := s.last.Sub(s.first)
	line := fmt.Sprintf("Flow %d: %d packets, %d bytes in %d ms, %.3f Mb/s", s.fd, s.track.packets, s.bytes, d.Milliseconds(), mega(s.bytes, d))
	if s.gaps != nil { // unidirectional
		line += fmt.Sprintf(", %d lost, %d out of order, %d duplicates", s.track.lost(), s.track.late, s.track.dup)
	}
	s.out.Line(line)
}

// mega is the rate of n bytes in d, Mbit/s; 0 for no time at all.
func mega(n uint64, d time.Duration) float64 {
	if d <= 0 {
		return 0
	}
	return float64(n) * 8 / 1e6 / d.Seconds()
}
