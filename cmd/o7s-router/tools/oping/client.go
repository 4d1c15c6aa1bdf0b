package oping

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// client is one run.
type client struct {
	o     options
	f     kit.Flow
	out   *kit.Printer
	clock clock

	sent atomic.Uint32

	// Of the goroutine that reads.
	next     uint32 // number expected
	received uint32
	disorder uint32
	min, max float64 // round-trip times, ms
	mean, m2 float64 // running mean and sum of squares (Welford)
}

func ping(ctx context.Context, n kit.Network, o options, out *kit.Printer, stderr io.Writer) int {
	f, err := n.Alloc(ctx, o.name, o.qos)
	if err != nil {
		fmt.Fprintln(stderr, kit.Explain("Failed to allocate flow", err))
		return 1
	}
	defer f.Close()
	c := &client{o: o, f: f, out: out, clock: newClock()}
	flags := o7s.Default | o7s.RNOPART
	if o.busyFlood {
		flags |= o7s.RNOBLOCK
	}
	if err := f.SetFlags(flags); err != nil {
		fmt.Fprintf(stderr, "oping: %v\n", err)
		return 1
	}
	f.SetReadTimeout(c.patience())
	if !o.quiet {
		out.Line(fmt.Sprintf("Pinging %s with %d bytes of data (%d packets):\n", o.name, o.size, o.count))
	}

	start := time.Now()
	stop := context.AfterFunc(ctx, func() { f.Close() }) // ends reads and writes
	defer stop()
	if o.flood {
		err = c.flood()
	} else {
		err = c.paced(ctx)
	}
	took := time.Since(start)
	status := 0
	switch {
	case err == nil || ctx.Err() != nil: // done or interrupted
	case errors.Is(err, os.ErrDeadlineExceeded):
		out.Line("Server timed out.")
	default:
		out.Flush()
		fmt.Fprintf(stderr, "oping: %v\n", kit.Reason(err))
		status = 1
	}
	c.statistics(took)
	return status
}

// patience is how long a reply may take: the interval in whole seconds and 2 s.
func (c *client) patience() time.Duration {
	return c.o.interval.Truncate(time.Second) + 2*time.Second
}

// paced sends at the interval while it receives. It returns when all replies
// are there and the last interval is over, or something is wrong.
func (c *client) paced(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 2)
	go func() { done <- c.send(ctx) }()
	go func() { done <- c.receive() }()
	err := <-done
	if err != nil { // end the other one
		cancel()
		c.f.Close()
		<-done
		return err
	}
	return <-done
}

func (c *client) send(ctx context.Context) error {
	b := make([]byte, c.o.size)
	next := time.Now()
	t := time.NewTimer(time.Hour)
	defer t.Stop()
	for id := range uint32(c.o.count) {
		stamp(b, id, c.clock.now())
		if _, err := c.f.Write(b); err != nil {
			return err
		}
		c.sent.Store(id + 1)
		// From when it was due: delays do not add up.
		next = next.Add(c.o.interval)
		t.Reset(time.Until(next))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
	return nil
}

func (c *client) receive() error {
	b := make([]byte, maxSize)
	for c.received < uint32(c.o.count) {
		n, err := c.f.Read(b)
		if errors.Is(err, o7serr.EMSGSIZE) {
			continue // none of ours
		}
		if err != nil {
			return err
		}
		c.reply(b[:n])
	}
	return nil
}

// flood sends when the reply to the last packet is there.
func (c *client) flood() error {
	out, in := make([]byte, c.o.size), make([]byte, maxSize)
	patience := c.patience().Nanoseconds()
	for id := range uint32(c.o.count) {
		sent := c.clock.now()
		stamp(out, id, sent)
		if _, err := c.f.Write(out); err != nil {
			return err
		}
		c.sent.Store(id + 1)
		for answered := false; !answered; {
			n, err := c.f.Read(in)
			switch {
			case err == nil:
				got, ok := c.reply(in[:n])
				answered = ok && got == id
			case errors.Is(err, o7serr.EMSGSIZE):
			case !errors.Is(err, o7serr.EAGAIN):
				return err
			case c.clock.now()-sent > patience: // polling
				return os.ErrDeadlineExceeded
			}
		}
	}
	return nil
}

// reply notes a reply and prints it. ok is false for what is none.
func (c *client) reply(b []byte) (id uint32, ok bool) {
	now := c.clock.now()
	if len(b) < minSize || binary.BigEndian.Uint32(b) != echoReply {
		return 0, false
	}
	id = binary.BigEndian.Uint32(b[offID:])
	if id >= uint32(c.o.count) {
		return id, false
	}
	rtt := float64(now-sentAt(b)) / 1e6
	late := id < c.next
	if late {
		c.disorder++
	} else {
		c.next = id + 1
	}
	if c.received == 0 {
		c.min, c.max = rtt, rtt
	}
	c.min, c.max = min(c.min, rtt), max(c.max, rtt)
	c.received++
	delta := rtt - c.mean
	c.mean += delta / float64(c.received)
	c.m2 += delta * (rtt - c.mean)
	if !c.o.quiet {
		c.print(len(b), id, rtt, late)
	}
	return id, true
}

func (c *client) print(n int, id uint32, rtt float64, late bool) {
	p := c.out.Begin()
	if c.o.timeOfDay {
		now := time.Now()
		us := now.Nanosecond() / 1000
		p.Str("[").Num(int(now.Unix())).Str(".")
		for limit := 100000; us < limit && limit > 1; limit /= 10 {
			p.Str("0")
		}
		p.Num(us).Str("] ")
	}
	p.Num(n).Str(" bytes from ").Str(c.o.name).Str(": seq=").Num(int(id)).Str(" time=")
	if rtt < 0.1 {
		p.Fixed(rtt * 1000).Str(" µs")
	} else {
		p.Fixed(rtt).Str(" ms")
	}
	if late {
		p.Str(" [out-of-order]")
	}
	p.End()
}

func (c *client) statistics(took time.Duration) {
	sent, loss := uint64(c.sent.Load()), uint64(0)
	if sent > 0 {
		loss = 100 - min(uint64(c.received)*100/sent, 100)
	}
	c.out.Line("\n--- " + c.o.name + " ping statistics ---")
	c.out.Line(fmt.Sprintf("%d packets transmitted, %d received, %d out-of-order, %d%% packet loss, time: %.3f ms",
		sent, c.received, c.disorder, loss, float64(took.Nanoseconds())/1e6))
	if c.received > 0 {
		mdev := math.Sqrt(c.m2 / float64(c.received-1)) // of one sample: NaN
		unit, scale := "ms", 1.0
		if c.mean < 0.1 { // as for the single replies
			unit, scale = "µs", 1000
		}
		c.out.Line(fmt.Sprintf("rtt min/avg/max/mdev = %.3f/%.3f/%.3f/%.3f %s", c.min*scale, c.mean*scale, c.max*scale, mdev*scale, unit))
	}
}
