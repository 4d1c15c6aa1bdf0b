package port

import (
	"encoding/binary"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The generic netlink family "netdev" (kernel 6.3 and later) tells what a
// device can do with XDP; Documentation/netlink/specs/netdev.yaml.
const (
	netdevCmdDevGet       = 1
	netdevAttrIfindex     = 1
	netdevAttrXDPFeatures = 3

	xdpFeatureBasic   = 1 << 0 // runs XDP programs in the driver
	xdpFeatureNdoXmit = 1 << 2 // takes redirected frames, now
)

// netdev talks to that family.
type netdev struct {
	socks  map[int]*nl.SocketHandle
	family uint16
	group  int // multicast group of changes
}

// newNetdev fails on kernels that do not have the family.
func newNetdev() (*netdev, error) {
	h, err := netlink.NewHandle(unix.NETLINK_GENERIC)
	if err != nil {
		return nil, fmt.Errorf("generic netlink: %w", err)
	}
	defer h.Close()
	family, err := h.GenlFamilyGet("netdev")
	if err != nil {
		return nil, fmt.Errorf("generic netlink family netdev: %w", err)
	}
	d := &netdev{family: family.ID}
	for _, g := range family.Groups {
		if g.Name == "mgmt" {
			d.group = int(g.ID)
		}
	}
	s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_GENERIC)
	if err != nil {
		return nil, fmt.Errorf("generic netlink: %w", err)
	}
	_ = s.SetReceiveTimeout(&nl.SocketTimeoutTv) // cannot fail
	d.socks = map[int]*nl.SocketHandle{unix.NETLINK_GENERIC: {Socket: s}}
	return d, nil
}

func (d *netdev) close() {
	for _, s := range d.socks {
		s.Close()
	}
}

// genlHeader is the header of a generic netlink message: command, version and
// two reserved bytes, which the kernel wants to be zero. nl.Genlmsg has memory
// for the first two only and sends whatever lies behind it.
type genlHeader [nl.SizeofGenlmsg]byte

func (genlHeader) Len() int            { return nl.SizeofGenlmsg }
func (h genlHeader) Serialize() []byte { return h[:] }

// xdpFeatures returns the device's xdpFeature bits.
func (d *netdev) xdpFeatures(ifindex int) (uint64, error) {
	req := nl.NewNetlinkRequest(int(d.family), 0)
	req.Sockets = d.socks
	req.AddData(genlHeader{netdevCmdDevGet, 1})
	req.AddData(nl.NewRtAttr(netdevAttrIfindex, nl.Uint32Attr(uint32(ifindex))))
	msgs, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return 0, fmt.Errorf("xdp features: %w", err)
	}
	for _, m := range msgs {
		if i, features, ok := parseNetdev(m); ok && i == ifindex {
			return features, nil
		}
	}
	return 0, fmt.Errorf("xdp features of device %d: no answer", ifindex)
}

// parseNetdev decodes a message of the family: an answer, or a notification.
func parseNetdev(m []byte) (ifindex int, features uint64, ok bool) {
	if len(m) < nl.SizeofGenlmsg {
		return 0, 0, false
	}
	attrs, err := nl.ParseRouteAttr(m[nl.SizeofGenlmsg:])
	if err != nil {
		return 0, 0, false
	}
	for _, a := range attrs {
		switch {
		case a.Attr.Type == netdevAttrIfindex && len(a.Value) >= 4:
			ifindex = int(binary.NativeEndian.Uint32(a.Value))
		case a.Attr.Type == netdevAttrXDPFeatures && len(a.Value) >= 8:
			features, ok = binary.NativeEndian.Uint64(a.Value), true
		}
	}
	return ifindex, features, ok
}
