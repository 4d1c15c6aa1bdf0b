package ring

import (
	"runtime"
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

// Waiter blocks goroutines until the other end rings. For each direction one
// goroutine waits at a time.
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

// bell wakes the other end: it leaves a bit at the other side's door, and makes a
// system call if that side sleeps.
type bell struct {
	door *door
	slot uint32
	fd   int // of the slab
}

// ring does not block.
func (b *bell) ring() {
	if b.door.ring(b.slot) {
		ringFD(b.fd)
	}
}

var one = [8]byte{0: 1} // native order does not matter: any number but 0 will do

var past = time.Unix(1, 0)

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
