package operf

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
)

const (
	progressEvery = time.Second
	// askEvery is how often a server of ours is asked for the result, where
	// the question may get lost.
	askEvery = 200 * time.Millisecond
)

// client is one test.
type client struct {
	o    options
	f    kit.Flow
	show io.Writer // progress; nil: nobody looks

	sent atomic.Uint64
	// When packet n left, ns of clock and 1, at n modulo its length; 0: it is back.
	left  []atomic.Int64
	clock time.Time

	hello chan struct{} // closed when a server of ours has reported
	all   chan struct{} // closed when nothing more is to come
	tasks sync.WaitGroup

	mu        sync.Mutex // guards what follows
	start     time.Time  // of sending
	stopped   time.Time  // sending; zero: it goes on
	track     track
	bytes     uint64
	last      time.Time // when something came
	rtt       *hdrhistogram.Histogram
	server    *report // the newest
	complete  bool    // all is closed
	intervals []interval
}

func measure(ctx context.Context, n kit.Network, o options, stdout, stderr io.Writer) int {
	f, err := n.Alloc(ctx, o.name, o.qos)
	if err != nil {
		fmt.Fprintln(stderr, kit.Explain("Failed to allocate flow", err))
		return 1
	}
	if o.defaultSize {
		o.size = min(o.size, f.MTU())
	}
	now := time.Now()
	c := &client{
		o: o, f: f, clock: now, start: now, last: now, rtt: newHistogram(),
		hello: make(chan struct{}), all: make(chan struct{}),
	}
	if o.bi {
		c.left = make([]atomic.Int64, window)
	}
	text := stdout
	switch {
	case o.json:
		text = io.Discard
	case kit.Terminal(stdout):
		c.show = stdout
	}
	c.describe(text)
	silent, err := c.run(ctx)
	fmt.Fprint(text, "Test finished.\n")
	if silent {
		fmt.Fprint(text, "Server timed out.\n")
	}
	status := 0
	if err != nil && ctx.Err() == nil {
		fmt.Fprintf(stderr, "operf: %v\n", kit.Reason(err))
		status = 1
	}
	r := c.result()
	r.TimedOut = silent
	if o.json {
		e := json.NewEncoder(stdout)
		e.SetIndent("", "  ")
		_ = e.Encode(r)
	} else {
		r.print(text)
	}
	// Only now: it may take a while when the other end is gone.
	f.Close()
	c.tasks.Wait()
	return status
}

// describe says what is done, in the words of the reference.
func (c *client) describe(w io.Writer) {
	kind := "uni"
	if c.o.bi {
		kind = "bi"
	}
	fmt.Fprintf(w, "Doing a %sdirectional test.\n", kind)
	d := strconv.FormatFloat(c.o.duration.Seconds(), 'g', -1, 64)
	if c.o.flood {
		fmt.Fprintf(w, "Flooding %s with %d byte packets for %s seconds.\n\n", c.o.name, c.o.size, d)
	} else {
		fmt.Fprintf(w, "Sending %d byte packets for %s s to %s at %.3f Mb/s.\n\n", c.o.size, d, c.o.name, c.o.rate/1e6)
	}
}

// run does the test. silent: the server did not send everything back.
func (c *client) run(parent context.Context) (silent bool, err error) {
	if err := c.f.SetFlags(o7s.Default | o7s.RNOPART); err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	c.tasks.Go(func() { cancel(c.receive()) }) // until the flow is closed
	c.tasks.Go(func() { c.progress(ctx) })

	w := uint32(confUni | confOurs)
	if c.o.bi {
		w = confBi
	}
	if err := c.ready(ctx, w); err != nil {
		return false, err
	}
	if err := c.stream(ctx); err != nil {
		return false, err
	}
	return c.rest(ctx)
}

// ready configures the server and waits until it can take packets.
func (c *client) ready(ctx context.Context, w uint32) error {
	stop := context.AfterFunc(ctx, func() { _ = c.f.SetWriteDeadline(time.Now()) })
	defer stop()
	if _, err := c.f.Write(config(w)); err != nil {
		return err
	}
	t := time.NewTimer(headStart)
	defer t.Stop()
	select {
	case <-t.C:
	case <-c.hello:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	c.mu.Lock()
	c.start = time.Now()
	c.last = c.start
	c.mu.Unlock()
	return nil
}

// stream sends packets for the duration of the test. An interrupt is no error.
func (c *client) stream(ctx context.Context) error {
	end, cancel := context.WithTimeout(ctx, c.o.duration)
	defer cancel()
	stop := context.AfterFunc(end, func() { _ = c.f.SetWriteDeadline(time.Now()) })
	err := c.send(end)
	if !stop() {
		_ = c.f.SetWriteDeadline(time.Time{})
	}
	c.mu.Lock()
	c.stopped = time.Now()
	c.check()
	c.mu.Unlock()
	// Why the reader failed tells more than what that did to the sender.
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	if end.Err() != nil {
		return nil
	}
	return err
}

func (c *client) send(ctx context.Context) error {
	n := batch(c.o.size)
	if c.o.bi {
		n = 1 // each with its own time
	}
	packets := make([][]byte, n)
	for i := range packets {
		packets[i] = make([]byte, c.o.size)
	}
	pacer := kit.NewPacer(c.o.size, c.o.rate, c.o.spin)
	for sent := uint64(0); ; {
		due := n
		if c.o.flood {
			if err := ctx.Err(); err != nil {
				return err
			}
		} else {
			all, err := pacer.Wait(ctx, sent)
			if err != nil {
				return err
			}
			due = int(min(all-sent, uint64(n)))
		}
		for i, p := range packets[:due] {
			binary.NativeEndian.PutUint32(p, uint32(sent)+uint32(i))
		}
		// Counted before they leave: they may be back before the call is.
		c.sent.Store(sent + uint64(due))
		if c.o.bi {
			c.left[sent%window].Store(int64(time.Since(c.clock)) + 1)
		}
		k, err := c.f.WriteBatch(packets[:due])
		sent += uint64(k)
		if err != nil {
			c.sent.Store(sent)
			if errors.Is(err, o7serr.EMSGSIZE) {
				err = fmt.Errorf("%w; -s %d fits%s", err, c.f.MTU(), kit.SplitHint(c.f))
			}
			return err
		}
	}
}

// receive takes what comes: packets of a bidirectional test, and reports.
func (c *client) receive() error {
	bufs, sizes := make([][]byte, maxBatch), make([]int, maxBatch)
	for i := range bufs {
		bufs[i] = make([]byte, maxReport) // of packets the number is enough
	}
	for {
		n, err := c.f.ReadBatch(bufs, sizes)
		if err != nil {
			return err
		}
		now := time.Now()
		c.mu.Lock()
		for i, p := range bufs[:n] {
			switch p = p[:min(sizes[i], len(p))]; {
			case p[0] == '{' && c.reported(p):
				c.last = now
			case c.o.bi && sizes[i] == c.o.size:
				c.back(binary.NativeEndian.Uint32(p), now)
			}
		}
		c.check()
		c.mu.Unlock()
	}
}

// reported takes a report; false for what is none. c.mu is held.
func (c *client) reported(p []byte) bool {
	r, ok := decodeReport(p)
	if !ok {
		return false
	}
	if c.server == nil {
		close(c.hello)
	}
	c.server = &r
	return true
}

// back takes a packet that was sent back. c.mu is held.
func (c *client) back(seq uint32, now time.Time) {
	sent := uint32(c.sent.Load())
	if int32(seq-sent) >= 0 {
		return // none of ours
	}
	c.last = now
	if !c.track.add(seq) {
		return
	}
	c.bytes += uint64(c.o.size)
	if t := c.left[seq%window].Swap(0); t != 0 && sent-seq < window {
		note(c.rtt, now.Sub(c.clock)-time.Duration(t-1))
	}
}

// check notices that nothing more is to come. c.mu is held.
func (c *client) check() {
	if c.complete || c.stopped.IsZero() {
		return
	}
	if c.o.bi && c.track.packets >= c.sent.Load() || !c.o.bi && c.server != nil && c.server.Final {
		c.complete = true
		close(c.all)
	}
}

// rest waits for what is still to come: packets, or the result from a server
// of ours. An interrupt shortens that.
func (c *client) rest(ctx context.Context) (silent bool, err error) {
	patience := silence(c.f.QoS())
	if ctx.Err() != nil {
		if c.o.bi {
			return false, nil // it is known what came
		}
		patience = 2 * askEvery
	}
	ours := !isOpen(c.hello)
	if !c.o.bi && !ours {
		return false, nil // such a server tells nothing
	}
	if !c.o.bi {
		c.f.SetWriteTimeout(patience)
		if _, err := c.f.Write(config(confOurs | confEnd)); err != nil {
			return kit.Silent(err), notSilence(err)
		}
	}
	t := time.NewTicker(askEvery)
	defer t.Stop()
	for {
		select {
		case <-c.all:
			return false, nil
		case <-t.C:
		}
		c.mu.Lock()
		since := c.last
		if c.stopped.After(since) {
			since = c.stopped
		}
		c.mu.Unlock()
		if time.Since(since) >= patience {
			return true, nil
		}
		if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
			return false, cause
		}
		if !c.o.bi && c.o.qos.InOrder == 0 { // the question may be lost
			if _, err := c.f.Write(config(confOurs | confEnd)); err != nil {
				return kit.Silent(err), notSilence(err)
			}
		}
	}
}

func notSilence(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

func isOpen(c chan struct{}) bool {
	select {
	case <-c:
		return false
	default:
		return true
	}
}

// progress keeps what happens in each second, and prints it for who looks.
func (c *client) progress(ctx context.Context) {
	t := time.NewTicker(progressEvery)
	defer t.Stop()
	var sent, received, bytes uint64
	var begun time.Time
	var at float64
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			c.mu.Lock()
			if begun != c.start { // it begins only now
				begun, at = c.start, 0
			}
			i := interval{Start: at, End: now.Sub(begun).Seconds(), Transmitted: c.sent.Load() - sent}
			got, gotBytes := c.track.packets, c.bytes
			if !c.o.bi {
				got, gotBytes = 0, 0
				if c.server != nil {
					got, gotBytes = c.server.Packets, c.server.Bytes
				}
			}
			i.Received = got - min(received, got)
			d := time.Duration((i.End - i.Start) * 1e9)
			i.Bandwidth = mega(gotBytes-min(bytes, gotBytes), d) * 1e6
			if !c.o.bi && c.server == nil {
				i.Bandwidth = mega(i.Transmitted*uint64(c.o.size), d) * 1e6
			}
			if c.stopped.IsZero() && i.Transmitted > 0 && i.End > i.Start {
				c.intervals = append(c.intervals, i)
				if c.show != nil {
					fmt.Fprintln(c.show, i.line(c.o.bi, c.rtt))
				}
			}
			sent, received, bytes, at = c.sent.Load(), got, gotBytes, i.End
			c.mu.Unlock()
		}
	}
}

// interval is a second of a test.
type interval struct {
	Start       float64 `json:"start_s"`
	End         float64 `json:"end_s"`
	Transmitted uint64  `json:"transmitted"`
	Received    uint64  `json:"received"`      // as known at its end
	Bandwidth   float64 `json:"bandwidth_bps"` // received, or transmitted when that is not known
}

func (i interval) line(bi bool, rtt *hdrhistogram.Histogram) string {
	s := fmt.Sprintf("%6.1f s: %d packets transmitted, %d received, %.3f Mb/s", i.End, i.Transmitted, i.Received, i.Bandwidth/1e6)
	if bi && rtt.TotalCount() > 0 {
		s += fmt.Sprintf(", rtt p50/p99 so far %.3f/%.3f ms", float64(rtt.ValueAtQuantile(50))/1e6, float64(rtt.ValueAtQuantile(99))/1e6)
	}
	return s
}
