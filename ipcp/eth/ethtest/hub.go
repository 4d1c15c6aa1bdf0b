// Package ethtest is an Ethernet in memory: a hub whose ports stand for
// network interfaces in the tests of Ethernet layers. A frame is delivered in
// the call of Send, so a test needs no waiting, no root and no goroutine.
package ethtest

import (
	"errors"
	"sync"

	"github.com/o7s/o7s-router/ipcp/eth"
	"github.com/o7s/o7s-router/ipcp/eth/core"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
)

// minFrame is the length to which Ethernet pads, without the check sequence.
const minFrame = 60

// Hub connects ports. The zero value is ready; methods are safe for concurrent use.
type Hub struct {
	// Fate, if set before the first frame, says how many copies of a frame
	// arrive: 0 loses it. It also is the place to watch frames.
	Fate func(from *Port, frame []byte) (copies int)
	// Flood makes the hub show every frame to every port, as hubs do; else it
	// looks at the destination, as switches do.
	Flood bool

	mu    sync.Mutex // guards ports and their fields
	ports []*Port
}

// Port is a network interface; it implements eth.Device.
type Port struct {
	hub *Hub
	mac core.MAC
	mtu int

	up       bool
	claims   map[uint16]func([]*packet.Buf)
	blocks   map[uint16]*Block
	watchers map[int]func(bool)
	nextID   int
	closed   bool
}

var _ eth.Device = (*Port)(nil)

// Port adds an interface that is up.
func (h *Hub) Port(mac core.MAC, mtu int) *Port {
	p := &Port{
		hub: h, mac: mac, mtu: mtu, up: true,
		claims:   map[uint16]func([]*packet.Buf){},
		blocks:   map[uint16]*Block{},
		watchers: map[int]func(bool){},
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ports = append(h.ports, p)
	return p
}

// Open is an eth.Opener that always opens p.
func (p *Port) Open(string) (eth.Device, error) { return p, nil }

// MAC is the address of the interface.
func (p *Port) MAC() core.MAC { return p.mac }

// MTU is as given.
func (p *Port) MTU() int { return p.mtu }

// Send delivers a frame to the other ports, padded, before it returns.
func (p *Port) Send(b *packet.Buf) error {
	defer b.Release()
	if b.Len() > p.mtu+14 {
		return o7serr.EMSGSIZE
	}
	p.hub.mu.Lock()
	up := p.up && !p.closed
	p.hub.mu.Unlock()
	if !up {
		return o7serr.EFLOWDOWN
	}
	copies := 1
	if p.hub.Fate != nil {
		copies = p.hub.Fate(p, b.Bytes())
	}
	for range copies {
		p.hub.Inject(p, b.Bytes())
	}
	return nil
}

// Inject delivers a copy of frame as if it came from port from; nil: from an
// interface of its own.
func (h *Hub) Inject(from *Port, frame []byte) {
	padded := frame
	if len(frame) < minFrame {
		padded = make([]byte, minFrame)
		copy(padded, frame)
	}
	var dst core.MAC
	copy(dst[:], padded)
	etherType := uint16(padded[12])<<8 | uint16(padded[13])
	var to []func([]*packet.Buf)
	h.mu.Lock()
	for _, p := range h.ports {
		mine := h.Flood || dst[0]&1 != 0 || dst == p.mac
		if rx := p.claims[etherType]; p != from && p.up && mine && rx != nil {
			to = append(to, rx)
		}
	}
	h.mu.Unlock()
	for _, rx := range to {
		rx([]*packet.Buf{packet.From(padded)})
	}
}

// Claim gives all frames with the EtherType to rx.
func (p *Port) Claim(etherType uint16, rx func([]*packet.Buf)) (eth.Block, error) {
	p.hub.mu.Lock()
	defer p.hub.mu.Unlock()
	if p.claims[etherType] != nil {
		return nil, errors.New("ethertype is in use")
	}
	p.claims[etherType] = rx
	b := &Block{port: p, etherType: etherType, user: map[uint16]bool{}}
	p.blocks[etherType] = b
	return b, nil
}

// OnState registers f for changes of the state, and calls it when it is down.
func (p *Port) OnState(f func(up bool)) (cancel func()) {
	p.hub.mu.Lock()
	id := p.nextID
	p.nextID++
	p.watchers[id] = f
	up := p.up
	p.hub.mu.Unlock()
	if !up {
		f(false)
	}
	return func() {
		p.hub.mu.Lock()
		defer p.hub.mu.Unlock()
		delete(p.watchers, id)
	}
}

// SetUp changes the state of the interface.
func (p *Port) SetUp(up bool) {
	p.hub.mu.Lock()
	p.up = up
	var fs []func(bool)
	for _, f := range p.watchers {
		fs = append(fs, f)
	}
	p.hub.mu.Unlock()
	for _, f := range fs {
		f(up)
	}
}

// Close ends sending.
func (p *Port) Close() error {
	p.hub.mu.Lock()
	defer p.hub.mu.Unlock()
	p.closed = true
	return nil
}

// Closed tells whether a layer closed the port and left nothing behind.
func (p *Port) Closed() bool {
	p.hub.mu.Lock()
	defer p.hub.mu.Unlock()
	return p.closed && len(p.watchers) == 0 && len(p.claims) == 0
}

// Endpoints is how many endpoints of an EtherType are open.
func (p *Port) Endpoints(etherType uint16) int {
	p.hub.mu.Lock()
	defer p.hub.mu.Unlock()
	if b := p.blocks[etherType]; b != nil {
		return len(b.user)
	}
	return 0
}

// Block notes which endpoints are open.
type Block struct {
	port      *Port
	etherType uint16
	user      map[uint16]bool
}

// SetUser implements eth.Block.
func (b *Block) SetUser(endpoint uint16) {
	b.port.hub.mu.Lock()
	defer b.port.hub.mu.Unlock()
	b.user[endpoint] = true
}

// Clear implements eth.Block.
func (b *Block) Clear(endpoint uint16) {
	b.port.hub.mu.Lock()
	defer b.port.hub.mu.Unlock()
	delete(b.user, endpoint)
}

// Release implements eth.Block.
func (b *Block) Release() {
	b.port.hub.mu.Lock()
	defer b.port.hub.mu.Unlock()
	delete(b.port.claims, b.etherType)
}
