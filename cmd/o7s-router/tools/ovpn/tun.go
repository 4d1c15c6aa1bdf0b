package ovpn

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const tunPath = "/dev/net/tun"

// tun is a device of the kernel. It goes when it is closed, also by the end of
// the program.
type tun struct {
	*os.File
	name string

	mu  sync.Mutex      // guards what follows
	nl  *netlink.Handle // of the network namespace it is in
	mtu int
}

// openTUN makes a device in the network namespace of the calling thread; name
// may hold %d.
func openTUN(name string, tap bool) (_ *tun, err error) {
	fd, err := unix.Open(tunPath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return nil, fmt.Errorf("there is no %s: the kernel's tun module is missing (%w)", tunPath, err)
	case err != nil:
		return nil, fmt.Errorf("open %s: %w (root, or CAP_NET_ADMIN, is needed)", tunPath, err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	req, err := unix.NewIfreq(name)
	if err != nil {
		return nil, fmt.Errorf("device name %q: %w", name, err)
	}
	mode := uint16(unix.IFF_TUN)
	if tap {
		mode = unix.IFF_TAP
	}
	req.SetUint16(mode | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		switch {
		case errors.Is(err, unix.EPERM):
			err = fmt.Errorf("%w (root, or CAP_NET_ADMIN, is needed)", err)
		case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EINVAL):
			err = fmt.Errorf("%w (is there another device of this name?)", err)
		}
		return nil, fmt.Errorf("make device %s: %w", name, err)
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	// Only now: the runtime waits for the descriptor's device.
	return &tun{File: os.NewFile(uintptr(fd), tunPath), name: req.Name(), nl: nl}, nil
}

// up gives the device its address, if there is one, and switches it on.
func (t *tun) up(addr netip.Prefix) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	link, err := t.nl.LinkByName(t.name)
	if err != nil {
		return fmt.Errorf("device %s: %w", t.name, err)
	}
	if addr.IsValid() {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(addr.Bits(), addr.Addr().BitLen())}}
		if addr.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD // nobody answers yet, and everything would wait
		}
		if err := t.nl.AddrAdd(link, a); err != nil {
			return fmt.Errorf("address %s of device %s: %w", addr, t.name, err)
		}
	}
	if err := t.nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("switch on device %s: %w", t.name, err)
	}
	return nil
}

// SetMTU sets the longest IP packet.
func (t *tun) SetMTU(n int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n == t.mtu {
		return nil
	}
	link, err := t.nl.LinkByName(t.name)
	if err == nil {
		err = t.nl.LinkSetMTU(link, n)
	}
	if err != nil {
		return fmt.Errorf("MTU %d of device %s: %w", n, t.name, err)
	}
	t.mtu = n
	return nil
}

// MTU is what SetMTU set.
func (t *tun) MTU() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mtu
}

// Close removes the device.
func (t *tun) Close() error {
	err := t.File.Close()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.nl.Close()
	return err
}
