package enroll

import (
	"fmt"
	"math"
	"strings"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/wire"
)

// Numbers of the policies that exist (spec 41 §4). Link-state variants and hash
// algorithms are those of package ipcp.
const (
	routingLinkState = 0
	directoryDHT     = 0
	addrAuthFlat     = 0
	maxCongestion    = 1
)

// eidSize is the only size of endpoint ids: members replace any other, as the
// reference does (spec 20 §2.1).
const eidSize = 8

// maxFanout bounds alpha and k. The reference's tools allow 10 and 20, but its
// command line does not check (spec 43 §5); this is what bounds our memory.
const maxFanout = 128

// Validate checks the configuration of a unicast or broadcast layer, whether
// it comes from an operator or from a peer. Errors wrap EINVAL and name the
// option and the values it can have.
func Validate(c ipcp.Config) error {
	switch {
	case c.LayerName == "" || len(c.LayerName) > wire.MaxLayerName || strings.ContainsRune(c.LayerName, 0):
		return invalid("layer name %q: expected 1 to %d bytes without NUL", c.LayerName, wire.MaxLayerName)
	case wire.HashLen(uint8(c.Hash)) == 0:
		return invalid("hash %d: expected 0 (SHA3_224) to 3 (SHA3_512)", c.Hash)
	case c.Type == ipcp.Broadcast:
		return nil
	case c.Type != ipcp.Unicast:
		return invalid("a layer of type %v has no members that enrol", c.Type)
	}
	u := &c.Unicast
	switch {
	case u.AddrSize != 4:
		return invalid("addr_size %d: flat addresses have 4 bytes", u.AddrSize)
	case u.EIDSize != eidSize:
		return invalid("eid_size %d: only %d is possible", u.EIDSize, eidSize)
	case u.MaxTTL == 0:
		return invalid("max_ttl 0: expected 1 to 255")
	case u.Routing > ipcp.ECMP:
		return invalid("link-state policy %d: expected 0 (link-state), 1 (lfa) or 2 (ecmp)", u.Routing)
	case u.Congestion > maxCongestion:
		return invalid("congestion avoidance %d: expected 0 (none) or 1 (mb-ecn)", u.Congestion)
	case u.Peer > math.MaxUint32:
		return invalid("directory peer %#x: addresses have 4 bytes", u.Peer)
	}
	for _, v := range [...]struct {
		name   string
		v, max uint32
	}{
		{"ls_t_recalc", u.TRecalc, math.MaxInt32},
		{"ls_t_update", u.TUpdate, math.MaxInt32},
		{"ls_t_timeo", u.TTimeo, math.MaxInt32},
		{"dht_alpha", u.DHTAlpha, maxFanout},
		{"dht_k", u.DHTK, maxFanout},
		{"dht_t_expire", u.DHTExpire, math.MaxInt32},
		{"dht_t_refresh", u.DHTRefresh, math.MaxInt32},
		{"dht_t_replicate", u.DHTRep, math.MaxInt32},
	} {
		if v.v == 0 || v.v > v.max {
			return invalid("%s %d: expected 1 to %d", v.name, v.v, v.max)
		}
	}
	return nil
}

func invalid(format string, a ...any) error { return o7serr.Wrap(o7serr.EINVAL, format, a...) }

// toWire converts a valid configuration.
func toWire(c ipcp.Config) *wire.LayerConfig {
	w := &wire.LayerConfig{LayerName: c.LayerName, HashAlg: uint32(c.Hash), Type: uint32(c.Type)}
	if c.Type != ipcp.Unicast {
		return w
	}
	u := &c.Unicast
	w.Unicast = &wire.UnicastConfig{
		AddrSize: uint32(u.AddrSize), EIDSize: uint32(u.EIDSize), MaxTTL: uint32(u.MaxTTL),
		RoutingPolicy: routingLinkState,
		LinkState: &wire.LinkStateConfig{
			Policy: uint32(u.Routing), TRecalc: u.TRecalc, TUpdate: u.TUpdate, TTimeo: u.TTimeo,
		},
		DirectoryPolicy: directoryDHT,
		DHT: &wire.DHTConfig{
			Alpha: u.DHTAlpha, K: u.DHTK, TExpire: u.DHTExpire, TRefresh: u.DHTRefresh, TReplicate: u.DHTRep, Peer: u.Peer,
		},
		AddrAuth: addrAuthFlat, Congestion: u.Congestion,
	}
	return w
}

// fromWire converts what a peer sent and says what it had to change.
func fromWire(w *wire.LayerConfig) (c ipcp.Config, warnings []string, err error) {
	if w.Type > math.MaxUint8 || w.HashAlg > math.MaxUint8 {
		return c, nil, invalid("type %d, hash %d: no such numbers", w.Type, w.HashAlg)
	}
	c = ipcp.Config{Type: ipcp.Type(w.Type), LayerName: w.LayerName, Hash: ipcp.HashAlg(w.HashAlg)}
	if c.Type == ipcp.Unicast {
		if c.Unicast, warnings, err = unicastFromWire(w.Unicast); err != nil {
			return c, nil, err
		}
	}
	return c, warnings, Validate(c)
}

func unicastFromWire(w *wire.UnicastConfig) (u ipcp.UnicastConfig, warnings []string, err error) {
	switch {
	case w.AddrAuth != addrAuthFlat:
		return u, nil, invalid("address authority policy %d: only 0 (flat) is known", w.AddrAuth)
	case w.RoutingPolicy != routingLinkState || w.LinkState == nil:
		return u, nil, invalid("routing policy %d: only 0 (link-state) is known", w.RoutingPolicy)
	case w.DirectoryPolicy != directoryDHT || w.DHT == nil:
		return u, nil, invalid("directory policy %d: only 0 (DHT) is known", w.DirectoryPolicy)
	case w.LinkState.Policy > math.MaxUint8:
		return u, nil, invalid("link-state policy %d: expected 0 to 2", w.LinkState.Policy)
	case w.AddrSize > math.MaxUint8 || w.MaxTTL > math.MaxUint8:
		return u, nil, invalid("addr_size %d, max_ttl %d: must fit a byte", w.AddrSize, w.MaxTTL)
	}
	if w.EIDSize != eidSize {
		warnings = append(warnings, fmt.Sprintf("eid_size %d replaced by %d", w.EIDSize, eidSize))
	}
	if w.DHT.Peer == 0 {
		warnings = append(warnings, "enroller gave no address: the directory has no first contact")
	}
	return ipcp.UnicastConfig{
		AddrSize: uint8(w.AddrSize), EIDSize: eidSize, MaxTTL: uint8(w.MaxTTL),
		Routing: ipcp.RoutingPolicy(w.LinkState.Policy),
		TRecalc: w.LinkState.TRecalc, TUpdate: w.LinkState.TUpdate, TTimeo: w.LinkState.TTimeo,
		DHTAlpha: w.DHT.Alpha, DHTK: w.DHT.K,
		DHTExpire: w.DHT.TExpire, DHTRefresh: w.DHT.TRefresh, DHTRep: w.DHT.TReplicate,
		Congestion: w.Congestion, Peer: w.DHT.Peer,
	}, warnings, nil
}
