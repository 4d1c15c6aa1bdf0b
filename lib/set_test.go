package o7s

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// setCase is a pair of flows of each kind of path.
func setCases() map[string]func(*testing.T, *fake) (x, y *Flow) {
	return map[string]func(*testing.T, *fake) (x, y *Flow){
		"rings": func(t *testing.T, d *fake) (x, y *Flow) { return d.pair(t, d.client(t), d.client(t)) },
		"ordered": func(t *testing.T, d *fake) (x, y *Flow) {
			x, y, _, _ = d.wired(t, qos.Data, &wire{})
			return x, y
		},
	}
}

// one waits for one event.
func one(t *testing.T, s *Set, f *Flow, e Event) {
	t.Helper()
	var evs [4]SetEvent
	n, err := s.Wait(evs[:], 10*time.Second)
	if err != nil || n != 1 || evs[0] != (SetEvent{f, e}) {
		t.Fatalf("%d events %v, %v; want %v", n, evs[:n], err, e)
	}
}

func none(t *testing.T, s *Set) {
	t.Helper()
	var evs [4]SetEvent
	for _, d := range []time.Duration{0, 5 * time.Millisecond} {
		n, err := s.Wait(evs[:], d)
		if n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, o7serr.ETIMEDOUT) {
			t.Fatalf("%d events %v, %v; want none", n, evs[:n], err)
		}
	}
}

func TestSet(t *testing.T) {
	for name, open := range setCases() {
		t.Run(name, func(t *testing.T) {
			x, y := open(t, newFake(t))
			s := NewSet()
			defer s.Close()
			none(t, s)
			if err := s.Add(x); err != nil {
				t.Fatal(err)
			}
			other := NewSet()
			defer other.Close()
			if err := other.Add(x); !errors.Is(err, o7serr.EPERM) {
				t.Errorf("in two sets: %v", err)
			}
			if !s.Has(x) || other.Has(x) || s.Has(y) || s.Len() != 1 {
				t.Error("has the wrong flows")
			}
			none(t, s)
			// One message to read for each event, whenever it came.
			buf := make([]byte, 100)
			read := func(want string) {
				t.Helper()
				if n, err := x.Read(buf); err != nil || string(buf[:n]) != want {
					t.Fatalf("read %q, %v, want %q", buf[:n], err, want)
				}
			}
			for i := range 20 {
				k := 1 + i%3
				late := make(chan struct{})
				go func() {
					defer close(late)
					time.Sleep(time.Duration(i%4) * time.Millisecond)
					for j := range k {
						if _, err := y.Write(fmt.Appendf(nil, "%d/%d", i, j)); err != nil {
							t.Error(err)
						}
					}
				}()
				for j := range k {
					one(t, s, x, EventPacket)
					read(fmt.Sprintf("%d/%d", i, j))
				}
				<-late
				none(t, s)
			}
			// All at once, until there is nothing.
			for range 5 {
				if _, err := y.Write([]byte("m")); err != nil {
					t.Fatal(err)
				}
			}
			if err := x.SetFlags(Default | RNOBLOCK); err != nil {
				t.Fatal(err)
			}
			for got := 0; got < 5; {
				one(t, s, x, EventPacket)
				for {
					if _, err := x.Read(buf); errors.Is(err, o7serr.EAGAIN) {
						break
					} else if err != nil {
						t.Fatal(err)
					}
					got++
				}
			}
			var evs [1]SetEvent
			_, _ = s.Wait(evs[:], 0) // it may come once more
			none(t, s)
			// Parts of a message, and its end.
			if _, err := y.Write([]byte("four")); err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"fo", "ur", ""} {
				one(t, s, x, EventPacket)
				if n, err := x.Read(buf[:2]); err != nil || string(buf[:n]) != want {
					t.Fatalf("part %q, %v, want %q", buf[:n], err, want)
				}
			}
			none(t, s)
			// A message that was there before.
			s.Del(x)
			if _, err := y.Write([]byte("early")); err != nil {
				t.Fatal(err)
			}
			none(t, s)
			if err := s.Add(x); err != nil {
				t.Fatal(err)
			}
			one(t, s, x, EventPacket)
			read("early")
			none(t, s)
			// The end of the stream is read like a message.
			if err := y.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			one(t, s, x, EventPacket)
			if _, err := x.Read(buf); err != io.EOF {
				t.Errorf("read: %v", err)
			}
			if err := x.Close(); err != nil {
				t.Error(err)
			}
			if s.Len() != 0 {
				t.Error("a closed flow stays")
			}
			none(t, s)
		})
	}
}

// Events of the daemon reach the set, those of flows that left it do not.
func TestSetEvents(t *testing.T) {
	d := newFake(t)
	x, hx := d.flow1(t, d.client(t), &qos.Data)
	y, hy := d.flow1(t, d.client(t), nil) // of another hub
	s := NewSet()
	defer s.Close()
	if err := errors.Join(s.Add(x), s.Add(y)); err != nil {
		t.Fatal(err)
	}
	for typ, e := range map[string]Event{"down": EventDown, "up": EventUp, "peer": EventPeer} {
		hx.event(t, typ)
		one(t, s, x, e)
	}
	if err := hy.end.Write([]byte("from another hub")); err != nil {
		t.Fatal(err)
	}
	one(t, s, y, EventPacket)
	hy.event(t, "dealloc")
	one(t, s, y, EventDealloc)
	hx.event(t, "down")
	waitFor(t, func() bool { return x.Flags()&DOWN != 0 })
	s.Del(x)
	none(t, s)
	s.Zero()
	if s.Len() != 0 {
		t.Error("not empty")
	}
}

// Wake and Close end waits, with flows and without.
func TestSetWake(t *testing.T) {
	d := newFake(t)
	x, _ := d.pair(t, d.client(t), d.client(t))
	s := NewSet()
	var evs [1]SetEvent
	for round := range 2 {
		s.Wake()
		if n, err := s.Wait(evs[:], -1); n != 0 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		done := make(chan error)
		go func() {
			n, err := s.Wait(evs[:], -1)
			if n != 0 {
				err = fmt.Errorf("%d events", n)
			}
			done <- err
		}()
		waitFor(t, s.asleep.Load)
		s.Wake()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if round == 0 {
			if err := s.Add(x); err != nil {
				t.Fatal(err)
			}
			continue
		}
		go func() {
			_, err := s.Wait(evs[:], -1)
			done <- err
		}()
		waitFor(t, s.asleep.Load)
		s.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed: %v", err)
		}
	}
	if err := s.Add(x); !errors.Is(err, net.ErrClosed) {
		t.Errorf("add after close: %v", err)
	}
}

// An echo server of many flows with one goroutine.
func TestSetServer(t *testing.T) {
	const flows, rounds = 300, 20
	d := newFake(t)
	a, b := d.client(t), d.client(t)
	s := NewSet()
	var xs []*Flow
	for range flows {
		x, y := d.pair(t, a, b)
		if err := s.Add(y); err != nil {
			t.Fatal(err)
		}
		xs = append(xs, x)
	}
	served := make(chan error, 1)
	go func() {
		evs, buf := make([]SetEvent, 64), make([]byte, 100)
		for {
			n, err := s.Wait(evs, -1)
			for _, e := range evs[:n] {
				k, err := e.Flow.Read(buf)
				if err == nil {
					_, err = e.Flow.Write(buf[:k])
				}
				if err != nil {
					served <- err
					return
				}
			}
			if err != nil {
				served <- err
				return
			}
		}
	}()
	buf := make([]byte, 100)
	for r := range rounds {
		for i, x := range xs {
			if _, err := x.Write(fmt.Appendf(nil, "%d of %d", r, i)); err != nil {
				t.Fatal(err)
			}
		}
		for i, x := range xs {
			if n, err := x.Read(buf); err != nil || !bytes.Equal(buf[:n], fmt.Appendf(nil, "%d of %d", r, i)) {
				t.Fatalf("round %d, flow %d: %q, %v", r, i, buf[:n], err)
			}
		}
	}
	s.Close()
	if err := <-served; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// Messages of a set are read without allocation.
func TestSetAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	d := newFake(t)
	x, y := d.pair(t, d.client(t), d.client(t))
	s := NewSet()
	defer s.Close()
	if err := s.Add(y); err != nil {
		t.Fatal(err)
	}
	evs, buf := make([]SetEvent, 4), make([]byte, 10)
	round := func() {
		if _, err := x.Write(buf); err != nil {
			t.Fatal(err)
		}
		if n, err := s.Wait(evs, -1); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if _, err := y.Read(buf); err != nil {
			t.Fatal(err)
		}
		y.Read(nil)
	}
	round()
	if n := testing.AllocsPerRun(100, round); n > 0 {
		t.Errorf("%.1f allocations", n)
	}
}
