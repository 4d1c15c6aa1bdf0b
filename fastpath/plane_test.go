package fastpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/fastpath/port"
	"github.com/o7s/o7s-router/lib/packet"
)

func TestPortIsShared(t *testing.T) {
	p, f := testPlane(t, false, 100)
	a := must[*Port](t)(p.OpenPort("eth0"))
	b := must[*Port](t)(p.OpenPort("eth0"))
	if a != b {
		t.Fatal("two ports for one device")
	}
	if ok, why := p.Kernel(); ok || why == "" {
		t.Errorf("kernel: %v %q", ok, why)
	}
	got := map[string]int{}
	count := func(name string) func([]*packet.Buf) {
		return func(frames []*packet.Buf) {
			got[name] += len(frames)
			for _, b := range frames {
				b.Release()
			}
		}
	}
	one := must[*EthBlock](t)(a.Claim(0xa000, count("one")))
	must[*EthBlock](t)(a.Claim(0xa001, count("two")))
	if _, err := a.Claim(0xa000, count("three")); err == nil {
		t.Error("an EtherType was claimed twice")
	}
	if _, err := a.Claim(100, count("length")); err == nil {
		t.Error("a length was claimed as EtherType")
	}
	frame := func(dst byte, etherType uint16) *packet.Buf {
		b := packet.Get(60)
		copy(b.Bytes(), []byte{2, 0, 0, 0, 0, dst})
		binary.BigEndian.PutUint16(b.Bytes()[12:], etherType)
		return b
	}
	feed := func() {
		f["eth0"].c.Rx([]*packet.Buf{
			frame(1, 0xa000), frame(1, 0xa000), frame(1, 0xa001), frame(9, 0xa000), frame(1, 0x800),
			frame(1, 0xa000), packet.Get(5),
		})
	}
	feed()
	if got["one"] != 3 || got["two"] != 1 {
		t.Errorf("frames %v", got)
	}
	if n := p.Snapshot()[0].Verdicts[bpf.DropMAC]; n != 1 {
		t.Errorf("%d frames for another address counted", n)
	}
	one.Release()
	one.Release()
	feed()
	if got["one"] != 3 || got["two"] != 2 {
		t.Errorf("frames %v", got)
	}
	for _, port := range []*Port{a, b} {
		if p.Snapshot() == nil {
			t.Error("the port went with its first user")
		}
		if err := port.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(p.Snapshot()) != 0 {
		t.Error("the port is still there")
	}
	if _, err := a.Claim(0xa005, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("claim on a closed port: %v", err)
	}
}

// Opening a device takes the kernel long; routes and flows do not wait for it.
func TestOpeningBlocksNobody(t *testing.T) {
	f := fakes{}
	begun, finish := make(chan struct{}), make(chan struct{})
	p := must[*Plane](t)(newPlane(Options{MaxRoutes: 100, DisableXDP: true}, func(c port.Config) (device, error) {
		close(begun)
		c.Redirect(true) // a device may call back before it is open
		<-finish
		return f.open(c)
	}))
	defer p.Close()
	layer := must[*Layer](t)(p.NewLayer("l", 1, 4))
	opened := make(chan error, 2)
	for range 2 { // the second finds what the first one opened
		go func() {
			_, err := p.OpenPort("eth0")
			opened <- err
		}()
	}
	<-begun
	if err := layer.Replace(nil); err != nil {
		t.Error(err)
	}
	if len(p.Snapshot()) != 0 {
		t.Error("a port that is not open is shown")
	}
	close(finish)
	for range 2 {
		if err := <-opened; err != nil {
			t.Error(err)
		}
	}
	if len(f) != 1 || len(p.Snapshot()) != 1 {
		t.Errorf("%d devices, %d ports", len(f), len(p.Snapshot()))
	}
}

func TestPortState(t *testing.T) {
	p, f := testPlane(t, false, 100)
	port := must[*Port](t)(p.OpenPort("eth0"))
	var seen []bool
	cancel := port.OnState(func(up bool) { seen = append(seen, up) })
	f["eth0"].c.State(true)
	f["eth0"].c.State(false)
	f["eth0"].c.State(false)
	port.OnState(func(up bool) { seen = append(seen, up) }) // hears at once that it is down
	cancel()
	f["eth0"].c.State(true)
	if fmt.Sprint(seen) != "[false false true]" {
		t.Errorf("events %v", seen)
	}
}

func TestWirePath(t *testing.T) {
	p, f := testPlane(t, true, 100)
	l := must[*Layer](t)(p.NewLayer("l", 1, 4))
	port := must[*Port](t)(p.OpenPort("eth0"))
	user := must[*Wire](t)(l.NewWire(WireSpec{User: "u"}))
	if xdp, why := user.Path(); xdp || why == "" || user.User() != "u" {
		t.Errorf("wire of user space: %v %q", xdp, why)
	}
	w := must[*Wire](t)(l.NewWire(WireSpec{Port: port, MTU: 1496}))
	if xdp, _ := w.Path(); !xdp {
		t.Error("wire is not in XDP")
	}
	f["eth0"].setRedirectable(false)
	if xdp, why := w.Path(); xdp || why != "made so" {
		t.Errorf("wire of a port that takes no redirects: %v %q", xdp, why)
	}
	f["eth0"].setRedirectable(true)
	w.SetPunt(true, "congested")
	if xdp, why := w.Path(); xdp || why != "congested" {
		t.Errorf("punted wire: %v %q", xdp, why)
	}
	w.SetPunt(false, "")
	if xdp, _ := w.Path(); !xdp {
		t.Error("wire does not come back to XDP")
	}
}

// Tables in plain memory: lookups follow routes, states and changes, against a
// slow oracle.
func TestLookup(t *testing.T) {
	p, _ := testPlane(t, false, 4000)
	rapid.Check(t, func(t *rapid.T) {
		size := pick(t, "size", 4, 8)
		l := must[*Layer](t)(p.NewLayer("l", 1, size))
		defer l.Close()
		var wires []*Wire
		up := map[*Wire]bool{}
		for range 4 {
			w := must[*Wire](t)(l.NewWire(WireSpec{}))
			wires = append(wires, w)
			up[w] = true
		}
		defer func() {
			for _, w := range wires {
				w.Release()
			}
		}()
		oracle := map[uint64]Route{}
		dst := rapid.Uint64Range(1, 60)
		route := func(t *rapid.T) Route {
			r := Route{Dst: dst.Draw(t, "dst")}
			for range rapid.IntRange(1, 3).Draw(t, "ways") {
				r.NextHops = append(r.NextHops, pick(t, "wire", wires...))
			}
			if rapid.Bool().Draw(t, "lfa") {
				r.Alternate = pick(t, "alternate", wires...)
			}
			return r
		}
		t.Repeat(map[string]func(*rapid.T){
			"replace": func(t *rapid.T) {
				var routes []Route
				clear(oracle)
				for range rapid.IntRange(0, 40).Draw(t, "n") {
					r := route(t)
					routes = append(routes, r)
					oracle[r.Dst] = r
				}
				if err := l.Replace(routes); err != nil {
					t.Fatal(err)
				}
			},
			"set": func(t *rapid.T) {
				r := route(t)
				if err := l.Set(r); err != nil {
					t.Fatal(err)
				}
				oracle[r.Dst] = r
			},
			"delete": func(t *rapid.T) {
				d := dst.Draw(t, "dst")
				if _, want := oracle[d]; l.Delete(d) != want {
					t.Fatal("delete")
				}
				delete(oracle, d)
			},
			"switch": func(t *rapid.T) {
				a, b := pick(t, "old", wires...), pick(t, "new", wires...)
				if err := l.Switch(a, b); err != nil {
					t.Fatal(err)
				}
				for d, r := range oracle {
					s := Route{Dst: d, Alternate: r.Alternate}
					for _, w := range r.NextHops {
						if w == a {
							w = b
						}
						s.NextHops = append(s.NextHops, w)
					}
					if s.Alternate == a {
						s.Alternate = b
					}
					oracle[d] = s
				}
			},
			"state": func(t *rapid.T) {
				w := pick(t, "wire", wires...)
				up[w] = rapid.Bool().Draw(t, "up")
				w.SetState(up[w])
			},
			"": func(t *rapid.T) {
				if l.Len() != len(oracle) {
					t.Fatalf("%d routes, want %d", l.Len(), len(oracle))
				}
				for d := range uint64(61) {
					r, known := oracle[d]
					usable, primary := map[*Wire]bool{}, map[*Wire]bool{}
					for _, w := range r.NextHops {
						primary[w] = true
						if up[w] {
							usable[w] = true
						}
					}
					if len(usable) == 0 && r.Alternate != nil && up[r.Alternate] {
						usable[r.Alternate] = true
					}
					for eid := uint64(64); eid < 67; eid++ {
						w, ok := l.Lookup(d, eid)
						again, _ := l.Lookup(d, eid)
						switch {
						case !known && (w != nil || ok):
							t.Fatalf("no route to %d, but a wire", d)
						case known && len(usable) == 0 && (ok || !primary[w]):
							t.Fatalf("everything towards %d is down: %v", d, ok)
						case len(usable) > 0 && (!ok || !usable[w]):
							t.Fatalf("wrong wire to %d", d)
						case w != again:
							t.Fatalf("flow %d/%d has two paths", d, eid)
						}
					}
				}
			},
		})
	})
}

// Equal-cost wires share the flows evenly.
func TestECMPShare(t *testing.T) {
	p, _ := testPlane(t, false, 100)
	l := must[*Layer](t)(p.NewLayer("l", 1, 4))
	var wires []*Wire
	for range 3 {
		wires = append(wires, must[*Wire](t)(l.NewWire(WireSpec{})))
	}
	if err := l.Replace([]Route{{Dst: 5, NextHops: wires}}); err != nil {
		t.Fatal(err)
	}
	share := map[*Wire]int{}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		w, _ := l.Lookup(5, rng.Uint64())
		share[w]++
	}
	for _, w := range wires {
		if share[w] < 850 || share[w] > 1150 {
			t.Errorf("%d of 3000 flows on one of three wires", share[w])
		}
	}
}

// A reader that takes no lock never sees a wire that its route did not name,
// though table, next-hop and wire memory is reused all the time.
func TestLookupWhileReplacing(t *testing.T) {
	p, _ := testPlane(t, false, 300)
	l := must[*Layer](t)(p.NewLayer("l", 1, 4))
	other := must[*Layer](t)(p.NewLayer("other", 1, 4))
	good := must[*Wire](t)(l.NewWire(WireSpec{}))
	var stop atomic.Bool
	var wg sync.WaitGroup
	if err := l.Replace([]Route{{Dst: 1, NextHops: []*Wire{good}}}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		wg.Go(func() {
			for !stop.Load() {
				if w, ok := l.Lookup(1, 64); !ok || w.layer != l {
					t.Errorf("lookup: %v", ok)
					return
				}
			}
		})
	}
	for i := range 2000 {
		w := must[*Wire](t)(l.NewWire(WireSpec{}))
		bad := must[*Wire](t)(other.NewWire(WireSpec{}))
		var mine, theirs []Route
		for d := range uint64(i % 200) {
			mine = append(mine, Route{Dst: d + 1, NextHops: []*Wire{w}})
			theirs = append(theirs, Route{Dst: d + 1, NextHops: []*Wire{bad}})
		}
		mine = append(mine, Route{Dst: 1, NextHops: []*Wire{w, good}})
		if err := errors.Join(l.Replace(mine), other.Replace(theirs)); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(l.Replace(append(mine[:0], Route{Dst: 1, NextHops: []*Wire{good}})), other.Replace(nil)); err != nil {
			t.Fatal(err)
		}
		w.Release()
		bad.Release()
		if i%50 == 0 {
			p.mu.Lock()
			p.reclaim()
			p.mu.Unlock()
		}
	}
	stop.Store(true)
	wg.Wait()
}

// Nothing leaks: slots and table memory come back.
func TestReuse(t *testing.T) {
	p, _ := testPlane(t, false, 1000)
	for range 300 {
		l := must[*Layer](t)(p.NewLayer("l", 1, 4))
		port := must[*Port](t)(p.OpenPort("eth0"))
		b := must[*EthBlock](t)(port.Claim(0xa000, nil))
		w := must[*Wire](t)(l.NewWire(WireSpec{Port: port}))
		b.SetDT(100, w)
		if err := l.Replace([]Route{{Dst: 3, NextHops: []*Wire{w}}}); err != nil {
			t.Fatal(err)
		}
		b.Release()
		l.Close()
		w.Release()
		if err := port.Close(); err != nil {
			t.Fatal(err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reclaim()
	p.reclaim() // wires whose next hops went in the first
	if p.nhSlots.Used()+p.wireSlots.Used()+p.blocks.Used()+p.portSlots.Used()+p.layerSlot.Used() != 0 {
		t.Error("slots are not given back")
	}
	if got, want := p.arena.Largest(), uint32(len(p.t.FIB)/8-1); got != want {
		t.Errorf("largest region %d buckets, want %d", got, want)
	}
}

func TestTooManyRoutes(t *testing.T) {
	p, _ := testPlane(t, false, 100)
	l := must[*Layer](t)(p.NewLayer("l", 1, 4))
	w := must[*Wire](t)(l.NewWire(WireSpec{}))
	list := make([]Route, 20000)
	for i := range list {
		list[i] = Route{Dst: uint64(i + 1), NextHops: []*Wire{w}}
	}
	if err := l.Replace(list[:10]); err != nil {
		t.Fatal(err)
	}
	if err := l.Replace(list); !errors.Is(err, ErrTableFull) {
		t.Fatalf("error %v", err)
	}
	if _, ok := l.Lookup(3, 64); !ok || l.Len() != 10 {
		t.Error("the old table did not survive")
	}
	for _, r := range []Route{{Dst: 0, NextHops: []*Wire{w}}, {Dst: 1 << 32, NextHops: []*Wire{w}}, {Dst: 1}, {Dst: 1, NextHops: []*Wire{nil}}} {
		if err := l.Set(r); err == nil {
			t.Errorf("route %+v was accepted", r)
		}
	}
}

func TestPins(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount a BPF file system")
	}
	dir := filepath.Join(t.TempDir(), "bpf")
	p, err := New(Options{MaxRoutes: 100, PinDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if ok, why := p.Kernel(); !ok {
		p.Close()
		skip(t, why)
	}
	for _, name := range []string{"tables", bpf.RouterMapFib, bpf.RouterMapDevs} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || int64(st.Type) == bpffsMagic {
		t.Errorf("BPF file system is still mounted: %v", err)
	}
}
