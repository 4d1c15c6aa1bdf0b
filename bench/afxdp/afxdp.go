// Package afxdp measures AF_XDP receive and transmit through fastpath/xsk and,
// side by side, through github.com/asavie/xdp, on veth pairs. It is what keeps
// the choice of having rings of our own honest.
package afxdp

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/o7s/o7s-router/bench/live"
	"github.com/o7s/o7s-router/bench/router"
	"github.com/o7s/o7s-router/bench/row"
	"github.com/o7s/o7s-router/bpf"
)

// The same for both libraries.
const (
	frames    = 8192 // in the Umem
	ringSize  = 4096
	fillSize  = 2 * ringSize // room even before the kernel says what it has taken
	batch     = 256
	frameSize = 2048
	runTime   = 500 * time.Millisecond
	userCPU   = 1 // the generator has the other one
)

// socket is one AF_XDP socket; the two libraries implement it.
type socket interface {
	// attach puts the library's program on the device and enters the socket.
	attach(dev netlink.Link) error
	// receive takes what has arrived, hands every frame to use, and gives the
	// memory back to the kernel.
	receive(use func([]byte)) (n int, err error)
	// send transmits a batch of frames whose content is there already.
	send() (n int, err error)
	close()
}

// Group is the rows of this package.
func Group() row.Group {
	return row.Group{
		Name: "AF_XDP", Rounds: 5, Setup: setup,
		Rows: []string{"asavie/rx", "asavie/tx", "xsk/rx", "xsk/tx"},
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
		id := fmt.Sprint("x", i)
		near, far, err := live.Pair("u"+id, "k"+id) // user space, kernel
		if err != nil {
			down()
			return nil, nil, err
		}
		downs = append(downs, func() { _ = netlink.LinkDel(near) })
		r := row.Row{Name: n, Unit: "Mpps", RatioTo: ratioTo[n]}
		open := openXSK
		if n == "asavie/rx" || n == "asavie/tx" {
			open = openAsavie
		}
		var d func()
		if n == "xsk/rx" || n == "asavie/rx" {
			r.Measure, d, err = receiver(open, near, far)
		} else {
			r.Measure, d, err = sender(open, near, far)
		}
		if err != nil {
			down()
			return nil, nil, fmt.Errorf("%s: %w", n, err)
		}
		downs = append(downs, d)
		rows = append(rows, r)
	}
	return rows, down, nil
}

var ratioTo = map[string]string{"xsk/rx": "asavie/rx", "xsk/tx": "asavie/tx"}

type measure = func(context.Context) (float64, error)

// receiver floods a socket from the kernel, whose half of the work (and the
// generator) has one core, user space the other. The generator never waits, so
// one of both is the limit: the kernel, or user space, and then the socket
// drops. User space reads the destination of each frame, as a demultiplexer does.
func receiver(open func(netlink.Link) (socket, error), near, far netlink.Link) (measure, func(), error) {
	s, err := open(near)
	if err != nil {
		return nil, nil, err
	}
	if err := s.attach(near); err != nil {
		s.close()
		return nil, nil, err
	}
	gen, err := live.NewGenerator(far, live.Config{
		Program: bpf.BenchProgGenO7s, Template: router.Frame(live.MAC(near)), First: 1, Count: 1000,
	})
	if err != nil {
		s.close()
		return nil, nil, err
	}
	var sum uint64
	use := func(f []byte) { sum += uint64(binary.LittleEndian.Uint32(f[18:])) }
	m := func(context.Context) (float64, error) {
		done, err := live.Pin(userCPU)
		if err != nil {
			return 0, err
		}
		defer done()
		sent := make(chan error, 1)
		go func() {
			_, _, err := gen.Fill(runTime)
			sent <- err
		}()
		n, took, err := drain(s, use, sent)
		if err != nil {
			return 0, err
		}
		return rate(n, took), nil
	}
	return m, func() { gen.Close(); s.close() }, nil
}

func rate(n int, d time.Duration) float64 { return float64(n) / float64(d.Nanoseconds()) * 1e3 }

// drain receives until the generator is done and the socket empty. The time is
// from the first frame to the last.
func drain(s socket, use func([]byte), sent <-chan error) (total int, took time.Duration, err error) {
	var first, last time.Time
	finished := false
	for empty := 0; ; {
		n, err := s.receive(use)
		if err != nil {
			return 0, 0, err
		}
		if n > 0 {
			last = time.Now()
			if total == 0 {
				first = last
			}
			total += n
			empty = 0
			continue
		}
		// The channel costs more than the ring: it is looked at now and then.
		if empty++; empty&0x3ff != 0 {
			continue
		}
		if finished {
			break
		}
		select {
		case err := <-sent:
			if err != nil {
				return 0, 0, err
			}
			finished = true
		default:
		}
	}
	if total == 0 {
		return 0, 0, errors.New("nothing was received")
	}
	return total, max(last.Sub(first), time.Microsecond), nil
}

// sender transmits to a sink in the kernel, which runs on the same core: when
// copying, the call that sends does all the work up to the sink. So the sender
// is the limit, unless it could not put anything on the ring.
func sender(open func(netlink.Link) (socket, error), near, far netlink.Link) (measure, func(), error) {
	sink, err := live.NewSink(far)
	if err != nil {
		return nil, nil, err
	}
	s, err := open(near)
	if err != nil {
		sink.Close()
		return nil, nil, err
	}
	m := func(context.Context) (float64, error) {
		done, err := live.Pin(userCPU)
		if err != nil {
			return 0, err
		}
		defer done()
		before, err := sink.Received()
		if err != nil {
			return 0, err
		}
		start, calls, idle := time.Now(), 0, 0
		for {
			n, err := s.send()
			if err != nil {
				return 0, err
			}
			if n == 0 {
				idle++
			}
			if calls++; calls&0xff == 0 && time.Since(start) >= runTime {
				break
			}
		}
		took := time.Since(start)
		after, err := sink.Received()
		if err != nil {
			return 0, err
		}
		if idle > calls/10 {
			return 0, fmt.Errorf("%w: %d of %d times there was nothing to send", live.ErrIdle, idle, calls)
		}
		if after == before {
			return 0, live.ErrLost
		}
		return float64(after-before) / float64(took.Nanoseconds()) * 1e3, nil
	}
	return m, func() { s.close(); sink.Close() }, nil
}
