package ring

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// side is one process's view of a slab, as the two processes of a test.
type hubSide struct {
	hub  *Hub
	slab *Slab
}

// hubPair makes a slab between two hubs.
func hubPair(t testing.TB, capacity int) (fd int, sides [2]hubSide) {
	t.Helper()
	fd, err := NewSlab(capacity)
	if err != nil {
		t.Fatal(err)
	}
	var bells [2]int
	for i := range sides {
		wait, err := NewWaitFD()
		if err != nil {
			t.Fatal(err)
		}
		if bells[i], err = NewSlabBell(wait); err != nil {
			t.Fatal(err)
		}
		if sides[i].hub, err = NewHub(wait); err != nil {
			t.Fatal(err)
		}
	}
	for i := range sides {
		bell, err := unix.FcntlInt(uintptr(bells[1-i]), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if sides[i].slab, err = OpenSlab(fd, i, bell); err != nil {
			t.Fatal(err)
		}
		sides[i].hub.AddSlab(sides[i].slab)
	}
	t.Cleanup(func() {
		for i, s := range sides {
			s.hub.RemoveSlab(s.slab)
			if err := errors.Join(s.hub.Close(), s.slab.Close()); err != nil {
				t.Error(err)
			}
			unix.Close(bells[i])
		}
		unix.Close(fd)
	})
	return fd, sides
}

func (s hubSide) open(t testing.TB, fd int, slot uint32, capacity int, format bool) *End {
	t.Helper()
	if format {
		if err := Format(fd, SlotOffset(slot, capacity), capacity); err != nil {
			t.Fatal(err)
		}
	}
	w, err := s.hub.End(s.slab, slot)
	if err != nil {
		t.Fatal(err)
	}
	e, err := s.slab.Open(slot, w, Config{Spin: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

// Many flows of one slab echo at the same time: no wake-up is lost, whoever
// leads.
func TestHubEcho(t *testing.T) {
	const flows, rounds = 20, 500
	fd, sides := hubPair(t, MinCapacity)
	var wg sync.WaitGroup
	for i := range uint32(flows) {
		slot := i * 700
		a := sides[0].open(t, fd, slot, MinCapacity, true)
		b := sides[1].open(t, fd, slot, MinCapacity, false)
		wg.Go(func() {
			buf := make([]byte, 8)
			for range rounds {
				n, err := readWait(b, buf)
				if err == nil {
					err = b.Write(buf[:n])
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
		wg.Go(func() {
			buf := make([]byte, 8)
			for k := range uint64(rounds) {
				binary.NativeEndian.PutUint64(buf, k<<8|uint64(i))
				if err := a.Write(buf); err != nil {
					t.Error(err)
					return
				}
				if n, err := readWait(a, buf); err != nil || n != 8 || binary.NativeEndian.Uint64(buf) != k<<8|uint64(i) {
					t.Errorf("flow %d, round %d: %d bytes, %v", i, k, n, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func readWait(e *End, p []byte) (int, error) {
	for {
		n, err := e.Read(p)
		if !errors.Is(err, ErrEmpty) {
			return n, err
		}
		if err := e.WaitRead(); err != nil {
			return 0, err
		}
	}
}

// A writer that waits for room is woken, too.
func TestHubRoom(t *testing.T) {
	fd, sides := hubPair(t, MinCapacity)
	a, b := sides[0].open(t, fd, 3, MinCapacity, true), sides[1].open(t, fd, 3, MinCapacity, false)
	done := make(chan error, 1)
	const n = 2000
	go func() {
		msg := make([]byte, 100)
		for range n {
			for {
				err := a.Write(msg)
				if err == nil {
					break
				}
				if !errors.Is(err, ErrFull) {
					done <- err
					return
				}
				if err := a.WaitWrite(); err != nil {
					done <- err
					return
				}
			}
		}
		done <- nil
	}()
	buf := make([]byte, 100)
	for range n {
		if _, err := readWait(b, buf); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Deadlines, kicks and closing end waits of leaders and of those that follow.
func TestHubWaits(t *testing.T) {
	fd, sides := hubPair(t, MinCapacity)
	leader := sides[0].open(t, fd, 0, MinCapacity, true)
	sides[1].open(t, fd, 0, MinCapacity, false)
	follower := sides[0].open(t, fd, 1, MinCapacity, true)
	sides[1].open(t, fd, 1, MinCapacity, false)
	for _, e := range []*End{leader, follower} {
		if err := e.SetDeadline(DirRead, time.Now().Add(5*time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if err := e.WaitRead(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("deadline: %v", err)
		}
		if err := e.SetDeadline(DirRead, time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	ends := make(chan error, 2)
	for _, e := range []*End{leader, follower} {
		go func() { ends <- e.WaitRead() }()
	}
	for sides[0].hub.followers() != 1 {
		time.Sleep(time.Millisecond)
	}
	leader.Kick(DirRead)
	if err := <-ends; err != nil {
		t.Errorf("kicked: %v", err)
	}
	follower.Shut()
	if err := <-ends; !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	// A deadline that is set while it sleeps.
	go func() { ends <- leader.WaitRead() }()
	for !sides[0].hub.led() {
		time.Sleep(time.Millisecond)
	}
	if err := leader.SetDeadline(DirRead, time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := <-ends; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("deadline in the past: %v", err)
	}
}

func (h *Hub) followers() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.waiting)
}

func (h *Hub) led() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.leader != nil
}

// What nobody waits for goes to its handler, also while others wait, and from
// other sources, too.
func TestHubHandlers(t *testing.T) {
	fd, sides := hubPair(t, MinCapacity)
	near, far := sides[0], sides[1]
	near.hub.Serve()
	e, peer := near.open(t, fd, 9000, MinCapacity, true), far.open(t, fd, 9000, MinCapacity, false)
	called := make(chan struct{}, 1)
	e.Waiter().(*HubEnd).Handle(func() { called <- struct{}{} })
	buf := make([]byte, 8)
	other, otherPeer := near.open(t, fd, 1, MinCapacity, true), far.open(t, fd, 1, MinCapacity, false)
	for round := range 20 {
		if !e.Arm() {
			t.Fatal("not empty")
		}
		blocked := make(chan error, 1)
		if round%2 == 1 {
			go func() {
				_, err := readWait(other, make([]byte, 1))
				blocked <- err
			}()
		}
		if err := peer.Write([]byte("12345678")); err != nil {
			t.Fatal(err)
		}
		<-called
		if n, err := e.Read(buf); n != 8 || err != nil {
			t.Fatalf("%d bytes, %v", n, err)
		}
		if round%2 == 1 {
			if err := otherPeer.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if err := <-blocked; err != nil {
				t.Fatal(err)
			}
		}
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[1])
	got := make(chan byte, 10)
	if err := near.hub.AddSource(p[0], func() bool {
		var b [1]byte
		if n, _ := unix.Read(p[0], b[:]); n == 1 {
			got <- b[0]
			return true
		}
		return false
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p[0]) })
	for i := range byte(20) {
		if _, err := unix.Write(p[1], []byte{i}); err != nil {
			t.Fatal(err)
		}
		if b := <-got; b != i {
			t.Fatalf("%d, want %d", b, i)
		}
	}
}

// A peer that sets all bits of a door costs looks, and nothing else.
func TestHostileDoor(t *testing.T) {
	fd, sides := hubPair(t, MinCapacity)
	e, peer := sides[0].open(t, fd, 5, MinCapacity, true), sides[1].open(t, fd, 5, MinCapacity, false)
	d := &sides[1].slab.peer
	for i := range d.bits {
		d.bits[i] = ^uint64(0)
	}
	for i := range d.summary {
		d.summary[i] = ^uint64(0)
	}
	d.sleeps.Store(77)
	if err := peer.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := readWait(e, make([]byte, 8)); n != 1 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	if err := e.SetDeadline(DirRead, time.Now().Add(5*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if err := e.WaitRead(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("wait: %v", err)
	}
}

// The memory of a slot that is freed comes back, and it can be used again.
func TestFreeSlot(t *testing.T) {
	fd, sides := hubPair(t, DefaultCapacity)
	blocks := func() int64 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks
	}
	var before int64
	for round := range 3 {
		a, b := sides[0].open(t, fd, 8, DefaultCapacity, true), sides[1].open(t, fd, 8, DefaultCapacity, false)
		buf := make([]byte, 1000)
		for range 300 {
			if err := a.Write(buf); err != nil && !errors.Is(err, ErrFull) {
				t.Fatal(err)
			}
		}
		if n, err := b.Read(buf); n != 1000 || err != nil {
			t.Fatalf("%d bytes, %v", n, err)
		}
		if err := errors.Join(a.Close(), b.Close(), FreeSlot(fd, 8, DefaultCapacity)); err != nil {
			t.Fatal(err)
		}
		if round == 0 {
			before = blocks() // the doors are touched
		} else if n := blocks(); n > before {
			t.Errorf("%d blocks, %d before", n, before)
		}
	}
}

// Closing ends a wait whenever it begins.
func TestHubCloseRace(t *testing.T) {
	_, sides := hubPair(t, MinCapacity)
	h := sides[0].hub
	for range 20000 {
		s := h.Sleeper()
		done := make(chan error)
		go func() { done <- s.Wait(func() bool { return false }) }()
		s.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Fatal(err)
		}
	}
}
