package port

import (
	"errors"
	"fmt"
	"net"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Device is what the kernel tells about a network device.
type Device struct {
	Name   string
	Index  int
	MAC    net.HardwareAddr
	MTU    int    // largest Ethernet payload, bytes
	Up     bool   // administratively up, with a carrier
	Kind   string // of a virtual device, as "ip -d link" shows it; "device" for a physical one
	Driver string

	RxQueues, TxQueues int

	// Veth is true for one end of a pair. PeerIndex is the other end's index in
	// its own namespace; PeerNetNS the id of that namespace, -1: this one.
	Veth                 bool
	PeerIndex, PeerNetNS int

	// XDP program that is attached; "" when there is none.
	XDPMode    string // native, generic, offload or several
	XDPProgram uint32 // id; 0 when the kernel does not tell

	// XDPKnown says that the kernel reports XDP abilities (6.3 and later):
	// CanNative, that the driver runs XDP programs; TakesRedirect, that frames
	// redirected to the device are sent and not lost, at present.
	XDPKnown, CanNative, TakesRedirect bool

	// Offloads are the active ones, by the kernel's names.
	Offloads map[string]bool

	vlanAbove bool // a VLAN device sits on it
}

// Inspect tells about a device of the calling thread's network namespace.
func Inspect(ifname string) (Device, error) {
	s, err := newSources()
	if err != nil {
		return Device{}, err
	}
	defer s.close()
	link, err := s.route.LinkByName(ifname)
	if err != nil {
		return Device{}, fmt.Errorf("device %s: %w", ifname, err)
	}
	return s.device(link), nil
}

// sources are the descriptors through which one namespace answers questions.
type sources struct {
	route *netlink.Handle
	eth   ethtool
	xdp   *netdev // nil: kernel too old
}

func newSources() (*sources, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("rtnetlink: %w", err)
	}
	eth, err := newEthtool()
	if err != nil {
		h.Close()
		return nil, err
	}
	x, err := newNetdev()
	if err != nil {
		x = nil // before 6.3 the peer of a veth is looked at instead
	}
	return &sources{route: h, eth: eth, xdp: x}, nil
}

func (s *sources) close() {
	s.route.Close()
	s.eth.close()
	if s.xdp != nil {
		s.xdp.close()
	}
}

func linkUp(a *netlink.LinkAttrs) bool {
	const all = unix.IFF_UP | unix.IFF_RUNNING | unix.IFF_LOWER_UP
	return a.RawFlags&all == all
}

// device fills in a Device; what cannot be found out stays zero.
func (s *sources) device(link netlink.Link) Device {
	a := link.Attrs()
	d := Device{
		Name: a.Name, Index: a.Index, MAC: a.HardwareAddr, MTU: a.MTU, Up: linkUp(a), Kind: link.Type(),
		Driver: s.eth.driver(a.Name), PeerNetNS: -1,
	}
	d.RxQueues, d.TxQueues = s.eth.queues(a.Name)
	if link.Type() == "veth" {
		d.Veth, d.PeerIndex, d.PeerNetNS = true, a.ParentIndex, a.NetNsID
	}
	if x := a.Xdp; x != nil && x.Attached {
		d.XDPMode, d.XDPProgram = xdpMode(x.AttachMode), x.ProgId
	}
	s.abilities(&d)
	d.Offloads, _ = s.eth.features(a.Name) // nil: unknown, no advice
	if links, err := s.route.LinkList(); err == nil {
		for _, l := range links {
			if l.Type() == "vlan" && l.Attrs().ParentIndex == a.Index {
				d.vlanAbove = true
			}
		}
	}
	return d
}

// abilities asks what the device can do with XDP at present.
func (s *sources) abilities(d *Device) {
	if s.xdp == nil {
		return
	}
	if f, err := s.xdp.xdpFeatures(d.Index); err == nil {
		d.XDPKnown, d.CanNative, d.TakesRedirect = true, f&xdpFeatureBasic != 0, f&xdpFeatureNdoXmit != 0
	}
}

// xdpMode names IFLA_XDP_ATTACHED (XDP_ATTACHED_* of if_link.h).
func xdpMode(attached uint32) string {
	switch attached {
	case 0:
		return ""
	case 1:
		return "native"
	case 2:
		return "generic"
	case 3:
		return "offload"
	}
	return "several"
}

// programName describes an attached program for a message.
func programName(id uint32) string {
	if id == 0 {
		return "an XDP program"
	}
	name := ""
	if p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id)); err == nil {
		if info, err := p.Info(); err == nil {
			name = " " + info.Name
		}
		p.Close()
	}
	return fmt.Sprintf("XDP program%s (id %d)", name, id)
}

// Peer is the other end of a veth pair.
type Peer struct {
	Device
	NetNS     string // where its namespace was found, "" for the same one
	KernelNet bool   // it has IP addresses: a kernel stack talks through the pair
}

var errNoPeer = errors.New("not a veth")

// peer looks at the other end of a veth, in whatever namespace that is found.
func (s *sources) peer(d Device) (Peer, error) {
	if !d.Veth {
		return Peer{}, errNoPeer
	}
	if d.PeerNetNS < 0 {
		return s.peerHere(d.PeerIndex)
	}
	fd, path, err := findNetNS(s.route, d.PeerNetNS)
	if err != nil {
		return Peer{}, err
	}
	defer unix.Close(fd)
	var p Peer
	err = inNetNS(fd, func() error {
		there, err := newSources()
		if err != nil {
			return err
		}
		defer there.close()
		p, err = there.peerHere(d.PeerIndex)
		return err
	})
	p.NetNS = path
	return p, err
}

func (s *sources) peerHere(index int) (Peer, error) {
	link, err := s.route.LinkByIndex(index)
	if err != nil {
		return Peer{}, fmt.Errorf("device %d: %w", index, err)
	}
	p := Peer{Device: s.device(link)}
	addrs, err := s.route.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return p, nil // only advice depends on it
	}
	for _, a := range addrs {
		p.KernelNet = p.KernelNet || !a.IP.IsLinkLocalUnicast() // every device gets an IPv6 link-local one
	}
	return p, nil
}

// xdpRuns tells whether a device runs an XDP program in the driver.
func (d *Device) xdpRuns() bool { return d.XDPMode == "native" || d.XDPMode == "several" }

// gro tells whether generic receive offload is on.
func (d *Device) gro() bool { return d.Offloads["rx-gro"] }

// txChecksum tells whether packets leave the stack without a checksum.
func (d *Device) txChecksum() bool {
	o := d.Offloads
	return o["tx-checksum-ip-generic"] || o["tx-checksum-ipv4"] || o["tx-checksum-ipv6"]
}
