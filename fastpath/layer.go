package fastpath

import (
	"errors"
	"fmt"
	"math"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/fastpath/fib"
	"github.com/o7s/o7s-router/fastpath/model"
	"github.com/o7s/o7s-router/fastpath/tables"
)

// Route says how a destination is reached: over NextHops, all equal, at most
// eight (a flow stays on one of them as long as it is up), and over Alternate,
// if not nil, when all of them are down.
type Route struct {
	Dst       uint64
	NextHops  []*Wire
	Alternate *Wire
}

// Layer is a member of a unicast layer: an address and a forwarding table.
type Layer struct {
	plane *Plane
	name  string
	slot  uint32
	size  int

	// Guarded by plane.mu.
	table  *fib.Table        // 4-byte addresses
	routes map[uint64]uint32 // 8-byte addresses: next hop
	hops   map[hopKey]*hop   // next hops that the table may name
	stale  []*hop            // ... whose wires were switched into those of another
	apps   map[uint32]*App   // flows of programs, by handle
	closed bool

	length atomic.Int64
}

// hopKey is the content of a next hop: wire slots.
type hopKey struct {
	wires     [tables.ECMPWays]uint32
	count     uint32
	alternate uint32
}

// hop is a next-hop record. It holds a reference on its wires.
type hop struct {
	slot uint32
	key  hopKey
}

// NewLayer adds a member of a unicast layer with its own address (0: none yet)
// and the size of addresses on the wire, 4 or 8 bytes.
func (p *Plane) NewLayer(name string, addr uint64, addrSize int) (*Layer, error) {
	if addrSize != 4 && addrSize != 8 {
		return nil, fmt.Errorf("address size %d: must be 4 or 8", addrSize)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	slot, err := p.alloc(p.layerSlot, "unicast layers")
	if err != nil {
		return nil, err
	}
	l := &Layer{plane: p, name: name, slot: slot, size: addrSize, hops: map[hopKey]*hop{}, routes: map[uint64]uint32{}, apps: map[uint32]*App{}}
	ref, ok := p.allocRegion(fib.SizeFor(0))
	if !ok {
		p.layerSlot.Free(slot)
		return nil, fmt.Errorf("%w: no more routes (option MaxRoutes)", ErrTableFull)
	}
	l.table = fib.NewTable(p.t.FIB, ref)
	rec := &p.t.Layers[slot]
	atomic.StoreUint32(&rec.AddrSize, uint32(addrSize))
	atomic.StoreUint64(&rec.Fib, uint64(ref))
	p.layers[slot] = l
	l.setAddress(addr)
	return l, nil
}

// SetAddress changes the own address.
func (l *Layer) SetAddress(addr uint64) { l.setAddress(addr) }

func (l *Layer) setAddress(addr uint64) { atomic.StoreUint64(&l.plane.t.Layers[l.slot].Addr, addr) }

// Len is the number of routes.
func (l *Layer) Len() int { return int(l.length.Load()) }

// Lookup chooses the wire for a destination and EID as XDP does. ok is false
// when there is no usable one; the wire is then nil (no route) or the first
// choice, which is down. It takes no lock.
func (l *Layer) Lookup(dst, eid uint64) (w *Wire, ok bool) {
	p := l.plane
	if l.size == 4 && dst > math.MaxUint32 {
		return nil, false
	}
	for {
		epoch := p.epoch.Load()
		slot, r := model.Forward(p.t, l.slot, dst, eid)
		w = p.wires[slot].Load()
		// Memory that the lookup went through may have got a new meaning on the
		// way, but not before the epoch changed.
		if p.epoch.Load() == epoch {
			return w, w != nil && (r == bpf.Forward || r == bpf.UserPunt)
		}
	}
}

// key returns the next hop of a route. plane.mu is held.
func (l *Layer) key(r *Route) (k hopKey, err error) {
	if r.Dst == 0 || l.size == 4 && r.Dst > math.MaxUint32 {
		return k, fmt.Errorf("route to %#x: not an address of %d bytes", r.Dst, l.size)
	}
	if len(r.NextHops) == 0 {
		return k, fmt.Errorf("route to %#x: no next hop", r.Dst)
	}
	k.count = uint32(min(len(r.NextHops), len(k.wires)))
	for i := range k.count {
		w := r.NextHops[i]
		if w == nil || w.layer != l || w.gone {
			return k, fmt.Errorf("route to %#x: next hop %d is not a wire of this layer", r.Dst, i)
		}
		k.wires[i] = w.slot
	}
	if w := r.Alternate; w != nil {
		if w.layer != l || w.gone {
			return k, fmt.Errorf("route to %#x: the alternate is not a wire of this layer", r.Dst)
		}
		k.alternate = w.slot
	}
	return k, nil
}

// addHop writes a next hop. plane.mu is held.
func (l *Layer) addHop(k hopKey) (*hop, error) {
	p := l.plane
	slot, err := p.alloc(p.nhSlots, "next hops")
	if err != nil {
		return nil, err
	}
	h := &hop{slot: slot, key: k}
	rec := &p.t.NextHops[slot]
	for i := range k.wires {
		atomic.StoreUint32(&rec.Wire[i], k.wires[i])
	}
	atomic.StoreUint32(&rec.Alternate, k.alternate)
	atomic.StoreUint32(&rec.Count, k.count)
	p.holdWires(k, 1)
	return h, nil
}

// dropHop retires a next hop that no route names any more. plane.mu is held.
func (l *Layer) dropHop(h *hop) {
	p := l.plane
	p.retire(func() {
		p.nhSlots.Free(h.slot)
		p.holdWires(h.key, -1)
	})
}

func (p *Plane) holdWires(k hopKey, n int) {
	hold := func(slot uint32) {
		if w := p.wires[slot].Load(); w != nil {
			w.refs += n
			w.collect()
		}
	}
	for _, slot := range k.wires[:k.count] {
		hold(slot)
	}
	if k.alternate != 0 {
		hold(k.alternate)
	}
}

// hopSet collects the next hops of a new table; those of the old one are kept.
type hopSet struct {
	l    *Layer
	hops map[hopKey]*hop
	key  hopKey // of last: routes mostly come in runs
	last *hop
}

func (s *hopSet) get(k hopKey) (*hop, error) {
	if s.last != nil && s.key == k {
		return s.last, nil
	}
	h := s.hops[k]
	if h == nil {
		if h = s.l.hops[k]; h == nil {
			var err error
			if h, err = s.l.addHop(k); err != nil {
				return nil, err
			}
		}
		s.hops[k] = h
	}
	s.key, s.last = k, h
	return h, nil
}

// undo drops what the set added.
func (s *hopSet) undo() {
	for k, h := range s.hops {
		if s.l.hops[k] != h {
			s.l.dropHop(h)
		}
	}
}

// Replace makes routes the layer's table. With 4-byte addresses the new table
// is built beside the old one and takes its place in one store: a packet sees
// the one or the other. Of several routes to one destination the last counts.
// On error the old table stays. Errors: ErrTableFull.
func (l *Layer) Replace(routes []Route) error {
	p := l.plane
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.closed || p.closed {
		return ErrClosed
	}
	set := &hopSet{l: l, hops: map[hopKey]*hop{}}
	var err error
	if l.size == 4 {
		err = l.rebuild(routes, set)
	} else {
		err = l.replace8(routes, set)
	}
	if err != nil {
		set.undo()
		return err
	}
	for k, h := range l.hops {
		if set.hops[k] != h {
			l.dropHop(h)
		}
	}
	for _, h := range l.stale {
		l.dropHop(h)
	}
	l.hops, l.stale = set.hops, nil
	return nil
}

// rebuild builds a table and switches to it. plane.mu is held.
func (l *Layer) rebuild(routes []Route, set *hopSet) error {
	p := l.plane
	for size := fib.SizeFor(len(routes)); ; size = size.Retry(len(routes)) {
		ref, ok := p.allocRegion(size)
		if !ok {
			return fmt.Errorf("%w: %d routes need %d buckets, the largest free region has %d (option MaxRoutes)",
				ErrTableFull, len(routes), size.Buckets, p.arena.Largest())
		}
		next := fib.NewTable(p.t.FIB, ref)
		err := l.fill(next, routes, set)
		if err == nil {
			l.switchTo(next)
			return nil
		}
		p.arena.Free(ref) // no reader has seen it
		if !errors.Is(err, fib.ErrFull) {
			return err
		}
	}
}

// allocRegion reserves a region, after a reclaim if need be. mu is held.
func (p *Plane) allocRegion(size fib.Size) (fib.Ref, bool) {
	ref, ok := p.arena.Alloc(size.Buckets)
	if !ok {
		p.reclaim()
		ref, ok = p.arena.Alloc(size.Buckets)
	}
	return size.Ref(ref), ok
}

func (l *Layer) fill(t *fib.Table, routes []Route, set *hopSet) error {
	for i := range routes {
		k, err := l.key(&routes[i])
		if err != nil {
			return err
		}
		h, err := set.get(k)
		if err != nil {
			return err
		}
		if err := t.Set(uint32(routes[i].Dst), h.slot); err != nil {
			return err
		}
	}
	return nil
}

// switchTo makes next the table: one store. plane.mu is held.
func (l *Layer) switchTo(next *fib.Table) {
	p, old := l.plane, l.table
	atomic.StoreUint64(&p.t.Layers[l.slot].Fib, uint64(next.Ref()))
	l.table = next
	l.length.Store(int64(next.Len()))
	p.retire(func() { p.arena.Free(old.Ref()) })
}

// replace8 changes the hash of 8-byte addresses entry by entry: first what is
// new or different, then what goes. plane.mu is held.
func (l *Layer) replace8(routes []Route, set *hopSet) error {
	p := l.plane
	next := make(map[uint64]uint32, len(routes))
	for i := range routes {
		k, err := l.key(&routes[i])
		if err != nil {
			return err
		}
		h, err := set.get(k)
		if err != nil {
			return err
		}
		next[routes[i].Dst] = h.slot
	}
	for dst, nh := range next {
		if l.routes[dst] == nh {
			continue
		}
		if err := p.put8(l.slot, dst, nh); err != nil {
			// Back to what the old table says.
			for d := range next {
				if old := l.routes[d]; old != 0 {
					_ = p.put8(l.slot, d, old) // updates cannot fail for want of room
				} else {
					p.delete8(l.slot, d)
				}
			}
			return err
		}
	}
	for dst := range l.routes {
		if _, ok := next[dst]; !ok {
			p.delete8(l.slot, dst)
		}
	}
	l.routes = next
	l.length.Store(int64(len(next)))
	return nil
}

func (p *Plane) put8(layer uint32, dst uint64, nh uint32) error {
	key := tables.FIB8Key{Addr: dst, Layer: layer}
	if k := p.kernel; k != nil {
		if err := k.maps[bpf.RouterMapFib8].Put(key, nh); err != nil {
			return fmt.Errorf("%w: 8-byte addresses: %w", ErrTableFull, err)
		}
	}
	p.t.FIB8.Store(key, nh)
	return nil
}

func (p *Plane) delete8(layer uint32, dst uint64) {
	key := tables.FIB8Key{Addr: dst, Layer: layer}
	if k := p.kernel; k != nil {
		if err := k.maps[bpf.RouterMapFib8].Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			p.log.Error("remove route", "dst", dst, "error", err)
		}
	}
	p.t.FIB8.Delete(key)
}

// Set adds or changes one route in place.
func (l *Layer) Set(r Route) error {
	p := l.plane
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.closed || p.closed {
		return ErrClosed
	}
	k, err := l.key(&r)
	if err != nil {
		return err
	}
	h := l.hops[k]
	if h == nil {
		if h, err = l.addHop(k); err != nil {
			return err
		}
		l.hops[k] = h
	}
	if l.size == 8 {
		if err := p.put8(l.slot, r.Dst, h.slot); err != nil {
			return err
		}
		l.routes[r.Dst] = h.slot
		l.length.Store(int64(len(l.routes)))
		return nil
	}
	err = l.table.Set(uint32(r.Dst), h.slot)
	if errors.Is(err, fib.ErrFull) {
		err = l.grow(uint32(r.Dst), h.slot)
	}
	l.length.Store(int64(l.table.Len()))
	return err
}

// grow moves the table to a larger region and adds an entry. plane.mu is held.
func (l *Layer) grow(dst, nh uint32) error {
	p := l.plane
	n := l.table.Len()
	n += n/4 + 8
	for size := fib.SizeFor(n); ; size = size.Retry(n) {
		ref, ok := p.allocRegion(size)
		if !ok {
			return fmt.Errorf("%w: %d routes (option MaxRoutes)", ErrTableFull, l.table.Len())
		}
		next := fib.NewTable(p.t.FIB, ref)
		err := next.Set(dst, nh)
		for d, h := range l.table.All() {
			if err == nil {
				err = next.Set(d, h)
			}
		}
		if err == nil {
			l.switchTo(next)
			return nil
		}
		p.arena.Free(ref)
	}
}

// Delete removes the route to dst and tells whether there was one.
func (l *Layer) Delete(dst uint64) bool {
	p := l.plane
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.closed || p.closed {
		return false
	}
	found := false
	if l.size == 8 {
		if _, found = l.routes[dst]; found {
			p.delete8(l.slot, dst)
			delete(l.routes, dst)
		}
		l.length.Store(int64(len(l.routes)))
		return found
	}
	if dst <= math.MaxUint32 {
		found = l.table.Delete(uint32(dst))
	}
	l.length.Store(int64(l.table.Len()))
	return found
}

// Switch puts wire next in the place of old in every route at once: a store per
// distinct next hop, whatever the number of routes.
func (l *Layer) Switch(old, next *Wire) error {
	p := l.plane
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.closed || p.closed {
		return ErrClosed
	}
	if old.layer != l || next.layer != l || next.gone {
		return errors.New("switch wire: not a wire of this layer")
	}
	all := l.stale
	for _, h := range l.hops {
		all = append(all, h)
	}
	hops := make(map[hopKey]*hop, len(all))
	l.stale = nil
	for _, h := range all {
		k := h.key
		rec := &p.t.NextHops[h.slot]
		for i, slot := range k.wires[:k.count] {
			if slot == old.slot {
				k.wires[i] = next.slot
				atomic.StoreUint32(&rec.Wire[i], next.slot)
			}
		}
		if k.alternate == old.slot {
			k.alternate = next.slot
			atomic.StoreUint32(&rec.Alternate, next.slot)
		}
		if k != h.key {
			before := h.key
			h.key = k
			p.holdWires(k, 1)
			p.retire(func() { p.holdWires(before, -1) })
		}
		if hops[k] != nil {
			l.stale = append(l.stale, h) // same content twice
		} else {
			hops[k] = h
		}
	}
	l.hops = hops
	return nil
}

// Close removes the layer, and its flows from the programs that have them: what
// they still send must not take the routes of the layer that gets the slot next.
// Endpoints that lead to it must be gone.
func (l *Layer) Close() error {
	p := l.plane
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	for h, a := range l.apps {
		a.remove(h)
	}
	for dst := range l.routes {
		p.delete8(l.slot, dst)
	}
	atomic.StoreUint64(&p.t.Layers[l.slot].Fib, 0)
	atomic.StoreUint64(&p.t.Layers[l.slot].Addr, 0)
	for _, h := range l.hops {
		l.dropHop(h)
	}
	for _, h := range l.stale {
		l.dropHop(h)
	}
	ref := l.table.Ref()
	p.retire(func() {
		p.arena.Free(ref)
		p.layerSlot.Free(l.slot)
	})
	delete(p.layers, l.slot)
	l.length.Store(0)
	return nil
}
