package run

import (
	"net/netip"
	"strings"
	"sync"
)

// The private addresses that stand for hosts while a program runs; shim.c has
// the same. They are none of the loopback network's, because programs trust
// those, and none that is used between machines: 198.19.0.0/16 is reserved for
// benchmarks (RFC 2544), fd6f:3773::/64 is a unique local prefix (RFC 4193).
var (
	range4 = netip.MustParsePrefix("198.19.0.0/16")
	range6 = netip.MustParsePrefix("fd6f:3773::/64")
)

const (
	selfNumber = 1 // this end of connections
	peerNumber = 2 // the other end of those that arrive: flows have no addresses
	firstHost  = 256
	lastHost   = 65534
	maxHosts   = lastHost - firstHost + 1
)

// address is that of a number.
func address(n uint16, v6 bool) netip.Addr {
	if v6 {
		b := range6.Addr().As16()
		b[14], b[15] = byte(n>>8), byte(n)
		return netip.AddrFrom16(b)
	}
	b := range4.Addr().As4()
	b[2], b[3] = byte(n>>8), byte(n)
	return netip.AddrFrom4(b)
}

// synthetic reports whether an address stands for a host.
func synthetic(a netip.Addr) bool {
	a = a.Unmap()
	return range4.Contains(a) || range6.Contains(a)
}

// selfAddr is this end's address in the form of requests.
func selfAddr(family uint32) [16]byte { return wire(selfNumber, family) }

// wire is an address in the form of requests. Of IPv6 it is a mapped one: the
// programs that listen with IPv6 serve both.
func wire(n uint16, family uint32) (b [16]byte) {
	a := address(n, false)
	if family == 4 {
		a4 := a.As4()
		copy(b[:], a4[:])
		return b
	}
	return a.As16()
}

// hosts numbers the hosts that a program asked for. The zero value is empty.
type hosts struct {
	mu     sync.Mutex // guards what follows
	byName map[string]uint16
	names  []string // less firstHost
}

// number is that of a host, which gets one. False when there are none left.
func (h *hosts) number(host string) (uint16, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	host = strings.TrimSuffix(host, ".")
	if n, ok := h.byName[host]; ok {
		return n, true
	}
	if len(h.names) >= maxHosts {
		return 0, false
	}
	if h.byName == nil {
		h.byName = map[string]uint16{}
	}
	n := uint16(firstHost + len(h.names))
	h.byName[host] = n
	h.names = append(h.names, host)
	return n, true
}

// name is the host that an address stands for.
func (h *hosts) name(a netip.Addr) (string, bool) {
	a = a.Unmap()
	if !synthetic(a) {
		return "", false
	}
	b := a.AsSlice()
	if a.Is6() {
		for _, x := range b[8:14] {
			if x != 0 {
				return "", false
			}
		}
	}
	n := int(b[len(b)-2])<<8 | int(b[len(b)-1])
	h.mu.Lock()
	defer h.mu.Unlock()
	if n < firstHost || n-firstHost >= len(h.names) {
		return "", false
	}
	return h.names[n-firstHost], true
}
