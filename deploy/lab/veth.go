package lab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("loopback device: %w", err)
	}
	return netlink.LinkSetUp(lo)
}

// at runs f with a netlink handle of the named namespace.
func at(name string, f func(*netlink.Handle) error) error {
	ns, err := netns.GetFromName(name)
	if err != nil {
		return fmt.Errorf("namespace %s: %w", name, err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink in namespace %s: %w", name, err)
	}
	defer h.Close()
	return f(h)
}

// mac is the address of the nth link of host i towards host j, counted from 0:
// 02:00:00:00:01:02 for the first from host 1 to host 2.
func mac(i, j, nth int) net.HardwareAddr {
	i, j = i+1, j+1
	return net.HardwareAddr{0x02, byte(nth - 1), byte(i >> 8), byte(j >> 8), byte(i), byte(j)}
}

// index is the interface index of the first end; the kernel numbers the second
// from 2 on. They must differ: when both ends have the same index in their
// namespaces the kernel can report the loss of the carrier a second late.
func (l *Link) index() int { return 1000 + (l.a<<8|l.b)*16 + l.nth }

// vethEnd is one end of a veth pair to be made.
type vethEnd struct {
	ns, dev string
	mac     net.HardwareAddr // nil: the kernel's choice
}

// addVeth makes the two ends where they belong, so that no name exists in the
// lab's own namespace. index is that of the first end, 0 for any.
func addVeth(a, b vethEnd, mtu, index int) error {
	peer, err := netns.GetFromName(b.ns)
	if err != nil {
		return fmt.Errorf("namespace %s: %w", b.ns, err)
	}
	defer peer.Close()
	return at(a.ns, func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.HardwareAddr, attrs.Index = a.dev, mtu, a.mac, index
		v := netlink.NewVeth(attrs)
		v.PeerName, v.PeerHardwareAddr, v.PeerNamespace = b.dev, b.mac, netlink.NsFd(peer)
		return h.LinkAdd(v)
	})
}

// addLink makes a link's devices and brings them up. With a relay in the link
// each end is connected to a device of the relay's namespace.
func (l *Lab) addLink(k *Link) error {
	what := fmt.Sprintf("link %s:%s - %s:%s", k.Ends[0], k.Devices[0], k.Ends[1], k.Devices[1])
	a := vethEnd{l.Namespace(k.Ends[0]), k.Devices[0], mac(k.a, k.b, k.nth)}
	b := vethEnd{l.Namespace(k.Ends[1]), k.Devices[1], mac(k.b, k.a, k.nth)}
	if k.Impair != nil {
		if err := l.addRelay(k, a, b); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	} else if err := addVeth(a, b, k.MTU, k.index()); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	// Both ends have their features before one is up: what the kernel knows of
	// a veth's ability to take redirected frames is as its peer was then.
	for _, step := range []func(*Link, int, string) error{setFeatures, setUp} {
		for e, ns := range []string{a.ns, b.ns} {
			if err := step(k, e, ns); err != nil {
				return fmt.Errorf("%s: device %s: %w", what, k.Devices[e], err)
			}
		}
	}
	return nil
}

func setFeatures(l *Link, end int, ns string) error {
	if l.GRO == nil && l.GSO == nil && l.TxChecksum == nil {
		return nil
	}
	dev := l.Devices[end]
	return inNetns(ns, func() error {
		if l.TxChecksum != nil {
			if err := setFeature(dev, unix.ETHTOOL_STXCSUM, *l.TxChecksum); err != nil {
				return fmt.Errorf("transmit checksum offload: %w", err)
			}
		}
		if l.GSO != nil {
			if err := setFeature(dev, unix.ETHTOOL_SGSO, *l.GSO); err != nil {
				return fmt.Errorf("GSO: %w", err)
			}
		}
		if l.GRO != nil {
			if err := setFeature(dev, unix.ETHTOOL_SGRO, *l.GRO); err != nil {
				return fmt.Errorf("GRO: %w", err)
			}
		}
		return nil
	})
}

func setUp(l *Link, end int, ns string) error {
	dev := l.Devices[end]
	return at(ns, func(h *netlink.Handle) error {
		link, err := h.LinkByName(dev)
		if err != nil {
			return err
		}
		if len(l.Addresses) == 2 {
			a, err := netlink.ParseAddr(l.Addresses[end])
			if err != nil {
				return err
			}
			if err := h.AddrAdd(link, a); err != nil {
				return fmt.Errorf("address %s: %w", l.Addresses[end], err)
			}
		}
		if err := h.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring up: %w", err)
		}
		return nil
	})
}

// setFeature sets one offload of a device in the namespace of the thread.
func setFeature(dev string, cmd uint32, on bool) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var data uint32
	if on {
		data = 1
	}
	_, err = ethtoolValue(fd, dev, cmd, data)
	return err
}

// ethtoolValue does one of the ethtool commands that carry a number.
func ethtoolValue(fd int, dev string, cmd, data uint32) (uint32, error) {
	value := struct{ cmd, data uint32 }{cmd, data}
	// struct ifreq with ifr_data; x/sys has no function for these commands.
	req := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&value)}
	copy(req.name[:unix.IFNAMSIZ-1], dev)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); e != 0 {
		return 0, os.NewSyscallError("ioctl", e)
	}
	return value.data, nil
}

// delLinks removes the veth devices of a namespace at once; with the namespace
// alone they would go some time later.
func delLinks(ns string) error {
	return at(ns, func(h *netlink.Handle) error {
		links, err := h.LinkList()
		// The neighbours go at the same moment, which the kernel reports as a list
		// that changed under our eyes.
		for n := 0; errors.Is(err, netlink.ErrDumpInterrupted) && n < 100; n++ {
			links, err = h.LinkList()
		}
		if err != nil {
			return fmt.Errorf("list devices of %s: %w", ns, err)
		}
		var errs []error
		for _, l := range links {
			if l.Type() != "veth" {
				continue
			}
			// The other end may have taken it along in the meantime.
			if err := h.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
				errs = append(errs, fmt.Errorf("remove %s of %s: %w", l.Attrs().Name, ns, err))
			}
		}
		return errors.Join(errs...)
	})
}

// setLink sets a device up or down.
func setLink(ns, dev string, up bool) error {
	return at(ns, func(h *netlink.Handle) error {
		link, err := h.LinkByName(dev)
		if err != nil {
			return fmt.Errorf("device %s: %w", dev, err)
		}
		if up {
			return h.LinkSetUp(link)
		}
		return h.LinkSetDown(link)
	})
}
