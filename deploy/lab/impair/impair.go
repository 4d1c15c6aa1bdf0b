// Package impair is a user-space relay that makes a link between two hosts bad:
// it takes the frames of one device, loses, delays, duplicates, reorders or
// throttles them, and sends the others out of a second device, in both
// directions. It does what the kernel's netem does, on kernels without it.
//
// The chances come from a seeded generator for each direction: the nth frame of
// a direction meets the same fate in every run with the same seed.
//
// Frames stay in one memory for packets from arrival to departure (AF_XDP,
// package xsk), so that the relay takes little from the machine on which both
// ends run, too: at 300 Mbit/s about an eighth of a processor, with what the
// receiving end's kernel does for each frame that the relay hands to it.
package impair

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/fastpath/xsk"
)

const (
	// frames is the memory of a relay: 20 ms of 10 Gbit/s of long frames, in
	// both directions together. Pages are touched as they are needed.
	frames   = 1 << 15
	ringSize = 4096
	batch    = 256
	// tick is how often a busy relay looks at its rings instead of being woken
	// for each frame; delays are exact to about two of them.
	tick = 200 * time.Microsecond
	// calm is how long without a frame makes a relay wait for the next one.
	calm = 2 * time.Millisecond
	// sendBuffer lets a copying socket have all of its frames under way, bytes.
	sendBuffer = 8 << 20
	// stopEvery is how often an idle relay looks whether it is to end.
	stopEvery = 50 * time.Millisecond
)

// MaxMTU is the largest MTU of a device that a relay takes, in bytes.
const MaxMTU = xsk.MaxFrame - unix.XDP_PACKET_HEADROOM - frameTail - ethHeader

const (
	ethHeader = 14
	// frameTail is what the kernel keeps behind a frame that a native program
	// sees, within its page.
	frameTail = 320
)

// Config of a relay.
type Config struct {
	// Devices are the two to connect, in the network namespace of the thread
	// that calls New. The relay must be the only user of their first queue, and
	// of their XDP hook.
	Devices [2]string
	// Impair is for the frames that Devices[i] receives.
	Impair [2]Impairment
	Seed   uint64
}

// Both is the same impairment in both directions.
func Both(im Impairment) [2]Impairment { return [2]Impairment{im, im} }

// Check reports values that make no sense.
func (im Impairment) Check() error {
	for _, p := range []float64{im.Loss, im.Duplicate, im.Reorder} {
		if !(p >= 0 && p <= 1) {
			return fmt.Errorf("impair: share %v is not between 0 and 1", p)
		}
	}
	if im.Delay < 0 || im.HoldBack < 0 || im.Backlog < 0 || im.Rate < 0 {
		return errors.New("impair: negative delay or rate")
	}
	return nil
}

// Relay connects two devices. Set and Stats may be called at any time, from any
// goroutine.
type Relay struct {
	umem   *xsk.Umem
	sides  [2]side
	impair [2]atomic.Pointer[Impairment]
	free   []uint64 // frames that are nowhere
	descs  []xsk.Desc
	addrs  []uint64
	shown  atomic.Pointer[Stats]
}

// side is a device, and the line of the frames that come from it.
type side struct {
	sock *xsk.Socket
	prog *ebpf.Program
	xsks *ebpf.Map
	hook link.Link
	line *line
	held []xsk.Desc // to be sent here, and the ring had no room

	empty int // frames that the fill ring lacks
}

// Stats are the counters of the frames that each device received.
type Stats struct {
	Lines [2]Counters
	// Kernel counts frames that the kernel dropped on the way to the relay: when
	// it is not 0 the machine was too slow for what was asked of it.
	Kernel [2]uint64
}

// New attaches a relay to its devices. It needs root. Frames pass when Run runs.
func New(c Config) (*Relay, error) {
	for i := range c.Impair {
		if err := c.Impair[i].Check(); err != nil {
			return nil, err
		}
	}
	mtu := 0
	var ifs [2]*net.Interface
	for i, name := range c.Devices {
		dev, err := net.InterfaceByName(name)
		if err != nil {
			return nil, fmt.Errorf("impair: device %s: %w", name, err)
		}
		ifs[i], mtu = dev, max(mtu, dev.MTU)
	}
	if mtu > MaxMTU {
		return nil, fmt.Errorf("impair: mtu %d, a relay takes up to %d", mtu, MaxMTU)
	}
	size := xsk.MinFrame
	if mtu+ethHeader > xsk.MaxLen(size) {
		size = xsk.MaxFrame
	}
	u, err := xsk.NewUmem(frames, size)
	if err != nil {
		return nil, err
	}
	r := &Relay{umem: u, free: make([]uint64, frames), descs: make([]xsk.Desc, batch), addrs: make([]uint64, batch)}
	r.free = r.free[:u.Alloc(r.free)]
	r.Set(c.Impair)
	r.shown.Store(new(Stats))
	for i := range r.sides {
		r.sides[i].line = newLine(c.Seed, uint64(i))
		if err := r.attach(&r.sides[i], ifs[i]); err != nil {
			r.close()
			return nil, fmt.Errorf("impair: device %s: %w", c.Devices[i], err)
		}
	}
	return r, nil
}

// attach opens the socket of a device and sends all that it receives there.
func (r *Relay) attach(s *side, dev *net.Interface) (err error) {
	s.sock, err = xsk.Open(r.umem, xsk.Config{
		Ifindex: dev.Index, Rx: ringSize, Fill: 2 * ringSize, Tx: ringSize, Completion: ringSize,
		SendBuffer: sendBuffer, Batch: batch,
	})
	if err != nil {
		return err
	}
	r.fill(s, ringSize)
	s.xsks, err = ebpf.NewMap(&ebpf.MapSpec{Name: "impair_xsks", Type: ebpf.XSKMap, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		return err
	}
	if err := s.xsks.Put(uint32(0), uint32(s.sock.FD())); err != nil {
		return err
	}
	const rxQueueIndex = 16 // in struct xdp_md
	s.prog, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "impair", Type: ebpf.XDP, License: "BSD",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, rxQueueIndex, asm.Word),
			asm.LoadMapPtr(asm.R1, s.xsks.FD()),
			asm.Mov.Imm(asm.R3, 1), // XDP_DROP, for a queue that nobody has
			asm.FnRedirectMap.Call(),
			asm.Return(),
		},
	})
	if err != nil {
		return fmt.Errorf("load program: %w", err)
	}
	s.hook, err = link.AttachXDP(link.XDPOptions{Program: s.prog, Interface: dev.Index, Flags: link.XDPDriverMode})
	if err != nil {
		return fmt.Errorf("attach program: %w", err)
	}
	return nil
}

// Set changes what happens to frames that arrive from now on; see Check.
func (r *Relay) Set(im [2]Impairment) {
	for i := range im {
		r.impair[i].Store(&im[i])
	}
}

// Stats returns the counters; those of a frame follow it within
// microseconds.
func (r *Relay) Stats() Stats { return *r.shown.Load() }

// Run passes frames until the context ends, and then detaches the relay from
// its devices for good. The error is nil then.
func (r *Relay) Run(ctx context.Context) error {
	runtime.LockOSThread() // for its timer slack; the thread ends with Run
	// A sleep of 200 us would take 250 with the usual slack.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0) // only less exact without
	defer r.close()
	last := time.Now()
	for ctx.Err() == nil {
		n := 0
		now := nanotime()
		for i := range r.sides {
			n += r.receive(i, now)
		}
		for i := range r.sides {
			if err := r.send(i, nanotime()); err != nil {
				return err
			}
		}
		if n > 0 {
			last = time.Now()
		}
		r.show()
		if err := r.wait(time.Since(last) < calm && r.delays()); err != nil {
			return err
		}
	}
	return nil
}

var epoch = time.Now()

func nanotime() int64 { return int64(time.Since(epoch)) }

// delays reports whether frames wait long enough to be looked after in ticks.
func (r *Relay) delays() bool {
	return r.impair[0].Load().Delay >= 10*tick && r.impair[1].Load().Delay >= 10*tick
}

// receive takes what device i has received.
func (r *Relay) receive(i int, now int64) (n int) {
	s, im := &r.sides[i], r.impair[i].Load()
	for {
		k := s.sock.Receive(r.descs)
		for _, d := range r.descs[:k] {
			copies := s.line.offer(now, im, d.Addr, d.Len, func() (uint64, bool) {
				a, ok := r.take()
				if ok {
					a += d.Addr - r.umem.Base(d.Addr)
					copy(r.umem.Bytes(xsk.Desc{Addr: a, Len: d.Len}), r.umem.Bytes(d))
				}
				return a, ok
			})
			if copies == 0 {
				r.free = append(r.free, r.umem.Base(d.Addr))
			}
		}
		n += k
		s.empty += k
		if k < len(r.descs) {
			// When all memory is under way the kernel drops until some is free.
			s.empty -= r.fill(s, s.empty)
			return n
		}
	}
}

func (r *Relay) take() (uint64, bool) {
	n := len(r.free)
	if n == 0 {
		return 0, false
	}
	a := r.free[n-1]
	r.free = r.free[:n-1]
	return a, true
}

// fill gives the device n frames to receive into, and returns how many it got.
func (r *Relay) fill(s *side, n int) int {
	n = min(n, len(r.free))
	k := s.sock.Fill(r.free[len(r.free)-n:])
	// Fill takes the first ones: what it left moves to where they were.
	at := len(r.free) - n
	r.free = append(r.free[:at], r.free[at+k:]...)
	return k
}

// send sends the frames from device i that are due out of the other.
func (r *Relay) send(i int, now int64) error {
	l, to := r.sides[i].line, &r.sides[1-i]
	for {
		for {
			k := to.sock.Complete(r.addrs)
			for _, a := range r.addrs[:k] {
				r.free = append(r.free, r.umem.Base(a))
			}
			if k < len(r.addrs) {
				break
			}
		}
		for len(to.held) < batch {
			f, ok := l.pop(now)
			if !ok {
				break
			}
			to.held = append(to.held, xsk.Desc{Addr: f.addr, Len: f.size})
		}
		if len(to.held) == 0 && to.sock.Unsent() == 0 {
			return nil
		}
		k := to.sock.Transmit(to.held)
		to.held = append(to.held[:0], to.held[k:]...)
		l.n.Sent += uint64(k)
		switch err := to.sock.Kick(); err {
		case nil, unix.EAGAIN, unix.EBUSY:
		case unix.ENOBUFS:
			return nil // later
		case unix.ENETDOWN, unix.ENXIO:
			return nil // the link is down: as on a wire, they wait and are lost
		default:
			return fmt.Errorf("impair: send: %w", err)
		}
		if k == 0 && to.sock.Unsent() > 0 {
			return nil // the device takes no more now
		}
	}
}

// show publishes the counters when they have changed.
func (r *Relay) show() {
	was := r.shown.Load()
	if r.sides[0].line.n == was.Lines[0] && r.sides[1].line.n == was.Lines[1] {
		return
	}
	var st Stats
	for i := range r.sides {
		st.Lines[i] = r.sides[i].line.n
		if k, err := r.sides[i].sock.Stats(); err == nil {
			st.Kernel[i] = k.RxDropped + k.RxRingFull
		}
	}
	r.shown.Store(&st)
}

// wait sleeps until there may be something to do: to the next tick when busy,
// else until a frame arrives or is due.
func (r *Relay) wait(busy bool) error {
	d := stopEvery
	now := nanotime()
	for i := range r.sides {
		if due, ok := r.sides[i].line.next(); ok {
			d = min(d, time.Duration(max(due-now, 0)))
		}
	}
	var fds []unix.PollFd
	if busy {
		d = tick
	} else {
		fds = []unix.PollFd{
			{Fd: int32(r.sides[0].sock.FD()), Events: unix.POLLIN},
			{Fd: int32(r.sides[1].sock.FD()), Events: unix.POLLIN},
		}
	}
	ts := unix.NsecToTimespec(int64(d))
	if _, err := unix.Ppoll(fds, &ts, nil); err != nil && err != unix.EINTR {
		return fmt.Errorf("impair: wait: %w", err)
	}
	return nil
}

func (r *Relay) close() {
	for i := range r.sides {
		s := &r.sides[i]
		if s.hook != nil {
			_ = s.hook.Close() // nothing is left to do about it, here and below
		}
		if s.prog != nil {
			_ = s.prog.Close()
		}
		if s.xsks != nil {
			_ = s.xsks.Close()
		}
		if s.sock != nil {
			_ = s.sock.Close()
		}
	}
	_ = r.umem.Close()
}
