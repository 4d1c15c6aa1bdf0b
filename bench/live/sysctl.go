package live

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// disableIPv6 keeps neighbour discovery off a device.
func disableIPv6(dev string) error {
	err := os.WriteFile("/proc/sys/net/ipv6/conf/"+dev+"/disable_ipv6", []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil // a kernel without IPv6
	}
	return err
}

// EnableForwarding makes the network namespace of the caller a router without
// source checks.
func EnableForwarding(devs ...string) error {
	files := map[string]string{
		"/proc/sys/net/ipv4/ip_forward":         "1",
		"/proc/sys/net/ipv4/conf/all/rp_filter": "0",
	}
	for _, dev := range devs {
		files["/proc/sys/net/ipv4/conf/"+dev+"/rp_filter"] = "0"
		files["/proc/sys/net/ipv4/conf/"+dev+"/send_redirects"] = "0"
	}
	for file, v := range files {
		if err := os.WriteFile(file, []byte(v), 0); err != nil {
			return fmt.Errorf("sysctl: %w", err)
		}
	}
	return nil
}

// setGRO switches generic receive offload of a device on. A frame that is
// redirected into a veth needs it at the far end when no XDP program is there.
func setGRO(dev string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	value := struct{ cmd, data uint32 }{unix.ETHTOOL_SGRO, 1}
	// struct ifreq with ifr_data, for which x/sys has no function.
	req := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&value)}
	copy(req.name[:unix.IFNAMSIZ-1], dev)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return fmt.Errorf("generic receive offload of %s: %w", dev, errno)
	}
	return nil
}
