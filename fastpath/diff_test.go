package fastpath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/fastpath/model"
	"github.com/o7s/o7s-router/fastpath/tables"
)

// twins is the kernel's pipeline and the model on the same tables.
type twins struct {
	p     *Plane
	progs map[uint32]*ebpf.Program // by port slot
	app   uint32                   // slot of the application port
}

func newTwins(t *testing.T) (*twins, []*Port, *App) {
	p, _ := testPlane(t, true, 2000)
	p.noGrace = true
	w := &twins{p: p, progs: map[uint32]*ebpf.Program{}}
	var ports []*Port
	for _, name := range []string{"eth0", "eth1", "user0", "tap0"} {
		port := must[*Port](t)(p.OpenPort(name))
		t.Cleanup(func() { port.Close() })
		ports = append(ports, port)
		prog := progRouter
		if name == "tap0" {
			prog = progApp
			w.app = port.slot
		}
		w.progs[port.slot] = must[*ebpf.Program](t)(p.kernel.program(prog, port.slot, nil))
		t.Cleanup(func() { w.progs[port.slot].Close() })
	}
	// eth0 has a socket for user space, eth1 has none. It need not be bound to
	// be a redirect target of a test run.
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := p.kernel.setSocket(ports[0].slot, 0, fd); err != nil {
		t.Fatal(err)
	}
	return w, ports, &App{plane: p, port: ports[3], handles: map[uint32]*appFlow{}}
}

func (w *twins) model() *model.Pipeline {
	return &model.Pipeline{
		Tables: w.p.t, Counters: model.NewCounters(w.p.t),
		Socket: func(port, queue uint32) bool { return port == 1 && queue == 0 },
	}
}

// counters reads what the kernel counted.
func (w *twins) counters(t *rapid.T) *model.Counters {
	c := model.NewCounters(w.p.t)
	k := w.p.kernel
	for slot := range w.progs {
		copy(c.Verdicts[slot].N[:], func() []uint64 { v := k.verdicts(slot); return v[:] }())
	}
	for i := range uint32(64 * tables.Cubes) { // wires in use have the lowest slots
		var cpus []bpf.RouterDtCount
		if err := k.maps[bpf.RouterMapDtCounters].Lookup(i, &cpus); err != nil {
			t.Fatal(err)
		}
		for _, n := range cpus {
			for j := range n.C {
				c.DT[i].C[j].Packets += n.C[j].Packets
				c.DT[i].C[j].Bytes += n.C[j].Bytes
			}
		}
	}
	for i := range uint32(16) {
		rx, tx := k.appCounters(i)
		c.Apps[i].Rx.Packets, c.Apps[i].Rx.Bytes = rx.Packets, rx.Bytes
		c.Apps[i].Tx.Packets, c.Apps[i].Tx.Bytes = tx.Packets, tx.Bytes
	}
	return c
}

func subtract(a, b *model.Counters) {
	for i := range a.Verdicts {
		for j := range a.Verdicts[i].N {
			a.Verdicts[i].N[j] -= b.Verdicts[i].N[j]
		}
	}
	for i := range a.DT {
		for j := range a.DT[i].C {
			a.DT[i].C[j].Packets -= b.DT[i].C[j].Packets
			a.DT[i].C[j].Bytes -= b.DT[i].C[j].Bytes
		}
	}
	for i := range a.Apps {
		a.Apps[i].Rx.Packets -= b.Apps[i].Rx.Packets
		a.Apps[i].Rx.Bytes -= b.Apps[i].Rx.Bytes
		a.Apps[i].Tx.Packets -= b.Apps[i].Tx.Packets
		a.Apps[i].Tx.Bytes -= b.Apps[i].Tx.Bytes
	}
}

const testType = 0xa000

// world is what the packets of one check meet.
type world struct {
	layers  []*Layer
	wires   [][]*Wire // by layer
	handles []uint32
	eids    []uint64 // of flows behind the application port
}

func pick[T any](t *rapid.T, label string, from ...T) T {
	return from[rapid.IntRange(0, len(from)-1).Draw(t, label)]
}

// frame draws a frame from the network.
func (s *world) frame(t *rapid.T, port *Port) []byte {
	mac := port.MAC()
	var f []byte
	f = append(f, pick(t, "mac", mac, mac, mac, mac, mac, mac, mac, mac, mac, mac, mac, mac,
		[]byte{255, 255, 255, 255, 255, 255}, []byte{0, 0, 0, 0, 0, 0}, []byte{255, 255, 255, 255, 255, 254})...)
	f = append(f, 2, 9, 9, 9, 9, 9)
	f = binary.BigEndian.AppendUint16(f, pick[uint16](t, "ethertype", testType, testType, testType, testType, testType, testType, testType, testType, testType, testType, testType, testType, testType+1, 0x800, 0))
	eid := pick[uint16](t, "eid", 100, 101, 100, 101, 100, 101, 0, 200, 300, 400, 4095, 4096, 65535)
	f = binary.BigEndian.AppendUint16(f, eid)

	l := s.layers[eid&1]
	dst := rapid.Uint64Range(0, 12).Draw(t, "dst")
	if rapid.IntRange(0, 9).Draw(t, "far") == 0 {
		dst = rapid.Uint64().Draw(t, "anywhere")
	}
	var dt []byte
	if l.size == 4 {
		dt = binary.LittleEndian.AppendUint32(dt, uint32(dst))
	} else {
		dt = binary.LittleEndian.AppendUint64(dt, dst)
	}
	dt = append(dt, pick[byte](t, "qc", 0, 0, 0, 1, 2, 3, 255), pick[byte](t, "ttl", 60, 60, 60, 0, 1, 2, 255),
		rapid.Byte().Draw(t, "ecn"))
	dt = binary.LittleEndian.AppendUint64(dt, pick(t, "deid", 0, 1, 63, 64, s.eids[0], s.eids[1], rapid.Uint64().Draw(t, "any")))
	dt = append(dt, rapid.SliceOfN(rapid.Byte(), 0, 70).Draw(t, "payload")...)
	if rapid.IntRange(0, 5).Draw(t, "cut") == 0 {
		dt = dt[:rapid.IntRange(0, len(dt)).Draw(t, "cutat")]
	}
	length := len(dt) + pick(t, "length", 0, 0, 0, 0, 0, 0, 1, 1000, -1, -len(dt))
	f = binary.BigEndian.AppendUint16(f, uint16(max(length, 0)))
	f = append(f, dt...)
	f = append(f, make([]byte, pick(t, "padding", 0, 0, 0, 1, 20, 50))...)
	if rapid.IntRange(0, 19).Draw(t, "truncated") == 0 {
		f = f[:rapid.IntRange(14, len(f)).Draw(t, "left")]
	}
	return f
}

// sent draws a frame as a program writes it.
func (s *world) sent(t *rapid.T) []byte {
	f := make([]byte, rapid.IntRange(14, 120).Draw(t, "size"))
	for i := range f {
		f[i] = byte(i)
	}
	binary.LittleEndian.PutUint32(f, pick(t, "handle", s.handles[0], s.handles[1], s.handles[2],
		s.handles[0]+1<<16, 0, 5, rapid.Uint32().Draw(t, "any")))
	return f
}

// The kernel's programs and the Go model agree on verdict, bytes and counters
// for every packet, whatever is in the tables.
func TestKernelAgreesWithModel(t *testing.T) {
	w, ports, app := newTwins(t)
	block0 := must[*EthBlock](t)(ports[0].Claim(testType, nil))
	block1 := must[*EthBlock](t)(ports[1].Claim(testType, nil))
	seen := map[bpf.Reason]int{}
	rapid.Check(t, func(t *rapid.T) {
		s := &world{}
		for i, size := range []int{4, 8} {
			l := must[*Layer](t)(w.p.NewLayer(fmt.Sprint("layer", i), rapid.Uint64Range(0, 3).Draw(t, "own"), size))
			s.layers = append(s.layers, l)
			var wires []*Wire
			for j := range 5 {
				spec := WireSpec{Port: pick(t, "port", ports[0], ports[1], ports[0], ports[1], ports[2]), MTU: pick(t, "mtu", 1496, 1496, 40)}
				for k := range spec.Header {
					spec.Header[k] = byte(16*i + j + k)
				}
				wires = append(wires, must[*Wire](t)(l.NewWire(spec)))
			}
			s.wires = append(s.wires, wires)
			for _, b := range []*EthBlock{block0, block1} {
				b.SetDT(uint16(100+i), wires[0])
				b.SetUser(200)
			}
		}
		h0, _, err := app.AddDTFlow(s.layers[0], 1000, 5, 77, 60)
		if err != nil {
			t.Fatal(err)
		}
		h1, _, err := app.AddDTFlow(s.layers[1], 1<<40, 6, 78, 1)
		if err != nil {
			t.Fatal(err)
		}
		h2, _, err := app.AddEthFlow(block0, 300, s.wires[0][1])
		if err != nil {
			t.Fatal(err)
		}
		block1.set(400, tables.MakeEndpoint(tables.EndpointApp, 0, h2&0xffff))
		s.handles, s.eids = []uint32{h0, h1, h2}, []uint64{1000, 1 << 40}
		defer func() {
			for _, h := range s.handles {
				app.Remove(h)
			}
			for _, b := range []*EthBlock{block0, block1} {
				for _, eid := range []uint16{100, 101, 200, 300, 400} {
					b.Clear(eid)
				}
			}
			for i, l := range s.layers {
				l.Close()
				for _, wire := range s.wires[i] {
					wire.Release()
				}
			}
			w.p.mu.Lock()
			w.p.reclaim() // the same slots in every check
			w.p.reclaim()
			w.p.mu.Unlock()
		}()
		routes := func(i int) (out []Route) {
			for dst := range uint64(12) {
				if rapid.IntRange(0, 3).Draw(t, "absent") == 0 || dst == 0 {
					continue
				}
				r := Route{Dst: dst}
				for range rapid.IntRange(1, 4).Draw(t, "ways") {
					r.NextHops = append(r.NextHops, pick(t, "wire", s.wires[i]...))
				}
				if rapid.Bool().Draw(t, "lfa") {
					r.Alternate = pick(t, "alternate", s.wires[i]...)
				}
				out = append(out, r)
			}
			return out
		}
		m := w.model()
		before := w.counters(t)
		run := func(slot uint32, frame []byte) {
			out := make([]byte, len(frame)+256)
			o := ebpf.RunOptions{Data: frame, DataOut: out}
			got, err := w.progs[slot].Run(&o)
			if err != nil {
				t.Fatal(err)
			}
			want := bytes.Clone(frame)
			var action uint32
			var r bpf.Reason
			if slot == w.app {
				action, r, _ = m.App(slot, 0, want)
			} else {
				action, r, _ = m.Frame(slot, 0, want)
			}
			seen[r]++
			if got != action {
				t.Fatalf("frame %x\nkernel's action %d, model's %d (%v)", frame, got, action, r)
			}
			if !r.Drop() && !bytes.Equal(o.DataOut, want) {
				t.Fatalf("frame %x (%v)\nkernel %x\nmodel  %x", frame, r, o.DataOut, want)
			}
		}
		for i := range s.layers {
			if err := s.layers[i].Replace(routes(i)); err != nil {
				t.Fatal(err)
			}
		}
		for range 30 {
			i := rapid.IntRange(0, 1).Draw(t, "layer")
			switch rapid.IntRange(0, 11).Draw(t, "change") {
			case 0, 1:
				pick(t, "wire", s.wires[i]...).SetState(rapid.Bool().Draw(t, "up"))
			case 2:
				pick(t, "wire", s.wires[i]...).SetPunt(rapid.Bool().Draw(t, "punt"), "test")
			case 3:
				s.layers[i].Delete(rapid.Uint64Range(1, 12).Draw(t, "dst"))
			case 4:
				if err := s.layers[i].Set(Route{Dst: rapid.Uint64Range(1, 12).Draw(t, "dst"), NextHops: []*Wire{pick(t, "wire", s.wires[i]...)}}); err != nil {
					t.Fatal(err)
				}
			case 5:
				if err := s.layers[i].Switch(pick(t, "old", s.wires[i]...), pick(t, "new", s.wires[i]...)); err != nil {
					t.Fatal(err)
				}
			case 7:
				// A device that went away under the wires' feet.
				flags, index := uint32(0), 0
				if rapid.Bool().Draw(t, "device") {
					flags, index = tables.PortTx, 1
				}
				if err := w.p.kernel.setDevice(ports[1].slot, index); err != nil {
					t.Fatal(err)
				}
				w.p.t.Ports[ports[1].slot].Flags = flags
			case 6:
				s.layers[i].SetAddress(rapid.Uint64Range(0, 3).Draw(t, "own"))
			}
			for range 3 {
				port := ports[rapid.IntRange(0, 1).Draw(t, "in")]
				run(port.slot, s.frame(t, port))
			}
			run(w.app, s.sent(t))
		}
		after := w.counters(t)
		subtract(after, before)
		if c := m.Counters; !slices.Equal(c.Verdicts, after.Verdicts) || !slices.Equal(c.DT, after.DT) || !slices.Equal(c.Apps, after.Apps) {
			t.Fatalf("counters (-model +kernel):\n%s", cmp.Diff(c, after))
		}
	})
	for r := range bpf.NumReasons {
		if seen[r] == 0 && r != bpf.Aborted {
			t.Errorf("no packet met %v", r)
		}
	}
	t.Log(seen)
}

// The programs stay small; the verifier's work is the measure that does not
// depend on the machine.
func TestProgramSize(t *testing.T) {
	p, _ := testPlane(t, true, 100)
	for name, ceiling := range map[string]uint32{progRouter: 60000, progApp: 15000} {
		prog := must[*ebpf.Program](t)(p.kernel.program(name, 1, nil))
		defer prog.Close()
		info := must[*ebpf.ProgramInfo](t)(prog.Info())
		n, ok := info.VerifiedInstructions()
		if !ok {
			t.Skip("kernel does not tell verified instructions")
		}
		jited, _ := info.JitedSize()
		t.Logf("%s: %d verified instructions, %d bytes", name, n, jited)
		if n > ceiling {
			t.Errorf("%s: %d verified instructions, ceiling %d", name, n, ceiling)
		}
	}
}
