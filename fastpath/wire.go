package fastpath

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/fastpath/tables"
)

// headerRoom is what a frame has in front of an Ethernet layer's payload:
// Ethernet and DIX header (spec 10 §2.1).
const headerRoom = 18

// WireSpec describes the way to a neighbour over an N-1 flow.
type WireSpec struct {
	// Port carries the flow; nil when only user space can send on it.
	Port *Port
	// Header is the start of every frame: destination MAC, source MAC,
	// EtherType, remote EID (big-endian).
	Header [16]byte
	// MTU is the largest payload, bytes, data-transfer header included.
	MTU int
	// Punt keeps XDP from sending on the wire; Reason says why.
	Punt   bool
	Reason string
	// User is the caller's; Wire.User returns it.
	User any
}

// Wire is the way to a neighbour. It is up when made.
type Wire struct {
	plane *Plane
	layer *Layer // nil: not of a unicast layer
	port  *Port  // nil: user space sends
	slot  uint32
	user  any
	cubes [tables.Cubes]goCounters

	mu     sync.Mutex // guards what follows and the wire's state word
	up     bool
	punt   bool
	reason string
	closed bool

	refs int  // next hops that name the wire; guarded by plane.mu
	gone bool // released; guarded by plane.mu
}

// NewWire makes a wire outside any unicast layer, for App.AddEthFlow.
func (p *Plane) NewWire(s WireSpec) (*Wire, error) { return p.newWire(nil, s) }

// NewWire makes a wire of the layer. Errors: ErrTableFull.
func (l *Layer) NewWire(s WireSpec) (*Wire, error) { return l.plane.newWire(l, s) }

func (p *Plane) newWire(l *Layer, s WireSpec) (*Wire, error) {
	w := &Wire{plane: p, layer: l, port: s.Port, user: s.User, up: true, punt: s.Punt, reason: s.Reason}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	slot, err := p.alloc(p.wireSlots, "wires")
	if err != nil {
		return nil, err
	}
	w.slot = slot
	if p.kernel != nil {
		for cube := range uint32(tables.Cubes) {
			if err := zero[bpf.RouterDtCount](p.kernel.maps[bpf.RouterMapDtCounters], slot*tables.Cubes+cube); err != nil {
				p.wireSlots.Free(slot)
				return nil, fmt.Errorf("clear counters of a wire: %w", err)
			}
		}
	}
	rec := &p.t.Wires[slot]
	rec.MaxFrame = uint32(s.MTU + headerRoom)
	rec.Hdr = s.Header
	rec.Port = 0
	if s.Port != nil {
		rec.Port = s.Port.slot
	}
	p.wires[slot].Store(w)
	w.apply()
	return w, nil
}

// path tells whether XDP may send on the wire and, if not, why. w.mu is held.
func (w *Wire) path() (bool, string) {
	switch {
	case w.punt:
		return false, w.reason
	case w.port == nil:
		return false, "lower flow is served by user space"
	}
	return w.port.transmits()
}

// apply writes the state word. w.mu is held, or the wire is new.
func (w *Wire) apply() {
	state := uint32(tables.WireUp)
	if !w.up || w.closed {
		state = tables.WireDown
	} else if ok, _ := w.path(); !ok {
		state = tables.WirePunt
	}
	atomic.StoreUint32(&w.plane.t.Wires[w.slot].State, state)
}

// SetState takes the wire down or up, for every route at once: one store. What
// used a wire that is down goes to another equal-cost wire or the alternate.
func (w *Wire) SetState(up bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.up = up
	w.apply()
}

// SetPunt sends the wire's packets through user space, or ends that. A wire
// whose port XDP cannot use goes through user space anyway.
func (w *Wire) SetPunt(punt bool, reason string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.punt, w.reason = punt, reason
	w.apply()
}

// Path tells whether XDP sends on the wire and, if not, why.
func (w *Wire) Path() (xdp bool, reason string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.path()
}

// Up tells the state last set.
func (w *Wire) Up() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.up && !w.closed
}

// User returns WireSpec.User.
func (w *Wire) User() any { return w.user }

// Release ends the wire: it is down from now on. Its slot is reused when no
// route names it any more (Layer.Replace drops old routes).
func (w *Wire) Release() {
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return
	}
	w.closed = true
	w.apply()
	w.mu.Unlock()
	p := w.plane
	p.mu.Lock()
	defer p.mu.Unlock()
	w.gone = true
	w.collect()
}

// collect retires the slot of a released wire that nobody names. plane.mu is held.
func (w *Wire) collect() {
	if w.gone && w.refs == 0 {
		p := w.plane
		p.retire(func() {
			p.wires[w.slot].Store(nil)
			p.wireSlots.Free(w.slot)
		})
	}
}
