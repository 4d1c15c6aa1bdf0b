// Package lab builds networks of O7s nodes out of network namespaces, from a
// small TOML file: hosts, links, layers, names, programs and checks. Every
// host is a namespace called o7s-<lab>-<host>, which `ip netns` shows, with one
// daemon in it.
//
// All kernel objects are made over netlink; no program but the daemon and those
// that the file names is run. A lab cleans up after itself, and after an
// earlier one of the same name that was killed.
//
// The files beside this package (line3.toml and so on) show the format.
package lab

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/o7s/o7s-router/deploy/lab/impair"
)

// Topology is a lab as written in its file. Get it from Load or Parse, which
// fill in the defaults and check it.
type Topology struct {
	// Name is that of the lab: letters, digits, '_' and '.'. No dash, which
	// separates lab and host in the names of namespaces.
	Name string `toml:"name"`
	// Hosts are numbered from 1 in this order, for device names and MAC addresses.
	Hosts    []string  `toml:"hosts"`
	Defaults Defaults  `toml:"defaults"`
	Links    []Link    `toml:"link"`
	Layers   []Layer   `toml:"layer"`
	Services []Service `toml:"service"`
	Runs     []Run     `toml:"run"`
	Checks   []Check   `toml:"check"`
}

// Defaults apply to all links and daemons.
type Defaults struct {
	MTU        int   `toml:"mtu"`         // bytes; 1500 when absent
	GRO        *bool `toml:"gro"`         // absent: as the kernel has it (off on veth)
	TxChecksum *bool `toml:"tx_checksum"` // absent: as the kernel has it (on)
	// IPv6 leaves IPv6 on, whose neighbour discovery then talks on every link.
	IPv6   bool     `toml:"ipv6"`
	Daemon []string `toml:"daemon"` // further arguments of every daemon
}

// Link is a veth pair between two hosts.
type Link struct {
	Ends    []string `toml:"ends"`    // two hosts
	Devices []string `toml:"devices"` // e12 and e21 between hosts 1 and 2 when absent
	// Layer is an eth-dix layer over the link, with an IPC process of the same
	// name at both ends; absent for none.
	Layer     string   `toml:"layer"`
	EtherType string   `toml:"ethertype"` // hexadecimal; A000 when absent
	Addresses []string `toml:"addresses"` // IP prefixes of the two ends, for comparisons with IP
	MTU       int      `toml:"mtu"`
	GRO       *bool    `toml:"gro"`
	GSO       *bool    `toml:"gso"` // segmentation by the kernel behind its stack; on when absent
	// TxChecksum false turns transmit checksum offload off, which IP needs when
	// its packets pass an XDP program.
	TxChecksum *bool `toml:"tx_checksum"`
	// Impair puts a relay into the link, in a namespace of its own, that
	// makes it bad in both directions (package impair). It runs in the process
	// that calls Up, and ends with it. Transmit checksum offload is off then.
	Impair *Impair `toml:"impair"`

	a, b int // indexes of the hosts
	nth  int // among the links between the two
}

// Impair is what happens to the frames of a link; see impair.Impairment.
type Impair struct {
	Loss      float64  `toml:"loss"`      // share of the frames, 0 to 1
	Duplicate float64  `toml:"duplicate"` // share
	Reorder   float64  `toml:"reorder"`   // share, held back for HoldBack
	HoldBack  Duration `toml:"hold_back"`
	Delay     Duration `toml:"delay"` // each way
	Rate      int64    `toml:"rate"`  // bit/s; absent: as fast as it goes
	Backlog   Duration `toml:"backlog"`
	Seed      uint64   `toml:"seed"`
}

func (m *Impair) impairment() impair.Impairment {
	return impair.Impairment{
		Loss: m.Loss, Duplicate: m.Duplicate, Reorder: m.Reorder, HoldBack: time.Duration(m.HoldBack),
		Delay: time.Duration(m.Delay), Rate: m.Rate, Backlog: time.Duration(m.Backlog),
	}
}

// Layer is a layer above the links.
type Layer struct {
	Name string `toml:"name"`
	Type string `toml:"type"` // unicast when absent, or local
	// Over are the layers that carry it: those of links, or unicast layers. All
	// layers of links when absent. Members register their name and the layer's
	// with those of them that their host is a member of.
	Over []string `toml:"over"`
	// Routing is link-state, lfa or ecmp.
	Routing string `toml:"routing"`
	// Options are further bootstrap options by the keyword of `irm ipcp
	// bootstrap`, such as ls_t_update.
	Options map[string]any `toml:"options"`
	Members []Member       `toml:"member"`
}

// Member is an IPC process <layer>.<host> of a layer.
type Member struct {
	Host string `toml:"host"`
	// Enroll is the member to enrol through and then to connect to. Absent: this
	// member bootstraps the layer.
	Enroll string `toml:"enroll"`
	// Connect are further members to connect to, management and data transfer.
	Connect []string `toml:"connect"`
	QoS     string   `toml:"qos"` // of data-transfer flows; raw when absent
}

// Service is a name, registered where its program runs.
type Service struct {
	Name    string   `toml:"name"`
	Host    string   `toml:"host"`
	Layers  []string `toml:"layers"`  // to register it in
	Program string   `toml:"program"` // bound to it
	Args    []string `toml:"args"`    // with auto
	Auto    bool     `toml:"auto"`    // start the program when a flow arrives
	LB      string   `toml:"lb"`      // round-robin when absent, or spillover
}

// Run is a program that runs as long as the lab is up.
type Run struct {
	Host    string   `toml:"host"`
	Command []string `toml:"command"`
}

// Check is a command that must succeed on the running lab. Exactly one of Ping
// and Command is set.
type Check struct {
	Host     string   `toml:"host"`
	Ping     string   `toml:"ping"`     // name to ping; no packet may be lost
	Count    int      `toml:"count"`    // pings; 3 when absent
	Interval Duration `toml:"interval"` // between pings; 10 ms when absent
	Command  []string `toml:"command"`
	Expect   string   `toml:"expect"`  // regular expression that the output must match
	Within   Duration `toml:"within"`  // try again until then; once when absent
	Timeout  Duration `toml:"timeout"` // of one try; 20 s when absent
}

// Duration is a time.Duration that reads as "250ms".
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err == nil && v < 0 {
		err = fmt.Errorf("negative duration %q", b)
	}
	*d = Duration(v)
	return err
}

// Error is a mistake in a topology file.
type Error struct {
	File         string
	Line, Column int // from 1; 0 when it concerns the file as a whole
	Msg          string
}

func (e *Error) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: %s", e.File, e.Msg)
	}
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Msg)
}

// Load reads and checks a topology file.
func Load(file string) (*Topology, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return Parse(file, data)
}

// Parse reads and checks a topology. The error joins one *Error for every
// mistake, with file as the name of the file.
func Parse(file string, data []byte) (*Topology, error) {
	t := new(Topology)
	d := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	if err := d.Decode(t); err != nil {
		var strict *toml.StrictMissingError
		var one *toml.DecodeError
		switch {
		case errors.As(err, &strict):
			var errs []error
			for i := range strict.Errors {
				e := &strict.Errors[i]
				line, col := e.Position()
				errs = append(errs, &Error{file, line, col, fmt.Sprintf("unknown key %q", strings.Join(e.Key(), "."))})
			}
			return nil, errors.Join(errs...)
		case errors.As(err, &one):
			line, col := one.Position()
			return nil, &Error{file, line, col, strings.TrimPrefix(one.Error(), "toml: ")}
		}
		return nil, &Error{File: file, Msg: err.Error()}
	}
	c := &checker{t: t, file: file, pos: positions(data)}
	c.check()
	if len(c.errs) > 0 {
		return nil, errors.Join(c.errs...)
	}
	return t, nil
}

var goodName = regexp.MustCompile(`^[A-Za-z0-9_.]{1,64}$`)

// checker collects the mistakes of a topology and fills in defaults.
type checker struct {
	t    *Topology
	file string
	pos  map[string]position
	errs []error
}

// fail reports a mistake at the value with the given path, or at the nearest
// that encloses it.
func (c *checker) fail(path, format string, a ...any) {
	p, ok := c.pos[path]
	for !ok {
		i := strings.LastIndexAny(path, ".[")
		if i < 0 {
			break
		}
		path = path[:i]
		p, ok = c.pos[path]
	}
	c.errs = append(c.errs, &Error{c.file, p.line, p.column, fmt.Sprintf(format, a...)})
}

// host returns the index of a host, or -1 after reporting that there is none.
func (c *checker) host(path, name string) int {
	i := slices.Index(c.t.Hosts, name)
	switch {
	case i >= 0:
	case name == "":
		c.fail(path, "no host given")
	default:
		c.fail(path, "unknown host %q (hosts: %s)", name, strings.Join(c.t.Hosts, ", "))
	}
	return i
}

func (c *checker) check() {
	t := c.t
	switch {
	case t.Name == "":
		c.fail("", "no name given")
	case !goodName.MatchString(t.Name):
		c.fail("name", "bad lab name %q, expected letters, digits, '_' and '.'", t.Name)
	}
	if len(t.Hosts) == 0 {
		c.fail("hosts", "no hosts given")
	}
	for i, h := range t.Hosts {
		path := fmt.Sprintf("hosts[%d]", i)
		if !goodName.MatchString(h) || h == "." || h == ".." || h == binDir {
			c.fail(path, "bad host name %q, expected letters, digits, '_' and '.'", h)
		}
		if slices.Contains(t.Hosts[:i], h) {
			c.fail(path, "host %q is there twice", h)
		}
	}
	if t.Defaults.MTU == 0 {
		t.Defaults.MTU = 1500
	}
	c.links()
	c.layers()
	c.services()
	for i := range t.Runs {
		path := fmt.Sprintf("run[%d]", i)
		c.host(path+".host", t.Runs[i].Host)
		if len(t.Runs[i].Command) == 0 {
			c.fail(path, "no command given")
		}
	}
	c.checks()
}

func (c *checker) mtu(path string, mtu int) {
	// 68 is what IP asks for; a veth takes at most 65535.
	if mtu < 68 || mtu > 65535 {
		c.fail(path, "mtu %d is not between 68 and 65535", mtu)
	}
}

func (c *checker) links() {
	t := c.t
	c.mtu("defaults.mtu", t.Defaults.MTU)
	devices := map[string]string{} // host and device to path
	between := map[[2]int]int{}
	for i := range t.Links {
		l := &t.Links[i]
		path := fmt.Sprintf("link[%d]", i)
		if len(l.Ends) != 2 {
			c.fail(path+".ends", "a link has 2 ends, not %d", len(l.Ends))
			continue
		}
		l.a, l.b = c.host(path+".ends[0]", l.Ends[0]), c.host(path+".ends[1]", l.Ends[1])
		if l.a < 0 || l.b < 0 {
			continue
		}
		if l.a == l.b {
			c.fail(path+".ends", "both ends are at host %q", l.Ends[0])
			continue
		}
		pair := [2]int{min(l.a, l.b), max(l.a, l.b)}
		between[pair]++
		l.nth = between[pair]
		switch len(l.Devices) {
		case 0:
			if l.nth > 1 {
				c.fail(path+".ends", "second link between %q and %q: give its devices", l.Ends[0], l.Ends[1])
				continue
			}
			l.Devices = []string{t.device(l.a, l.b), t.device(l.b, l.a)}
		case 2:
		default:
			c.fail(path+".devices", "a link has 2 devices, not %d", len(l.Devices))
			continue
		}
		for e, dev := range l.Devices {
			at := fmt.Sprintf("%s.devices[%d]", path, e)
			// IFNAMSIZ with its terminator is 16.
			if dev == "" || len(dev) > 15 || strings.ContainsAny(dev, "/ \t\n:") || dev == "." || dev == ".." || dev == "lo" {
				c.fail(at, "bad device name %q", dev)
			}
			key := l.Ends[e] + "/" + dev
			if other, ok := devices[key]; ok {
				c.fail(at, "device %q of host %q belongs to %s already", dev, l.Ends[e], other)
			}
			devices[key] = path
		}
		if l.Layer != "" && !goodLayer(l.Layer) {
			c.fail(path+".layer", "bad layer name %q", l.Layer)
		}
		if l.Layer == "" && l.EtherType != "" {
			c.fail(path+".ethertype", "ethertype without a layer")
		}
		for j := range i {
			if o := &t.Links[j]; l.Layer != "" && o.Layer == l.Layer && (slices.Contains(o.Ends, l.Ends[0]) || slices.Contains(o.Ends, l.Ends[1])) {
				c.fail(path+".layer", "a host has layer %q on two links", l.Layer)
			}
		}
		if l.MTU == 0 {
			l.MTU = t.Defaults.MTU
		} else {
			c.mtu(path+".mtu", l.MTU)
		}
		if l.GRO == nil {
			l.GRO = t.Defaults.GRO
		}
		if l.TxChecksum == nil {
			l.TxChecksum = t.Defaults.TxChecksum
		}
		if l.Impair != nil {
			if l.TxChecksum == nil {
				// The relay passes frames on as they are.
				off := false
				l.TxChecksum = &off
			}
			if err := l.Impair.impairment().Check(); err != nil {
				c.fail(path+".impair", "%v", err)
			}
			if most := impair.MaxMTU; l.MTU > most {
				c.fail(path+".impair", "mtu %d: a relay takes up to %d", l.MTU, most)
			}
		}
		if n := len(l.Addresses); n != 0 && n != 2 {
			c.fail(path+".addresses", "a link has 2 addresses, not %d", n)
		}
		for e, a := range l.Addresses {
			if _, err := netip.ParsePrefix(a); err != nil {
				c.fail(fmt.Sprintf("%s.addresses[%d]", path, e), "bad address %q, expected one like 10.1.2.1/24", a)
			}
		}
	}
}

// device is the name of the device of host i towards host j, counted from 0.
func (t *Topology) device(i, j int) string {
	if len(t.Hosts) < 10 {
		return fmt.Sprintf("e%d%d", i+1, j+1)
	}
	return fmt.Sprintf("e%d-%d", i+1, j+1)
}

func goodLayer(s string) bool {
	return s != "" && len(s) <= 255 && !strings.ContainsAny(s, " \t\n*")
}

// lowerAt returns which layers of l.Over the host is a member of.
func (t *Topology) lowerAt(l *Layer, host string) []string {
	var out []string
	for _, o := range l.Over {
		if t.isMember(o, host) && !slices.Contains(out, o) {
			out = append(out, o)
		}
	}
	return out
}

func (t *Topology) isMember(layer, host string) bool {
	for i := range t.Links {
		if t.Links[i].Layer == layer && slices.Contains(t.Links[i].Ends, host) {
			return true
		}
	}
	for i := range t.Layers {
		if t.Layers[i].Name == layer && t.Layers[i].member(host) != nil {
			return true
		}
	}
	return false
}

func (l *Layer) member(host string) *Member {
	for i := range l.Members {
		if l.Members[i].Host == host {
			return &l.Members[i]
		}
	}
	return nil
}

func (c *checker) layers() {
	t := c.t
	var links []string // layers of links
	for i := range t.Links {
		if n := t.Links[i].Layer; n != "" && !slices.Contains(links, n) {
			links = append(links, n)
		}
	}
	known := slices.Clone(links)
	for i := range t.Layers {
		l := &t.Layers[i]
		path := fmt.Sprintf("layer[%d]", i)
		if !goodLayer(l.Name) {
			c.fail(path+".name", "bad layer name %q", l.Name)
		}
		if slices.Contains(known, l.Name) {
			c.fail(path+".name", "layer %q is there twice", l.Name)
		}
		switch l.Type {
		case "":
			l.Type = "unicast"
		case "unicast", "local":
		default:
			c.fail(path+".type", "unknown layer type %q (expected unicast or local)", l.Type)
		}
		switch l.Routing {
		case "", "link-state", "lfa", "ecmp":
		default:
			c.fail(path+".routing", "unknown routing %q (expected link-state, lfa or ecmp)", l.Routing)
		}
		for k, v := range l.Options {
			switch v.(type) {
			case string, int64, bool:
			default:
				c.fail(path+".options."+k, "option %q: expected a string or a number", k)
			}
		}
		if l.Over == nil && l.Type == "unicast" {
			l.Over = links
		}
		for j, o := range l.Over {
			at := fmt.Sprintf("%s.over[%d]", path, j)
			// Only what was defined before: no circles.
			if !slices.Contains(known, o) {
				c.fail(at, "unknown layer %q (before this one: %s)", o, strings.Join(known, ", "))
			} else if k := slices.IndexFunc(t.Layers, func(x Layer) bool { return x.Name == o }); k >= 0 && t.Layers[k].Type == "local" {
				c.fail(at, "layer %q is local and reaches no other host", o)
			}
		}
		c.members(l, path)
		known = append(known, l.Name)
	}
}

func (c *checker) members(l *Layer, path string) {
	if len(l.Members) == 0 {
		c.fail(path, "layer %q has no members", l.Name)
	}
	first := -1
	for i := range l.Members {
		m := &l.Members[i]
		at := fmt.Sprintf("%s.member[%d]", path, i)
		if c.host(at+".host", m.Host) < 0 {
			continue
		}
		for j := range i {
			if l.Members[j].Host == m.Host {
				c.fail(at+".host", "host %q is a member of layer %q already", m.Host, l.Name)
			}
		}
		switch m.QoS {
		case "", "raw", "best", "video", "voice", "data":
		default:
			c.fail(at+".qos", "unknown qos %q (expected raw, best, video, voice or data)", m.QoS)
		}
		if l.Type == "local" {
			if m.Enroll != "" || len(m.Connect) != 0 {
				c.fail(at, "members of a local layer neither enrol nor connect")
			}
			continue
		}
		if m.Enroll == "" {
			if first >= 0 {
				c.fail(at, "%q and %q both bootstrap layer %q: say where one of them enrols", l.Members[first].Host, m.Host, l.Name)
			}
			first = i
		}
		if m.Enroll != "" {
			c.peer(l, m, at+".enroll", m.Enroll)
		}
		for j, p := range m.Connect {
			c.peer(l, m, fmt.Sprintf("%s.connect[%d]", at, j), p)
		}
	}
	if l.Type == "unicast" && first < 0 && len(l.Members) > 0 {
		c.fail(path, "no member bootstraps layer %q", l.Name)
	}
	// Everybody must get to the first member by enrolments.
	for i := range l.Members {
		m, n := &l.Members[i], 0
		for m != nil && m.Enroll != "" && n <= len(l.Members) {
			m = l.member(m.Enroll)
			n++
		}
		if n > len(l.Members) {
			c.fail(fmt.Sprintf("%s.member[%d].enroll", path, i), "host %q enrols in a circle", l.Members[i].Host)
			break
		}
	}
}

// peer checks that two members can meet.
func (c *checker) peer(l *Layer, m *Member, path, peer string) {
	if c.host(path, peer) < 0 {
		return
	}
	if peer == m.Host {
		c.fail(path, "host %q is this host", peer)
		return
	}
	if l.member(peer) == nil {
		c.fail(path, "host %q is no member of layer %q", peer, l.Name)
		return
	}
	theirs := c.t.lowerAt(l, peer)
	if !slices.ContainsFunc(c.t.lowerAt(l, m.Host), func(o string) bool { return slices.Contains(theirs, o) }) {
		c.fail(path, "hosts %q and %q have no layer below %q in common", m.Host, peer, l.Name)
	}
}

func (c *checker) services() {
	t := c.t
	for i := range t.Services {
		n := &t.Services[i]
		path := fmt.Sprintf("service[%d]", i)
		if !goodLayer(n.Name) {
			c.fail(path+".name", "bad name %q", n.Name)
		}
		if c.host(path+".host", n.Host) < 0 {
			continue
		}
		for j, l := range n.Layers {
			if !t.isMember(l, n.Host) {
				c.fail(fmt.Sprintf("%s.layers[%d]", path, j), "host %q is in no layer %q", n.Host, l)
			}
		}
		if n.Program == "" && (n.Auto || len(n.Args) > 0) {
			c.fail(path, "auto and args need a program")
		}
		switch n.LB {
		case "", "round-robin", "spillover":
		default:
			c.fail(path+".lb", "unknown lb %q (expected round-robin or spillover)", n.LB)
		}
	}
}

func (c *checker) checks() {
	for i := range c.t.Checks {
		k := &c.t.Checks[i]
		path := fmt.Sprintf("check[%d]", i)
		c.host(path+".host", k.Host)
		if (k.Ping == "") == (len(k.Command) == 0) {
			c.fail(path, "a check has either ping or command")
		}
		if k.Ping == "" && (k.Count != 0 || k.Interval != 0) {
			c.fail(path, "count and interval belong to ping")
		}
		if k.Count < 0 {
			c.fail(path+".count", "negative count")
		}
		if k.Ping != "" {
			if k.Count == 0 {
				k.Count = 3
			}
			if k.Interval == 0 {
				k.Interval = Duration(10 * time.Millisecond)
			}
			if k.Expect == "" {
				k.Expect = `(^|[^0-9.])0% packet loss`
			}
		}
		if _, err := regexp.Compile(k.Expect); err != nil {
			c.fail(path+".expect", "bad regular expression: %v", err)
		}
		if k.Timeout == 0 {
			k.Timeout = Duration(20 * time.Second)
		}
	}
}

// argv is the command of a check.
func (k *Check) argv() []string {
	if k.Ping == "" {
		return k.Command
	}
	return []string{"oping", "-n", k.Ping, "-c", fmt.Sprint(k.Count), "-i", fmt.Sprintf("%dms", time.Duration(k.Interval).Milliseconds())}
}
