// Package ovpn carries IP packets, or Ethernet frames, over flows (spec 45
// §11.6): with the options of the reference, and more.
//
// A message is one raw IP packet as a TUN device has it, without packet
// information; with --tap one Ethernet frame. A server takes any number of
// clients: it forwards packets by the addresses that it saw behind them, frames
// as a learning switch.
package ovpn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	"github.com/o7s/o7s-router/lib/qos"
)

const (
	defaultMTU = 1500
	minMTU     = 576 // RFC 791: what every host takes
	maxMTU     = 65535
	maxPeers   = 256
	// How often a client tells its address, and how soon after the first time.
	helloEvery, helloAgain = 15 * time.Second, time.Second
	// How long a client waits before it allocates again.
	retryFirst, retryMost = 500 * time.Millisecond, 10 * time.Second

	batchMemory = 256 << 10
	maxBatch    = 32
)

type options struct {
	name   string
	ip     string
	mask   string
	addr   netip.Prefix // of ip and mask
	tap    bool
	dev    string
	mtu    int
	qos    qos.Spec
	retry  bool
	help   bool
	runDir string
}

const usage = `Usage: ovpn [OPTION]...
Carries IP packets between hosts over flows. A server accepts clients.

  -n, --name NAME         run as client of the server NAME
  -i, --ip ADDRESS        address of the device, IPv4 or IPv6
  -m, --mask MASK         mask of the address, 255.255.255.0 or 24
      --tap               carry Ethernet frames instead; -i and -m may be left out
      --dev NAME          name of the device (default: ovpn%d or otap%d, by number)
      --mtu N             the device's MTU at most, 576 to 65535 (default: 1500)
  -q, --qos QOS           raw, best, video, voice or data (default: raw)
      --retry             as a client, allocate again when the flow ends

      --run-dir DIR       run directory of the daemon (default: $O7S_RUN_DIR)
      --help              print this text

The MTU of the device is what the flows carry, if that is less. Root, or
CAP_NET_ADMIN, is needed.
`

func parseArgs(args []string) (options, error) {
	o := options{mtu: defaultMTU, qos: qos.Raw}
	err := kit.Parse(args, []kit.Opt{
		kit.String("n", "name", &o.name),
		kit.String("i", "ip", &o.ip),
		kit.String("m", "mask", &o.mask),
		kit.Flag("", "tap", &o.tap),
		kit.String("", "dev", &o.dev),
		kit.Int("", "mtu", &o.mtu, minMTU, maxMTU),
		kit.QoS("q", "qos", &o.qos),
		kit.Flag("", "retry", &o.retry),
		kit.Flag("h", "help", &o.help),
		kit.String("", "run-dir", &o.runDir),
	})
	if err != nil || o.help {
		return o, err
	}
	switch {
	case o.tap && o.ip == "" && o.mask == "":
	case o.ip == "":
		return o, errors.New("expected -i ADDRESS and -m MASK")
	default:
		if o.addr, err = prefix(o.ip, o.mask); err != nil {
			return o, err
		}
	}
	switch {
	case o.retry && o.name == "":
		return o, errors.New("--retry is for a client (-n)")
	case o.dev == "" && o.tap:
		o.dev = "otap%d"
	case o.dev == "":
		o.dev = "ovpn%d"
	case len(o.dev) > 15 || strings.ContainsAny(o.dev, "/ "):
		return o, fmt.Errorf("--dev %s: expected at most 15 letters and digits", o.dev)
	}
	return o, nil
}

// prefix is an address with its mask, which may be in ip.
func prefix(ip, mask string) (netip.Prefix, error) {
	if a, bits, ok := strings.Cut(ip, "/"); ok && mask == "" {
		ip, mask = a, bits
	}
	a, err := netip.ParseAddr(ip)
	if err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
		return netip.Prefix{}, fmt.Errorf("-i %s: expected an address such as 10.0.0.1", ip)
	}
	a = a.Unmap()
	if mask == "" {
		return netip.Prefix{}, errors.New("expected -m MASK, such as 255.255.255.0 or 24")
	}
	n, err := strconv.Atoi(mask)
	if m := net.ParseIP(mask).To4(); err != nil && m != nil && a.Is4() {
		var bits int
		if n, bits = net.IPMask(m).Size(); bits != 0 {
			err = nil
		}
	}
	if err != nil || n < 1 || n > a.BitLen() {
		return netip.Prefix{}, fmt.Errorf("-m %s: expected a mask such as 255.255.255.0 or 24", mask)
	}
	return netip.PrefixFrom(a, n), nil
}

// Main runs the tool with the arguments after its name and returns its exit
// status. An interrupt ends it.
func Main(args []string, stdout, stderr io.Writer) int {
	o, err := parseArgs(args)
	if err != nil {
		return kit.Wrong(stderr, "ovpn", err)
	}
	if o.help {
		_, _ = io.WriteString(stdout, usage)
		return 0
	}
	ctx, stop := kit.Interruptible()
	defer stop()
	n, done := kit.Library(o.runDir, "ovpn", args)
	defer done()
	return run(ctx, n, o, stdout, stderr)
}

func run(ctx context.Context, n kit.Network, o options, stdout, stderr io.Writer) int {
	// Before anything else: it tells whether the rights are there.
	dev, err := openTUN(o.dev, o.tap)
	if err != nil {
		fmt.Fprintf(stderr, "ovpn: %v\n", err)
		return 1
	}
	t := &tunnel{o: o, net: n, dev: dev, out: kit.NewPrinter(stdout), stderr: stderr, hub: newHub(dev, o.tap, o.addr, o.mtu)}
	defer t.out.Flush()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer dev.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() {
		defer cancel()
		t.pump(ctx)
	})
	if o.name != "" {
		return t.client(ctx)
	}
	if err := t.up(); err != nil {
		fmt.Fprintf(stderr, "ovpn: %v\n", err)
		return 1
	}
	return kit.Serve(ctx, n, maxPeers, "ovpn", kit.After(t.out, stderr), func(ctx context.Context, f kit.Flow) { _ = t.carry(ctx, f) })
}

// tunnel is a running ovpn.
type tunnel struct {
	o      options
	net    kit.Network
	dev    *tun
	hub    *hub
	out    *kit.Printer
	stderr io.Writer
	isUp   bool // of the goroutine that runs client or run
}

// up switches the device on, once.
func (t *tunnel) up() error {
	if t.isUp {
		return nil
	}
	if t.dev.MTU() == 0 {
		if err := t.dev.SetMTU(t.o.mtu); err != nil {
			return err
		}
	}
	if err := t.dev.up(t.o.addr); err != nil {
		return err
	}
	t.isUp = true
	what := "without an address"
	if t.o.addr.IsValid() {
		what = t.o.addr.String()
	}
	t.out.Line(fmt.Sprintf("Device %s is up: %s, MTU %d.", t.dev.name, what, t.dev.MTU()))
	return nil
}

// pump takes the packets of the device.
func (t *tunnel) pump(ctx context.Context) {
	b := make([]byte, maxPacket)
	for {
		n, err := t.dev.Read(b)
		switch {
		case errors.Is(err, os.ErrClosed):
			return
		case err != nil:
			if ctx.Err() == nil {
				fmt.Fprintf(kit.After(t.out, t.stderr), "ovpn: device %s: %v\n", t.dev.name, err)
			}
			return
		}
		t.hub.fromDevice(b[:n])
	}
}

// client keeps a flow to the server.
func (t *tunnel) client(ctx context.Context) int {
	wait := retryFirst
	for {
		t.out.Line(fmt.Sprintf("Allocating a flow to %s.", t.o.name))
		t.out.Flush()
		f, err := t.net.Alloc(ctx, t.o.name, t.o.qos)
		switch {
		case ctx.Err() != nil:
			if err == nil {
				f.Close()
			}
			return 0
		case err != nil:
			fmt.Fprintln(kit.After(t.out, t.stderr), kit.Explain("Failed to allocate flow", err))
		default:
			wait = retryFirst
			stop := context.AfterFunc(ctx, func() { f.Close() })
			err = t.carry(ctx, f)
			stop()
			f.Close()
			if ctx.Err() != nil {
				return 0
			}
			if errors.Is(err, errDevice) {
				return 1
			}
		}
		if !t.o.retry {
			return 1
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return 0
		}
		wait = min(2*wait, retryMost)
	}
}

// errDevice says that the device cannot be used.
var errDevice = errors.New("device")

// carry takes the packets of a flow until it ends.
func (t *tunnel) carry(ctx context.Context, f kit.Flow) error {
	fd := f.FD()
	p, err := t.hub.join(f)
	defer t.hub.leave(p)
	if err == nil && t.o.name != "" {
		err = t.up()
	}
	if err != nil {
		fmt.Fprintf(kit.After(t.out, t.stderr), "ovpn: %v\n", err)
		return fmt.Errorf("%w: %w", errDevice, err)
	}
	t.out.Line(fmt.Sprintf("New flow %d.", fd))
	stop := t.greet(f)
	defer stop()
	err = t.receive(p)
	if ctx.Err() != nil {
		return err
	}
	switch {
	case kit.Silent(err):
		t.out.Line(fmt.Sprintf("Flow %d timed out.", fd))
	case kit.Ended(err):
		t.out.Line(fmt.Sprintf("Flow %d closed.", fd))
	default:
		fmt.Fprintf(kit.After(t.out, t.stderr), "ovpn: flow %d: %v\n", fd, err)
	}
	return err
}

// greet tells the server the address of a client's device, again and again
// until stop: it may get lost, and an address seen is what a server routes by.
func (t *tunnel) greet(f kit.Flow) (stop func()) {
	if t.o.name == "" || t.o.tap {
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		p := hello(t.o.addr.Addr())
		for wait := helloAgain; ; wait = helloEvery {
			if _, err := f.Write(p); kit.Ended(err) {
				return
			}
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}

func (t *tunnel) receive(p *peer) error {
	size := int(p.limit.Load())
	if p.most != nil {
		size = maxPacket // it may become more
	}
	bufs := make([][]byte, min(max(batchMemory/size, 1), maxBatch))
	memory := make([]byte, len(bufs)*size)
	for i := range bufs {
		bufs[i] = memory[i*size : (i+1)*size]
	}
	sizes := make([]int, len(bufs))
	warned := false
	for {
		n, err := p.f.ReadBatch(bufs, sizes)
		if err != nil {
			return err
		}
		if err := t.hub.heard(p); err != nil {
			return err
		}
		for i, k := range sizes[:n] {
			if k > size {
				t.hub.dropped.Add(1)
				continue
			}
			bad := t.hub.malformed.Load()
			t.hub.fromPeer(p, bufs[i][:k])
			if t.hub.malformed.Load() != bad && !warned {
				warned = true
				fmt.Fprintf(kit.After(t.out, t.stderr), "ovpn: flow %d carries what is no packet (both ends, or neither, need --tap)\n", p.f.FD())
			}
		}
	}
}
