package ovpn

import (
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
)

const (
	// maxPacket is the longest packet of a device, Ethernet header included.
	maxPacket = 65535 + etherLen
	// maxStations bounds the addresses that are known behind one peer.
	maxStations = 4096
	// stationAge is after how long without a frame a switch forgets a station
	// (IEEE 802.1D §7.9.2). IP addresses are kept as long as the flow.
	stationAge = 300 * time.Second
	// patience is how long a packet waits for room in the only flow. Where
	// there are several, one that is full must not hold up the others.
	patience = 50 * time.Millisecond
	// errorsPerSecond bounds the ICMP errors.
	errorsPerSecond = 100
)

// device is the hub's own port; *tun is one.
type device interface {
	Write([]byte) (int, error)
	// SetMTU sets the longest IP packet.
	SetMTU(int) error
}

// peer is a port of the hub.
type peer struct {
	f     kit.Flow
	born  uint64       // a later peer has a larger number
	limit atomic.Int64 // longest message
	// most is the longest message of a flow that splits messages, which it does
	// from when it knows that the other end puts them together; nil otherwise.
	most  func() int
	known int // stations; guarded by hub.mu
}

// station is where an address is.
type station struct {
	peer *peer        // nil: the device
	seen atomic.Int64 // hub clock, s
}

// hub forwards packets between a device and peers: IP packets by address, or
// Ethernet frames as a learning switch. It is safe for concurrent use.
type hub struct {
	dev   device
	tap   bool
	own   netip.Prefix // of the device; zero: none
	mtu   int          // of the device at most
	clock func() time.Time

	dropped, malformed atomic.Uint64

	mu     sync.RWMutex // guards what follows
	peers  map[*peer]struct{}
	list   []*peer // the same; replaced, not changed
	births uint64
	addrs  map[netip.Addr]*station // of IP packets
	macs   map[[6]byte]*station    // of frames

	emu    sync.Mutex // guards what follows
	errors int        // in the second
	second int64
}

func newHub(dev device, tap bool, own netip.Prefix, mtu int) *hub {
	return &hub{
		dev: dev, tap: tap, own: own, mtu: mtu, clock: time.Now,
		peers: map[*peer]struct{}{}, addrs: map[netip.Addr]*station{}, macs: map[[6]byte]*station{},
	}
}

// join adds a flow.
func (h *hub) join(f kit.Flow) (*peer, error) {
	p := &peer{f: f}
	p.limit.Store(int64(min(f.MTU(), maxPacket)))
	if m, ok := f.(interface{ MaxMessage() int }); ok && f.QoS().InOrder != 0 {
		p.most = m.MaxMessage
		p.limit.Store(int64(min(p.most(), maxPacket)))
	}
	f.SetWriteTimeout(patience)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.births++
	p.born = h.births
	h.peers[p] = struct{}{}
	return p, h.changed()
}

// heard looks, after packets of p, whether it now takes longer ones.
func (h *hub) heard(p *peer) error {
	if p.most == nil {
		return nil
	}
	n := int64(min(p.most(), maxPacket))
	if n <= p.limit.Load() {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	p.limit.Store(n)
	return h.changed()
}

// leave removes a peer and what was known behind it.
func (h *hub) leave(p *peer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.peers, p)
	for a, s := range h.addrs {
		if s.peer == p {
			delete(h.addrs, a)
		}
	}
	for a, s := range h.macs {
		if s.peer == p {
			delete(h.macs, a)
		}
	}
	_ = h.changed() // the device stays as it is
}

// changed adapts everything to the peers that there are. h.mu is held.
func (h *hub) changed() error {
	h.list = make([]*peer, 0, len(h.peers))
	mtu := h.mtu
	flags := o7s.Default | o7s.RNOPART
	if len(h.peers) > 1 {
		flags |= o7s.WNOBLOCK
	}
	for p := range h.peers {
		h.list = append(h.list, p)
		mtu = min(mtu, h.ip(int(p.limit.Load())))
		if err := p.f.SetFlags(flags); err != nil && !h.gone(err) {
			return err
		}
	}
	if len(h.peers) == 0 {
		return nil
	}
	return h.dev.SetMTU(mtu)
}

func (h *hub) gone(err error) bool { return errors.Is(err, o7serr.ENOTALLOC) }

// ip is the longest IP packet in a message of n bytes.
func (h *hub) ip(n int) int {
	if h.tap {
		return n - etherLen
	}
	return n
}

// fromDevice forwards a packet of the device.
func (h *hub) fromDevice(b []byte) { h.forward(nil, b) }

// fromPeer forwards a packet of a peer.
func (h *hub) fromPeer(p *peer, b []byte) { h.forward(p, b) }

func (h *hub) forward(from *peer, b []byte) {
	if h.tap {
		h.bridge(from, b)
	} else {
		h.route(from, b)
	}
}

// route forwards an IP packet.
func (h *hub) route(from *peer, b []byte) {
	ip, ok := parse(b)
	if !ok {
		h.malformed.Add(1)
		return
	}
	if from != nil {
		h.learn(from, ip.src)
		if isHello(b, ip) {
			return
		}
	}
	b = b[:ip.length]
	if h.everybody(ip.dst) {
		h.flood(from, b)
		return
	}
	h.mu.RLock()
	s := h.addrs[ip.dst]
	only := (*peer)(nil)
	if len(h.list) == 1 {
		only = h.list[0]
	}
	h.mu.RUnlock()
	switch {
	case s != nil && s.peer != from:
		h.send(from, s.peer, b)
	case from != nil:
		_, _ = h.dev.Write(b)
	case only != nil: // who else
		h.send(from, only, b)
	default:
		h.dropped.Add(1)
		h.complain(from, nil, unreachable, b, 0)
	}
}

// everybody reports whether dst is more than one host.
func (h *hub) everybody(dst netip.Addr) bool {
	if dst.IsMulticast() || dst == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return true
	}
	if !dst.Is4() || !h.own.IsValid() || !h.own.Contains(dst) || h.own.Bits() >= 31 {
		return false
	}
	a := dst.As4()
	last := uint32(a[0])<<24 | uint32(a[1])<<16 | uint32(a[2])<<8 | uint32(a[3])
	host := uint32(1)<<(32-h.own.Bits()) - 1
	return last&host == host
}

// learn notes that an address is behind a peer. One that a later peer has used
// is not given back to an earlier: a client that lost its flow comes again
// under another, and whoever was first cannot be displaced by an older flow.
func (h *hub) learn(p *peer, a netip.Addr) {
	h.mu.RLock()
	s := h.addrs[a]
	h.mu.RUnlock()
	if s != nil && s.peer.born >= p.born {
		return
	}
	if a.IsUnspecified() || a.IsMulticast() || h.own.IsValid() && a == h.own.Addr() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, in := h.peers[p]; !in || p.known >= maxStations {
		return
	}
	if s := h.addrs[a]; s != nil {
		if s.peer.born >= p.born {
			return
		}
		s.peer.known--
	}
	h.addrs[a] = &station{peer: p}
	p.known++
}

// bridge forwards a frame as a learning switch does.
func (h *hub) bridge(from *peer, b []byte) {
	if len(b) < etherLen {
		h.malformed.Add(1)
		return
	}
	dst, src := [6]byte(b), [6]byte(b[6:])
	now := h.clock().Unix()
	h.mu.RLock()
	s, t := h.macs[src], h.macs[dst]
	h.mu.RUnlock()
	if src[0]&1 == 0 {
		if s == nil || s.peer != from {
			h.learnMAC(from, src, now)
		} else if s.seen.Load() != now {
			s.seen.Store(now)
		}
	}
	switch {
	case dst[0]&1 != 0 || t == nil || now-t.seen.Load() > int64(stationAge/time.Second):
		h.flood(from, b)
	case t.peer == from: // it is where it came from
	case t.peer == nil:
		_, _ = h.dev.Write(b)
	default:
		h.send(from, t.peer, b)
	}
}

// learnMAC notes where a station is. A station may move.
func (h *hub) learnMAC(p *peer, a [6]byte, now int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p != nil {
		if _, in := h.peers[p]; !in || p.known >= maxStations && !h.forget(p, now) {
			return
		}
		p.known++
	}
	if s := h.macs[a]; s != nil && s.peer != nil {
		s.peer.known--
	}
	s := &station{peer: p}
	s.seen.Store(now)
	h.macs[a] = s
}

// forget removes the stations behind p that are too old, and reports whether
// there were any. h.mu is held.
func (h *hub) forget(p *peer, now int64) (some bool) {
	for a, s := range h.macs {
		if s.peer == p && now-s.seen.Load() > int64(stationAge/time.Second) {
			delete(h.macs, a)
			p.known--
			some = true
		}
	}
	return some
}

// flood sends b everywhere but where it came from.
func (h *hub) flood(from *peer, b []byte) {
	h.mu.RLock()
	list := h.list
	h.mu.RUnlock()
	for _, p := range list {
		if p != from {
			h.send(from, p, b)
		}
	}
	if from != nil {
		_, _ = h.dev.Write(b)
	}
}

// send sends b to a peer, in parts or not at all if it is too long.
func (h *hub) send(from, to *peer, b []byte) {
	if n := int(to.limit.Load()); len(b) > n {
		h.tooLong(from, to, b, n)
		return
	}
	_, err := to.f.Write(b)
	if errors.Is(err, o7serr.EMSGSIZE) && int(to.limit.Load()) > to.f.MTU() {
		// The other end does not put fragments together.
		h.mu.Lock()
		to.limit.Store(int64(to.f.MTU()))
		_ = h.changed()
		h.mu.Unlock()
		h.tooLong(from, to, b, to.f.MTU())
		return
	}
	if err != nil {
		h.dropped.Add(1)
	}
}

// tooLong handles a packet of more than n bytes.
func (h *hub) tooLong(from, to *peer, b []byte, n int) {
	inner, mtu := b, h.ip(n)
	var ether []byte
	if h.tap {
		if t := uint16(b[12])<<8 | uint16(b[13]); t != 0x0800 && t != 0x86dd {
			h.dropped.Add(1)
			return
		}
		ether, inner = b[:etherLen], b[etherLen:]
	}
	ip, ok := parse(inner)
	switch {
	case !ok || ip.length <= mtu && h.tap: // padding
		h.dropped.Add(1)
	case mayFragment(inner, ip):
		frame := make([]byte, 0, n)
		fragment(inner, ip, mtu, func(p []byte) {
			if _, err := to.f.Write(append(append(frame, ether...), p...)); err != nil {
				h.dropped.Add(1)
			}
		})
	default:
		h.dropped.Add(1)
		h.complain(from, ether, tooBig, inner, mtu)
	}
}

// complain sends an ICMP error to where a packet came from.
func (h *hub) complain(from *peer, ether []byte, what trouble, b []byte, mtu int) {
	ip, ok := parse(b)
	if !ok || !h.allowed() {
		return
	}
	p := icmp(what, b, ip, h.own.Addr(), mtu)
	if p == nil {
		return
	}
	if ether != nil {
		q := append([]byte{}, ether[6:12]...)
		p = append(append(append(q, ether[:6]...), ether[12:14]...), p...)
	}
	if from == nil {
		_, _ = h.dev.Write(p)
	} else if len(p) <= int(from.limit.Load()) {
		_, _ = from.f.Write(p)
	}
}

// allowed reports whether one more error may be sent now.
func (h *hub) allowed() bool {
	h.emu.Lock()
	defer h.emu.Unlock()
	if now := h.clock().Unix(); now != h.second {
		h.second, h.errors = now, 0
	}
	h.errors++
	return h.errors <= errorsPerSecond
}
