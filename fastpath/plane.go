// Package fastpath programs the kernel data plane: it loads the XDP programs,
// attaches them to ports, and keeps the tables of endpoints, wires, next hops
// and routes that they read.
//
// A Plane belongs to one daemon. Where the kernel cannot help (no rights, too
// old, or switched off) the same tables live in plain memory and everything
// works through user space; Kernel says why.
//
//	Plane ─┬─ Port ── EthBlock      a device; one EtherType's endpoints on it
//	       ├─ Layer ─┬─ Wire        a member of a unicast layer; the way to a neighbour
//	       │         └─ Route       destination address -> wires
//	       └─ App                   a tap: the port of one program
//
// Lifetime: close what a Plane handed out before the Plane. All methods are
// safe for concurrent use unless they say otherwise.
package fastpath

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/fastpath/fib"
	"github.com/o7s/o7s-router/fastpath/tables"
)

// Sizes of tables that no option sets: far above what one node needs, small
// enough not to matter.
const (
	maxApps     = 16384 // flows behind application ports: what one process may have
	flowBuckets = 8192  // of 4 flows, half full at most; even
)

// ErrTableFull means that a table of the data plane has no room; the message
// says which and what to do.
var ErrTableFull = errors.New("table full")

// ErrClosed is returned after Close.
var ErrClosed = errors.New("fast path is closed")

// Options of a Plane. Zero values stand for the defaults.
type Options struct {
	MaxRoutes    int    // routes of all layers with 4-byte addresses; default 1 000 000
	MaxPorts     int    // devices and application ports; default and most 63
	MaxEthBlocks int    // Ethernet layers; default and most 63
	PinDir       string // where maps are pinned: a BPF file system is mounted there; "" pins nothing
	DisableXDP   bool   // serve everything from user space
	Log          *slog.Logger
}

// Plane is one data plane.
type Plane struct {
	log    *slog.Logger
	opts   Options
	t      *tables.Tables
	kernel *kernel // nil: plain memory
	why    string  // why kernel is nil
	open   opener
	// noGrace is for tests in which nothing runs at the same time.
	noGrace bool

	// wires finds the Wire of a slot without a lock.
	wires []atomic.Pointer[Wire]
	// epoch changes before table memory is reused, see Layer.Lookup.
	epoch atomic.Uint64

	// mu guards what follows, and all writes to the tables except wire states.
	mu        sync.Mutex
	closed    bool
	ports     map[string]*Port
	layers    map[uint32]*Layer
	portSlots *tables.Slots
	layerSlot *tables.Slots
	nhSlots   *tables.Slots
	wireSlots *tables.Slots
	appSlots  *tables.Slots
	blocks    *tables.Slots
	arena     *fib.Arena
	appGen    uint16 // upper half of the next application handle

	retired   []func()       // gives memory back that readers may still hold
	waiting   []func()       // ... whose grace period runs
	reclaimer *time.Timer    // of the background reclaim, nil: none
	reclaims  sync.WaitGroup // running reclaims

	// opening has one device at a time opened or closed, so that of one device
	// nobody finds half of it. It comes before mu, which is not held meanwhile:
	// the kernel takes tens of milliseconds, and flows and routes do not wait.
	opening sync.Mutex
}

// New creates a data plane. When BPF cannot be used it works without; only a
// failure to pin maps that could be loaded is an error.
func New(o Options) (*Plane, error) { return newPlane(o, openDevice) }

func newPlane(o Options, open opener) (*Plane, error) {
	if o.MaxRoutes <= 0 {
		o.MaxRoutes = 1_000_000
	}
	if o.MaxPorts <= 0 {
		o.MaxPorts = tables.MaxPorts - 1
	}
	if o.MaxEthBlocks <= 0 {
		o.MaxEthBlocks = tables.MaxEthBlocks - 1
	}
	if o.MaxPorts >= tables.MaxPorts || o.MaxEthBlocks >= tables.MaxEthBlocks {
		return nil, fmt.Errorf("at most %d ports and %d Ethernet layers", tables.MaxPorts-1, tables.MaxEthBlocks-1)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	c := tables.Config{
		Ports: o.MaxPorts + 1, EthBlocks: o.MaxEthBlocks + 1, Layers: tables.MaxLayers,
		// Twice, so that a new table is built beside the one in use.
		Buckets:  2*int(fib.WideSizeFor(o.MaxRoutes).Buckets) + 1024,
		NextHops: tables.MaxNextHops, Wires: tables.MaxWires, Apps: maxApps, FlowBuckets: flowBuckets,
		FIB8: o.MaxRoutes,
	}
	p := &Plane{
		log: o.Log, opts: o, open: open,
		wires: make([]atomic.Pointer[Wire], c.Wires),
		ports: map[string]*Port{}, layers: map[uint32]*Layer{},
		portSlots: tables.NewSlots(c.Ports), layerSlot: tables.NewSlots(c.Layers),
		nhSlots: tables.NewSlots(c.NextHops), wireSlots: tables.NewSlots(c.Wires),
		appSlots: tables.NewSlots(c.Apps), blocks: tables.NewSlots(c.EthBlocks),
		arena: fib.NewArena(uint32(c.Buckets)),
	}
	// Bucket 0 stays empty: that is what a layer without a table looks at.
	if _, ok := p.arena.Alloc(1); !ok {
		return nil, errors.New("no room for routes")
	}
	if o.DisableXDP {
		p.why = "switched off"
	} else {
		k, err := loadKernel(c)
		if err != nil {
			p.why = err.Error()
			p.log.Warn("kernel data path unavailable, packets pass through user space", "error", err)
		} else {
			p.kernel = k
			p.t = k.tables
			if o.PinDir != "" {
				if err := k.pin(o.PinDir); err != nil {
					k.close()
					return nil, fmt.Errorf("pin maps in %s: %w", o.PinDir, err)
				}
			}
		}
	}
	if p.t == nil {
		p.t = tables.New(c)
	}
	return p, nil
}

// Program loads one of package bpf's programs on the tables of the plane, as for
// the port in slot, with further constants set: benchmarks and tests run and
// attach such programs. The caller closes it.
func (p *Plane) Program(name string, slot uint32, constants map[string]any) (*ebpf.Program, error) {
	if p.kernel == nil {
		return nil, fmt.Errorf("kernel data path: %s", p.why)
	}
	return p.kernel.program(name, slot, constants)
}

// Kernel tells whether the kernel data path is in use and, if not, why.
func (p *Plane) Kernel() (ok bool, reason string) { return p.kernel != nil, p.why }

// Close detaches everything that is still attached and removes pins and maps.
func (p *Plane) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	if p.reclaimer != nil && p.reclaimer.Stop() {
		p.reclaims.Done()
	}
	ports := make([]*Port, 0, len(p.ports))
	for _, port := range p.ports {
		ports = append(ports, port)
	}
	p.mu.Unlock()
	for _, port := range ports {
		port.shut()
	}
	p.reclaims.Wait()
	if p.kernel != nil {
		return p.kernel.close()
	}
	return nil
}

// PortSnapshot is what a port's program counted.
type PortSnapshot struct {
	Slot     uint32
	Name     string
	Mode     string
	Reasons  []string
	Verdicts [bpf.NumReasons]uint64 // packets, by reason
}

// Snapshot returns the verdict counters of every port and application port,
// ordered by slot. Frames that a packet socket received are included.
func (p *Plane) Snapshot() []PortSnapshot {
	p.mu.Lock()
	ports := make([]*Port, 0, len(p.ports))
	for _, port := range p.ports {
		ports = append(ports, port)
	}
	p.mu.Unlock()
	out := make([]PortSnapshot, 0, len(ports))
	for _, port := range ports {
		s := PortSnapshot{Slot: port.slot, Name: port.name, Mode: port.Mode(), Reasons: port.Reasons()}
		if p.kernel != nil {
			s.Verdicts = p.kernel.verdicts(port.slot)
		}
		for r := range s.Verdicts {
			s.Verdicts[r] += port.verdicts[r].Load()
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b PortSnapshot) int { return int(a.Slot) - int(b.Slot) })
	return out
}

// reclaimAfter is how long retired memory waits for company: a reclaim costs a
// grace period of the kernel, so one serves many changes.
const reclaimAfter = 100 * time.Millisecond

// retire hands over memory that is no longer referenced but that a reader may
// still look at; f makes it reusable. mu is held.
func (p *Plane) retire(f func()) {
	p.retired = append(p.retired, f)
	p.scheduleReclaim()
}

// scheduleReclaim sees to it that what is retired is recycled. mu is held.
func (p *Plane) scheduleReclaim() {
	if p.reclaimer != nil || p.closed || len(p.retired) == 0 {
		return
	}
	p.reclaims.Add(1)
	p.reclaimer = time.AfterFunc(reclaimAfter, func() {
		defer p.reclaims.Done()
		p.mu.Lock()
		p.waiting, p.retired = p.retired, nil
		p.mu.Unlock()
		p.gracePeriod()
		p.mu.Lock()
		defer p.mu.Unlock()
		p.recycle()
		p.reclaimer = nil
		p.scheduleReclaim()
	})
}

// reclaim makes all retired memory reusable now. mu is held.
func (p *Plane) reclaim() {
	p.waiting = append(p.waiting, p.retired...)
	p.retired = nil
	if len(p.waiting) > 0 {
		p.gracePeriod()
		p.recycle()
	}
}

// recycle runs after a grace period for what is waiting. mu is held.
func (p *Plane) recycle() {
	list := p.waiting
	p.waiting = nil
	if len(list) > 0 {
		p.epoch.Add(1) // before the memory changes: readers in Go notice
	}
	for _, f := range list {
		f()
	}
}

const membarrierGlobal = 1 // MEMBARRIER_CMD_GLOBAL of linux/membarrier.h

// gracePeriod returns when no XDP program runs any more that ran at the call.
func (p *Plane) gracePeriod() {
	if p.kernel == nil || p.noGrace {
		return
	}
	// The global membarrier is synchronize_rcu, and programs run inside an RCU
	// read section.
	_, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0)
	if errno != 0 {
		// Kernels with nohz_full refuse it. A program runs for less than a
		// microsecond with interrupts' bottom halves off: this is ample.
		time.Sleep(50 * time.Millisecond)
	}
}

// alloc takes a slot of a table, after a reclaim if need be. mu is held.
func (p *Plane) alloc(s *tables.Slots, what string) (uint32, error) {
	slot, ok := s.Alloc()
	if !ok {
		p.reclaim()
		slot, ok = s.Alloc()
	}
	if !ok {
		return 0, fmt.Errorf("%w: no more %s", ErrTableFull, what)
	}
	return slot, nil
}
