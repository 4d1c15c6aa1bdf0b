// Package port opens network devices for the fast path: it attaches the XDP
// program, binds AF_XDP sockets to all receive queues, sends and receives
// frames, and watches the link.
//
// Where XDP is not possible, or would lose frames without telling, a port falls
// back: native XDP, generic XDP, packet socket. It says why, one line for each
// reason, and whether frames may be redirected into it.
package port

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/fastpath/xsk"
	"github.com/o7s/o7s-router/lib/packet"
)

// Mode is how a port is attached.
type Mode string

// Modes, fastest first.
const (
	ModeNative  Mode = "native"  // XDP in the driver
	ModeGeneric Mode = "generic" // XDP in the stack
	ModePacket  Mode = "packet"  // no XDP: a packet socket
)

// MaxQueues is the default of Config.MaxQueues.
const MaxQueues = 16

// Config of a port. Callbacks run on goroutines of the port, one at a time for
// each callback, possibly before Open has returned and never after Close has;
// they must not block and must not call Close.
type Config struct {
	Ifname string
	// Program loads the XDP program to attach; the port closes it. Nil: no XDP.
	Program func() (*ebpf.Program, error)
	// SetXSK enters the AF_XDP socket of a receive queue where the program
	// finds it; fd -1 removes it.
	SetXSK func(queue, fd int) error
	// Rx gets received frames, whole and with the MAC header, in batches: those
	// that XDP redirected to AF_XDP or, in packet mode, those of the EtherTypes.
	// Ownership of the buffers passes, the slice stays the port's.
	Rx func(frames []*packet.Buf)
	// EtherTypes are those that packet mode receives (host order); SetEtherTypes
	// changes them.
	EtherTypes []uint16
	// State tells that the link went down or came up: administratively down, no
	// carrier, device removed.
	State func(up bool)
	// Redirect tells that XDP must no longer redirect frames to the port, or may.
	Redirect func(ok bool)
	// ForceMode forbids faster modes; "" does not.
	ForceMode Mode
	// MaxQueues is how many receive queues SetXSK has room for; default MaxQueues.
	MaxQueues int
	// Spin is how long the receive goroutine looks for the next frame before it
	// sleeps; it burns a CPU for latency. 0: not at all.
	Spin time.Duration
	Log  *slog.Logger
}

// receiver is where frames come from.
type receiver interface {
	receive(out []*packet.Buf, c *counters) int // does not block
	pending() bool                              // something is to be received; safe while somebody receives
	watch(p *xsk.Poller) error
	dropped() uint64 // by the kernel, before receive saw them
	close() error
}

// Port is an open device. All methods are safe for concurrent use.
type Port struct {
	cfg   Config
	log   *slog.Logger
	name  string
	index int
	mac   [6]byte
	mode  Mode

	src      *sources // stays in the namespace the port was opened in
	xdp      link.Link
	rx       receiver
	rxPoller *xsk.Poller
	rxN      int         // frames in batch; receive goroutine
	rxIdle   atomic.Bool // it has handed on all that it received
	batch    [batchSize]*packet.Buf
	txqs     []*txq
	maxFrame int // that fits the transmit frames, bytes
	watcher  *watcher

	c      counters
	mtu    atomic.Int32
	up     atomic.Bool
	closed atomic.Bool
	done   chan struct{}
	txWake chan struct{}
	wg     sync.WaitGroup

	rxMu sync.RWMutex // guards rx against being closed while Settle looks at it

	mu       sync.Mutex // guards what follows
	dev      Device     // newest knowledge
	reasons  []string   // that do not change
	redirect bool
	why      string // why redirect is false
}

// counters are of a whole port.
type counters struct {
	rxFrames, rxBytes, rxDropped           atomic.Uint64
	txFrames, txBytes                      atomic.Uint64
	txDropped, txLost, txRetries, txErrors atomic.Uint64
}

// Counters of frames since the port was opened.
type Counters struct {
	RxFrames, RxBytes uint64
	RxDropped         uint64 // user space was too slow, or the frame too long
	TxFrames, TxBytes uint64 // handed to the kernel
	TxDropped         uint64 // by the port: link down, queue full, too long
	TxLost            uint64 // of TxFrames: refused by the device
	TxRetries         uint64 // times the device was busy
	TxErrors          uint64 // times sending failed: link down, device gone
}

// Open opens a device of the calling thread's network namespace (lock the
// thread when that is not the process's). A mode that does not work is not an
// error but a Reason; a device that is not there is.
func Open(cfg Config) (*Port, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxQueues <= 0 {
		cfg.MaxQueues = MaxQueues
	}
	if cfg.Rx == nil {
		return nil, errors.New("port: nobody receives")
	}
	src, err := newSources()
	if err != nil {
		return nil, err
	}
	p := &Port{
		cfg: cfg, log: cfg.Log, name: cfg.Ifname, src: src, done: make(chan struct{}),
		txWake: make(chan struct{}, 1),
	}
	if err := p.open(); err != nil {
		p.closed.Store(true)
		return nil, errors.Join(fmt.Errorf("open port %s: %w", cfg.Ifname, err), p.release())
	}
	for _, r := range p.Reasons() {
		p.log.Warn("port is degraded", "ifname", p.name, "mode", string(p.mode), "reason", r)
	}
	p.log.Info("port opened", "ifname", p.name, "mode", string(p.mode), "driver", p.dev.driver(), "mtu", p.MTU(),
		"queues", p.dev.RxQueues, "up", p.Up())
	p.wg.Add(3)
	go p.watchLoop()
	go p.txLoop()
	go p.rxLoop()
	return p, nil
}

func (p *Port) open() error {
	l, err := p.src.route.LinkByName(p.name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return errors.New("no such network interface")
	}
	if err != nil {
		return err
	}
	p.index = l.Attrs().Index
	if t := l.Attrs().EncapType; t != "ether" && t != "loopback" {
		return fmt.Errorf("not an Ethernet device (%s)", t)
	}
	copy(p.mac[:], l.Attrs().HardwareAddr)
	// Listen before looking, so that no change falls between.
	if p.watcher, err = newWatcher(p.index, p.src.xdp); err != nil {
		return err
	}
	if l, err = p.src.route.LinkByIndex(p.index); err != nil {
		return err
	}
	p.dev = p.src.device(l)
	p.mtu.Store(int32(p.dev.MTU))
	p.up.Store(p.dev.Up)
	p.maxFrame = longestFrame

	if why := p.openFast(); why != "" {
		p.reasons = append(p.reasons, why)
	}
	if p.mode == "" {
		if err := p.openSlow(); err != nil {
			return err
		}
	}
	// Attaching changes what the kernel says about the device.
	if l, err := p.src.route.LinkByIndex(p.index); err == nil {
		p.dev = p.src.device(l)
	}
	p.reasons = slices.Concat(p.reasons, p.src.advice(p.dev))
	p.redirect, p.why = p.src.redirectable(p.dev, p.mode == ModeNative)
	if p.rxPoller, err = xsk.NewPoller(p.fillBatch); err != nil {
		return err
	}
	return p.rx.watch(p.rxPoller)
}

// openFast attaches XDP if that works, and says what does not.
func (p *Port) openFast() (why string) {
	switch {
	case p.cfg.Program == nil:
		return "no XDP program: packet socket"
	case p.cfg.ForceMode == ModePacket:
		return "packet mode was asked for"
	}
	if why := p.dev.obstacle(p.cfg.MaxQueues); why != "" {
		return why
	}
	prog, err := p.cfg.Program()
	if err != nil {
		return fmt.Sprintf("XDP program cannot be loaded: %v: packet socket", err)
	}
	defer prog.Close()

	frameSize := xsk.MinFrame
	if p.dev.MTU+ethHeader > xsk.MaxLen(frameSize) {
		frameSize = xsk.MaxFrame
	}
	x, err := openXDP(p.dev, frameSize)
	if err != nil {
		return fmt.Sprintf("no AF_XDP on %s: %v: packet socket", p.name, err)
	}
	for i, q := range x.queues {
		if err = p.cfg.SetXSK(i, q.sock.FD()); err != nil {
			err = fmt.Errorf("enter AF_XDP socket: %w", err)
			break
		}
	}
	var mode Mode
	if err == nil {
		p.xdp, mode, why, err = p.attach(prog)
	}
	if err != nil {
		p.forget(x)
		return errors.Join(fmt.Errorf("%w: packet socket", err), x.close()).Error()
	}
	p.mode, p.rx, p.maxFrame = mode, x, frameSize
	for _, q := range x.queues {
		if q.txTotal > 0 {
			p.txqs = append(p.txqs, newTxq(q, &p.c))
		}
	}
	return why
}

// forget takes sockets out of where the program finds them. The kernel does the
// same when a socket is closed, so an error does not matter.
func (p *Port) forget(x *xdpReceiver) {
	for i := range x.queues {
		_ = p.cfg.SetXSK(i, -1)
	}
}

// attach attaches the program in the best mode, and says why it is not native.
func (p *Port) attach(prog *ebpf.Program) (l link.Link, mode Mode, why string, err error) {
	o := link.XDPOptions{Program: prog, Interface: p.index, Flags: link.XDPDriverMode}
	if p.cfg.ForceMode == ModeGeneric {
		why = "generic mode was asked for"
	} else {
		if l, err = link.AttachXDP(o); err == nil {
			return l, ModeNative, "", nil
		}
		switch {
		case errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST): // since we looked
			return nil, "", "", fmt.Errorf("a foreign XDP program is attached to %s and stays", p.name)
		case p.dev.Veth && errors.Is(err, unix.ERANGE):
			mtu := p.dev.MTU
			if peer, err := p.src.peer(p.dev); err == nil {
				mtu = peer.MTU
			}
			why = tooLarge(p.dev, mtu)
		case errors.Is(err, unix.EOPNOTSUPP):
			why = fmt.Sprintf("driver %s has no native XDP: generic mode, about 2.7 times slower", p.dev.driver())
		default:
			why = fmt.Sprintf("native XDP on %s: %v: generic mode", p.name, err)
		}
	}
	o.Flags = link.XDPGenericMode
	if l, err = link.AttachXDP(o); err != nil {
		return nil, "", "", fmt.Errorf("attach XDP to %s: %w", p.name, err)
	}
	return l, ModeGeneric, why, nil
}

// openSlow opens the packet socket.
func (p *Port) openSlow() error {
	s, err := openPacket(p.dev, p.cfg.EtherTypes)
	if err != nil {
		return err
	}
	p.mode, p.rx = ModePacket, s
	p.txqs = []*txq{newTxq(s, &p.c)}
	return nil
}

// fillBatch receives if the batch is empty and tells whether there is one.
func (p *Port) fillBatch() bool {
	if p.rxN == 0 {
		p.rxIdle.Store(false)
		p.rxN = p.rx.receive(p.batch[:], &p.c)
		p.rxIdle.Store(p.rxN == 0)
	}
	return p.rxN > 0
}

// settleFor bounds Settle: a port that is flooded may never be at rest.
const settleFor = time.Millisecond

// Settle waits until the frames that had arrived for user space when it was
// called were handed to Rx, and Rx has returned, or for a millisecond. Rx must
// not call it.
func (p *Port) Settle() {
	p.rxMu.RLock()
	defer p.rxMu.RUnlock()
	for end := time.Now().Add(settleFor); !p.closed.Load() && (p.rx.pending() || !p.rxIdle.Load()); {
		if time.Now().After(end) {
			return
		}
		time.Sleep(20 * time.Microsecond)
	}
}

func (p *Port) rxLoop() {
	defer p.wg.Done()
	for p.rxPoller.Wait(p.cfg.Spin) == nil {
		n := p.rxN
		p.rxN = 0
		p.cfg.Rx(p.batch[:n])
		clear(p.batch[:n])
	}
}

// SetEtherTypes says which EtherTypes (host order) packet mode receives. In
// other modes the XDP program decides.
func (p *Port) SetEtherTypes(types []uint16) error {
	s, ok := p.rx.(*packetSocket)
	if !ok {
		return nil
	}
	if err := s.setEtherTypes(types); err != nil {
		return fmt.Errorf("port %s: %w", p.name, err)
	}
	return nil
}

// update takes in a change of the link. Called by the watcher.
func (p *Port) update(l netlink.Link) {
	a := l.Attrs()
	p.mtu.Store(int32(a.MTU))
	p.mu.Lock()
	d := p.dev
	p.mu.Unlock()
	d.Name, d.MTU, d.Up = a.Name, a.MTU, linkUp(a)
	p.src.abilities(&d)
	ok, why := p.src.redirectable(d, p.mode == ModeNative) // slow: may search namespaces
	p.mu.Lock()
	changed := ok != p.redirect
	p.dev, p.redirect, p.why = d, ok, why
	p.mu.Unlock()

	if changed {
		if ok {
			p.log.Info("port takes redirected frames", "ifname", p.name)
		} else {
			p.log.Warn("port is degraded", "ifname", p.name, "mode", string(p.mode), "reason", why)
		}
		if f := p.cfg.Redirect; f != nil {
			f(ok)
		}
	}
	p.setUp(linkUp(a))
}

// removed takes in that the device is gone, or in another namespace.
func (p *Port) removed() {
	p.mu.Lock()
	p.dev.Up = false
	changed := p.redirect
	p.redirect, p.why = false, p.name+" was removed"
	p.mu.Unlock()
	p.log.Warn("device was removed", "ifname", p.name)
	if f := p.cfg.Redirect; changed && f != nil {
		f(false)
	}
	p.setUp(false)
}

func (p *Port) setUp(up bool) {
	if p.up.Swap(up) == up {
		return
	}
	p.log.Debug("link state", "ifname", p.name, "up", up)
	if up {
		p.wakeTx() // what was left on the rings
	}
	if f := p.cfg.State; f != nil {
		f(up)
	}
}

// Ifname is the name the port was opened by.
func (p *Port) Ifname() string { return p.name }

// Index is the device's index in its namespace.
func (p *Port) Index() int { return p.index }

// MAC is the hardware address at the time of opening.
func (p *Port) MAC() [6]byte { return p.mac }

// MTU is the largest Ethernet payload at present, bytes.
func (p *Port) MTU() int { return int(p.mtu.Load()) }

// Mode is how the port is attached. It does not change.
func (p *Port) Mode() Mode { return p.mode }

// Up tells whether the link is up: administratively, and with a carrier.
func (p *Port) Up() bool { return p.up.Load() }

// Redirectable tells whether XDP may redirect frames into the port without
// losing them silently, and why not. Config.Redirect reports changes.
func (p *Port) Redirectable() (bool, string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.redirect, p.why
}

// Reasons says, one line each, why the mode is not native and what about the
// device loses packets or time at present.
func (p *Port) Reasons() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := slices.Clone(p.reasons)
	if p.why != "" {
		r = append(r, p.why)
	}
	return r
}

// Counters returns the port's counters.
func (p *Port) Counters() Counters {
	c := &p.c
	n := Counters{
		RxFrames: c.rxFrames.Load(), RxBytes: c.rxBytes.Load(), RxDropped: c.rxDropped.Load(),
		TxFrames: c.txFrames.Load(), TxBytes: c.txBytes.Load(), TxDropped: c.txDropped.Load(), TxLost: c.txLost.Load(),
		TxRetries: c.txRetries.Load(), TxErrors: c.txErrors.Load(),
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed.Load() {
		n.RxDropped += p.rx.dropped()
	}
	return n
}

// Report tells all about the port.
func (p *Port) Report() Report {
	r := Report{Mode: p.mode, Reasons: p.Reasons(), Counters: p.Counters()}
	p.mu.Lock()
	defer p.mu.Unlock()
	r.Device, r.Redirectable = p.dev, p.redirect
	r.Device.MAC = net.HardwareAddr(p.mac[:])
	return r
}

// Close detaches the program, releases the device, and waits for the port's
// goroutines. Callbacks have ended when it returns.
func (p *Port) Close() error {
	p.mu.Lock()
	if p.closed.Swap(true) {
		p.mu.Unlock()
		return nil
	}
	p.mu.Unlock()
	return p.release()
}

// release undoes whatever part of open was done. Closed is set.
func (p *Port) release() error {
	var errs []error
	if p.xdp != nil { // first: nothing new comes
		errs = append(errs, p.xdp.Close())
	}
	close(p.done)
	if p.rxPoller != nil {
		errs = append(errs, p.rxPoller.Close())
	}
	if p.watcher != nil {
		_ = p.watcher.poller.Close() // ends the goroutine; the rest below
	}
	p.wg.Wait()
	for _, b := range p.batch[:p.rxN] {
		b.Release()
	}
	for _, t := range p.txqs {
		t.close()
	}
	if x, ok := p.rx.(*xdpReceiver); ok {
		p.forget(x)
	}
	if p.rx != nil {
		p.rxMu.Lock()
		errs = append(errs, p.rx.close())
		p.rxMu.Unlock()
	}
	if p.watcher != nil {
		p.watcher.close()
	}
	p.src.close()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close port %s: %w", p.name, err)
	}
	return nil
}
