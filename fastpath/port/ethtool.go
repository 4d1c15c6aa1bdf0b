package port

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ethtool asks a driver through the SIOCETHTOOL ioctl. The descriptor is any
// socket; it fixes the network namespace.
type ethtool struct{ fd int }

func newEthtool() (ethtool, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return ethtool{-1}, fmt.Errorf("ethtool socket: %w", err)
	}
	return ethtool{fd}, nil
}

func (e ethtool) close() { _ = unix.Close(e.fd) } // a datagram socket without peer: nothing to lose

// call runs one request; buf starts with the command word.
func (e ethtool) call(ifname string, buf []byte) error {
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte // struct ifreq is 40 bytes
	}
	if len(ifname) >= len(req.name) {
		return unix.ENODEV
	}
	copy(req.name[:], ifname)
	req.data = unsafe.Pointer(&buf[0])
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(e.fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req)))
	runtime.KeepAlive(buf)
	if errno != 0 {
		return errno
	}
	return nil
}

func (e ethtool) driver(ifname string) string {
	info, err := unix.IoctlGetEthtoolDrvinfo(e.fd, ifname)
	if err != nil {
		return ""
	}
	return unix.ByteSliceToString(info.Driver[:])
}

// queues returns the number of receive and transmit queues in use. Devices
// without the notion (EOPNOTSUPP) have one of each.
func (e ethtool) queues(ifname string) (rx, tx int) {
	// struct ethtool_channels: cmd, four maxima, then rx, tx, other, combined.
	buf := make([]byte, 9*4)
	ne := binary.NativeEndian
	ne.PutUint32(buf, unix.ETHTOOL_GCHANNELS)
	if e.call(ifname, buf) != nil {
		return 1, 1
	}
	word := func(i int) int { return int(ne.Uint32(buf[4*i:])) }
	return max(1, word(5)+word(8)), max(1, word(6)+word(8))
}

// ethSSFeatures is the string set of feature names (ETH_SS_FEATURES).
const ethSSFeatures = 4

// features returns the active offload features by the kernel's names
// ("rx-gro", "tx-checksum-ip-generic", "rx-vlan-hw-parse", ...).
func (e ethtool) features(ifname string) (map[string]bool, error) {
	ne := binary.NativeEndian
	// struct ethtool_sset_info: cmd, reserved, mask (64), one count per set bit.
	info := make([]byte, 8+8+4)
	ne.PutUint32(info, unix.ETHTOOL_GSSET_INFO)
	ne.PutUint64(info[8:], 1<<ethSSFeatures)
	if err := e.call(ifname, info); err != nil {
		return nil, fmt.Errorf("count features: %w", err)
	}
	n := int(ne.Uint32(info[16:]))
	const nameLen = 32 // ETH_GSTRING_LEN
	names := make([]byte, 12+n*nameLen)
	ne.PutUint32(names, unix.ETHTOOL_GSTRINGS)
	ne.PutUint32(names[4:], ethSSFeatures)
	ne.PutUint32(names[8:], uint32(n))
	if err := e.call(ifname, names); err != nil {
		return nil, fmt.Errorf("names of features: %w", err)
	}
	// struct ethtool_gfeatures: cmd, size, blocks of available, requested,
	// active, never changed; 32 features each.
	blocks := (n + 31) / 32
	bits := make([]byte, 8+blocks*16)
	ne.PutUint32(bits, unix.ETHTOOL_GFEATURES)
	ne.PutUint32(bits[4:], uint32(blocks))
	if err := e.call(ifname, bits); err != nil {
		return nil, fmt.Errorf("features: %w", err)
	}
	active := map[string]bool{}
	for i := range n {
		if ne.Uint32(bits[8+(i/32)*16+8:])&(1<<(i%32)) != 0 {
			active[unix.ByteSliceToString(names[12+i*nameLen:12+(i+1)*nameLen])] = true
		}
	}
	return active, nil
}
