package ring

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/lib/o7serr"
)

// roleEnv makes the test binary play the other process.
const roleEnv = "O7S_RING_TEST_ROLE"

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		os.Exit(child(role))
	}
	goleak.VerifyTestMain(m)
}

type tb interface {
	Helper()
	Fatal(...any)
}

func ends(t tb, capacity int) (a, b *End, done func()) {
	t.Helper()
	p, err := NewPair(capacity)
	if err != nil {
		t.Fatal(err)
	}
	if a, err = p.Open(0, 0, 0); err != nil {
		t.Fatal(err)
	}
	if b, err = p.Open(1, 0, 0); err != nil {
		t.Fatal(err)
	}
	return a, b, func() { a.Close(); b.Close(); p.Close() }
}

// read and write block.
func read(e *End, p []byte) (int, error) {
	for {
		n, err := e.Read(p)
		if !errors.Is(err, ErrEmpty) {
			return n, err
		}
		if e.Peer()&Closed != 0 {
			if n, err = e.Read(p); !errors.Is(err, ErrEmpty) { // it wrote before it closed
				return n, err
			}
			return 0, net.ErrClosed
		}
		if err := e.WaitRead(); err != nil {
			return 0, err
		}
	}
}

func write(e *End, p []byte) error {
	for {
		err := e.Write(p)
		if !errors.Is(err, ErrFull) {
			return err
		}
		if e.Peer()&Closed != 0 {
			return net.ErrClosed
		}
		if err := e.WaitWrite(); err != nil {
			return err
		}
	}
}

// TestModel compares both directions with queues of byte slices.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		capacity := 1 << rapid.IntRange(12, 17).Draw(t, "log2 capacity")
		a, b, done := ends(t, capacity)
		defer done()
		e := [2]*End{a, b}
		var queue [2][][]byte // sent by side i
		var fill byte
		length := rapid.OneOf(rapid.IntRange(0, 80), rapid.IntRange(0, a.MaxMessage()))
		check := func(side int, got []byte) {
			want := queue[1-side][0]
			queue[1-side] = queue[1-side][1:]
			if !bytes.Equal(got, want) {
				t.Fatalf("side %d read %d bytes % .8x, want %d bytes % .8x", side, len(got), got, len(want), want)
			}
		}
		message := func(t *rapid.T) []byte {
			fill++
			return bytes.Repeat([]byte{fill}, length.Draw(t, "length"))
		}
		t.Repeat(map[string]func(*rapid.T){
			"write": func(t *rapid.T) {
				side, m := rapid.IntRange(0, 1).Draw(t, "side"), message(t)
				switch err := e[side].Write(m); {
				case err == nil:
					queue[side] = append(queue[side], m)
				case !errors.Is(err, ErrFull):
					t.Fatal(err)
				case len(queue[side]) == 0:
					t.Fatalf("%d bytes do not fit into an empty ring of %d", len(m), capacity)
				}
			},
			"write batch": func(t *rapid.T) {
				side := rapid.IntRange(0, 1).Draw(t, "side")
				var ms [][]byte
				for range rapid.IntRange(0, 9).Draw(t, "n") {
					ms = append(ms, message(t))
				}
				n, err := e[side].WriteBatch(ms)
				if (n < len(ms)) != errors.Is(err, ErrFull) {
					t.Fatal(n, err)
				}
				queue[side] = append(queue[side], ms[:n]...)
			},
			"read": func(t *rapid.T) {
				side := rapid.IntRange(0, 1).Draw(t, "side")
				p := make([]byte, a.MaxMessage())
				n, err := e[side].Read(p)
				if len(queue[1-side]) == 0 {
					if !errors.Is(err, ErrEmpty) {
						t.Fatalf("empty ring: %d, %v", n, err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				check(side, p[:n])
			},
			"read batch": func(t *rapid.T) {
				side := rapid.IntRange(0, 1).Draw(t, "side")
				bufs := make([][]byte, rapid.IntRange(0, 9).Draw(t, "n"))
				for i := range bufs {
					bufs[i] = make([]byte, a.MaxMessage())
				}
				sizes := make([]int, len(bufs))
				n, err := e[side].ReadBatch(bufs, sizes)
				if want := min(len(bufs), len(queue[1-side])); n != want {
					t.Fatalf("read %d of %d: %v", n, want, err)
				}
				for i := range n {
					check(side, bufs[i][:sizes[i]])
				}
			},
			"": func(t *rapid.T) {
				for side := range 2 {
					if n, want := e[side].TxLen(1000), len(queue[side]); n != want {
						t.Fatalf("side %d sends %d, want %d", side, n, want)
					}
					if n, want := e[1-side].RxLen(1000), len(queue[side]); n != want {
						t.Fatalf("side %d has %d to read, want %d", 1-side, n, want)
					}
				}
			},
		})
	})
}

// TestHostile lets the other end scribble over the region between operations:
// no panic, no fault, no endless loop, and every length within bounds.
func TestHostile(t *testing.T) {
	p, err := NewPair(MinCapacity)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	e, err := p.Open(0, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	all, err := unix.Mmap(p.share.memory, 0, int(SlabSize(MinCapacity)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(all)
	m := all[ctlOffset(p.slot):][:ctlSize]
	data := all[dataOffset(p.slot, MinCapacity):]
	control := []int{offRing + offTail, offRing + ringStride + offHead, offRing + offHungry, offRing + offBlocked, offRing + ringStride + offHungry}
	r := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, MinCapacity)
	corrupt, read := 0, 0
	for range 200000 {
		switch r.IntN(8) {
		case 0: // a position near the true one, or anywhere
			off := control[r.IntN(len(control))]
			v := binary.NativeEndian.Uint64(m[off:])
			if r.IntN(4) == 0 {
				v = r.Uint64()
			} else {
				v = (v + uint64(r.IntN(600))*8 - 1200) &^ uint64(r.IntN(2)*7)
			}
			binary.NativeEndian.PutUint64(m[off:], v)
		case 1: // make what the end believes true again
			binary.NativeEndian.PutUint64(m[offRing+offTail:], e.p.pos)
			binary.NativeEndian.PutUint64(m[offRing+ringStride+offHead:], e.c.pos+uint64(r.IntN(513))*8)
		case 2: // a length
			v := []uint64{wrapMark, uint64(r.IntN(5000)), r.Uint64(), 0, 1 << 31, 1<<64 - 1}[r.IntN(6)]
			binary.NativeEndian.PutUint64(data[MinCapacity+8*r.IntN(MinCapacity/8):], v)
		case 3:
			err = e.Write(buf[:r.IntN(e.MaxMessage()+1)])
		case 4:
			e.RxLen(1 << 20)
			e.TxLen(1 << 20)
		default:
			var n int
			if n, err = e.Read(buf); err == nil {
				read++
				if n > MinCapacity-header {
					t.Fatalf("message of %d bytes", n)
				}
			}
		}
		if errors.Is(err, ErrCorrupt) {
			corrupt++
		}
		err = nil
	}
	if corrupt == 0 || read == 0 {
		t.Errorf("%d corruptions found, %d messages read: the test misses its point", corrupt, read)
	}
}

// A hostile peer cannot block the one who wakes it, nor unseal the memory.
func TestHostileDescriptors(t *testing.T) {
	p, err := NewPair(0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	fds := p.FDs(1)
	wait, memory := fds[0], fds[1]
	if err := unix.Ftruncate(memory, 0); err == nil {
		t.Error("the memory can be truncated")
	}
	full := []byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	if _, err := unix.Write(wait, full); err == nil {
		t.Error("who waits on a bell can write to it")
	}
	unix.SetNonblock(wait, false)
	ringFD(p.FDs(0)[2]) // returns
	dup := func(fd int) int {
		fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	other, err := NewMemory(SlabSize(MinCapacity))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	for what, fd := range map[string]int{"what is no memory": wait, "memory without a slab": other} {
		if _, err := OpenSlab(fd, 0, dup(fds[2])); err == nil {
			t.Errorf("opened %s", what)
		}
	}
	for _, side := range []int{-1, 2} {
		if _, err := OpenSlab(memory, side, dup(fds[2])); err == nil {
			t.Errorf("opened side %d", side)
		}
	}
	for what, g := range map[string]Grant{
		"a slot beyond the last": {Slab: 1, Slot: SlabSlots, NewSlab: true, NewWait: true},
		"a slot without rings":   {Slab: 1, Slot: 77, NewSlab: true, NewWait: true},
		"an unknown slab":        {Slab: 9},
		"too few descriptors":    {Slab: 1, NewSlab: true, NewWait: true, Side: 1},
	} {
		var d Desk
		own := []int{}
		for _, fd := range p.FDs(0)[:g.FDs()] {
			own = append(own, dup(fd))
		}
		if g.Side == 1 {
			unix.Close(own[2])
			own = own[:2]
		}
		if _, _, err := d.Open(g, own, Config{}); err == nil {
			t.Errorf("opened %s", what)
		}
		d.Close()
	}
}

func TestLimits(t *testing.T) {
	p, err := NewPair(MinCapacity)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	e, err := p.Open(0, 100, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := e.Write(make([]byte, 101)); !errors.Is(err, o7serr.EMSGSIZE) {
		t.Errorf("long message: %v", err)
	}
	for err == nil {
		err = e.Write(make([]byte, 100))
	}
	if !errors.Is(err, o7serr.EAGAIN) {
		t.Errorf("full ring: %v", err)
	}
	if _, err := NewPair(5000); err == nil {
		t.Error("odd capacity accepted")
	}
}

// Both directions, both ends asleep now and then, every message arrives.
func TestConcurrent(t *testing.T) {
	for _, spin := range []time.Duration{-1, 0} {
		p, err := NewPair(MinCapacity)
		if err != nil {
			t.Fatal(err)
		}
		var e [2]*End
		for i := range e {
			if e[i], err = p.Open(i, 0, spin); err != nil {
				t.Fatal(err)
			}
		}
		const n = 20000
		var wg sync.WaitGroup
		for side := range e {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(side), 7))
				b := make([]byte, 1000)
				for i := range n {
					binary.NativeEndian.PutUint32(b, uint32(i))
					if err := write(e[side], b[:4+r.IntN(900)]); err != nil {
						t.Error(err)
						return
					}
					if r.IntN(2000) == 0 {
						time.Sleep(time.Millisecond)
					}
				}
			})
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(1-side), 7))
				b := make([]byte, 1000)
				for i := range n {
					got, err := read(e[side], b)
					if want := 4 + r.IntN(900); err != nil || got != want || binary.NativeEndian.Uint32(b) != uint32(i) {
						t.Errorf("message %d: %d bytes (want %d), number %d, %v", i, got, want, binary.NativeEndian.Uint32(b), err)
						return
					}
					if r.IntN(2000) == 0 { // keeps the streams of both sides in step
						time.Sleep(time.Millisecond)
					}
				}
			})
		}
		wg.Wait()
		e[0].Close()
		e[1].Close()
	}
}

func TestWait(t *testing.T) {
	a, b, done := ends(t, 0)
	defer done()
	w := a.Waiter()
	w.SetDeadline(DirRead, time.Now().Add(5*time.Millisecond))
	if err := a.WaitRead(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v", err)
	}
	w.SetDeadline(DirRead, time.Time{})
	// A kick is not lost, neither before nor during a wait.
	a.Kick(DirRead)
	if err := a.WaitRead(); err != nil {
		t.Errorf("kicked before: %v", err)
	}
	for range 50 {
		woken := make(chan error)
		go func() { woken <- a.WaitRead() }()
		time.Sleep(100 * time.Microsecond)
		a.Kick(DirRead)
		if err := <-woken; err != nil {
			t.Fatalf("kicked: %v", err)
		}
	}
	// A kick leaves the deadline alone.
	w.SetDeadline(DirRead, time.Now().Add(5*time.Millisecond))
	a.Kick(DirRead)
	a.WaitRead()
	if err := a.WaitRead(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("deadline after a kick: %v", err)
	}
	w.SetDeadline(DirRead, time.Time{})
	// The other end's state wakes, a full ring too.
	go b.SetState(Down)
	for a.Peer() != Down {
		a.waiter.Wait(DirRead, func() bool { return a.Peer() == Down })
	}
	for a.Write(make([]byte, 1000)) == nil {
	}
	drained := make(chan bool)
	go func() {
		for b.RxLen(1) > 0 {
			b.Read(nil)
		}
		close(drained)
	}()
	if err := write(a, make([]byte, 1000)); err != nil {
		t.Errorf("after the wait: %v", err)
	}
	<-drained
	go b.Shut()
	for a.Peer()&Closed == 0 {
		if err := a.WaitRead(); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.WaitRead(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("wait on a shut end: %v", err)
	}
	shut := make(chan error)
	c, d, done2 := ends(t, 0)
	defer done2()
	_ = d
	go func() { shut <- c.WaitRead() }()
	time.Sleep(time.Millisecond)
	c.Shut()
	if err := <-shut; !errors.Is(err, net.ErrClosed) {
		t.Errorf("shut during a wait: %v", err)
	}
}

func TestNoAllocation(t *testing.T) {
	a, b, done := ends(t, 0)
	defer done()
	p := make([]byte, 1500)
	batch := [][]byte{p, p, p, p}
	sizes := make([]int, 4)
	n := testing.AllocsPerRun(1000, func() {
		a.Write(p)
		b.Read(p)
		a.WriteBatch(batch)
		b.ReadBatch(batch, sizes)
		b.Waiter().SetDeadline(DirRead, time.Now().Add(-1))
		b.WaitRead()
		b.Waiter().SetDeadline(DirRead, time.Time{})
		b.Kick(DirRead)
		b.WaitRead()
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// child is the other process: it has side 1 of slot 0 in descriptors 3, 4, 5.
func child(role string) int {
	if role == "seqpacket" {
		c, err := net.FileConn(os.NewFile(3, "socket"))
		p := make([]byte, 2000)
		for n := 0; err == nil; {
			if n, err = c.Read(p); err == nil {
				_, err = c.Write(p[:n])
			}
		}
		return 0
	}
	var desk Desk
	e, _, err := desk.Open((&Pair{}).Grant(1), []int{3, 4, 5}, Config{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	b := make([]byte, 2000)
	for {
		n, err := read(e, b)
		if err != nil {
			return 0
		}
		if role == "flood" { // sends as fast as it can once it is told to
			for write(e, b[:n]) == nil {
			}
			return 0
		}
		if err := write(e, b[:n]); err != nil {
			return 0
		}
	}
}

// spawn starts the test binary as the owner of side 1.
func spawn(t testing.TB, role string) (*End, *exec.Cmd) {
	t.Helper()
	p, err := NewPair(0)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	cmd.Stderr = os.Stderr
	for _, fd := range p.FDs(1) {
		fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "side 1")
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	e, err := p.Open(0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		e.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.Shut()
		cmd.Process.Kill()
		cmd.Wait()
		e.Close()
	})
	return e, cmd
}

func TestProcess(t *testing.T) {
	e, _ := spawn(t, "echo")
	r := rand.New(rand.NewPCG(3, 4))
	b := make([]byte, 2000)
	for i := range 3000 {
		n := r.IntN(1500)
		b[0] = byte(i)
		if err := write(e, b[:n]); err != nil {
			t.Fatal(err)
		}
		if got, err := read(e, b); err != nil || got != n || (n > 0 && b[0] != byte(i)) {
			t.Fatalf("message %d: %d bytes, want %d: %v", i, got, n, err)
		}
		if r.IntN(500) == 0 {
			time.Sleep(time.Millisecond) // both fall asleep
		}
	}
}

// A process killed in the middle of writing leaves whole messages only, and
// this end goes on: what is there can be read, then nothing comes any more.
func TestProcessKilled(t *testing.T) {
	e, cmd := spawn(t, "flood")
	b := make([]byte, 2000)
	for i := range 300 {
		b[i] = byte(i)
	}
	if err := write(e, b[:300]); err != nil {
		t.Fatal(err)
	}
	patience := 20 * time.Second
	for i := range 20000 {
		if i == 10000 {
			cmd.Process.Kill()
			cmd.Wait()
			patience = 50 * time.Millisecond // nothing new can come
		}
		e.Waiter().SetDeadline(DirRead, time.Now().Add(patience))
		n, err := read(e, b)
		if errors.Is(err, os.ErrDeadlineExceeded) && i > 10000 {
			return
		}
		if err != nil || n != 300 || b[0] != 0 || b[299] != byte(299&0xff) {
			t.Fatalf("message %d: %d bytes: %v", i, n, err)
		}
	}
	t.Error("a killed process goes on sending")
}
