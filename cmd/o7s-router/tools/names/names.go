// Package names is the rule by which the tools that carry existing programs
// turn a host and a port into a name of the network. It is the same for
// `o7s-router proxy` and `o7s-router run`:
//
//  1. what a map says: HOST:PORT=NAME, then HOST=NAME, then *=NAME
//  2. the name HOST:PORT, if there is one
//  3. the name HOST
//
// A host that is an IP address has no name but by a map. Names of hosts are
// compared without regard to case in maps, as those of the Internet are; names
// of the network are used as they are written. A dot at the end is dropped.
package names

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// Rule holds the maps. The zero value has none. It is a flag.Value; it must not
// be changed while it is used.
type Rule struct {
	exact map[string]string // by host:port, host: or *:, with the host in lower case
	list  []string
}

// Add takes HOST[:PORT]=NAME. HOST is a host's name, an address, in brackets if
// it is one of IPv6 with a port, or * for all hosts.
func (r *Rule) Add(s string) error {
	i := strings.LastIndexByte(s, '=')
	if i < 1 || i == len(s)-1 {
		return fmt.Errorf("map %q: expected HOST[:PORT]=NAME", s)
	}
	host, port, err := splitHost(s[:i])
	if err != nil {
		return fmt.Errorf("map %q: %w", s, err)
	}
	k := key(host, port)
	if _, twice := r.exact[k]; twice {
		return fmt.Errorf("map %q: there is one for %s already", s, s[:i])
	}
	if r.exact == nil {
		r.exact = map[string]string{}
	}
	r.exact[k] = s[i+1:]
	r.list = append(r.list, s)
	return nil
}

// Set is Add under the name that package flag gives it.
func (r *Rule) Set(s string) error { return r.Add(s) }

// String lists the maps.
func (r *Rule) String() string { return strings.Join(r.list, " ") }

// splitHost splits HOST[:PORT]; the port is 0 when there is none.
func splitHost(s string) (host string, port uint16, err error) {
	host = s
	switch _, notAddr := netip.ParseAddr(s); {
	case notAddr == nil:
	case strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]"):
		host = s[1 : len(s)-1]
	case strings.Contains(s, ":"):
		var p string
		if host, p, err = net.SplitHostPort(s); err != nil {
			return "", 0, fmt.Errorf("%q is not HOST[:PORT]", s)
		}
		if port, err = Port(p); err != nil {
			return "", 0, err
		}
	}
	if host == "" {
		return "", 0, errors.New("the host is empty")
	}
	return host, port, nil
}

// Port reads the number of a port.
func Port(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is no port (expected a number from 1 to 65535)", s)
	}
	return uint16(n), nil
}

func key(host string, port uint16) string {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if a, err := netip.ParseAddr(host); err == nil {
		host = a.Unmap().String()
	}
	if port == 0 {
		return host + ":"
	}
	return host + ":" + strconv.Itoa(int(port))
}

// Mapped returns the name that a map gives.
func (r *Rule) Mapped(host string, port uint16) (string, bool) {
	if len(r.exact) == 0 {
		return "", false
	}
	for _, k := range []string{key(host, port), key(host, 0), key("*", port), key("*", 0)} {
		if n, ok := r.exact[k]; ok {
			return n, true
		}
	}
	return "", false
}

// HasHost reports whether a map is about the host, whatever the port.
func (r *Rule) HasHost(host string) bool {
	want := key(host, 0)
	for k := range r.exact {
		if h := k[:strings.LastIndexByte(k, ':')+1]; h == want || h == "*:" {
			return true
		}
	}
	return false
}

// HasAddresses reports whether a map is about an address, or all of them.
func (r *Rule) HasAddresses() bool {
	for k := range r.exact {
		h := k[:strings.LastIndexByte(k, ':')]
		if _, err := netip.ParseAddr(h); err == nil || h == "*" {
			return true
		}
	}
	return false
}

// Names returns the names to try, in this order; none for an address that no
// map is about.
func (r *Rule) Names(host string, port uint16) []string {
	if n, ok := r.Mapped(host, port); ok {
		return []string{n}
	}
	host = strings.TrimSuffix(host, ".")
	if _, err := netip.ParseAddr(host); err == nil || host == "" {
		return nil
	}
	return []string{host + ":" + strconv.Itoa(int(port)), host}
}

// Dialer allocates flows; *o7s.Client is one.
type Dialer interface {
	Alloc(ctx context.Context, name string, q *qos.Spec) (*o7s.Flow, error)
}

// Dial allocates a flow to the first of the names that there is. The error of
// a host without a name is o7serr.ENAME, at once. Where one of the names is
// known and its flow fails, that is the error.
func (r *Rule) Dial(ctx context.Context, d Dialer, host string, port uint16, q *qos.Spec) (*o7s.Flow, error) {
	list := r.Names(host, port)
	if len(list) == 0 {
		return nil, fmt.Errorf("%s is an address, not a name (see --map): %w", host, o7serr.ENAME)
	}
	var first error
	for _, n := range list {
		f, err := d.Alloc(ctx, n, q)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, o7serr.ENAME) {
			return nil, err
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}
