package irm

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/o7s/o7s-router/control/irm/registry"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// typeWords are the exact words for types, by value (spec 45 §9).
var typeWords = []string{"local", "unicast", "broadcast", "eth-llc", "eth-dix", "udp4", "udp6"}

// ParseType reads the word for a type of IPC process.
func ParseType(s string) (ipcp.Type, error) {
	if i := slices.Index(typeWords, s); i >= 0 {
		return ipcp.Type(i), nil
	}
	return 0, fail(o7serr.EIPCPTYPE, "unknown ipcp type %q (expected %s)", s, strings.Join(typeWords, ", "))
}

// option is one bootstrap option: what it applies to and how it is read.
type option struct {
	types []ipcp.Type
	set   func(c *ipcp.Config, v string, log *slog.Logger) error
}

var hashed = []ipcp.Type{ipcp.Local, ipcp.Unicast, ipcp.EthLLC, ipcp.EthDIX}
var onlyUnicast = []ipcp.Type{ipcp.Unicast}
var onlyUDP = []ipcp.Type{ipcp.UDP4, ipcp.UDP6}

// options are those of spec 47 §1 by command-line keyword.
var options = map[string]option{
	"hash": {hashed, func(c *ipcp.Config, v string, _ *slog.Logger) (err error) {
		c.Hash, err = registry.ParseHash(v)
		return err
	}},
	"dev": {[]ipcp.Type{ipcp.EthLLC, ipcp.EthDIX}, func(c *ipcp.Config, v string, _ *slog.Logger) error {
		c.Eth.Device = v
		return registry.CheckName("device", v)
	}},
	"ethertype": {[]ipcp.Type{ipcp.EthDIX}, func(c *ipcp.Config, v string, _ *slog.Logger) error {
		digits := strings.TrimPrefix(strings.TrimPrefix(v, "0x"), "0X")
		n, err := strconv.ParseUint(digits, 16, 16)
		if err != nil || n < 0x600 || n > 0xfffe {
			return fmt.Errorf("expected a hexadecimal number from 0x0600 to 0xFFFE")
		}
		c.Eth.EtherType = uint16(n)
		return nil
	}},
	"ip":   {onlyUDP, nil},
	"dns":  {onlyUDP, nil},
	"port": {onlyUDP, nil},
	"addr_size": {onlyUnicast, func(c *ipcp.Config, v string, _ *slog.Logger) error {
		// The flat policy of the reference draws 4 bytes (spec 47 §1.2).
		if v != "4" {
			return fmt.Errorf("only 4 works with address authority flat")
		}
		c.Unicast.AddrSize = 4
		return nil
	}},
	"eid_size": {onlyUnicast, func(c *ipcp.Config, v string, log *slog.Logger) error {
		n, err := strconv.ParseUint(v, 10, 8)
		if err != nil {
			return fmt.Errorf("expected 8")
		}
		if n != 8 {
			log.Warn("eid size is not supported, using 8", "layer", c.LayerName, "eid_size", n)
		}
		c.Unicast.EIDSize = 8
		return nil
	}},
	"ttl": {onlyUnicast, func(c *ipcp.Config, v string, _ *slog.Logger) error {
		n, err := number(v, 1, 255)
		c.Unicast.MaxTTL = uint8(n)
		return err
	}},
	"addr_auth": {onlyUnicast, words("flat")},
	"directory": {onlyUnicast, words("DHT", "dht")},
	"routing": {onlyUnicast, func(c *ipcp.Config, v string, _ *slog.Logger) error {
		switch v {
		case "link_state", "link-state":
			c.Unicast.Routing = ipcp.LinkState
		case "lfa":
			c.Unicast.Routing = ipcp.LFA
		case "ecmp":
			c.Unicast.Routing = ipcp.ECMP
		default:
			return fmt.Errorf("expected link_state, lfa or ecmp")
		}
		return nil
	}},
	"congestion": {onlyUnicast, func(c *ipcp.Config, v string, _ *slog.Logger) error {
		switch v {
		case "none":
			c.Unicast.Congestion = 0
		case "mb-ecn", "lfa": // "lfa" by a slip of the reference's file reader (spec 47 §6.1)
			c.Unicast.Congestion = 1
		default:
			return fmt.Errorf("expected none or mb-ecn")
		}
		return nil
	}},
	"ls_t_recalc":     seconds(1, 86400, func(u *ipcp.UnicastConfig) *uint32 { return &u.TRecalc }),
	"ls_t_update":     seconds(1, 86400, func(u *ipcp.UnicastConfig) *uint32 { return &u.TUpdate }),
	"ls_t_timeo":      seconds(1, 86400, func(u *ipcp.UnicastConfig) *uint32 { return &u.TTimeo }),
	"dht_alpha":       seconds(1, 10, func(u *ipcp.UnicastConfig) *uint32 { return &u.DHTAlpha }),
	"dht_k":           seconds(1, 20, func(u *ipcp.UnicastConfig) *uint32 { return &u.DHTK }),
	"dht_t_expire":    seconds(10, 86400, func(u *ipcp.UnicastConfig) *uint32 { return &u.DHTExpire }),
	"dht_t_refresh":   seconds(3, 3600, func(u *ipcp.UnicastConfig) *uint32 { return &u.DHTRefresh }),
	"dht_t_replicate": seconds(3, 3600, func(u *ipcp.UnicastConfig) *uint32 { return &u.DHTRep }),
}

func number(v string, lo, hi uint64) (uint64, error) {
	n, err := strconv.ParseUint(v, 10, 32)
	if err != nil || n < lo || n > hi {
		return 0, fmt.Errorf("expected a number from %d to %d", lo, hi)
	}
	return n, nil
}

func seconds(lo, hi uint64, field func(*ipcp.UnicastConfig) *uint32) option {
	return option{onlyUnicast, func(c *ipcp.Config, v string, _ *slog.Logger) error {
		n, err := number(v, lo, hi)
		*field(&c.Unicast) = uint32(n)
		return err
	}}
}

func words(known ...string) func(*ipcp.Config, string, *slog.Logger) error {
	return func(_ *ipcp.Config, v string, _ *slog.Logger) error {
		if !slices.Contains(known, v) {
			return fmt.Errorf("expected %s", known[0])
		}
		return nil
	}
}

// ParseConfig reads the options of a bootstrap command for an IPC process of
// type t; absent ones get the defaults of spec 47 §1.
func ParseConfig(t ipcp.Type, a ipc.BootstrapArgs, log *slog.Logger) (ipcp.Config, error) {
	c := ipcp.Config{Type: t, LayerName: a.Layer, Hash: ipcp.SHA3_256}
	if err := registry.CheckName("layer", a.Layer); err != nil {
		return c, err
	}
	switch t {
	case ipcp.Unicast:
		c.Unicast = ipcp.DefaultUnicast()
	case ipcp.EthDIX:
		c.Eth.EtherType = 0xA000
	}
	for _, key := range slices.Sorted(maps.Keys(a.Options)) {
		o, ok := options[key]
		if !ok {
			return c, fail(o7serr.EINVAL, "unknown option %q (type %s knows %s)", key, t, strings.Join(optionsOf(t), ", "))
		}
		if !slices.Contains(o.types, t) {
			return c, fail(o7serr.EINVAL, "option %s does not apply to type %s (it knows %s)", key, t, strings.Join(optionsOf(t), ", "))
		}
		if err := o.set(&c, a.Options[key], log); err != nil {
			return c, fail(o7serr.EINVAL, "option %s %q: %v", key, a.Options[key], err)
		}
	}
	if (t == ipcp.EthDIX || t == ipcp.EthLLC) && c.Eth.Device == "" {
		return c, fail(o7serr.EINVAL, "option dev is missing: type %s needs a network interface", t)
	}
	return c, nil
}

func optionsOf(t ipcp.Type) []string {
	var out []string
	for key, o := range options {
		if slices.Contains(o.types, t) {
			out = append(out, key)
		}
	}
	slices.Sort(out)
	return out
}

// match reports whether s matches pattern, in which '*' stands for any run of
// characters (spec 45 §9).
func match(pattern, s string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == s
	}
	first, last := parts[0], parts[len(parts)-1]
	if len(s) < len(first)+len(last) || !strings.HasPrefix(s, first) || !strings.HasSuffix(s, last) {
		return false
	}
	s = s[len(first) : len(s)-len(last)]
	for _, p := range parts[1 : len(parts)-1] {
		i := strings.Index(s, p)
		if i < 0 {
			return false
		}
		s = s[i+len(p):]
	}
	return true
}
