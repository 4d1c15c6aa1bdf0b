package port

import (
	"fmt"
	"net"

	psock "github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/fastpath/xsk"
	"github.com/o7s/o7s-router/lib/packet"
)

// longestFrame is one of the loopback device, which has the largest MTU.
const longestFrame = 1<<16 + ethHeader

// receiveBuffer of a packet socket holds a burst of some thousand frames.
const receiveBuffer = 8 << 20

// packetSocket is the way without XDP: a socket on the device that the kernel
// filters by EtherType. Read and write are one system call a frame.
type packetSocket struct {
	conn *psock.Conn
	fd   int    // the conn's
	buf  []byte // frames are read here: how long one is shows only then
	lost uint64 // of the kernel, which forgets them when asked; guarded by Port.mu
}

func openPacket(d Device, types []uint16) (*packetSocket, error) {
	filter, err := bpf.Assemble(etherTypeFilter(types))
	if err != nil {
		return nil, fmt.Errorf("packet filter: %w", err)
	}
	ifi := &net.Interface{Index: d.Index, Name: d.Name, MTU: d.MTU, HardwareAddr: d.MAC}
	conn, err := psock.Listen(ifi, psock.Raw, unix.ETH_P_ALL, &psock.Config{Filter: filter})
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	s := &packetSocket{conn: conn, fd: -1, buf: make([]byte, longestFrame+1)}
	raw, err := conn.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { s.fd = int(fd) })
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	// Without these it works, only with smaller bursts or more filtering.
	_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer)
	_ = unix.SetsockoptInt(s.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
	return s, nil
}

// etherTypeFilter accepts untagged frames of the types that come in.
func etherTypeFilter(types []uint16) []bpf.Instruction {
	const all = 1 << 18 // longer than any frame
	prog := []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1},
		bpf.RetConstant{},
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.PACKET_OUTGOING, SkipTrue: 1},
		bpf.RetConstant{},
		bpf.LoadAbsolute{Off: 12, Size: 2},
	}
	for _, t := range types {
		prog = append(prog,
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(t), SkipTrue: 1},
			bpf.RetConstant{Val: all})
	}
	return append(prog, bpf.RetConstant{})
}

func (s *packetSocket) setEtherTypes(types []uint16) error {
	filter, err := bpf.Assemble(etherTypeFilter(types))
	if err == nil {
		err = s.conn.SetBPF(filter)
	}
	if err != nil {
		return fmt.Errorf("packet filter: %w", err)
	}
	return nil
}

func (s *packetSocket) watch(p *xsk.Poller) error { return p.Add(s.fd) }

func (s *packetSocket) receive(out []*packet.Buf, c *counters) (n int) {
	bytes := 0
	for n < len(out) {
		length, err := unix.Read(s.fd, s.buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			break // nothing there, or link down: the next event tells
		}
		if length < ethHeader || length > longestFrame {
			c.rxDropped.Add(1)
			continue
		}
		out[n] = packet.From(s.buf[:length])
		bytes += length
		n++
	}
	if n > 0 {
		c.rxFrames.Add(uint64(n))
		c.rxBytes.Add(uint64(bytes))
	}
	return n
}

func (s *packetSocket) transmit(frames []*packet.Buf, c *counters) (n int, err error) {
	bytes := 0
	for n < len(frames) {
		b := frames[n].Bytes()
		if _, err = unix.Write(s.fd, b); err == unix.EINTR {
			continue
		}
		if err == unix.EMSGSIZE {
			c.txLost.Add(1) // the MTU became smaller; the others still go
			n, err = n+1, nil
			continue
		}
		if err != nil {
			break
		}
		bytes += len(b)
		n++
	}
	c.txFrames.Add(uint64(n))
	c.txBytes.Add(uint64(bytes))
	return n, err
}

func (s *packetSocket) unsent() bool { return false }

// pending is unknown: a flow behind a packet socket is in no program's device.
func (s *packetSocket) pending() bool { return false }

func (s *packetSocket) dropped() uint64 {
	if st, err := s.conn.Stats(); err == nil {
		s.lost += uint64(st.Drops)
	}
	return s.lost
}

func (s *packetSocket) close() error { return s.conn.Close() }
