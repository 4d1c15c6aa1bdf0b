package o7s

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/ring"
)

// newSet makes a set of flows.
func newSet(t *testing.T, flows ...*Flow) *Set {
	t.Helper()
	s := NewSet()
	t.Cleanup(func() { s.Close() })
	for _, f := range flows {
		if err := s.Add(f); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// next waits for exactly the events wanted, in any order. While others are
// awaited a message that nobody has read yet may be told of again.
func (s *Set) next(t *testing.T, want ...SetEvent) {
	t.Helper()
	missing := map[SetEvent]bool{}
	for _, e := range want {
		missing[e] = true
	}
	evs := make([]SetEvent, 8)
	for len(missing) > 0 {
		n, err := s.Wait(evs, 5*time.Second)
		if err != nil {
			t.Fatalf("%v, still missing %v", err, missing)
		}
		for _, e := range evs[:n] {
			if !missing[e] && !(e.Event == EventPacket && slices.Contains(want, e)) {
				t.Fatalf("event %v of flow %d, missing are %v", e.Event, e.Flow.FD(), missing)
			}
			delete(missing, e)
		}
	}
}

// none checks that nothing happens.
func (s *Set) none(t *testing.T, d time.Duration) {
	t.Helper()
	evs := make([]SetEvent, 8)
	if n, err := s.Wait(evs, d); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, o7serr.ETIMEDOUT) {
		t.Fatalf("%v, %v, want none", evs[:n], err)
	}
}

func TestSetReads(t *testing.T) {
	d := newFake(t)
	c := d.client(t)
	f, hf := d.flow1(t, c, nil)
	g, hg := d.flow1(t, c, nil)
	p := make([]byte, 100)
	read := func(f *Flow, want string) {
		t.Helper()
		if n, err := f.Read(p); err != nil || string(p[:n]) != want {
			t.Fatalf("read %q, %v, want %q", p[:n], err, want)
		}
	}
	hf.end.Write([]byte("early"))
	s := newSet(t, f, g)
	if err := s.Add(f); err != nil {
		t.Errorf("added twice: %v", err)
	}
	if err := NewSet().Add(f); !errors.Is(err, o7serr.EPERM) {
		t.Errorf("added to another set: %v", err)
	}
	if !s.Has(f) || s.Len() != 2 {
		t.Errorf("%d flows", s.Len())
	}
	s.next(t, SetEvent{f, EventPacket}) // was there before
	s.none(t, 0)                        // no second event while it is not read
	read(f, "early")
	s.none(t, 0)
	s.none(t, 2*time.Millisecond)

	// One message for each event.
	for _, m := range []string{"1", "", "2", "3"} { // and a keep-alive, which nobody sees
		hf.end.Write([]byte(m))
	}
	hg.end.Write([]byte("other"))
	s.next(t, SetEvent{f, EventPacket}, SetEvent{g, EventPacket})
	read(g, "other")
	read(f, "1")
	s.next(t, SetEvent{f, EventPacket})
	read(f, "2")
	s.next(t, SetEvent{f, EventPacket})
	read(f, "3")
	s.none(t, 0)
	hg.end.Write(nil)
	s.none(t, time.Millisecond)
	hg.end.Write([]byte("after a keep-alive"))
	s.next(t, SetEvent{g, EventPacket})
	read(g, "after a keep-alive")

	// Or until there is nothing.
	f.SetFlags(RDWR | RNOBLOCK)
	for range 3 {
		hf.end.Write([]byte("x"))
	}
	s.next(t, SetEvent{f, EventPacket})
	for range 3 {
		read(f, "x")
	}
	if _, err := f.Read(p); !errors.Is(err, o7serr.EAGAIN) {
		t.Errorf("drained: %v", err)
	}
	s.none(t, time.Millisecond)
	hf.end.Write([]byte("again"))
	s.next(t, SetEvent{f, EventPacket})
	read(f, "again")
	f.SetFlags(Default)

	// A read that times out does not take the flow's mark away.
	f.SetReadDeadline(time.Now().Add(time.Millisecond))
	if _, err := f.Read(p); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
	f.SetReadDeadline(time.Time{})
	s.none(t, time.Millisecond)
	hf.end.Write([]byte("in time"))
	s.next(t, SetEvent{f, EventPacket})
	read(f, "in time")

	// A part of a message leaves more; a batch may not.
	hf.end.Write([]byte("long"))
	s.next(t, SetEvent{f, EventPacket})
	if n, err := f.Read(p[:2]); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	s.next(t, SetEvent{f, EventPacket})
	read(f, "ng")
	hf.end.WriteBatch([][]byte{{1}, {2}})
	s.next(t, SetEvent{f, EventPacket})
	if n, err := f.ReadBatch([][]byte{p, p[50:]}, make([]int, 2)); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	s.none(t, 0)

	// Few events at a time.
	hf.end.Write([]byte("f"))
	hg.end.Write([]byte("g"))
	evs := make([]SetEvent, 1)
	got := map[*Flow]bool{}
	for range 2 {
		if n, err := s.Wait(evs, time.Minute); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		got[evs[0].Flow] = true
	}
	if len(got) != 2 {
		t.Errorf("events of %d flows", len(got))
	}
	read(f, "f")
	read(g, "g")

	// A wait that sleeps is woken: by a packet, by Wake, by Close.
	for range 20 {
		var wg sync.WaitGroup
		wg.Go(func() {
			time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
			hg.end.Write([]byte("g"))
		})
		s.next(t, SetEvent{g, EventPacket})
		read(g, "g")
		wg.Wait()
	}
	go func() {
		time.Sleep(time.Millisecond)
		s.Wake()
	}()
	if n, err := s.Wait(evs, -1); n != 0 || err != nil {
		t.Errorf("woken: %d, %v", n, err)
	}
	s.Wake()
	if n, err := s.Wait(evs, -1); n != 0 || err != nil {
		t.Errorf("woken before: %d, %v", n, err)
	}
	s.none(t, 0)
	s.Del(g)
	s.Del(g)
	hg.end.Write([]byte("not told"))
	s.none(t, time.Millisecond)
	s.Add(g)
	hf.end.Write([]byte("dropped with its flow"))
	s.next(t, SetEvent{g, EventPacket}, SetEvent{f, EventPacket})
	f.Close()
	if s.Has(f) {
		t.Error("a closed flow is still in")
	}
	if err := s.Add(f); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed flow was added: %v", err)
	}
	s.Zero()
	if s.Len() != 0 {
		t.Error("not empty")
	}
	go func() {
		time.Sleep(time.Millisecond)
		s.Close()
	}()
	if _, err := s.Wait(evs, -1); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if err := s.Add(g); !errors.Is(err, net.ErrClosed) {
		t.Errorf("added to a closed set: %v", err)
	}
	read(g, "not told") // the flow is as it was
}

// A set that never had a flow waits, too.
func TestSetEmpty(t *testing.T) {
	s := newSet(t)
	s.none(t, 0)
	s.none(t, time.Millisecond)
	d := newFake(t)
	f, h := d.flow1(t, d.client(t), nil)
	h.end.Write([]byte("x"))
	go func() {
		time.Sleep(time.Millisecond)
		s.Add(f)
	}()
	s.next(t, SetEvent{f, EventPacket})
	done := make(chan error)
	go func() {
		_, err := s.Wait(make([]SetEvent, 1), time.Minute)
		done <- err
	}()
	time.Sleep(time.Millisecond)
	s.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

func TestSetStates(t *testing.T) {
	d := newFake(t)
	c := d.client(t)
	f, h := d.flow1(t, c, nil)
	s := newSet(t, f)
	s.none(t, 0)
	for typ, e := range map[string]Event{"down": EventDown, "up": EventUp, "peer": EventPeer} {
		h.event(t, typ)
		s.next(t, SetEvent{f, e})
	}
	h.end.Write([]byte("last"))
	s.next(t, SetEvent{f, EventPacket})
	h.event(t, "dealloc")
	s.next(t, SetEvent{f, EventDealloc})
	p := make([]byte, 10)
	if n, err := f.Read(p); err != nil || string(p[:n]) != "last" {
		t.Errorf("%q, %v", p[:n], err)
	}
	if _, err := f.Read(p); !errors.Is(err, o7serr.EFLOWDOWN) {
		t.Errorf("released: %v", err)
	}
	s.none(t, 0)
	// More than anybody looks at: what holds is told last.
	for i := range 1001 {
		typ := "down"
		if i == 1000 {
			typ = "up"
		}
		for errors.Is(h.conn.Event(ipc.FlowEvent{Flow: h.flow, Type: typ}), o7serr.EAGAIN) {
			time.Sleep(time.Millisecond)
		}
	}
	evs := make([]SetEvent, 4)
	for last := Event(0); last != EventUp; {
		n, err := s.Wait(evs, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		last = evs[n-1].Event
	}

	// The end of a stream is something to read, once.
	x, y := d.pair(t, c, d.client(t))
	s.Add(y)
	s.none(t, 0)
	x.Write([]byte("1"))
	x.CloseWrite()
	s.next(t, SetEvent{y, EventPacket})
	if n, err := y.Read(p); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	s.next(t, SetEvent{y, EventPacket})
	if _, err := y.Read(p); err != io.EOF {
		t.Errorf("end: %v", err)
	}
	s.none(t, time.Millisecond)
	// The daemon's end is everybody's.
	h2 := func() *held { _, h := d.flow1(t, c, nil); return h }()
	_ = h2
	d.stop()
	s.next(t, SetEvent{f, EventDown})
}

// Every kind of flow can be in a set, of several sessions, too.
func TestSetKinds(t *testing.T) {
	d := newFake(t)
	a, b := d.client(t), d.client(t)
	app, err := a.Alloc(t.Context(), "app", nil)
	if err != nil {
		t.Fatal(err)
	}
	h := <-d.held
	defer h.end.Close()
	tap := <-d.tap
	defer tap.Close()
	x, y, _, _ := d.wired(t, qos.Data, &wire{})
	checked := qos.Raw
	checked.BER = 0
	cx, cy, _, _ := d.wired(t, checked, &wire{})
	held, hh := d.flow1(t, b, nil)
	s := newSet(t, held, app, y, cy)
	p := make([]byte, 100)
	read := func(f *Flow, want string) {
		t.Helper()
		if n, err := f.Read(p); err != nil || string(p[:n]) != want {
			t.Fatalf("read %q, %v, want %q", p[:n], err, want)
		}
	}
	s.none(t, time.Millisecond)
	for round := range 20 {
		if round%5 == 0 {
			time.Sleep(7 * time.Millisecond) // hubs lead by themselves
		}
		m := fmt.Sprint("round ", round)
		tap.Write(network(h.handle, 40, m))
		s.next(t, SetEvent{app, EventPacket})
		read(app, m)
		h.end.Write([]byte(m)) // by way of the daemon
		s.next(t, SetEvent{app, EventPacket})
		read(app, m)
		x.Write([]byte(m))
		s.next(t, SetEvent{y, EventPacket})
		read(y, m)
		cx.Write([]byte(m))
		s.next(t, SetEvent{cy, EventPacket})
		read(cy, m)
		hh.end.Write([]byte(m))
		s.next(t, SetEvent{held, EventPacket})
		read(held, m)
		// All at once.
		tap.Write(network(h.handle, 40, m))
		x.Write([]byte(m))
		hh.end.Write([]byte(m))
		s.next(t, SetEvent{app, EventPacket}, SetEvent{y, EventPacket}, SetEvent{held, EventPacket})
		read(app, m)
		read(y, m)
		read(held, m)
	}
	x.CloseWrite()
	s.next(t, SetEvent{y, EventPacket})
	if _, err := y.Read(p); err != io.EOF {
		t.Errorf("end: %v", err)
	}
	// The session of the set's first flow ends, the set goes on. What ends with
	// it at the other end of these has nothing to do with it.
	s.Del(y)
	s.Del(cy)
	b.Close()
	tap.Write(network(h.handle, 40, "still"))
	s.next(t, SetEvent{app, EventPacket})
	read(app, "still")
}

// No event is lost, whoever writes when: one goroutine waits for all flows and
// reads one message for each event.
func TestSetStress(t *testing.T) {
	d := newFake(t)
	a, b := d.client(t), d.client(t)
	const flows, each, writers = 40, 500, 3
	s := newSet(t)
	var ends [flows]*Flow
	at := map[*Flow]int{}
	for i := range ends {
		x, y := d.pair(t, a, b)
		ends[i] = x
		at[y] = i
		if err := s.Add(y); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 1))
			m := make([]byte, 100)
			for i := range each {
				for j := w; j < flows; j += writers {
					binary.NativeEndian.PutUint32(m, uint32(i))
					if _, err := ends[j].Write(m); err != nil {
						t.Error(err)
						return
					}
					if r.IntN(500) == 0 {
						time.Sleep(time.Duration(r.IntN(300)) * time.Microsecond)
					}
				}
			}
		})
	}
	var next [flows]uint32
	evs := make([]SetEvent, 16)
	p := make([]byte, 200)
	for total := 0; total < flows*each; {
		n, err := s.Wait(evs, 10*time.Second)
		if err != nil {
			t.Fatalf("after %d messages: %v", total, err)
		}
		for _, e := range evs[:n] {
			if e.Event != EventPacket {
				t.Fatalf("event %v", e.Event)
			}
			e.Flow.SetReadTimeout(5 * time.Second)
			if _, err := e.Flow.Read(p); err != nil {
				t.Fatalf("after %d messages: event without a message: %v", total, err)
			}
			i := at[e.Flow]
			if v := binary.NativeEndian.Uint32(p); v != next[i] {
				t.Fatalf("flow %d: message %d, want %d", i, v, next[i])
			}
			next[i]++
			total++
		}
	}
	wg.Wait()
	s.none(t, 0)
}

// 10 000 flows cost a wait no more than the one on which something happens, and
// nothing is left of them.
func TestSetOfManyFlows(t *testing.T) {
	d := newFake(t)
	c := d.client(t)
	count := 10_000
	if raceEnabled {
		count = 1000
	}
	s := newSet(t)
	flows, ends := make([]*Flow, count), make([]*ring.End, count)
	for i := range flows {
		f, err := c.Alloc(t.Context(), "held", nil)
		if err != nil {
			t.Fatalf("flow %d: %v", i, err)
		}
		flows[i], ends[i] = f, (<-d.held).end
		if err := s.Add(f); err != nil {
			t.Fatal(err)
		}
	}
	s.none(t, 0)
	r := rand.New(rand.NewPCG(5, 6))
	p := make([]byte, 100)
	evs := make([]SetEvent, 100)
	for range 2000 {
		i := r.IntN(count)
		var wg sync.WaitGroup
		wg.Go(func() { ends[i].Write([]byte("x")) })
		n, err := s.Wait(evs, 5*time.Second)
		if err != nil || n != 1 || evs[0].Flow != flows[i] {
			t.Fatalf("%d events, %v", n, err)
		}
		flows[i].Read(p)
		wg.Wait()
	}
	// All at once: each event once.
	for i := range ends {
		ends[i].Write([]byte("x"))
	}
	seen := map[*Flow]bool{}
	for len(seen) < count {
		n, err := s.Wait(evs, 5*time.Second)
		if err != nil {
			t.Fatalf("%d events: %v", len(seen), err)
		}
		for _, e := range evs[:n] {
			if seen[e.Flow] {
				t.Fatal("told twice")
			}
			seen[e.Flow] = true
			e.Flow.Read(p)
		}
	}
	s.none(t, 0)
	for i := range flows {
		flows[i].Close()
		ends[i].Close()
	}
	if s.Len() != 0 {
		t.Errorf("%d flows left", s.Len())
	}
}

func TestSetNoAllocation(t *testing.T) {
	d := newFake(t)
	x, y := d.pair(t, d.client(t), d.client(t))
	s := newSet(t, y)
	msg, p, evs := make([]byte, 64), make([]byte, 100), make([]SetEvent, 4)
	if n := testing.AllocsPerRun(500, func() {
		x.Write(msg)
		if n, err := s.Wait(evs, time.Second); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		y.Read(p)
		s.Wait(evs, 0)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// A program closes a flow when it is told of its release: by then it was told
// of every message that is left, and not afterwards.
func TestSetReleaseIsLast(t *testing.T) {
	d := newFake(t)
	f, h := d.flow1(t, d.client(t), nil)
	s := newSet(t, f)
	const messages = 10
	for i := range messages {
		h.end.Write([]byte{byte(i)})
	}
	h.event(t, "dealloc")
	waitFor(t, func() bool { return f.Flags()&DOWN != 0 })
	evs := make([]SetEvent, 4) // fewer than there are
	p := make([]byte, 10)
	for read := 0; ; {
		n, err := s.Wait(evs, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		for i, e := range evs[:n] {
			if e.Event == EventPacket {
				if k, err := f.Read(p); k != 1 || err != nil || int(p[0]) != read {
					t.Fatalf("message %d: %v, %v", read, p[:k], err)
				}
				read++
				continue
			}
			if e.Event != EventDealloc || i != n-1 || read != messages {
				t.Fatalf("%v after %d messages, %d events behind it", e.Event, read, n-1-i)
			}
			f.Close()
			s.none(t, 0)
			return
		}
	}
}

// What happened before a flow gets into a set is told, or nobody would ever
// know: the flow may be released before accept returns.
func TestSetToldLate(t *testing.T) {
	d := newFake(t)
	c := d.client(t)
	f, h := d.flow1(t, c, nil)
	h.end.Write([]byte("early"))
	h.event(t, "down")
	h.event(t, "up")
	h.event(t, "dealloc")
	waitFor(t, func() bool { return f.Flags()&DOWN != 0 && len(f.Events()) == 3 })
	s := newSet(t, f)
	s.next(t, SetEvent{f, EventPacket}, SetEvent{f, EventDealloc})
	s.none(t, 0)
	s.Del(f)
	g, _ := d.flow1(t, c, nil)
	other := newSet(t, g, f)
	other.next(t, SetEvent{f, EventPacket}, SetEvent{f, EventDealloc})
}

// Thousands of flows that are released while nobody waits: each is told of.
func TestSetManyReleased(t *testing.T) {
	d := newFake(t)
	c := d.client(t)
	s := newSet(t)
	const flows = 3000
	for range flows {
		f, _ := d.flow1(t, c, nil)
		s.Add(f)
		f.event(EventDealloc)
	}
	evs := make([]SetEvent, 100)
	for told := 0; told < flows; {
		n, err := s.Wait(evs, 5*time.Second)
		if err != nil {
			t.Fatalf("%v after %d of %d", err, told, flows)
		}
		for _, e := range evs[:n] {
			if e.Event != EventDealloc {
				t.Fatal(e.Event)
			}
			e.Flow.Close()
		}
		told += n
	}
	s.none(t, 0)
}

// A message that is lost because it does not fit is read like another: the ones
// behind it are told of. So are those of a flow that was not open for reading.
func TestSetNotRead(t *testing.T) {
	d := newFake(t)
	f, h := d.flow1(t, d.client(t), nil)
	s := newSet(t, f)
	if err := f.SetFlags(Default | RNOPART); err != nil {
		t.Fatal(err)
	}
	h.end.Write([]byte("too long"))
	h.end.Write([]byte("fits"))
	s.next(t, SetEvent{f, EventPacket})
	p := make([]byte, 5)
	if _, err := f.Read(p); !errors.Is(err, o7serr.EMSGSIZE) {
		t.Fatal(err)
	}
	s.next(t, SetEvent{f, EventPacket})
	if n, err := f.Read(p); err != nil || string(p[:n]) != "fits" {
		t.Fatalf("%q, %v", p[:n], err)
	}
	f.SetFlags(WRONLY)
	h.end.Write([]byte("later"))
	s.next(t, SetEvent{f, EventPacket})
	if _, err := f.Read(p); !errors.Is(err, o7serr.EPERM) {
		t.Fatal(err)
	}
	s.none(t, 0)
	f.SetFlags(Default)
	s.next(t, SetEvent{f, EventPacket})
	if n, err := f.Read(p); err != nil || string(p[:n]) != "later" {
		t.Fatalf("%q, %v", p[:n], err)
	}
}

// The end of a stream is told of until it was read, and not again for what the
// other end does later.
func TestSetEndOnce(t *testing.T) {
	d := newFake(t)
	x, y := d.pairQoS(t, d.client(t), d.client(t), &qos.Data)
	s := newSet(t, y)
	x.CloseWrite()
	s.next(t, SetEvent{y, EventPacket})
	if _, err := y.Read(make([]byte, 100)); err != io.EOF {
		t.Fatal(err)
	}
	y.path.Kick(ring.DirRead)
	s.none(t, time.Millisecond)
	x.Close()
	s.next(t, SetEvent{y, EventDealloc})
	s.none(t, time.Millisecond)
}

// The queue of a flow within the machine holds more than its length tells: all
// of it comes before the release.
func TestSetReleaseOfFullQueue(t *testing.T) {
	d := newFake(t)
	f, h := d.flow1(t, d.client(t), nil)
	const messages = 2 * queueLimit
	for range messages {
		if err := h.end.Write([]byte("m")); err != nil {
			t.Skip(err) // it does not
		}
	}
	h.event(t, "dealloc")
	waitFor(t, func() bool { return f.Flags()&DOWN != 0 })
	s := newSet(t, f)
	evs := make([]SetEvent, 100)
	for told := 0; ; {
		n, err := s.Wait(evs, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range evs[:n] {
			if e.Event == EventPacket {
				told++
			} else if told < messages {
				t.Fatalf("%v after %d messages", e.Event, told)
			} else {
				return
			}
		}
	}
}

// What a program sets as the state of a flow within the machine is an event at
// the other end, and both ends read so.
func TestSetDownFlag(t *testing.T) {
	d := newFake(t)
	x, y := d.pairQoS(t, d.client(t), d.client(t), &qos.Data)
	s := newSet(t, y)
	p := make([]byte, 10)
	for range 3 {
		done := make(chan error)
		go func() {
			_, err := x.Read(p)
			done <- err
		}()
		x.SetFlags(Default | DOWN)
		if err := <-done; !errors.Is(err, o7serr.EFLOWDOWN) {
			t.Fatal(err)
		}
		s.next(t, SetEvent{y, EventDown})
		if _, err := y.Read(p); !errors.Is(err, o7serr.EFLOWDOWN) {
			t.Fatal(err)
		}
		s.none(t, 0)
		x.SetFlags(Default)
		s.next(t, SetEvent{y, EventUp})
		x.Write([]byte("m"))
		s.next(t, SetEvent{y, EventPacket})
		if _, err := y.Read(p); err != nil {
			t.Fatal(err)
		}
	}
	x.SetFlags(Default | DOWN)
	s.next(t, SetEvent{y, EventDown})
	y.Read(p)
	x.SetFlags(Default)
	s.next(t, SetEvent{y, EventUp})
	x.CloseWrite()
	s.next(t, SetEvent{y, EventPacket})
	if _, err := y.Read(p); err != io.EOF {
		t.Fatal(err)
	}
}
