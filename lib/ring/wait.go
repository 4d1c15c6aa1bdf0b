package ring

import (
	"errors"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Dir is the direction of a wait.
type Dir uint8

// Directions.
const (
	DirRead Dir = iota
	DirWrite
)

// Waiter blocks goroutines until the other end rings its bell. An End uses it
// for itself alone or shares it, through an implementation that knows which
// End a ring is for. For each direction one goroutine waits at a time.
type Waiter interface {
	// Wait blocks until ready returns true; it is asked once at the start and
	// after each ring or Kick. Errors: os.ErrDeadlineExceeded, net.ErrClosed.
	Wait(d Dir, ready func() bool) error
	// SetDeadline ends waits at t, present ones too; zero: never.
	SetDeadline(d Dir, t time.Time) error
	// Kick makes a present Wait ask ready again.
	Kick(d Dir)
	// Close makes every Wait return net.ErrClosed. It may be called twice.
	Close() error
}

// Bell wakes the other end: by a descriptor, or through the door of a slab.
type Bell struct {
	fd atomic.Int32

	door   *door // nil: none
	slot   uint32
	behind *Bell // of the slab
}

// NewBell makes a bell: the descriptor of an eventfd to ring it and the one to
// wait for it. Each belongs to one process, neither of which can disturb the
// other: whoever waits has an epoll descriptor that only watches the eventfd,
// so it cannot fill the counter up and take O_NONBLOCK away, which would block
// the ringer (the daemon's receive loop, say) for ever.
//
// Nobody ever reads the eventfd. Watched edge-triggered, every ring is an
// event, and both directions of an End hear it.
func NewBell() (ring, wait int, err error) {
	ring, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, -1, err
	}
	wait, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err == nil {
		err = unix.EpollCtl(wait, unix.EPOLL_CTL_ADD, ring, &unix.EpollEvent{Events: unix.EPOLLIN})
		if err != nil {
			unix.Close(wait)
		}
	}
	if err != nil {
		unix.Close(ring)
		return -1, -1, err
	}
	return ring, wait, nil
}

// BellFromFD makes a Bell of an eventfd, which belongs to it afterwards.
func BellFromFD(fd int) *Bell {
	b := new(Bell)
	b.fd.Store(int32(fd))
	return b
}

var one = [8]byte{0: 1} // native order does not matter: any number but 0 will do

// Ring wakes the other end. It does not block.
func (b *Bell) Ring() {
	if b.door == nil {
		ringFD(b.fd.Load())
	} else if b.door.ring(b.slot) {
		ringFD(b.behind.fd.Load())
	}
}

// Close closes the descriptor. Nobody may ring any more.
func (b *Bell) Close() {
	if b.door != nil {
		return // the slab's
	}
	if fd := b.fd.Swap(-1); fd >= 0 {
		unix.Close(int(fd))
	}
}

// poller waits for one descriptor in the Go runtime's own poller: a waiting
// goroutine costs no thread, and deadlines are the runtime's.
type poller struct {
	fd  int // the original; the files below have copies
	dir [2]pollDir
}

type pollDir struct {
	mu       sync.Mutex // guards what follows
	file     *os.File   // made by the first wait
	conn     syscall.RawConn
	deadline time.Time
	kicked   bool // the file's deadline is in the past because of Kick
	waiting  bool
	closed   bool

	ready func() bool          // of the present wait
	poll  func(_ uintptr) bool // calls ready; made once, so that waiting does not allocate
}

// NewWaiter returns a Waiter for a descriptor that becomes readable when the
// other end rings (see NewBell). The descriptor belongs to it afterwards.
func NewWaiter(fd int) (Waiter, error) {
	if err := unix.SetNonblock(fd, true); err != nil { // else the poller does not take it
		return nil, err
	}
	w := &poller{fd: fd}
	for i := range w.dir {
		d := &w.dir[i]
		d.poll = func(uintptr) bool { return d.ready() }
	}
	return w, nil
}

var past = time.Unix(1, 0)

// open makes the file. The caller holds d.mu.
func (d *pollDir) open(fd int) error {
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "o7s-bell")
	conn, err := f.SyscallConn()
	if err == nil && !d.deadline.IsZero() {
		err = f.SetReadDeadline(d.deadline)
	}
	if err != nil {
		f.Close()
		return err
	}
	d.file, d.conn = f, conn
	return nil
}

func (w *poller) Wait(dir Dir, ready func() bool) error {
	d := &w.dir[dir]
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return net.ErrClosed
	}
	if d.file == nil {
		if err := d.open(w.fd); err != nil {
			d.mu.Unlock()
			return err
		}
	}
	d.waiting = true
	d.mu.Unlock()
	d.ready = ready
	for {
		err := d.conn.Read(d.poll)
		d.mu.Lock()
		again := false
		if d.kicked {
			// Undo what Kick did; an error that was its doing is none.
			d.kicked = false
			d.file.SetReadDeadline(d.deadline)
			again = errors.Is(err, os.ErrDeadlineExceeded)
		}
		if again && !d.closed {
			d.mu.Unlock()
			continue
		}
		d.waiting = false
		if err != nil && d.closed {
			err = net.ErrClosed
		}
		d.mu.Unlock()
		return err
	}
}

func (w *poller) SetDeadline(dir Dir, t time.Time) error {
	d := &w.dir[dir]
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return net.ErrClosed
	}
	if d.deadline.Equal(t) {
		return nil
	}
	d.deadline = t
	if d.file == nil || d.kicked {
		return nil // open, or the kicked Wait, sets it
	}
	return d.file.SetReadDeadline(t)
}

func (w *poller) Kick(dir Dir) {
	d := &w.dir[dir]
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.waiting && !d.closed && !d.kicked {
		d.kicked = true
		d.file.SetReadDeadline(past)
	}
}

func (w *poller) Close() error {
	for i := range w.dir {
		d := &w.dir[i]
		d.mu.Lock()
		if !d.closed {
			d.closed = true
			if d.file != nil {
				d.file.Close()
			}
			if i == 1 {
				unix.Close(w.fd) // after the last possible open
			}
		}
		d.mu.Unlock()
	}
	return nil
}

// Spinning. A sleeping process takes tens of microseconds to wake, a spinning
// one a fraction of one. So a wait looks for a while before it sleeps: long
// where that has lately been, or would have been, enough, else short. Of all
// that wait in one process, only as many spin as leave a processor free, and a
// spinning thread yields to any other that could run on its processor.

// DefaultSpin is how long a wait may spin before it sleeps. It is longer than
// it takes to wake a process, so that two ends that answer each other get out
// of sleeping: with less, each gives up just before the other has woken.
const DefaultSpin = 100 * time.Microsecond

// shortSpin is spent on ends whose messages are far apart.
const shortSpin = 5 * time.Microsecond

var (
	spinners    atomic.Int32
	maxSpinners = int32(runtime.GOMAXPROCS(0) - 1)
)

// Spinner decides how long the waits of one direction spin. It belongs to the
// goroutine that waits.
type Spinner struct {
	Max  time.Duration // at most so long; negative: never
	long bool          // the last sleep was short enough to spin instead
}

// Spin reports whether ready returned true in time. A wait began at start.
func (s *Spinner) Spin(start time.Time, ready func() bool) bool {
	if s.Max < 0 {
		return false
	}
	defer spinners.Add(-1)
	if spinners.Add(1) > maxSpinners {
		return false
	}
	limit := min(s.Max, shortSpin)
	if s.long {
		limit = s.Max
	}
	for {
		for range 32 {
			if ready() {
				return true
			}
			pause()
		}
		if time.Since(start) >= limit {
			return false
		}
		syscall.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
}

// Slept tells how long the wait took after Spin returned false.
func (s *Spinner) Slept(d time.Duration) { s.long = d < 2*s.Max }
