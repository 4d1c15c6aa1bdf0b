package port

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/o7s/o7s-router/fastpath/xsk"
)

const (
	ethHeader = 14

	// vethNativeMTU is the largest MTU of the other end at which a veth takes a
	// native program without fragments: a page less head room (256), header and
	// the skb's tail (320).
	vethNativeMTU = 3506
)

// maxAFXDP is the largest MTU with which AF_XDP receives every frame, since a
// frame must fit in one page of the Umem.
const maxAFXDP = xsk.MaxFrame - 256 - ethHeader

// redirectable tells whether XDP may redirect frames into the device without
// losing them silently, and why not, in one line. native says that a program of
// ours runs in the device's driver.
func (s *sources) redirectable(d Device, native bool) (bool, string) {
	if d.XDPKnown {
		if d.TakesRedirect {
			return true, ""
		}
		if !d.Veth {
			return false, fmt.Sprintf("%s (%s) takes no redirected frames: traffic leaves through user space", d.Name, d.driver())
		}
	}
	if !d.Veth {
		switch {
		case d.Driver == "tun" && d.Kind == "tuntap":
			return true, "" // a tap; a tun has no Ethernet header and is not opened
		case native:
			return true, "" // drivers with native XDP of kernels before 6.3 transmit, too
		}
		return false, fmt.Sprintf("%s (%s) has no native XDP, so it takes no redirected frames: traffic leaves through user space", d.Name, d.driver())
	}
	p, err := s.peer(d)
	if err == nil && !d.XDPKnown && (p.xdpRuns() || p.gro()) {
		return true, ""
	}
	const lost = "redirected frames would be lost, so traffic leaves through user space"
	switch {
	case err == nil:
		return false, fmt.Sprintf("veth peer %s of %s has neither native XDP nor GRO: %s; cure: ethtool -K %s gro on", p.where(), d.Name, lost, p.Name)
	case errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission):
		if d.XDPKnown {
			return false, fmt.Sprintf("veth peer of %s (device %d, namespace not found) has neither native XDP nor GRO: %s", d.Name, d.PeerIndex, lost)
		}
		return false, fmt.Sprintf("veth peer of %s (device %d, namespace not found) may have neither native XDP nor GRO: traffic leaves through user space", d.Name, d.PeerIndex)
	}
	return false, fmt.Sprintf("veth peer of %s cannot be examined: %v: traffic leaves through user space", d.Name, err)
}

// where names a peer and its namespace.
func (p *Peer) where() string {
	if p.NetNS == "" {
		return p.Name
	}
	return p.Name + " in " + p.NetNS
}

func (d *Device) driver() string {
	if d.Driver != "" {
		return d.Driver
	}
	return d.Kind
}

// advice lists offloads that hurt, one line each.
func (s *sources) advice(d Device) (lines []string) {
	var p Peer
	havePeer := false
	if d.Veth {
		if found, err := s.peer(d); err == nil {
			p, havePeer = found, true
		}
	}
	// A tag that the device strips into metadata is invisible to XDP. On veth
	// that only happens when somebody uses VLANs on the pair.
	if d.Offloads["rx-vlan-hw-parse"] && (!d.Veth || d.vlanAbove || havePeer && p.vlanAbove) {
		lines = append(lines, fmt.Sprintf("%s strips VLAN tags (rxvlan): tagged frames look untagged to XDP; cure: ethtool -K %s rxvlan off txvlan off", d.Name, d.Name))
	}
	if havePeer && p.KernelNet && p.txChecksum() {
		lines = append(lines, fmt.Sprintf("kernel stack behind veth peer %s leaves checksums to the device: its packets have none when XDP redirects them; cure: ethtool -K %s tx off", p.where(), p.Name))
	}
	// The kernel reports a carrier change at once only for devices that stand
	// for another one, which it sees by the indexes; else once a second.
	if d.Veth && d.PeerIndex == d.Index {
		lines = append(lines, fmt.Sprintf("%s has the same index (%d) as its veth peer: the kernel may report a lost carrier up to a second late; cure: create the pair with different indexes", d.Name, d.Index))
	}
	if d.Offloads["rx-lro"] {
		lines = append(lines, fmt.Sprintf("%s merges received packets (LRO), which excludes native XDP; cure: ethtool -K %s lro off", d.Name, d.Name))
	}
	return lines
}

// obstacle says why AF_XDP and an XDP program of ours cannot work on a device,
// "" when they can.
func (d *Device) obstacle(maxQueues int) string {
	switch {
	case d.XDPMode != "":
		return fmt.Sprintf("foreign %s, mode %s, is attached to %s and stays: packet socket; it sees only what that program passes on", programName(d.XDPProgram), d.XDPMode, d.Name)
	case d.MTU > maxAFXDP:
		return fmt.Sprintf("MTU %d of %s is too large for XDP and AF_XDP (native on veth: %d, any mode: %d): packet socket", d.MTU, d.Name, vethNativeMTU, maxAFXDP)
	case d.RxQueues > maxQueues:
		return fmt.Sprintf("%s has %d receive queues, at most %d get AF_XDP sockets: packet socket; cure: ethtool -L %s combined %d", d.Name, d.RxQueues, maxQueues, d.Name, maxQueues)
	}
	return ""
}

// Report is what is known about a device and how the fast path would or does
// use it.
type Report struct {
	Device
	Mode         Mode // a port's actual mode; from Probe the expected one
	Redirectable bool
	Reasons      []string // one line each
	Counters     Counters // of an open port
}

// Probe reports on a device of the calling thread's network namespace without
// changing anything. Mode is what Open can be expected to choose.
func Probe(ifname string) (Report, error) {
	s, err := newSources()
	if err != nil {
		return Report{}, err
	}
	defer s.close()
	link, err := s.route.LinkByName(ifname)
	if err != nil {
		return Report{}, fmt.Errorf("device %s: %w", ifname, err)
	}
	d := s.device(link)
	r := Report{Device: d, Mode: ModeNative}
	switch why := d.obstacle(MaxQueues); {
	case why != "":
		r.Mode = ModePacket
		r.Reasons = append(r.Reasons, why)
	case d.XDPKnown && !d.CanNative:
		r.Mode = ModeGeneric
		r.Reasons = append(r.Reasons, fmt.Sprintf("driver %s has no native XDP: generic mode, about 2.7 times slower", d.driver()))
	case d.Veth:
		if p, err := s.peer(d); err == nil && p.MTU > vethNativeMTU {
			r.Mode = ModeGeneric
			r.Reasons = append(r.Reasons, tooLarge(d, p.MTU))
		}
	}
	var why string
	if r.Redirectable, why = s.redirectable(d, false); why != "" {
		r.Reasons = append(r.Reasons, why)
	}
	r.Reasons = slices.Concat(r.Reasons, s.advice(d))
	return r, nil
}

func tooLarge(d Device, peerMTU int) string {
	return fmt.Sprintf("MTU %d of the veth peer is too large for native XDP on %s (at most %d): generic mode", peerMTU, d.Name, vethNativeMTU)
}
