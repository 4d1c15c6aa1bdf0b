package xsk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is a veth pair in a namespace that the test's thread is in. A program on
// both ends redirects frames of the tests to AF_XDP; the kernel's own (IPv6
// neighbour discovery) pass.
type pair struct {
	index [2]int
	xsks  [2]*ebpf.Map
}

func newPair(t testing.TB) *pair {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, XDP, AF_XDP")
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	runtime.LockOSThread()
	old, err := netns.Get()
	check(err)
	ns, err := netns.New()
	check(err)
	t.Cleanup(func() {
		if err := netns.Set(old); err == nil { // else the thread ends with the test
			runtime.UnlockOSThread()
		}
		old.Close()
		ns.Close()
	})
	check(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "xsktest0"}, PeerName: "xsktest1"}))
	p := &pair{}
	for i := range p.index {
		l, err := netlink.LinkByName(fmt.Sprintf("xsktest%d", i))
		check(err)
		p.index[i] = l.Attrs().Index
		check(netlink.LinkSetUp(l))
		p.xsks[i], err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.XSKMap, KeySize: 4, ValueSize: 4, MaxEntries: 4})
		check(err)
		t.Cleanup(func() { p.xsks[i].Close() })
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "Dual BSD/GPL", Instructions: asm.Instructions{
			asm.LoadMem(asm.R3, asm.R1, 4, asm.Word),  // data_end
			asm.LoadMem(asm.R4, asm.R1, 0, asm.Word),  // data
			asm.LoadMem(asm.R2, asm.R1, 16, asm.Word), // rx_queue_index
			asm.Mov.Reg(asm.R5, asm.R4),
			asm.Add.Imm(asm.R5, 14),
			asm.JGT.Reg(asm.R5, asm.R3, "pass"),
			asm.LoadMem(asm.R4, asm.R4, 12, asm.Half),
			asm.JNE.Imm(asm.R4, 0xa0, "pass"), // 0xa000 in network order
			asm.LoadMapPtr(asm.R1, p.xsks[i].FD()),
			asm.Mov.Imm(asm.R3, 2), // XDP_PASS when there is no socket
			asm.FnRedirectMap.Call(),
			asm.Return(),
			asm.Mov.Imm(asm.R0, 2).WithSymbol("pass"),
			asm.Return(),
		}})
		check(err)
		at, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: p.index[i], Flags: link.XDPDriverMode})
		prog.Close()
		check(err)
		t.Cleanup(func() { at.Close() })
	}
	return p
}

// end is a socket with its own Umem: half of the frames receive.
type end struct {
	*Socket
	u    *Umem
	free []uint64
}

const frames = 128

func (p *pair) config(i int) Config {
	return Config{Ifindex: p.index[i], Rx: frames / 2, Fill: frames / 2, Tx: frames / 2, Completion: frames / 2}
}

func (p *pair) open(t testing.TB, i int, c Config) *end {
	t.Helper()
	u, err := NewUmem(frames, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return p.openOn(t, u, i, c)
}

func (p *pair) openOn(t testing.TB, u *Umem, i int, c Config) *end {
	t.Helper()
	s, err := Open(u, c)
	if err != nil {
		t.Fatal(err)
	}
	rx := make([]uint64, c.Fill)
	if n := s.Fill(rx[:u.Alloc(rx)]); n != c.Fill {
		t.Fatalf("filled %d of %d", n, c.Fill)
	}
	e := &end{Socket: s, u: u, free: make([]uint64, c.Tx)}
	e.free = e.free[:u.Alloc(e.free)]
	if err := p.xsks[i].Put(uint32(0), uint32(s.FD())); err != nil {
		t.Fatal(err)
	}
	return e
}

func (e *end) close(t testing.TB) {
	t.Helper()
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if err := e.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if err := e.u.Close(); err != nil {
		t.Error(err)
	}
}

// send transmits payload as one packet.
func (e *end) send(t testing.TB, payload []byte) {
	t.Helper()
	addrs := make([]uint64, frames)
	e.free = append(e.free, addrs[:e.Complete(addrs)]...)
	a := e.free[len(e.free)-1]
	e.free = e.free[:len(e.free)-1]
	if n := e.Transmit([]Desc{{Addr: a, Len: uint32(copy(e.u.Frame(a), payload))}}); n != 1 {
		t.Fatal("tx ring full")
	}
	if err := e.Kick(); err != nil {
		t.Fatal(err)
	}
	if n := e.Unsent(); n != 0 {
		t.Fatalf("%d packets unsent", n)
	}
}

// receive waits for one packet and refills.
func (e *end) receive(t testing.TB) []byte {
	t.Helper()
	var d [1]Desc
	for deadline := time.Now().Add(5 * time.Second); e.Receive(d[:]) == 0; {
		if time.Now().After(deadline) {
			st, _ := e.Stats()
			t.Fatalf("nothing received: %+v", st)
		}
		runtime.Gosched()
	}
	b := bytes.Clone(e.u.Bytes(d[0]))
	e.Fill([]uint64{e.u.Base(d[0].Addr)})
	return b
}

func payload(n, size int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(n + i)
	}
	// Addresses nobody has, so that the stack does not answer.
	copy(b, []byte{2, 0, 0, 0, 9, 1, 2, 0, 0, 0, 9, 2, 0xa0, 0})
	binary.BigEndian.PutUint16(b[14:], uint16(n))
	return b
}

func TestExchange(t *testing.T) {
	for _, c := range []struct {
		name   string
		adjust func(*Config)
	}{
		{"plain", func(*Config) {}},
		{"need wakeup", func(c *Config) { c.NeedWakeup = true }},
		{"busy polling", func(c *Config) { c.BusyPoll = 20 * time.Microsecond }},
		{"buffers", func(c *Config) { c.SendBuffer, c.Batch = 1<<20, 64 }},
		// veth has no zero copy: the fall-back.
		{"zero copy", func(c *Config) { c.ZeroCopy, c.NeedWakeup = true, true }},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t)
			var ends [2]*end
			for i := range ends {
				conf := p.config(i)
				c.adjust(&conf)
				ends[i] = p.open(t, i, conf)
				defer ends[i].close(t)
				if ends[i].ZeroCopy() {
					t.Error("zero copy on veth")
				}
			}
			// More packets than frames: they must circulate.
			for n := range 4 * frames {
				from, to := ends[n%2], ends[1-n%2]
				want := payload(n, 60+n%1400)
				from.send(t, want)
				if got := to.receive(t); !bytes.Equal(got, want) {
					t.Fatalf("packet %d: got %x, want %x", n, got, want)
				}
			}
			if st, err := ends[0].Stats(); err != nil || st.RxDropped+st.RxRingFull+st.RxInvalidDescs+st.TxInvalidDescs != 0 {
				t.Errorf("statistics %+v, %v", st, err)
			}
		})
	}
}

// Sockets on two devices share a Umem: what one received the other transmits
// without a copy.
func TestSharedUmem(t *testing.T) {
	p := newPair(t)
	u, err := NewUmem(2*frames, 2048)
	if err != nil {
		t.Fatal(err)
	}
	a, b := p.openOn(t, u, 0, p.config(0)), p.openOn(t, u, 1, p.config(1))
	if err := u.Close(); err == nil {
		t.Error("Umem closed under its sockets")
	}
	for n := range 10 {
		a.send(t, payload(n, 100))
		var d [1]Desc
		for b.Receive(d[:]) == 0 {
			runtime.Gosched()
		}
		u.Bytes(d[0])[50] = 0xff
		if b.Transmit(d[:]) != 1 || b.Kick() != nil {
			t.Fatal("not forwarded")
		}
		got := a.receive(t)
		want := payload(n, 100)
		want[50] = 0xff
		if !bytes.Equal(got, want) {
			t.Fatalf("packet %d: got %x", n, got)
		}
		var back [1]uint64
		if b.Complete(back[:]) != 1 || back[0] != u.Base(d[0].Addr) && back[0] != d[0].Addr {
			t.Fatalf("completed %d, sent %d", back[0], d[0].Addr)
		}
		b.Fill([]uint64{u.Base(back[0])})
	}
	// The first socket goes, the Umem stays with the second.
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	a = p.openOn(t, u, 0, Config{Ifindex: p.index[0], Tx: 8, Completion: 8, Rx: 8})
	a.free = []uint64{0}
	a.send(t, payload(77, 60))
	if got := b.receive(t); !bytes.Equal(got, payload(77, 60)) {
		t.Errorf("got %x", got)
	}
	a.Close()
	b.close(t)
}

func TestReopen(t *testing.T) {
	p := newPair(t)
	other := p.open(t, 1, p.config(1))
	defer other.close(t)
	before, mapped := -1, -1
	for range 8 {
		e := p.open(t, 0, p.config(0))
		e.send(t, payload(1, 60))
		other.receive(t)
		e.close(t)
		fds, maps := descriptors(t), socketMappings(t)
		if before >= 0 && (fds != before || maps != mapped) {
			t.Fatalf("%d descriptors and %d mappings, were %d and %d", fds, maps, before, mapped)
		}
		before, mapped = fds, maps
	}
	if mapped != 4 { // the rings of the other socket: the count counts something
		t.Errorf("%d rings mapped, want 4", mapped)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func socketMappings(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "socket:")
}

func TestErrors(t *testing.T) {
	p := newPair(t)
	e := p.open(t, 0, p.config(0))
	defer e.close(t)

	u, err := NewUmem(frames, 2048)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	before := descriptors(t)
	for _, c := range []struct {
		what string
		conf Config
		want error
	}{
		{"queue in use", p.config(0), unix.EBUSY},
		{"no such device", Config{Ifindex: 9999, Rx: 8, Fill: 8}, unix.ENODEV},
		{"no such queue", Config{Ifindex: p.index[1], Queue: 77, Rx: 8, Fill: 8}, unix.EINVAL},
		{"ring size", Config{Ifindex: p.index[1], Rx: 9, Fill: 8}, unix.EINVAL},
		{"no rings", Config{Ifindex: p.index[1]}, unix.EINVAL},
	} {
		if _, err := Open(u, c.conf); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.what, err, c.want)
		}
	}
	if n := descriptors(t); n != before || socketMappings(t) != 4 {
		t.Errorf("%d descriptors, %d mappings after errors", n-before, socketMappings(t)-4)
	}

	l, err := netlink.LinkByIndex(p.index[0])
	if err != nil {
		t.Fatal(err)
	}
	kick := func() error {
		e.Transmit([]Desc{{Addr: e.free[0], Len: 60}})
		return e.Kick()
	}
	if err := netlink.LinkSetDown(l); err != nil {
		t.Fatal(err)
	}
	if err := kick(); err != unix.ENETDOWN || e.Unsent() != 1 {
		t.Errorf("link down: %v, %d unsent", err, e.Unsent())
	}
	if err := netlink.LinkDel(l); err != nil {
		t.Fatal(err)
	}
	if err := kick(); err != unix.ENXIO {
		t.Errorf("device gone: %v", err)
	}
	var d [8]Desc
	e.Receive(d[:])
	e.Fill(nil)
}

// A socket that stays asleep is woken by a packet, and by Close.
func TestPoller(t *testing.T) {
	p := newPair(t)
	a, b := p.open(t, 0, p.config(0)), p.open(t, 1, p.config(1))
	defer a.close(t)
	defer b.close(t)
	for _, spin := range []time.Duration{0, 100 * time.Microsecond} {
		poller, err := NewPoller(b.Pending)
		if err != nil {
			t.Fatal(err)
		}
		if err := poller.Add(b.FD()); err != nil {
			t.Fatal(err)
		}
		got := make(chan error)
		go func() {
			for {
				err := poller.Wait(spin)
				if err == nil {
					b.receive(t)
				}
				got <- err
				if err != nil {
					return
				}
			}
		}()
		for n := range 50 {
			a.send(t, payload(n, 60))
			if err := <-got; err != nil {
				t.Fatal(err)
			}
		}
		if err := poller.Close(); err != nil {
			t.Error(err)
		}
		if err := <-got; !errors.Is(err, os.ErrClosed) {
			t.Errorf("Wait after Close: %v", err)
		}
	}
	if poller, err := NewPoller(b.Pending); err != nil {
		t.Error(err)
	} else {
		if err := poller.Add(-1); err == nil {
			t.Error("bad descriptor added")
		}
		poller.Close()
	}
}

// BenchmarkTransmit sends batches of 64 to the other end, which receives them:
// ns/op is for one packet sent and received on one core.
func BenchmarkTransmit(b *testing.B) {
	p := newPair(b)
	from, to := p.open(b, 0, p.config(0)), p.open(b, 1, p.config(1))
	defer from.close(b)
	defer to.close(b)
	const batch = frames / 2
	descs, addrs := make([]Desc, batch), make([]uint64, batch)
	for _, a := range from.free {
		copy(from.u.Frame(a), payload(1, 60))
	}
	b.ReportAllocs()
	b.ResetTimer()
	for n := 0; n < b.N; {
		for i, a := range from.free {
			descs[i] = Desc{Addr: a, Len: 60}
		}
		k := from.Transmit(descs[:len(from.free)])
		for from.Unsent() > 0 {
			if err := from.Kick(); err != nil && err != unix.EAGAIN {
				b.Fatal(err)
			}
		}
		from.free = from.free[:from.Complete(from.free[:batch])]
		for got := 0; got < k; {
			m := to.Receive(descs)
			for i, d := range descs[:m] {
				addrs[i] = to.u.Base(d.Addr)
			}
			to.Fill(addrs[:m])
			got += m
		}
		n += k
	}
}
