package capi_test

import (
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/capi/calls"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// proc is a process of the interface within the test's: what the C library has
// one of.
type proc struct {
	*calls.Process
	gen atomic.Uint32
}

func (n *node) proc(name string) *proc {
	p := &proc{}
	p.Process = calls.New(o7s.Options{RunDir: n.dir, Prog: name, Args: []string{name}}, &p.gen)
	if err := p.Announce(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { p.Close() })
	return p
}

// wait waits as the C side does.
func (p *proc) wait(op int) int {
	for {
		if r := p.Wait(op, p.gen.Load()); r != calls.Interrupted {
			return r
		}
	}
}

func (p *proc) read(fd int, b []byte) int {
	for {
		if r := p.Read(fd, b, p.gen.Load()); r != calls.Interrupted {
			return r
		}
	}
}

func (p *proc) write(fd int, b []byte) int {
	for {
		if r := p.Write(fd, b, p.gen.Load()); r != calls.Interrupted {
			return r
		}
	}
}

// interrupt is what the C side does when a thread is cancelled.
func (p *proc) interrupt() {
	p.gen.Add(1)
	p.Interrupt()
}

// pair gives two processes and a flow between them, and what makes more.
func pair(t *testing.T) (a, b *proc, more func(*qos.Spec) (int, int)) {
	n := newNode(t)
	n.start()
	n.irm("name", "create", "peer")
	n.irm("bind", "program", filepath.Join(built.dir, "server"), "peer") // by its base name
	a, b = n.proc("client"), n.proc("server")
	return a, b, func(q *qos.Spec) (int, int) {
		t.Helper()
		op := b.Accept(-1)
		x := a.wait(a.Alloc("peer", q, -1))
		y := b.wait(op)
		if x < 64 || y < 64 {
			t.Fatalf("descriptors %d and %d", x, y)
		}
		return x, y
	}
}

func TestNoAllocation(t *testing.T) {
	a, b, flow := pair(t)
	for _, q := range []qos.Spec{qos.Raw, qos.Data} {
		x, y := flow(&q)
		msg, buf := make([]byte, 64), make([]byte, 100)
		if n := testing.AllocsPerRun(1000, func() {
			if a.write(x, msg) != 64 || b.read(y, buf) != 64 || b.write(y, msg) != 64 || a.read(x, buf) != 64 {
				t.Fatal("lost")
			}
		}); n != 0 {
			t.Errorf("in_order %d: %v allocations per round trip", q.InOrder, n)
		}
		// Nor does looking at a flow that has nothing.
		a.SetFlags(x, uint32(o7s.RDWR|o7s.NONBLOCK))
		if n := testing.AllocsPerRun(1000, func() {
			if r := a.read(x, buf); r != -int(o7serr.EAGAIN) {
				t.Fatal(r)
			}
		}); n != 0 {
			t.Errorf("in_order %d: %v allocations when there is nothing", q.InOrder, n)
		}
	}
}

// Descriptors are the lowest that are free, and free when the release is over.
func TestDescriptors(t *testing.T) {
	a, _, flow := pair(t)
	var fds []int
	for i := range 20 {
		x, _ := flow(nil)
		if fds = append(fds, x); x != 64+i {
			t.Errorf("descriptor %d, want %d", x, 64+i)
		}
	}
	for _, i := range []int{7, 3, 12} {
		if r := a.wait(a.Dealloc(fds[i])); r != 0 {
			t.Error(r)
		}
		if r := a.read(fds[i], make([]byte, 1)); r != -int(o7serr.ENOTALLOC) {
			t.Error(r)
		}
	}
	for _, want := range []int{64 + 3, 64 + 7, 64 + 12, 64 + 20} {
		if x, _ := flow(nil); x != want {
			t.Errorf("descriptor %d, want %d", x, want)
		}
	}
	for _, fd := range []int{-1, -64, 1 << 30} {
		if r := a.Check(fd); r != -int(o7serr.EBADF) {
			t.Errorf("descriptor %d: %d", fd, r)
		}
	}
}

// Interruptions at any time end every wait, and lose and change nothing: many
// readers and writers share flows while threads are being cancelled.
func TestInterrupt(t *testing.T) {
	a, b, flow := pair(t)
	x, y := flow(nil)
	const messages, each = 3000, 3
	stop := make(chan struct{})
	var inter, all sync.WaitGroup
	inter.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				a.interrupt()
				b.interrupt()
			}
		}
	})
	var sum, got atomic.Int64
	for range each {
		all.Go(func() {
			for i := range messages {
				if r := a.write(x, fmt.Appendf(nil, "%d", i)); r < 0 {
					t.Errorf("write: %d", r)
					return
				}
				sum.Add(int64(i))
			}
		})
		all.Go(func() {
			p := make([]byte, 100)
			for range messages {
				r := b.read(y, p)
				if r < 0 {
					t.Errorf("read: %d", r)
					return
				}
				var i int64
				fmt.Sscan(string(p[:r]), &i)
				got.Add(i)
			}
		})
	}
	// A flow that arrives meanwhile is not lost.
	all.Go(func() {
		for range 20 {
			op := b.Accept(-1)
			x := a.wait(a.Alloc("peer", nil, -1))
			y := b.wait(op)
			if x < 64 || y < 64 {
				t.Errorf("descriptors %d and %d", x, y)
				return
			}
			a.wait(a.Dealloc(x))
			b.wait(b.Dealloc(y))
		}
	})
	all.Wait()
	close(stop)
	inter.Wait()
	if sum.Load() != got.Load() {
		t.Errorf("wrote %d, read %d", sum.Load(), got.Load())
	}

	// A wait that is under way, one that is about to begin, and one behind another.
	for _, wait := range []func(seen uint32) int{
		func(seen uint32) int { return b.Read(y, make([]byte, 1), seen) },
		func(seen uint32) int { return b.Wait(b.Accept(-1), seen) },
		func() func(uint32) int {
			s := b.NewSet()
			b.AddSet(s, y)
			return func(seen uint32) int { return b.Events(s, -1, seen, 10, func(int, calls.Event) {}) }
		}(),
	} {
		seen := b.gen.Load()
		var two sync.WaitGroup
		for range 2 {
			two.Go(func() {
				if r := wait(seen); r != calls.Interrupted {
					t.Errorf("interrupted wait returned %d", r)
				}
			})
		}
		time.Sleep(time.Millisecond) // more often than not both wait
		b.interrupt()
		two.Wait()
		if r := wait(seen); r != calls.Interrupted { // too late to be told
			t.Errorf("wait of one who is behind returned %d", r)
		}
	}
}

// An aborted call leaves nothing: the flow it may have got is released, which
// the other end sees, and so is its descriptor.
func TestAbort(t *testing.T) {
	a, b, flow := pair(t)
	p := make([]byte, 1)
	for range 30 {
		op := b.Accept(-1)
		out := a.Alloc("peer", nil, -1)
		b.Abort(op)
		op = b.Accept(-1) // gets the flow if the one before was withdrawn in time
		x := a.wait(out)
		if x < 64 {
			t.Fatal(x)
		}
		if r := a.write(x, p); r != 1 && r != -int(o7serr.EFLOWDOWN) {
			t.Error(r)
		}
		got := make(chan int)
		go func() { got <- b.wait(op) }()
		down := make(chan int)
		go func() { down <- a.read(x, p) }()
		select {
		case y := <-got:
			b.wait(b.Dealloc(y))
			<-down
		case r := <-down: // the aborted call had it
			if r != -int(o7serr.EFLOWDOWN) {
				t.Errorf("read of a flow that nobody took: %d", r)
			}
			b.Abort(op)
			if y := <-got; y >= 0 {
				t.Errorf("an aborted call returned %d", y)
			}
		}
		a.wait(a.Dealloc(x))
	}
	if x, y := flow(nil); x > 65 || y > 65 {
		t.Errorf("descriptors %d and %d: those before were not freed", x, y)
	}
}

// The end of a stream is no message of length 0.
func TestEnd(t *testing.T) {
	a, b, flow := pair(t)
	x, y := flow(&qos.Data)
	a.write(x, []byte("bye"))
	if r := a.wait(a.Dealloc(x)); r != 0 {
		t.Error(r)
	}
	p := make([]byte, 10)
	if r := b.read(y, p); r != 3 {
		t.Error(r)
	}
	for range 2 {
		if r := b.read(y, p); r != -int(o7serr.EFLOWDOWN) {
			t.Errorf("end: %d", r)
		}
	}
}

func TestSetLimit(t *testing.T) {
	n := newNode(t)
	n.start()
	p := n.proc("sets")
	for i := range 32 {
		if s := p.NewSet(); s != i {
			t.Fatalf("set %d: %d", i, s)
		}
	}
	if s := p.NewSet(); s != -int(syscall.EMFILE) {
		t.Errorf("one more: %d", s)
	}
	p.CloseSet(5)
	if s := p.NewSet(); s != 5 {
		t.Errorf("after one was closed: %d", s)
	}
	for _, s := range []int{-1, 32, 1000} {
		if r := p.Events(s, 0, 0, 1, nil); r != -int(o7serr.EINVAL) {
			t.Errorf("set %d: %d", s, r)
		}
	}
}
