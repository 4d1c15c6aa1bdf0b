package fastpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/lib/packet"
)

// inNamespace runs the calling test again in a process of its own in a fresh
// network namespace, and reports whether this is that process.
func inNamespace(t testing.TB) bool {
	t.Helper()
	const env = "O7S_TEST_NAMESPACE"
	if os.Getenv(env) == t.Name() {
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	args := []string{"-test.run=^" + t.Name() + "$", "-test.v"}
	if b, ok := t.(*testing.B); ok {
		b.Helper()
		args = []string{"-test.run=^$", "-test.bench=^" + t.Name() + "$", "-test.benchtime=1x"}
	}
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), env+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	for line := range strings.Lines(string(out)) {
		t.Log(strings.TrimRight(line, "\n"))
	}
	if err != nil {
		t.Fatal(err)
	}
	return false
}

// line is a router between a generator and a sink:
//
//	g0 ══ f0 [plane] f1 ══ s0
type line struct {
	p      *Plane
	in     *Port
	out    *Port
	block  *EthBlock
	layer  *Layer
	wire   *Wire
	gen    int // ifindex
	bench  *ebpf.Collection
	user   chan []byte
	header [8]uint64
}

func veth(t testing.TB, a, b string) {
	t.Helper()
	l := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: a, MTU: 1500}, PeerName: b}
	if err := netlink.LinkAdd(l); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{a, b} {
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+n+"/disable_ipv6", []byte("1"), 0)
		if err := netlink.LinkSetUp(must[netlink.Link](t)(netlink.LinkByName(n))); err != nil {
			t.Fatal(err)
		}
	}
}

func ifindex(t testing.TB, name string) int {
	return must[netlink.Link](t)(netlink.LinkByName(name)).Attrs().Index
}

func newLine(t testing.TB, routes, maxRoutes int, random uint32) *line {
	veth(t, "g0", "f0")
	veth(t, "f1", "s0")
	x := &line{gen: ifindex(t, "g0"), user: make(chan []byte, 64)}
	x.p = must[*Plane](t)(New(Options{MaxRoutes: maxRoutes}))
	t.Cleanup(func() { x.p.Close() })
	if ok, why := x.p.Kernel(); !ok {
		t.Fatal(why)
	}

	// Far ends first: redirected frames need a program there.
	var frame [64]byte
	gen := must[netlink.Link](t)(netlink.LinkByName("f0")).Attrs().HardwareAddr
	copy(frame[:], gen)
	binary.BigEndian.PutUint16(frame[12:], testType)
	binary.BigEndian.PutUint16(frame[14:], 100)
	binary.BigEndian.PutUint16(frame[16:], uint16(len(frame)-headerRoom))
	frame[18+5] = 60
	binary.LittleEndian.PutUint64(frame[18+7:], 64)
	for i := range x.header {
		x.header[i] = binary.LittleEndian.Uint64(frame[8*i:])
	}
	spec := must[*ebpf.CollectionSpec](t)(bpf.LoadBench())
	for name, v := range map[string]any{"gen_template": x.header, "gen_count": uint32(max(routes, 1)), "gen_random": random} {
		if err := spec.Variables[name].Set(v); err != nil {
			t.Fatal(err)
		}
	}
	x.bench = must[*ebpf.Collection](t)(ebpf.NewCollection(spec))
	t.Cleanup(x.bench.Close)
	for name, prog := range map[string]string{"g0": "xdp_sink", "s0": "xdp_sink"} {
		l := must[link.Link](t)(link.AttachXDP(link.XDPOptions{Program: x.bench.Programs[prog], Interface: ifindex(t, name), Flags: link.XDPDriverMode}))
		t.Cleanup(func() { l.Close() })
	}
	if err := x.bench.Maps["gen_dev"].Put(uint32(0), uint32(x.gen)); err != nil {
		t.Fatal(err)
	}

	x.in = must[*Port](t)(x.p.OpenPort("f0"))
	x.out = must[*Port](t)(x.p.OpenPort("f1"))
	for _, o := range []*Port{x.in, x.out} {
		t.Cleanup(func() { o.Close() })
		if o.Mode() != ModeNative {
			t.Fatalf("%s: mode %s: %v", o.Name(), o.Mode(), o.Reasons())
		}
	}
	x.block = must[*EthBlock](t)(x.in.Claim(testType, func(frames []*packet.Buf) {
		for _, b := range frames {
			select {
			case x.user <- slices.Clone(b.Bytes()):
			default:
			}
			b.Release()
		}
	}))
	x.layer = must[*Layer](t)(x.p.NewLayer("line", 0xffffffff, 4))
	h := [16]byte{2, 1, 1, 1, 1, 1}
	copy(h[6:], x.out.MAC())
	binary.BigEndian.PutUint16(h[12:], testType)
	binary.BigEndian.PutUint16(h[14:], 77)
	x.wire = must[*Wire](t)(x.layer.NewWire(WireSpec{Port: x.out, Header: h, MTU: 1496}))
	if ok, why := x.wire.Path(); !ok {
		t.Fatal(why)
	}
	x.block.SetDT(100, x.wire)
	list := make([]Route, routes)
	for i := range list {
		list[i] = Route{Dst: uint64(i) + 1, NextHops: []*Wire{x.wire}}
	}
	if err := x.layer.Replace(list); err != nil {
		t.Fatal(err)
	}
	return x
}

// generate sends n packets and returns how long it took.
func (x *line) generate(t testing.TB, n uint32) time.Duration {
	t.Helper()
	frame := make([]byte, 64)
	start := time.Now()
	_, err := x.bench.Programs["gen_o7s"].Run(&ebpf.RunOptions{
		Data: frame, Repeat: n, BatchSize: 64, Flags: unix.BPF_F_TEST_XDP_LIVE_FRAMES,
		Context: struct{ Data, DataEnd, DataMeta, IngressIfindex, RxQueueIndex, EgressIfindex uint32 }{
			DataEnd: uint32(len(frame)), IngressIfindex: uint32(x.gen)},
	})
	if err != nil {
		t.Fatal(err)
	}
	return time.Since(start)
}

func (x *line) sunk(t testing.TB) (n uint64) {
	var cpus []bpf.BenchSunk
	if err := x.bench.Maps["sink_count"].Lookup(uint32(0), &cpus); err != nil {
		t.Fatal(err)
	}
	for _, c := range cpus {
		n += c.Packets
	}
	return n
}

// Packets cross the router in the kernel, all of them, while routes and the
// wire change under them.
func TestTransit(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	x := newLine(t, 1000, 20000, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		other, err := x.layer.NewWire(WireSpec{Port: x.out, MTU: 1496})
		for i := 0; err == nil && i < 30; i++ {
			list := make([]Route, 1000+100*i)
			for j := range list {
				list[j] = Route{Dst: uint64(j) + 1, NextHops: []*Wire{other}, Alternate: x.wire}
				if i%2 == 0 {
					list[j] = Route{Dst: uint64(j) + 1, NextHops: []*Wire{x.wire}, Alternate: other}
				}
			}
			if err = x.layer.Replace(list); err == nil {
				other.SetState(i%3 != 0)
				_ = x.layer.Set(Route{Dst: 1 << 20, NextHops: []*Wire{other, x.wire}})
				x.layer.Delete(1 << 20)
			}
		}
		if err != nil {
			t.Error(err)
		}
	}()
	const n = 300000
	x.generate(t, n)
	<-done
	if got := x.sunk(t); got != n {
		t.Errorf("%d of %d packets arrived", got, n)
	}
	s := x.p.Snapshot()
	if got := s[0].Verdicts[bpf.Forward]; got != n {
		t.Errorf("%d of %d packets forwarded: %v", got, n, s[0].Verdicts)
	}
	if c := x.wire.Counters(); c[0].Rcvd.Packets != n {
		t.Errorf("wire counted %+v", c)
	}
	if rx, _ := x.wire.KernelActivity(); rx != n {
		t.Errorf("activity %d", rx)
	}

	// What is not in the table is dropped and counted; what is for user space
	// gets there, whole.
	if err := x.layer.Replace(nil); err != nil {
		t.Fatal(err)
	}
	x.generate(t, 100)
	if got := x.p.Snapshot()[0].Verdicts[bpf.DropNoRoute]; got != 100 {
		t.Errorf("%d of 100 packets without a route counted", got)
	}
	x.block.SetUser(100)
	x.generate(t, 10)
	select {
	case f := <-x.user:
		if len(f) < 60 || binary.BigEndian.Uint16(f[14:]) != 100 {
			t.Errorf("user space got % x", f)
		}
	case <-time.After(5 * time.Second):
		t.Error("nothing reached user space")
	}
	// An open port follows its device: XDP stops redirecting there.
	if err := netlink.LinkDel(must[netlink.Link](t)(netlink.LinkByName("f1"))); err != nil {
		t.Fatal(err)
	}
	for range 500 {
		if ok, _ := x.wire.Path(); !ok {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if ok, _ := x.wire.Path(); ok {
		t.Error("the wire's device is gone, but XDP still uses it")
	}
}

// A program sends and receives through its tap alone.
func TestAppPort(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	x := newLine(t, 0, 100, 0)
	app := must[*App](t)(x.p.NewApp("test"))
	defer app.Close()
	tapFile := app.File()
	if err := x.layer.Replace([]Route{{Dst: 7, NextHops: []*Wire{x.wire}}}); err != nil {
		t.Fatal(err)
	}
	x.layer.SetAddress(1) // the generator's destination
	handle, room, err := app.AddDTFlow(x.layer, 64, 7, 1<<40, 60)
	if err != nil {
		t.Fatal(err)
	}
	if room != 33 {
		t.Fatalf("head room %d", room)
	}

	x.generate(t, 10)
	buf := make([]byte, 2048)
	for range 10 {
		n := readFrame(t, tapFile, buf, handle)
		offset, length := binary.LittleEndian.Uint16(buf[4:]), binary.LittleEndian.Uint16(buf[6:])
		if n != 64 || offset != 33 || length != 64-33 {
			t.Fatalf("frame of %d bytes, payload %d at %d", n, length, offset)
		}
	}
	if rx, _ := app.Counters(handle); rx != (Count{10, 10 * 31}) {
		t.Errorf("received %+v", rx)
	}

	send := func(h uint32, payload int) {
		f := make([]byte, room+payload)
		binary.LittleEndian.PutUint32(f, h)
		if _, err := tapFile.Write(f); err != nil {
			t.Fatal(err)
		}
	}
	before := x.sunk(t)
	send(handle, 100)
	send(handle, 0) // keep-alive
	send(handle+1<<16, 100)
	for i := 0; x.sunk(t) != before+2; i++ {
		if i == 500 {
			t.Fatalf("%d packets arrived: %+v", x.sunk(t)-before, x.p.Snapshot())
		}
		time.Sleep(time.Millisecond)
	}
	var snap PortSnapshot
	for _, s := range x.p.Snapshot() {
		if s.Slot == app.Slot() {
			snap = s
		}
	}
	if snap.Verdicts[bpf.AppTx] != 2 || snap.Verdicts[bpf.DropAppHandle] != 1 {
		t.Errorf("verdicts %v", snap.Verdicts)
	}

	// Towards a wire that only user space serves the daemon gets the payload.
	punted := make(chan int, 1)
	app.OnPunt(func(h uint32, b *packet.Buf) {
		if h == handle {
			punted <- b.Len()
		}
		b.Release()
	})
	x.wire.SetPunt(true, "test")
	send(handle, 55)
	select {
	case n := <-punted:
		if n != 55 {
			t.Errorf("punted payload has %d bytes", n)
		}
	case <-time.After(5 * time.Second):
		t.Error("nothing was punted")
	}

	app.Remove(handle)
	x.generate(t, 1)
	for i := 0; x.p.Snapshot()[0].Verdicts[bpf.UserLocal] != 1; i++ {
		if i == 500 {
			t.Fatalf("%+v", x.p.Snapshot())
		}
		time.Sleep(time.Millisecond)
	}

	// With the layer go its flows: a program must not send into the next layer
	// that gets the slot.
	handle, _, err = app.AddDTFlow(x.layer, 64, 7, 1<<40, 60)
	if err != nil {
		t.Fatal(err)
	}
	x.wire.SetPunt(false, "")
	x.layer.Close()
	before = x.sunk(t)
	send(handle, 100)
	if n := x.sunk(t) - before; n != 0 {
		t.Errorf("%d packets of a flow whose layer is gone", n)
	}
	for _, s := range x.p.Snapshot() {
		if s.Slot == app.Slot() && s.Verdicts[bpf.DropAppHandle] != 2 {
			t.Errorf("verdicts %v", s.Verdicts)
		}
	}
	if err := app.Close(); err != nil {
		t.Error(err)
	}
}

// readFrame reads the next frame with the handle: the kernel may send some too.
func readFrame(t *testing.T, f *os.File, buf []byte, handle uint32) int {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; {
		n, err := f.Read(buf)
		if errors.Is(err, unix.EAGAIN) && time.Now().Before(end) {
			time.Sleep(100 * time.Microsecond)
			continue
		}
		if err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		if n >= 8 && binary.LittleEndian.Uint32(buf) == handle {
			return n
		}
	}
}

// BenchmarkLive compares forwarding with a bare redirect, in turns.
func BenchmarkLive(b *testing.B) {
	if !inNamespace(b) {
		return
	}
	for _, routes := range []int{1000, 1_000_000} {
		x := newLine(b, routes, 1_100_000, 1)
		bare := must[*ebpf.Collection](b)(ebpf.NewCollection(must[*ebpf.CollectionSpec](b)(bpf.LoadBench())))
		if err := bare.Maps["gen_dev"].Put(uint32(0), uint32(ifindex(b, "f1"))); err != nil {
			b.Fatal(err)
		}
		measure := func() float64 {
			fixed := x.generate(b, 1)
			const n = 4 << 20
			before := x.sunk(b)
			d := x.generate(b, n) - fixed
			if got := x.sunk(b) - before; got < n*99/100 {
				b.Fatalf("%d of %d arrived: %+v", got, n, x.p.Snapshot())
			}
			return float64(d) / n
		}
		var ours, least []float64
		for range 5 {
			ours = append(ours, measure())
			// The bare program takes the port's place and gives it back.
			l := must[link.Link](b)(attached(x.p, ifindex(b, "f0")))
			router := must[*ebpf.Program](b)(x.p.Program(progRouter, x.in.Slot(), nil))
			if err := l.Update(bare.Programs["xdp_bare"]); err != nil {
				b.Fatal(err)
			}
			least = append(least, measure())
			if err := l.Update(router); err != nil {
				b.Fatal(err)
			}
			router.Close()
			l.Close()
		}
		slices.Sort(ours)
		slices.Sort(least)
		fmt.Printf("%d routes: %.1f ns, bare %.1f ns, ratio %.2f\n", routes, ours[2], least[2], least[2]/ours[2])
		bare.Close()
		x.p.Close()
		for _, n := range []string{"g0", "s0"} {
			_ = netlink.LinkDel(must[netlink.Link](b)(netlink.LinkByName(n)))
		}
	}
}

// attached finds the XDP link of a device.
func attached(_ *Plane, index int) (link.Link, error) {
	it := new(link.Iterator)
	defer it.Close()
	for it.Next() {
		l := it.Take()
		info, err := l.Info()
		if err == nil && info.XDP() != nil && int(info.XDP().Ifindex) == index {
			return l, nil
		}
		l.Close()
	}
	return nil, errors.New("no XDP link")
}
