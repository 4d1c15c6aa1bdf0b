// Package live makes packets inside the kernel and counts them there: a
// generator that sends live frames out of one end of a veth pair, and a sink
// that drops what arrives. Generator, forwarder and sink run to completion on
// one core, so the rate is the cost of the whole path.
package live

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/bpf"
)

// FrameLen is the length of every generated frame in bytes.
const FrameLen = 64

// batch is how many frames the kernel makes before it lets them go; larger
// ones are not faster.
const batch = 64

// generatorCPU runs the generator and, in one go, everything in the kernel that
// its frames meet. User space that takes part runs on the other core.
const generatorCPU = 0

// Pair makes a veth pair whose two ends are up.
func Pair(a, b string) (netlink.Link, netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = a
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: b}); err != nil {
		return nil, nil, fmt.Errorf("add veth pair %s %s: %w", a, b, err)
	}
	var ends [2]netlink.Link
	for i, n := range []string{a, b} {
		// Nothing but the measurement may send on it.
		if err := disableIPv6(n); err != nil {
			return nil, nil, err
		}
		l, err := netlink.LinkByName(n)
		if err != nil {
			return nil, nil, err
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return nil, nil, fmt.Errorf("set %s up: %w", n, err)
		}
		ends[i] = l
	}
	return ends[0], ends[1], nil
}

// load loads the programs of the benchmarks with some constants set. Each
// collection has its own maps.
func load(vars map[string]any) (*ebpf.Collection, error) {
	spec, err := bpf.LoadBench()
	if err != nil {
		return nil, err
	}
	for n, v := range vars {
		if err := spec.Variables[n].Set(v); err != nil {
			return nil, fmt.Errorf("set %s: %w", n, err)
		}
	}
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, fmt.Errorf("load benchmark programs: %w", err)
	}
	return c, nil
}

// Attach puts a program into the driver of a device.
func Attach(p *ebpf.Program, l netlink.Link) (link.Link, error) {
	x, err := link.AttachXDP(link.XDPOptions{Program: p, Interface: l.Attrs().Index, Flags: link.XDPDriverMode})
	if err != nil {
		return nil, fmt.Errorf("attach XDP to %s: %w", l.Attrs().Name, err)
	}
	return x, nil
}

// Sink drops and counts what arrives at a device.
type Sink struct {
	c *ebpf.Collection
	l link.Link
}

// NewSink attaches a sink.
func NewSink(l netlink.Link) (*Sink, error) {
	c, err := load(nil)
	if err != nil {
		return nil, err
	}
	x, err := Attach(c.Programs[bpf.BenchProgXdpSink], l)
	if err != nil {
		c.Close()
		return nil, err
	}
	return &Sink{c, x}, nil
}

// Received is the number of frames that arrived.
func (s *Sink) Received() (n uint64, err error) {
	var per []bpf.BenchSunk
	if err := s.c.Maps[bpf.BenchMapSinkCount].Lookup(uint32(0), &per); err != nil {
		return 0, err
	}
	for _, c := range per {
		n += c.Packets
	}
	return n, nil
}

// Close detaches the sink.
func (s *Sink) Close() {
	_ = s.l.Close() // the namespace goes anyway
	s.c.Close()
}

// Redirect attaches the least a forwarder can do to in: a redirect to out.
func Redirect(in, out netlink.Link) (func(), error) {
	c, err := load(nil)
	if err != nil {
		return nil, err
	}
	if err := c.Maps[bpf.BenchMapGenDev].Put(uint32(0), uint32(out.Attrs().Index)); err != nil {
		c.Close()
		return nil, fmt.Errorf("device to redirect to: %w", err)
	}
	x, err := Attach(c.Programs[bpf.BenchProgXdpBare], in)
	if err != nil {
		c.Close()
		return nil, err
	}
	return func() { _ = x.Close(); c.Close() }, nil
}

// Config says what a generator sends.
type Config struct {
	Program  string         // bpf.BenchProgGenO7s or bpf.BenchProgGenIpv4
	Template [FrameLen]byte // the destination address is filled in
	First    uint32         // destinations First .. First+Count-1
	Count    uint32
	Random   bool
}

// Generator sends frames out of a device, to the other end of its veth pair.
type Generator struct {
	c    *ebpf.Collection
	prog *ebpf.Program
	ifi  uint32
	fix  time.Duration // cost of a call that sends next to nothing
	per  time.Duration // of a frame, by the last call
}

// NewGenerator prepares a generator. What receives the frames must be there.
func NewGenerator(l netlink.Link, c Config) (*Generator, error) {
	random := uint32(0)
	if c.Random {
		random = 1
	}
	var tmpl [FrameLen / 8]uint64
	for i := range c.Template {
		tmpl[i/8] |= uint64(c.Template[i]) << (8 * (i % 8))
	}
	coll, err := load(map[string]any{
		bpf.BenchVarGenTemplate: tmpl, bpf.BenchVarGenFirst: c.First, bpf.BenchVarGenCount: c.Count, bpf.BenchVarGenRandom: random,
	})
	if err != nil {
		return nil, err
	}
	g := &Generator{c: coll, prog: coll.Programs[c.Program], ifi: uint32(l.Attrs().Index)}
	if err := coll.Maps[bpf.BenchMapGenDev].Put(uint32(0), g.ifi); err != nil {
		coll.Close()
		return nil, fmt.Errorf("generator's device: %w", err)
	}
	if err := g.calibrate(); err != nil {
		coll.Close()
		return nil, err
	}
	return g, nil
}

// calibrate learns the fixed cost of a call and the cost of a frame.
func (g *Generator) calibrate() error {
	done, err := Pin(generatorCPU)
	if err != nil {
		return err
	}
	defer done()
	// The first call warms up; the least of the others is the fixed cost.
	var calls []time.Duration
	for range 4 {
		d, err := g.Send(1)
		if err != nil {
			return err
		}
		calls = append(calls, d)
	}
	g.fix = slices.Min(calls[1:])
	const frames = 1 << 17
	d, err := g.Send(frames)
	if err != nil {
		return err
	}
	g.learn(frames, d-g.fix)
	return nil
}

// Send sends n frames and returns how long that took, the fixed cost of a call
// (about 20 ms of idling) included.
func (g *Generator) Send(n uint32) (time.Duration, error) {
	start := time.Now()
	_, err := g.prog.Run(&ebpf.RunOptions{
		Data: make([]byte, FrameLen), Repeat: n, BatchSize: batch, Flags: unix.BPF_F_TEST_XDP_LIVE_FRAMES,
		Context: struct{ Data, DataEnd, DataMeta, IngressIfindex, RxQueueIndex, EgressIfindex uint32 }{
			DataEnd: FrameLen, IngressIfindex: g.ifi,
		},
	})
	if err != nil {
		return 0, fmt.Errorf("send live frames: %w", err)
	}
	return time.Since(start), nil
}

var (
	// ErrLost means that frames did not arrive where they should have.
	ErrLost = errors.New("frames were lost")
	// ErrIdle means that the rate is not the limit of what was measured.
	ErrIdle = errors.New("not saturated")
)

// maxIdle is the share of its time that the generator's CPU may have been idle
// in a saturated run; /proc/stat counts ticks of 10 ms.
const maxIdle = 0.1

// Fill sends for about d on the generator's CPU. It returns how many frames
// and how long it took without the fixed cost of the call. ErrIdle means that
// the CPU had time left, so that something else was the limit.
func (g *Generator) Fill(d time.Duration) (sent uint32, took time.Duration, err error) {
	done, err := Pin(generatorCPU)
	if err != nil {
		return 0, 0, err
	}
	defer done()
	before, err := idle(generatorCPU)
	if err != nil {
		return 0, 0, err
	}
	sent = uint32(d / g.per)
	if took, err = g.Send(sent); err != nil {
		return 0, 0, err
	}
	after, err := idle(generatorCPU)
	if err != nil {
		return 0, 0, err
	}
	took -= g.fix
	g.learn(sent, took)
	if share := (after - before - g.fix - 2*tick).Seconds() / took.Seconds(); share > maxIdle {
		return 0, 0, fmt.Errorf("%w: the CPU was idle for %.0f %% of the time", ErrIdle, 100*share)
	}
	return sent, took, nil
}

func (g *Generator) learn(n uint32, d time.Duration) {
	g.per = max(d/time.Duration(max(n, 1)), time.Nanosecond)
}

// Close unloads the generator.
func (g *Generator) Close() { g.c.Close() }

// Path is a generator, two ports in the middle for a forwarder, and a sink:
//
//	Gen -- In [forwarder] Out -- Far
type Path struct {
	Gen, In, Out, Far netlink.Link

	gen  *Generator
	sink *Sink
}

// NewPath makes the devices, named after id, and the sink at Far.
func NewPath(id string) (*Path, error) {
	p := &Path{}
	var err error
	if p.Gen, p.In, err = Pair("g"+id, "i"+id); err != nil {
		return nil, err
	}
	if p.Out, p.Far, err = Pair("o"+id, "s"+id); err != nil {
		return nil, err
	}
	if p.sink, err = NewSink(p.Far); err != nil {
		return nil, err
	}
	return p, nil
}

// Generate prepares the generator. The forwarder must be there by now.
func (p *Path) Generate(c Config) (err error) {
	p.gen, err = NewGenerator(p.Gen, c)
	return err
}

// Bare makes a bare redirect the forwarder.
func (p *Path) Bare() (func(), error) { return Redirect(p.In, p.Out) }

// Short makes In the sink: what the generator can send at most.
func (p *Path) Short() error {
	s, err := NewSink(p.In)
	if err != nil {
		return err
	}
	p.sink.Close()
	p.sink = s
	return nil
}

// Stack hands what arrives at In to the kernel's network stack.
func (p *Path) Stack() error { return setGRO(p.In.Attrs().Name) }

// Rate sends for about d and returns the rate of frames that arrived, in
// millions per second. lossy allows losses, which a forwarder with queues has
// when it is saturated.
func (p *Path) Rate(d time.Duration, lossy bool) (float64, error) {
	before, err := p.sink.Received()
	if err != nil {
		return 0, err
	}
	n, took, err := p.gen.Fill(d)
	if err != nil {
		return 0, err
	}
	after, err := p.sink.Received()
	if err != nil {
		return 0, err
	}
	got := after - before // the kernel may have sent more: a call that a signal interrupts starts again
	if got == 0 || !lossy && got < uint64(n) {
		return 0, fmt.Errorf("%w: %d of %d arrived", ErrLost, got, n)
	}
	return float64(got) / float64(took.Nanoseconds()) * 1e3, nil
}

// Close detaches everything and removes the devices.
func (p *Path) Close() {
	if p.gen != nil {
		p.gen.Close()
	}
	if p.sink != nil {
		p.sink.Close()
	}
	for _, l := range []netlink.Link{p.Gen, p.Out} {
		if l != nil {
			_ = netlink.LinkDel(l) // the namespace goes anyway
		}
	}
}

// MAC returns a device's hardware address.
func MAC(l netlink.Link) [6]byte { return [6]byte(net.HardwareAddr(l.Attrs().HardwareAddr)) }
