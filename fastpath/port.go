package fastpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/fastpath/port"
	"github.com/o7s/o7s-router/fastpath/tables"
	"github.com/o7s/o7s-router/lib/packet"
)

// Modes of a port: how XDP is attached.
const (
	ModeNative  = string(port.ModeNative)  // in the driver
	ModeGeneric = string(port.ModeGeneric) // in the stack, slower
	ModePacket  = string(port.ModePacket)  // not at all: a packet socket and user space
)

const broadcast = 1<<48 - 1

// Port is a network device that layers share.
type Port struct {
	plane *Plane
	slot  uint32
	name  string
	dev   device
	refs  int // guarded by plane.mu

	// claims is replaced as a whole, so that receiving takes no lock.
	claims   atomic.Pointer[[]*EthBlock]
	verdicts [bpf.NumReasons]atomic.Uint64 // of frames dropped in user space
	target   atomic.Pointer[target]

	stateMu  sync.Mutex // guards what follows, and the order of callbacks
	up       bool
	nextID   int
	watchers map[int]func(up bool)
}

// OpenPort attaches the data plane to a network device, or finds it attached:
// a port is shared and goes when everybody who opened it closed it.
func (p *Plane) OpenPort(ifname string) (*Port, error) {
	p.opening.Lock()
	defer p.opening.Unlock()
	p.mu.Lock()
	if o := p.ports[ifname]; o != nil && !p.closed {
		o.refs++
		p.mu.Unlock()
		return o, nil
	}
	p.mu.Unlock()
	slot, err := p.portSlot()
	if err != nil {
		return nil, err
	}
	o, err := p.attach(ifname, slot)
	if err != nil {
		p.mu.Lock()
		p.portSlots.Free(slot) // nothing referred to it yet
		p.mu.Unlock()
		return nil, err
	}
	return o, nil
}

// attach opens a device as the port in slot. opening is held.
func (p *Plane) attach(ifname string, slot uint32) (*Port, error) {
	o := p.newPort(ifname, slot)
	c := port.Config{
		Ifname: ifname, Rx: o.receive, State: o.setUp, Log: p.log, MaxQueues: tables.QueuesPerPort,
		Redirect: func(bool) {
			p.mu.Lock()
			defer p.mu.Unlock()
			o.setTarget()
		},
	}
	if k := p.kernel; k != nil {
		if err := zero[bpf.RouterVerdictCount](k.maps[bpf.RouterMapVerdicts], slot); err != nil {
			return nil, fmt.Errorf("clear counters of %s: %w", ifname, err)
		}
		c.Program = func() (*ebpf.Program, error) { return k.program(progRouter, slot, nil) }
		c.SetXSK = func(queue, fd int) error { return k.setSocket(slot, queue, fd) }
	}
	dev, err := p.open(c)
	if err != nil {
		return nil, err // says which device
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, errors.Join(ErrClosed, dev.Close())
	}
	mac := dev.MAC()
	atomic.StoreUint64(&p.t.Ports[slot].Mac, tables.MAC(mac[:]))
	p.ports[ifname] = o
	o.dev = dev
	o.setTarget()
	p.mu.Unlock()
	o.stateMu.Lock()
	o.up = dev.Up() // nobody watches; a change after this waits for the lock
	o.stateMu.Unlock()
	return o, nil
}

func (p *Plane) newPort(name string, slot uint32) *Port {
	o := &Port{plane: p, slot: slot, name: name, refs: 1, up: true, watchers: map[int]func(bool){}}
	o.claims.Store(&[]*EthBlock{})
	return o
}

// setTarget makes the port a target of redirects, or ends that, as the device
// says now; its wires follow. plane.mu is held.
func (p *Port) setTarget() {
	pl := p.plane
	if pl.kernel == nil || pl.ports[p.name] != p {
		return
	}
	flags := &pl.t.Ports[p.slot].Flags
	ok, why := p.dev.Redirectable()
	if ok {
		if err := pl.kernel.setDevice(p.slot, p.dev.Index()); err != nil {
			pl.log.Warn("device cannot be a redirect target", "ifname", p.name, "error", err)
			ok, why = false, err.Error()
		}
	}
	p.target.Store(&target{ok, why})
	if ok {
		atomic.StoreUint32(flags, tables.PortTx)
	}
	p.applyWires()
	if !ok { // after the wires: nothing is sent to a port that is not there
		atomic.StoreUint32(flags, 0)
		if err := pl.kernel.setDevice(p.slot, 0); err != nil {
			pl.log.Error("remove redirect target", "ifname", p.name, "error", err)
		}
	}
}

// applyWires brings the wires' states in line with the port. plane.mu is held.
func (p *Port) applyWires() {
	for i := range p.plane.wires {
		if w := p.plane.wires[i].Load(); w != nil && w.port == p {
			w.mu.Lock()
			w.apply()
			w.mu.Unlock()
		}
	}
}

// target tells whether XDP may redirect to a port and, if not, why.
type target struct {
	ok  bool
	why string
}

// Slot is the port's number in tables and counters.
func (p *Port) Slot() uint32 { return p.slot }

// Name is the device's name.
func (p *Port) Name() string { return p.name }

// MAC is the device's hardware address.
func (p *Port) MAC() net.HardwareAddr {
	mac := p.dev.MAC()
	return mac[:]
}

// MTU is the largest Ethernet payload, bytes (without the 14 of the header).
func (p *Port) MTU() int { return p.dev.MTU() }

// Mode is ModeNative, ModeGeneric or ModePacket.
func (p *Port) Mode() string { return string(p.dev.Mode()) }

// Reasons says, one clear line each, why the mode is not native and what about
// the device would lose packets.
func (p *Port) Reasons() []string { return p.dev.Reasons() }

// transmits tells whether XDP can redirect to the port, and why not.
func (p *Port) transmits() (bool, string) {
	if ok, why := p.plane.Kernel(); !ok {
		return false, "kernel data path: " + why
	}
	t := p.target.Load()
	return t.ok, t.why
}

// Send transmits a whole frame and takes ownership of it, also on error.
func (p *Port) Send(b *packet.Buf) error { return p.dev.Send(b) }

// SendBatch transmits whole frames and takes ownership of the buffers, also on
// error; the slice stays the caller's. The error is the first frame's.
func (p *Port) SendBatch(frames []*packet.Buf) error { return p.dev.SendBatch(frames) }

// OnState registers a function that is called when the link goes down or comes
// up, and now if it is down. It must not block. The returned function ends it.
func (p *Port) OnState(f func(up bool)) (cancel func()) {
	p.stateMu.Lock()
	defer p.stateMu.Unlock()
	id := p.nextID
	p.nextID++
	p.watchers[id] = f
	if !p.up {
		f(false)
	}
	return func() {
		p.stateMu.Lock()
		defer p.stateMu.Unlock()
		delete(p.watchers, id)
	}
}

// Up tells whether the link is up.
func (p *Port) Up() bool {
	p.stateMu.Lock()
	defer p.stateMu.Unlock()
	return p.up
}

func (p *Port) setUp(up bool) {
	p.stateMu.Lock()
	defer p.stateMu.Unlock()
	if p.up == up {
		return
	}
	p.up = up
	for _, f := range p.watchers {
		f(up)
	}
}

// Close gives the port back.
func (p *Port) Close() error {
	p.plane.opening.Lock() // whoever opens the device next finds it released
	defer p.plane.opening.Unlock()
	p.plane.mu.Lock()
	p.refs--
	last := p.refs == 0
	p.plane.mu.Unlock()
	if !last {
		return nil
	}
	return p.shut()
}

// shut detaches the device. Receiving has stopped when it returns.
func (p *Port) shut() error {
	pl := p.plane
	pl.mu.Lock()
	if pl.ports[p.name] != p {
		pl.mu.Unlock()
		return nil
	}
	delete(pl.ports, p.name)
	rec := &pl.t.Ports[p.slot]
	for i := range rec.Proto {
		atomic.StoreUint32(&rec.Proto[i], 0)
	}
	p.target.Store(&target{false, p.name + " was closed"})
	p.applyWires()
	atomic.StoreUint32(&rec.Flags, 0)
	pl.mu.Unlock()

	err := p.dev.Close() // outside the lock: waits for receive callbacks
	if k := pl.kernel; k != nil {
		err = errors.Join(err, k.setDevice(p.slot, 0))
	}
	pl.mu.Lock()
	pl.retire(func() { pl.portSlots.Free(p.slot) })
	pl.mu.Unlock()
	return err
}

// receive passes frames to whoever claimed their EtherType. XDP has checked
// frames of an AF_XDP socket; those of a packet socket are checked here.
func (p *Port) receive(frames []*packet.Buf) {
	claims := *p.claims.Load()
	own := atomic.LoadUint64(&p.plane.t.Ports[p.slot].Mac)
	var block *EthBlock // of frames[start:i]
	start := 0
	for i, b := range frames {
		next := p.claimant(b, claims, own)
		if next != block || next == nil {
			if block != nil {
				block.rx(frames[start:i])
			}
			block, start = next, i
		}
		if next == nil {
			b.Release()
		}
	}
	if block != nil {
		block.rx(frames[start:])
	}
}

func (p *Port) claimant(b *packet.Buf, claims []*EthBlock, own uint64) *EthBlock {
	f := b.Bytes()
	if len(f) < 14 {
		return nil
	}
	etherType := binary.BigEndian.Uint16(f[12:])
	for _, c := range claims {
		if c.etherType != etherType {
			continue
		}
		if mac := tables.MAC(f); mac != own && mac != broadcast {
			p.verdicts[bpf.DropMAC].Add(1)
			return nil
		}
		return c
	}
	return nil
}

// EthBlock is the endpoints of one EtherType on one port.
type EthBlock struct {
	port      *Port
	etherType uint16
	block     uint32
	rx        func([]*packet.Buf)
}

// Claim reserves an EtherType (host order) on the port. Frames of it that are
// for user space go to rx as whole frames, in batches; ownership of the
// buffers passes, the slice is the caller's. rx must not block.
func (p *Port) Claim(etherType uint16, rx func([]*packet.Buf)) (*EthBlock, error) {
	pl := p.plane
	pl.mu.Lock()
	defer pl.mu.Unlock()
	if pl.ports[p.name] != p {
		return nil, ErrClosed
	}
	if etherType < 0x600 {
		return nil, fmt.Errorf("EtherType 0x%04x: values below 0x0600 are lengths", etherType)
	}
	claims := *p.claims.Load()
	for _, c := range claims {
		if c.etherType == etherType {
			return nil, fmt.Errorf("EtherType 0x%04x on %s is in use by another layer", etherType, p.name)
		}
	}
	rec := &pl.t.Ports[p.slot]
	place := slices.Index(rec.Proto[:], 0)
	if place < 0 {
		return nil, fmt.Errorf("%w: %s carries %d layers already", ErrTableFull, p.name, len(rec.Proto))
	}
	block, err := pl.alloc(pl.blocks, "Ethernet layers")
	if err != nil {
		return nil, err
	}
	b := &EthBlock{port: p, etherType: etherType, block: block, rx: rx}
	next := append(slices.Clone(claims), b)
	if err := p.dev.SetEtherTypes(etherTypes(next)); err != nil {
		pl.blocks.Free(block)
		return nil, fmt.Errorf("EtherType 0x%04x on %s: %w", etherType, p.name, err)
	}
	p.claims.Store(&next)
	atomic.StoreUint32(&rec.Proto[place], tables.MakeProto(etherType, block))
	return b, nil
}

func etherTypes(claims []*EthBlock) []uint16 {
	var types []uint16
	for _, c := range claims {
		types = append(types, c.etherType)
	}
	return types
}

func (b *EthBlock) set(eid uint16, e tables.Endpoint) {
	if eid > 0 && eid < tables.EIDsPerBlock {
		b.port.plane.t.StoreEndpoint(b.block, uint32(eid), e)
	}
}

// Port is the port of the block.
func (b *EthBlock) Port() *Port { return b.port }

// SetUser sends frames for an EID to user space. EID 0 always goes there.
func (b *EthBlock) SetUser(eid uint16) { b.set(eid, tables.MakeEndpoint(tables.EndpointUser, 0, 0)) }

// SetDT makes an EID an N-1 flow of the wire's layer: the kernel forwards what
// comes in on it, and counts it for the wire. Only flows without end-to-end
// functions (raw, not encrypted) carry bare data-transfer packets.
func (b *EthBlock) SetDT(eid uint16, w *Wire) {
	b.set(eid, tables.MakeEndpoint(tables.EndpointDT, uint16(w.layer.slot), w.slot))
}

// Clear makes an EID unknown: frames for it are dropped.
func (b *EthBlock) Clear(eid uint16) { b.set(eid, 0) }

// Release gives the EtherType back. rx is not called after it returned unless
// a call was under way.
func (b *EthBlock) Release() {
	p := b.port
	pl := p.plane
	pl.mu.Lock()
	defer pl.mu.Unlock()
	claims := slices.Clone(*p.claims.Load())
	i := slices.Index(claims, b)
	if i < 0 {
		return
	}
	claims = slices.Delete(claims, i, i+1)
	p.claims.Store(&claims)
	rec := &pl.t.Ports[p.slot]
	if pl.ports[p.name] == p {
		if place := slices.Index(rec.Proto[:], tables.MakeProto(b.etherType, b.block)); place >= 0 {
			atomic.StoreUint32(&rec.Proto[place], 0)
		}
		if err := p.dev.SetEtherTypes(etherTypes(claims)); err != nil {
			pl.log.Warn("frames of a closed layer keep arriving", "ifname", p.name, "error", err)
		}
	}
	for eid := range uint32(tables.EIDsPerBlock) {
		pl.t.StoreEndpoint(b.block, eid, 0)
	}
	pl.retire(func() { pl.blocks.Free(b.block) })
}
