package o7s

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/ring"
	"golang.org/x/sys/unix"
)

// A packet that another goroutine has read from the device, and not given out yet,
// is there when a flow has settled.
func TestTapSettles(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	hub, err := ring.NewHub(-1)
	if err != nil {
		t.Fatal(err)
	}
	defer hub.Close()
	dev := &tap{fd: fds[0], hub: hub, flows: map[uint32]*tapPath{}}
	p := &tapPath{tap: dev, handle: 7, read: hub.Sleeper()}
	p.some = func() bool { return p.n.Load() > 0 }
	dev.flows[7] = p

	frame := make([]byte, tapHeader, tapHeader+5)
	binary.LittleEndian.PutUint32(frame, 7)
	binary.LittleEndian.PutUint16(frame[4:], tapHeader)
	binary.LittleEndian.PutUint16(frame[6:], 5)
	frame = append(frame, "hello"...)

	dev.busy.Store(true) // the other reads
	f := dev.get()
	n := copy(f.store[:], frame)
	if m, err := p.Next(); err == nil {
		t.Fatalf("%q", m)
	}
	done := make(chan struct{})
	go func() {
		p.Settle()
		close(done)
	}()
	select {
	case <-done:
		t.Fatal("settled while a packet is in another's hands")
	case <-time.After(5 * time.Millisecond):
	}
	if _, err := unix.Write(fds[1], frame); err != nil {
		t.Fatal(err)
	}
	dev.dispatch(f, n, false)
	dev.busy.Store(false)
	<-done
	for range 2 {
		if p.n.Load() == 0 {
			t.Fatal("a packet is missing")
		}
		p.Skip()
	}

	// Nor does it wait for a device that is closed.
	dev.busy.Store(true)
	p.shut.Store(true)
	p.Settle()
}
