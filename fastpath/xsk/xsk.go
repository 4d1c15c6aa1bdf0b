// Package xsk is AF_XDP: sockets through which user space exchanges frames with
// one queue of a network device, by rings in memory that it shares with the
// kernel.
//
// A Umem is the memory for frames. Sockets of several queues, also of several
// devices, may use one Umem, so that a frame received from one socket can be
// transmitted on another without a copy. Each socket has four rings:
//
//	fill        user -> kernel   frames to receive into
//	rx          kernel -> user   received frames
//	tx          user -> kernel   frames to transmit
//	completion  kernel -> user   transmitted frames, free again
//
// A frame belongs to whoever took it last from a ring or from Umem.Alloc. The
// package moves ownership and copies nothing.
//
// Concurrency: Receive and Fill belong to one goroutine at a time, Transmit,
// Complete and Kick to one goroutine at a time; the two may run side by side.
// Close must not run together with any of them: the rings are unmapped.
package xsk

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MinFrame and MaxFrame are the sizes of a frame in the Umem that the kernel
// accepts: a power of two, at most one page.
const (
	MinFrame = 2048
	MaxFrame = 4096
)

// headroom is what the kernel keeps free in front of a received frame
// (XDP_PACKET_HEADROOM).
const headroom = unix.XDP_PACKET_HEADROOM

// MaxLen is the longest packet, bytes from MAC header to end, that a socket
// with frames of the given size receives. The kernel drops longer ones.
func MaxLen(frameSize int) int { return frameSize - headroom }

// Desc is one packet in the Umem: Addr is its offset, Len its length in bytes.
type Desc = unix.XDPDesc

// Umem is memory for frames, registered with the kernel by the first socket
// that uses it. Its methods are safe for concurrent use.
type Umem struct {
	mem       []byte
	frameSize int

	mu      sync.Mutex // guards what follows
	free    []uint64
	sockets []*Socket // open ones; the first one's descriptor stands for the Umem
}

// NewUmem maps memory for frames of frameSize bytes.
func NewUmem(frames, frameSize int) (*Umem, error) {
	if frames < 1 || frameSize < MinFrame || frameSize > MaxFrame || frameSize&(frameSize-1) != 0 {
		return nil, fmt.Errorf("umem of %d frames of %d bytes: need %d or %d bytes", frames, frameSize, MinFrame, MaxFrame)
	}
	mem, err := unix.Mmap(-1, 0, frames*frameSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map umem: %w", err)
	}
	u := &Umem{mem: mem, frameSize: frameSize, free: make([]uint64, frames)}
	for i := range u.free {
		u.free[i] = uint64((frames - 1 - i) * frameSize)
	}
	return u, nil
}

// FrameSize is the size of a frame in bytes.
func (u *Umem) FrameSize() int { return u.frameSize }

// Alloc takes up to len(addrs) free frames and returns how many. It is for
// setting up; frames then circulate through the rings.
func (u *Umem) Alloc(addrs []uint64) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	n := min(len(addrs), len(u.free))
	rest := len(u.free) - n
	copy(addrs, u.free[rest:])
	u.free = u.free[:rest]
	return n
}

// Free gives frames back.
func (u *Umem) Free(addrs []uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, a := range addrs {
		u.free = append(u.free, u.Base(a))
	}
}

// Base is the address of the frame that contains addr.
func (u *Umem) Base(addr uint64) uint64 { return addr &^ uint64(u.frameSize-1) }

// Bytes is the memory of a packet. It is valid until the Umem is closed.
func (u *Umem) Bytes(d Desc) []byte {
	end := d.Addr + uint64(d.Len)
	return u.mem[d.Addr:end:end]
}

// Frame is the memory of the whole frame at base.
func (u *Umem) Frame(base uint64) []byte {
	end := base + uint64(u.frameSize)
	return u.mem[base:end:end]
}

// Close unmaps the memory. All sockets must be closed.
func (u *Umem) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.sockets) > 0 {
		return fmt.Errorf("umem has %d open sockets", len(u.sockets))
	}
	if u.mem == nil {
		return nil
	}
	err := unix.Munmap(u.mem)
	u.mem, u.free = nil, nil
	return err
}

// Config of a socket. Ring sizes are powers of two.
type Config struct {
	Ifindex int // in the network namespace of the calling thread
	Queue   int

	Rx, Fill       int // 0: the socket only transmits; else both
	Tx, Completion int // 0: the socket only receives; else both

	// ZeroCopy tries to bind with zero copy and falls back to copying. A
	// further socket of a Umem on the same device inherits the choice.
	ZeroCopy bool
	// NeedWakeup asks the kernel to say when it has to be woken. It helps with
	// zero copy only: a copying socket is always kicked to transmit, and with
	// the flag every poll(2) transmits as well.
	NeedWakeup bool
	// BusyPoll is how long a system call may poll the device instead of
	// waiting for an interrupt; 0 leaves it to the system.
	BusyPoll time.Duration
	// SendBuffer raises the limit, bytes, of frames that a copying socket has
	// under way in the device; 0 leaves it to the system.
	SendBuffer int
	// Batch is how many frames one Kick transmits when copying; 0 leaves the
	// kernel's 32. Kernels before 6.18 do not know it.
	Batch int
}

// Socket is an AF_XDP socket bound to one queue of a device.
type Socket struct {
	umem     *Umem
	fd       int
	zeroCopy bool
	wakeup   bool

	rx, tx     ring[Desc]
	fill, comp ring[uint64]
}

// bindPatience is how long a queue may stay bound after its last owner closed
// it: the kernel releases it from deferred work after an RCU grace period,
// about 23 ms on a machine with nothing to do, half a second and more on a busy
// one. The alternative is a packet socket, many times slower, for as long as the
// port is open.
const bindPatience = 3 * time.Second

// Open makes a socket and binds it. A queue takes one socket per Umem; while
// another one has it the error is EBUSY, after a short wait.
func Open(u *Umem, c Config) (*Socket, error) {
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("af_xdp socket: %w", err)
	}
	s := &Socket{umem: u, fd: fd}
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := s.setup(c); err != nil {
		s.release()
		return nil, fmt.Errorf("af_xdp socket on queue %d: %w", c.Queue, err)
	}
	u.sockets = append(u.sockets, s)
	return s, nil
}

// setup is called with the Umem locked, so that just one socket registers it.
func (s *Socket) setup(c Config) error {
	u := s.umem
	if u.mem == nil {
		return os.ErrClosed
	}
	if len(u.sockets) == 0 {
		reg := unix.XDPUmemReg{
			Addr: uint64(uintptr(unsafe.Pointer(&u.mem[0]))), Len: uint64(len(u.mem)), Size: uint32(u.frameSize),
		}
		if err := setsockopt(s.fd, unix.XDP_UMEM_REG, unsafe.Pointer(&reg), unsafe.Sizeof(reg)); err != nil {
			return fmt.Errorf("register umem (see ulimit -l): %w", err)
		}
	}
	rings := []struct {
		name     string
		opt      int
		size     int
		optional bool
	}{
		{"rx", unix.XDP_RX_RING, c.Rx, true},
		{"tx", unix.XDP_TX_RING, c.Tx, true},
		// Every device and queue needs both of these, used or not.
		{"fill", unix.XDP_UMEM_FILL_RING, max(c.Fill, 1), false},
		{"completion", unix.XDP_UMEM_COMPLETION_RING, max(c.Completion, 1), false},
	}
	for _, r := range rings {
		if r.size == 0 && r.optional {
			continue
		}
		if err := unix.SetsockoptInt(s.fd, unix.SOL_XDP, r.opt, r.size); err != nil {
			return fmt.Errorf("%s ring of %d: %w", r.name, r.size, err)
		}
	}
	var off unix.XDPMmapOffsets
	if err := getsockopt(s.fd, unix.XDP_MMAP_OFFSETS, unsafe.Pointer(&off), unsafe.Sizeof(off)); err != nil {
		return fmt.Errorf("ring offsets: %w", err)
	}
	err := errors.Join(
		s.rx.mmap(s.fd, unix.XDP_PGOFF_RX_RING, off.Rx, c.Rx),
		s.tx.mmap(s.fd, unix.XDP_PGOFF_TX_RING, off.Tx, c.Tx),
		s.fill.mmap(s.fd, unix.XDP_UMEM_PGOFF_FILL_RING, off.Fr, c.Fill),
		s.comp.mmap(s.fd, unix.XDP_UMEM_PGOFF_COMPLETION_RING, off.Cr, c.Completion))
	if err != nil {
		return err
	}
	if err := s.options(c); err != nil {
		return err
	}
	sa := &unix.SockaddrXDP{Ifindex: uint32(c.Ifindex), QueueID: uint32(c.Queue)}
	if len(u.sockets) > 0 {
		sa.Flags, sa.SharedUmemFD = unix.XDP_SHARED_UMEM, uint32(u.sockets[0].fd)
		s.wakeup = u.sockets[0].wakeup
		err = bind(s.fd, sa)
	} else {
		s.wakeup = c.NeedWakeup
		if c.NeedWakeup {
			sa.Flags |= unix.XDP_USE_NEED_WAKEUP
		}
		modes := []uint16{unix.XDP_COPY}
		if c.ZeroCopy {
			modes = []uint16{unix.XDP_ZEROCOPY, unix.XDP_COPY}
		}
		common := sa.Flags
		for _, mode := range modes {
			sa.Flags = common | mode
			if err = bind(s.fd, sa); err == nil {
				break
			}
		}
	}
	if err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	var o uint32
	if err := getsockopt(s.fd, unix.XDP_OPTIONS, unsafe.Pointer(&o), unsafe.Sizeof(o)); err == nil {
		s.zeroCopy = o&unix.XDP_OPTIONS_ZEROCOPY != 0
	}
	return nil
}

func (s *Socket) options(c Config) error {
	if c.SendBuffer > 0 {
		// FORCE needs a right that whoever opens AF_XDP sockets has anyway.
		if unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, c.SendBuffer) != nil {
			_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, c.SendBuffer) // the smaller buffer only throttles
		}
	}
	if c.Batch > 0 && c.Tx > 0 {
		_ = unix.SetsockoptInt(s.fd, unix.SOL_XDP, unix.XDP_MAX_TX_SKB_BUDGET, min(c.Batch, c.Tx)) // unknown: more kicks
	}
	if c.BusyPoll <= 0 {
		return nil
	}
	for _, o := range []struct{ opt, value int }{
		{unix.SO_PREFER_BUSY_POLL, 1},
		{unix.SO_BUSY_POLL, max(1, int(c.BusyPoll/time.Microsecond))},
		{unix.SO_BUSY_POLL_BUDGET, 64},
	} {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, o.opt, o.value); err != nil {
			return fmt.Errorf("busy polling: %w", err)
		}
	}
	return nil
}

func bind(fd int, sa unix.Sockaddr) error {
	const step = 5 * time.Millisecond
	for begin := time.Now(); ; {
		err := unix.Bind(fd, sa)
		if err != unix.EBUSY || time.Since(begin) >= bindPatience {
			return err
		}
		time.Sleep(step)
	}
}

// FD is the file descriptor, for an XSKMAP. It stays the socket's.
func (s *Socket) FD() int { return s.fd }

// ZeroCopy tells whether the device uses the Umem directly.
func (s *Socket) ZeroCopy() bool { return s.zeroCopy }

// Fill hands frames to the kernel to receive into and returns how many it took.
// A socket whose fill ring is empty drops what arrives.
func (s *Socket) Fill(addrs []uint64) int {
	n := s.fill.produce(addrs)
	if s.wakeup && n > 0 && s.fill.needWakeup() {
		_, _, _ = unix.Syscall6(unix.SYS_RECVFROM, uintptr(s.fd), 0, 0, unix.MSG_DONTWAIT, 0, 0) // a later fill tries again
	}
	return n
}

// Pending tells whether Receive would return something. It is two loads, and
// safe while another goroutine receives.
func (s *Socket) Pending() bool { return s.rx.readable() }

// Receive takes up to len(descs) received packets and returns how many.
func (s *Socket) Receive(descs []Desc) int { return s.rx.consume(descs) }

// Transmit puts packets on the tx ring and returns how many there was room
// for. Kick makes the kernel send them.
func (s *Socket) Transmit(descs []Desc) int { return s.tx.produce(descs) }

// Unsent is the number of packets that the kernel has not taken yet.
func (s *Socket) Unsent() int { return s.tx.waiting() }

// Complete takes up to len(addrs) frames that were transmitted and returns how
// many.
func (s *Socket) Complete(addrs []uint64) int { return s.comp.consume(addrs) }

// Kick makes the kernel transmit what is on the tx ring, one batch. Nil does
// not mean that all went; see Unsent. Errors, none of which loses what is still
// on the ring: EAGAIN (more to send, or too many frames under way), EBUSY (the
// device dropped a frame), ENOBUFS, ENETDOWN (link administratively down),
// ENXIO (device gone).
func (s *Socket) Kick() error {
	if s.wakeup && !s.tx.needWakeup() {
		return nil
	}
	for {
		_, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(s.fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return errno
	}
}

// Statistics of a socket, since it was opened, in packets.
type Statistics struct {
	RxDropped      uint64 // longer than a frame, or none to receive into
	RxRingFull     uint64 // user space was too slow
	FillRingEmpty  uint64 // times the kernel found no frame; those packets are in RxDropped, too
	RxInvalidDescs uint64
	TxInvalidDescs uint64
	TxRingEmpty    uint64 // kicks with nothing to send
}

// Stats asks the kernel for the statistics.
func (s *Socket) Stats() (Statistics, error) {
	var st unix.XDPStatistics
	if err := getsockopt(s.fd, unix.XDP_STATISTICS, unsafe.Pointer(&st), unsafe.Sizeof(st)); err != nil {
		return Statistics{}, fmt.Errorf("af_xdp statistics: %w", err)
	}
	return Statistics{
		RxDropped: st.Rx_dropped, RxRingFull: st.Rx_ring_full, FillRingEmpty: st.Rx_fill_ring_empty_descs,
		RxInvalidDescs: st.Rx_invalid_descs, TxInvalidDescs: st.Tx_invalid_descs, TxRingEmpty: st.Tx_ring_empty_descs,
	}, nil
}

// Close unmaps the rings and closes the socket. Frames on the rings are lost to
// the Umem; they come back with a new Umem only.
func (s *Socket) Close() error {
	u := s.umem
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, o := range u.sockets {
		if o == s {
			u.sockets = append(u.sockets[:i], u.sockets[i+1:]...)
			return s.release()
		}
	}
	return nil // closed before
}

// release unmaps first: a mapping keeps the socket, and its queue, alive.
func (s *Socket) release() error {
	err := errors.Join(s.rx.munmap(), s.tx.munmap(), s.fill.munmap(), s.comp.munmap(), unix.Close(s.fd))
	s.fd = -1
	return err
}

func setsockopt(fd, opt int, p unsafe.Pointer, size uintptr) error {
	if _, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_XDP, uintptr(opt), uintptr(p), size, 0); errno != 0 {
		return errno
	}
	return nil
}

func getsockopt(fd, opt int, p unsafe.Pointer, size uintptr) error {
	n := uint32(size)
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_XDP, uintptr(opt), uintptr(p), uintptr(unsafe.Pointer(&n)), 0); errno != 0 {
		return errno
	}
	return nil
}
