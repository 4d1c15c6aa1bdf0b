package xsk

import (
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Poller lets one goroutine wait until one of several descriptors becomes
// readable, without keeping a thread: it is an epoll instance that Go's network
// poller watches. Compared with a single socket watched directly, round trips
// take the same time.
type Poller struct {
	file  *os.File
	conn  syscall.RawConn
	epfd  int
	ready func() bool
	check func(uintptr) bool // made once: a closure per Wait would be garbage
}

// NewPoller returns a poller. Wait returns when ready reports true; ready is
// asked first and after every event, so it should be cheap.
func NewPoller(ready func() bool) (*Poller, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if err := unix.SetNonblock(epfd, true); err != nil { // makes os.NewFile use the network poller
		unix.Close(epfd)
		return nil, fmt.Errorf("epoll: %w", err)
	}
	p := &Poller{file: os.NewFile(uintptr(epfd), "epoll"), epfd: epfd, ready: ready}
	p.check = func(uintptr) bool { return p.ready() }
	if p.conn, err = p.file.SyscallConn(); err == nil {
		err = p.file.SetReadDeadline(time.Time{}) // fails when the file is not pollable
	}
	if err != nil {
		p.file.Close()
		return nil, fmt.Errorf("epoll: %w", err)
	}
	return p, nil
}

// Add watches a descriptor. Closing it ends that.
func (p *Poller) Add(fd int) error {
	// Edge-triggered: nobody ever collects the events of this instance, a new
	// one only has to reach the network poller.
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(fd)}
	if err := unix.EpollCtl(p.epfd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// Wait blocks until ready reports true. It first asks again and again for as
// long as spin, which spares the sleep and the wake-up when the next packet is
// near; 0 does not. The error is os.ErrClosed after Close. One goroutine at a
// time.
func (p *Poller) Wait(spin time.Duration) error {
	if spin > 0 {
		// The clock is read every now and then only: it costs more than ready.
		for start := time.Now(); time.Since(start) < spin; {
			for range 64 {
				if p.ready() {
					return nil
				}
			}
		}
	}
	if err := p.conn.Read(p.check); err != nil {
		return os.ErrClosed // the only way a wait without deadline fails
	}
	return nil
}

// Close ends Wait, which then returns an error, at once and for good.
func (p *Poller) Close() error { return p.file.Close() }
