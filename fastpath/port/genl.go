package port

import (
	"encoding/binary"
	"fmt"
	"iter"

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
	s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_GENERIC)
	if err != nil {
		return nil, fmt.Errorf("generic netlink: %w", err)
	}
	_ = s.SetReceiveTimeout(&nl.SocketTimeoutTv) // cannot fail
	d := &netdev{socks: map[int]*nl.SocketHandle{unix.NETLINK_GENERIC: {Socket: s}}}
	if err := d.resolve("netdev", "mgmt"); err != nil {
		d.close()
		return nil, fmt.Errorf("generic netlink family netdev: %w", err)
	}
	return d, nil
}

// resolve asks for the numbers of a family and of one of its multicast groups.
func (d *netdev) resolve(family, group string) error {
	req := nl.NewNetlinkRequest(nl.GENL_ID_CTRL, 0)
	req.Sockets = d.socks
	req.AddData(genlHeader{nl.GENL_CTRL_CMD_GETFAMILY, nl.GENL_CTRL_VERSION})
	req.AddData(nl.NewRtAttr(nl.GENL_CTRL_ATTR_FAMILY_NAME, nl.ZeroTerminated(family)))
	msgs, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return err
	}
	for _, m := range msgs {
		for typ, value := range attributes(m, nl.SizeofGenlmsg) {
			switch {
			case typ == nl.GENL_CTRL_ATTR_FAMILY_ID && len(value) >= 2:
				d.family = binary.NativeEndian.Uint16(value)
			case typ == nl.GENL_CTRL_ATTR_MCAST_GROUPS:
				for _, entry := range attributes(value, 0) {
					name, id := "", 0
					for typ, value := range attributes(entry, 0) {
						switch {
						case typ == nl.GENL_CTRL_ATTR_MCAST_GRP_NAME:
							name = nl.BytesToString(value)
						case typ == nl.GENL_CTRL_ATTR_MCAST_GRP_ID && len(value) >= 4:
							id = int(binary.NativeEndian.Uint32(value))
						}
					}
					if name == group {
						d.group = id
					}
				}
			}
		}
	}
	if d.family == 0 {
		return unix.ENOENT
	}
	return nil
}

// attributes yields the attributes behind a header, up to the first that does
// not make sense.
func attributes(m []byte, header int) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		if len(m) < header {
			return
		}
		attrs, err := nl.ParseRouteAttr(m[header:])
		if err != nil {
			return
		}
		for _, a := range attrs {
			if !yield(a.Attr.Type&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), a.Value) {
				return
			}
		}
	}
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
	for typ, value := range attributes(m, nl.SizeofGenlmsg) {
		switch {
		case typ == netdevAttrIfindex && len(value) >= 4:
			ifindex = int(binary.NativeEndian.Uint32(value))
		case typ == netdevAttrXDPFeatures && len(value) >= 8:
			features, ok = binary.NativeEndian.Uint64(value), true
		}
	}
	return ifindex, features, ok
}
