// Package calls is the application interface as a C program sees it (spec 33):
// flows are small numbers, every call returns a number that is negative when
// it failed, time-outs are durations. It has no C in it; package cshared puts
// the C functions on top.
//
// All methods are safe for concurrent use: any thread may make any call. A
// thread may be cancelled while it waits, which only the C side can do, and
// only outside Go code: Interrupt makes every wait return Interrupted, and the
// C side looks whether its thread was meant and waits again if not.
package calls

import (
	"context"
	"errors"
	"math/bits"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// Numbers of descriptors: from 64 as in the reference (spec 33 §1). The
// reference ends at 4095; the daemon here lets a program have more flows.
const (
	firstFD = 64
	endFD   = firstFD + 16384
)

// Interrupted is what a wait returns that Interrupt ended. It is none of the
// numbers a program may see.
const Interrupted = -4095

// Process is what one process has of the interface.
type Process struct {
	client *o7s.Client
	// gen is the number of interruptions so far. The C side increments it
	// before it asks for Interrupt, and reads it before it looks whether its
	// thread is cancelled: a wait that finds another number than the one read
	// then returns at once, so none begins after the interruption meant for it.
	gen  *atomic.Uint32
	kick atomic.Pointer[chan struct{}] // closed by the next Interrupt

	descs [endFD]atomic.Pointer[desc] // by descriptor

	mu   sync.Mutex // guards what follows
	used [endFD / 64]uint64
	sets [maxSets]*set
	ops  map[int]*op
	last int // number of the op started last
}

// New returns the calls of this process. gen is the counter described with
// Process.gen.
func New(o o7s.Options, gen *atomic.Uint32) *Process {
	p := &Process{client: o7s.New(o), gen: gen, ops: map[int]*op{}}
	p.used[0] = ^uint64(0) // 0 to 63
	c := make(chan struct{})
	p.kick.Store(&c)
	return p
}

// Announce makes the program known to the daemon if one is there.
func (p *Process) Announce(ctx context.Context) error { return p.client.Connect(ctx) }

// Close releases everything.
func (p *Process) Close() error { return p.client.Close() }

// Interrupt makes every wait return Interrupted.
func (p *Process) Interrupt() {
	next := make(chan struct{})
	close(*p.kick.Swap(&next))
	for i := firstFD; i < endFD; i++ {
		if d := p.descs[i].Load(); d != nil {
			d.rd.bounce()
			d.wr.bounce()
		}
	}
	for _, s := range p.allSets() {
		s.w.Wake()
	}
}

// kicked returns a channel that is closed by the next interruption, nil when
// there was one since the caller read seen.
func (p *Process) kicked(seen uint32) <-chan struct{} {
	c := *p.kick.Load()
	if p.gen.Load() != seen {
		return nil
	}
	return c
}

// get finds the flow of a descriptor, or gives the number of the error.
func (p *Process) get(fd int) (*desc, int) {
	if fd < 0 || fd >= endFD {
		return nil, code(o7serr.EBADF)
	}
	d := p.descs[fd].Load()
	if d == nil {
		return nil, code(o7serr.ENOTALLOC)
	}
	return d, 0
}

// add gives a flow the lowest descriptor that is free.
func (p *Process) add(f *o7s.Flow) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, w := range p.used {
		if w == ^uint64(0) {
			continue
		}
		fd := i*64 + bits.TrailingZeros64(^w)
		p.used[i] |= 1 << (fd % 64)
		p.descs[fd].Store(newDesc(fd, f))
		return fd
	}
	return -int(syscall.EMFILE)
}

// take takes the flow from its descriptor, which stays used until free.
func (p *Process) take(fd int) (*desc, int) {
	if fd < 0 || fd >= endFD {
		return nil, code(o7serr.EBADF)
	}
	d := p.descs[fd].Swap(nil)
	if d == nil {
		return nil, code(o7serr.ENOTALLOC)
	}
	return d, 0
}

func (p *Process) free(fd int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used[fd/64] &^= 1 << (fd % 64)
}

// code is the number for an error, 0 for nil.
func code(err error) int {
	if err == nil {
		return 0
	}
	if e, ok := err.(o7serr.Errno); ok { //nolint:errorlint // the quick way
		return int(e.Code())
	}
	var no o7serr.Errno
	if errors.As(err, &no) {
		return int(no.Code())
	}
	var sys syscall.Errno
	switch {
	case errors.As(err, &sys):
		return -int(sys)
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return code(o7serr.ETIMEDOUT)
	}
	return int(o7serr.Code(err))
}

// CommandLine is how the process was started. A shared library cannot rely on
// os.Args: only some C libraries pass them to it.
func CommandLine() []string {
	b, err := os.ReadFile("/proc/self/cmdline")
	if err != nil || len(b) == 0 {
		return os.Args
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}
