package port

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/packet"
)

func TestExchange(t *testing.T) {
	for _, c := range []struct {
		name  string
		force Mode
		mtu   int
		sizes []int
	}{
		{"native", "", 1500, []int{60, 64, 20, 1514}},
		{"native large frames", "", 3400, []int{60, 1792, 1793, 2048, 3414}},
		{"generic", ModeGeneric, 1500, []int{60, 64, 1514}},
		{"packet", ModePacket, 1500, []int{60, 64, 1514}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, c.mtu)
			set := func(cfg *Config) { cfg.ForceMode = c.force }
			a, b := l.mustOpen(0, set), l.mustOpen(1, set)
			want := c.force
			if want == "" {
				want = ModeNative
			}
			if a.Mode() != want || b.Mode() != want {
				t.Fatalf("modes %s and %s, want %s", a.Mode(), b.Mode(), want)
			}
			if m := a.MAC(); string(m[:]) != string(macs[0]) || a.MTU() != c.mtu || !a.Up() {
				t.Errorf("mac %x, mtu %d, up %v", m, a.MTU(), a.Up())
			}
			exchange(t, a, b, c.sizes...)
			for _, e := range []*end{a, b} {
				if n := e.Counters(); n.RxFrames != 40 || n.TxFrames != 40 || n.TxDropped+n.TxLost+n.RxDropped != 0 || n.RxBytes != n.TxBytes {
					t.Errorf("counters %+v", n)
				}
			}
			if err := a.Send(packet.Get(c.mtu + ethHeader + 1)); !errors.Is(err, ErrTooLong) {
				t.Errorf("long frame: %v", err)
			}
			if err := a.Send(packet.Get(13)); !errors.Is(err, ErrTooLong) {
				t.Errorf("short frame: %v", err)
			}
		})
	}
}

// Different modes at both ends understand each other.
func TestMixedModes(t *testing.T) {
	l := newLab(t, 1500)
	a := l.mustOpen(0, nil)
	b := l.mustOpen(1, func(c *Config) { c.ForceMode = ModePacket })
	exchange(t, a, b, 60, 1514)
}

// A port can be closed and opened again at once, and leaves nothing behind.
func TestReopen(t *testing.T) {
	for _, force := range []Mode{"", ModePacket} {
		t.Run("mode "+string(force), func(t *testing.T) {
			l := newLab(t, 1500)
			set := func(c *Config) { c.ForceMode = force }
			b := l.mustOpen(1, set)
			var fds, maps int
			for i := range 8 {
				a, err := l.open(0, set)
				if err != nil {
					t.Fatalf("round %d: %v", i, err)
				}
				if force == "" && (a.Mode() != ModeNative || mappings(t) != 8) { // 4 rings each
					t.Fatalf("round %d: mode %s, %d rings mapped: %v", i, a.Mode(), mappings(t), a.Reasons())
				}
				exchange(t, a, b, 60)
				if err := a.Close(); err != nil {
					t.Fatal(err)
				}
				if err := a.Close(); err != nil {
					t.Errorf("second Close: %v", err)
				}
				if err := a.Send(packet.From(frame(0, 0, 60))); !errors.Is(err, ErrClosed) {
					t.Errorf("Send after Close: %v", err)
				}
				if i < 3 {
					continue // pools, threads
				}
				if i == 3 {
					fds, maps = descriptors(t), mappings(t)
				}
				// The test program leaves one map a round. The other port may be
				// looking at its peer just now, which takes descriptors.
				eventually(t, "release of all descriptors and mappings", func() bool {
					return descriptors(t) <= fds+i-3 && mappings(t) == maps
				})
			}
		})
	}
}

// eventually waits for something that no callback tells about.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s", what)
		}
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// mappings counts mapped rings.
func mappings(t *testing.T) (n int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if strings.Contains(line, "socket:") {
			n++
		}
	}
	return n
}

// A link that goes down under a sender is an error and an event, and everything
// works again when it is back.
func TestLinkDown(t *testing.T) {
	for _, force := range []Mode{"", ModeGeneric, ModePacket} {
		t.Run("mode "+string(force), func(t *testing.T) {
			l := newLab(t, 1500)
			set := func(c *Config) { c.ForceMode = force }
			a, b := l.mustOpen(0, set), l.mustOpen(1, set)

			done := make(chan error, 1)
			stop := time.Now().Add(5 * time.Second)
			go func() {
				for n := 0; ; n++ {
					err := a.Send(packet.From(frame(0, n, 100)))
					if err != nil && !errors.Is(err, ErrFull) || time.Now().After(stop) {
						done <- err
						return
					}
				}
			}()
			l.setUp(0, false)
			a.wait(t, "down event", func() bool { return len(a.events) == 1 && !a.events[0] })
			b.wait(t, "down event at the peer", func() bool { return len(b.events) == 1 && !b.events[0] })
			if err := <-done; !errors.Is(err, ErrDown) && !errors.Is(err, unix.ENETDOWN) {
				t.Errorf("sending to a link that is down: %v", err)
			}
			if err := a.Send(packet.From(frame(0, 0, 100))); !errors.Is(err, ErrDown) {
				t.Errorf("Send while down: %v", err)
			}
			if a.Up() || b.Up() {
				t.Error("up while down")
			}
			l.setUp(0, true)
			a.wait(t, "up event", func() bool { return len(a.events) == 2 && a.events[1] })
			b.wait(t, "up event at the peer", func() bool { return len(b.events) == 2 && b.events[1] })
			// What was on its way when the link went down may come now.
			b.wait(t, "frames again", func() bool {
				if err := a.Send(packet.From(frame(0, 7777, 100))); err != nil {
					return false
				}
				return len(b.frames) > 0 && string(b.frames[len(b.frames)-1]) == string(frame(0, 7777, 100))
			})
		})
	}
}

// The device vanishes under an open port.
func TestDeviceRemoved(t *testing.T) {
	for _, force := range []Mode{"", ModePacket} {
		t.Run("mode "+string(force), func(t *testing.T) {
			l := newLab(t, 1500)
			set := func(c *Config) { c.ForceMode = force }
			a, b := l.mustOpen(0, set), l.mustOpen(1, set)
			exchange(t, a, b, 60)
			l.at(0, func() {
				link, err := netlink.LinkByName("v0")
				l.check(err)
				l.check(netlink.LinkDel(link))
			})
			for _, e := range []*end{a, b} {
				e.wait(t, "down event", func() bool { return len(e.events) > 0 && !e.events[len(e.events)-1] })
				if ok, why := e.Redirectable(); ok || why == "" {
					t.Errorf("redirectable %v %q", ok, why)
				}
				if err := e.Send(packet.From(frame(0, 0, 60))); err == nil {
					t.Error("Send succeeded")
				}
				e.Report()
			}
			// The same names again are other devices.
			l.check(a.Close())
			l.check(b.Close())
			l.veth(1500)
			exchange(t, l.mustOpen(0, set), l.mustOpen(1, set), 60)
		})
	}
}

// A program of somebody else stays, whatever its mode.
func TestForeignProgram(t *testing.T) {
	for _, generic := range []bool{false, true} {
		l := newLab(t, 1500)
		l.foreign(0, generic)
		a, b := l.mustOpen(0, nil), l.mustOpen(1, nil)
		if a.Mode() != ModePacket || !mentions(a.Reasons(), "stranger") {
			t.Errorf("mode %s, reasons %q", a.Mode(), a.Reasons())
		}
		exchange(t, a, b, 60, 1514)
		l.at(0, func() {
			d, err := Inspect("v0")
			l.check(err)
			if want := map[bool]string{false: "native", true: "generic"}[generic]; d.XDPMode != want {
				t.Errorf("foreign program is attached as %q, was %q", d.XDPMode, want)
			}
		})
	}
}

func TestLargeMTU(t *testing.T) {
	for _, c := range []struct {
		mtu  int
		want Mode
	}{{3506, ModeNative}, {3507, ModeGeneric}, {maxAFXDP, ModeGeneric}, {maxAFXDP + 1, ModePacket}, {9000, ModePacket}} {
		l := newLab(t, c.mtu)
		var r Report
		l.at(0, func() {
			var err error
			r, err = Probe("v0")
			l.check(err)
		})
		a, b := l.mustOpen(0, nil), l.mustOpen(1, nil)
		if a.Mode() != c.want || r.Mode != c.want {
			t.Errorf("MTU %d: mode %s, probed %s, want %s", c.mtu, a.Mode(), r.Mode, c.want)
		}
		if c.want != ModeNative && !mentions(a.Reasons(), "too large") {
			t.Errorf("MTU %d: reasons %q", c.mtu, a.Reasons())
		}
		exchange(t, a, b, 60, c.mtu+ethHeader)
	}
}

// Redirecting into a veth is safe with a native program or GRO at the other end,
// and the port hears when that changes.
func TestRedirectable(t *testing.T) {
	l := newLab(t, 1500)
	a := l.mustOpen(0, nil)
	check := func(what string, want bool, events int) {
		t.Helper()
		a.wait(t, what, func() bool { return len(a.redir) == events })
		ok, why := a.Redirectable()
		if ok != want || (why == "") != want || mentions(a.Reasons(), "neither native XDP nor GRO") == want {
			t.Errorf("%s: redirectable %v, %q, reasons %q", what, ok, why, a.Reasons())
		}
		l.at(0, func() {
			r, err := Probe("v0")
			l.check(err)
			if r.Redirectable != want {
				t.Errorf("%s: Probe says %v: %q", what, r.Redirectable, r.Reasons)
			}
		})
		// The same by looking at the peer, as before kernel 6.3.
		l.at(0, func() {
			s, err := newSources()
			l.check(err)
			defer s.close()
			link, err := s.route.LinkByName("v0")
			l.check(err)
			d := s.device(link)
			d.XDPKnown = false
			if ok, why := s.redirectable(d, true); ok != want {
				t.Errorf("%s: looking at the peer says %v: %s", what, ok, why)
			} else if !ok && !strings.Contains(why, "v1 in /run/netns/"+l.name[1]) {
				t.Errorf("%s: peer not named: %s", what, why)
			}
		})
	}
	check("nothing", false, 0)
	l.setFeature(1, "gro", true)
	check("GRO", true, 1)
	l.setFeature(1, "gro", false)
	check("GRO off", false, 2)
	l.foreign(1, true)
	check("generic program", false, 2)
	l.detach(1, true)
	l.foreign(1, false)
	check("native program", true, 3)
	l.detach(1, false)
	check("detached", false, 4)
	b := l.mustOpen(1, nil)
	check("our port", true, 5)
	if ok, why := b.Redirectable(); !ok {
		t.Errorf("second port: %s", why)
	}
}

// A device in the same namespace as its peer.
func TestPeerHere(t *testing.T) {
	l := newLab(t, 1500)
	l.at(0, func() {
		l.check(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "w0"}, PeerName: "w1"}))
		d, err := Inspect("w0")
		l.check(err)
		other, err := Inspect("w1")
		l.check(err)
		if !d.Veth || d.PeerIndex != other.Index || d.PeerNetNS != -1 || d.Driver != "veth" || d.RxQueues != 1 || d.Up {
			t.Errorf("%+v", d)
		}
		r, err := Probe("w0")
		l.check(err)
		if r.Redirectable || !mentions(r.Reasons, "peer w1 of w0") || mentions(r.Reasons, "netns") {
			t.Errorf("%+v", r)
		}
		if _, err := Probe("nosuch"); err == nil {
			t.Error("Probe of a missing device succeeded")
		}
		if _, err := Open(Config{Ifname: "nosuch", Rx: func([]*packet.Buf) {}}); err == nil {
			t.Error("Open of a missing device succeeded")
		}
	})
}

// On the loopback device a port receives what it sends (spec 10 §2.3).
func TestLoopback(t *testing.T) {
	l := newLab(t, 1500)
	l.at(0, func() {
		lo, err := netlink.LinkByName("lo")
		l.check(err)
		l.check(netlink.LinkSetUp(lo))
	})
	p := l.mustOpen(0, func(c *Config) { c.Ifname = "lo" })
	if p.Mode() != ModePacket || p.MTU() != 65536 || p.MAC() != [6]byte{} || !p.Up() {
		t.Errorf("mode %s, MTU %d, MAC %x, up %v", p.Mode(), p.MTU(), p.MAC(), p.Up())
	}
	var want [][]byte
	for n, size := range []int{60, 20000, longestFrame} {
		want = append(want, frame(0, n, size))
		l.check(p.Send(packet.From(want[n])))
	}
	p.wait(t, "own frames", func() bool { return len(p.frames) >= len(want) })
	p.mu.Lock()
	defer p.mu.Unlock()
	for n, f := range p.frames {
		if !bytes.Equal(f, want[n]) {
			t.Errorf("frame %d: %d bytes", n, len(f))
		}
	}
}

// A device without Ethernet header is refused.
func TestNoEthernet(t *testing.T) {
	l := newLab(t, 1500)
	l.at(0, func() {
		l.check(netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tun0"}, Mode: netlink.TUNTAP_MODE_TUN}))
	})
	if _, err := l.open(0, func(c *Config) { c.Ifname = "tun0" }); err == nil || !strings.Contains(err.Error(), "not an Ethernet device") {
		t.Errorf("tun: %v", err)
	}
}

// Advice about checksums only when a kernel stack is behind the peer.
func TestChecksumAdvice(t *testing.T) {
	l := newLab(t, 1500)
	probe := func() (r Report) {
		l.at(0, func() {
			var err error
			r, err = Probe("v0")
			l.check(err)
		})
		return r
	}
	if r := probe(); mentions(r.Reasons, "checksum") {
		t.Errorf("without addresses: %q", r.Reasons)
	}
	l.at(1, func() {
		link, err := netlink.LinkByName("v1")
		l.check(err)
		addr, err := netlink.ParseAddr("192.0.2.1/24")
		l.check(err)
		l.check(netlink.AddrAdd(link, addr))
	})
	if r := probe(); !mentions(r.Reasons, "ethtool -K v1 tx off") {
		t.Errorf("with an address: %q", r.Reasons)
	}
	l.setFeature(1, "tx", false)
	if r := probe(); mentions(r.Reasons, "checksum") {
		t.Errorf("after the cure: %q", r.Reasons)
	}
}

// Devices without native XDP, or where the program does not load.
func TestOtherDevices(t *testing.T) {
	l := newLab(t, 1500)
	l.at(0, func() {
		parent, err := netlink.LinkByName("v0")
		l.check(err)
		l.check(netlink.LinkAdd(&netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "m0", ParentIndex: parent.Attrs().Index}, Mode: netlink.MACVLAN_MODE_BRIDGE}))
	})
	prog := newTestProgram(t)
	open := func(adjust func(*Config)) *end {
		return l.mustOpen(0, func(c *Config) {
			c.Ifname, c.Program, c.SetXSK = "m0", prog.load, prog.set
			adjust(c)
		})
	}
	m := open(func(*Config) {})
	if m.Mode() != ModeGeneric || !mentions(m.Reasons(), "no native XDP") || !mentions(m.Reasons(), "no redirected frames") {
		t.Errorf("macvlan: mode %s, reasons %q", m.Mode(), m.Reasons())
	}
	l.check(m.Close())
	m = open(func(c *Config) { c.Program = func() (*ebpf.Program, error) { return nil, errors.New("made to fail") } })
	if m.Mode() != ModePacket || !mentions(m.Reasons(), "made to fail") {
		t.Errorf("no program: mode %s, reasons %q", m.Mode(), m.Reasons())
	}
	l.check(m.Close())
	m = open(func(c *Config) { c.SetXSK = func(int, int) error { return errors.New("map is full") } })
	if m.Mode() != ModePacket || !mentions(m.Reasons(), "map is full") {
		t.Errorf("no room for sockets: mode %s, reasons %q", m.Mode(), m.Reasons())
	}
}

// Packet mode receives the EtherTypes it was told, and what it is told later.
func TestEtherTypes(t *testing.T) {
	l := newLab(t, 1500)
	a := l.mustOpen(0, nil)
	b := l.mustOpen(1, func(c *Config) { c.ForceMode, c.EtherTypes = ModePacket, nil })
	send := func(n int, etherType uint16) {
		t.Helper()
		f := frame(0, n, 60)
		f[12], f[13] = byte(etherType>>8), byte(etherType)
		l.check(a.Send(packet.From(f)))
	}
	send(1, 0xa000)
	l.check(b.SetEtherTypes([]uint16{0xa001, 0xa002}))
	send(2, 0xa000)
	send(3, 0xa001)
	send(4, 0xa002)
	send(5, 0x0800)
	l.check(b.SetEtherTypes([]uint16{0xa000}))
	send(6, 0xa001)
	send(7, 0xa000)
	b.wait(t, "frames", func() bool { return len(b.frames) >= 3 })
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, want := range []byte{3, 4, 7} {
		if got := b.frames[i][19]; got != want {
			t.Errorf("frame %d is %d, want %d", i, got, want)
		}
	}
}

// Several senders at once lose nothing that Send accepted, and keep their order.
func TestConcurrentSend(t *testing.T) {
	l := newLab(t, 1500)
	a, b := l.mustOpen(0, nil), l.mustOpen(1, nil)
	const senders, each = 4, 500
	sent := make(chan int)
	for s := range senders {
		go func() {
			n := 0
			for n < each {
				var batch []*packet.Buf
				for range 1 + s {
					if n < each {
						batch = append(batch, packet.From(frame(0, s<<16|n, 64)))
						n++
					}
				}
				if len(batch) > 1 {
					// A full queue is allowed: frames are lost, and counted.
					if err := a.SendBatch(batch); err != nil && !errors.Is(err, ErrFull) {
						t.Error(err)
					}
					continue
				}
				if err := a.Send(batch[0]); err != nil && !errors.Is(err, ErrFull) {
					t.Error(err)
				}
			}
			sent <- n
		}()
	}
	for range senders {
		<-sent
	}
	const total = senders * each
	eventually(t, "end of transmission", func() bool {
		c := a.Counters()
		return c.TxFrames+c.TxDropped == total
	})
	c := a.Counters()
	if c.TxFrames < total/10 || c.TxLost+c.TxErrors != 0 {
		t.Errorf("counters %+v", c)
	}
	eventually(t, fmt.Sprintf("%d frames", c.TxFrames), func() bool {
		n := b.Counters()
		return n.RxFrames+n.RxDropped == c.TxFrames
	})
	b.mu.Lock()
	defer b.mu.Unlock()
	next := [senders]int{}
	for _, f := range b.frames {
		s, n := int(f[17]), int(f[18])<<8|int(f[19])
		if n < next[s] {
			t.Fatalf("sender %d: frame %d after %d", s, n, next[s]-1)
		}
		next[s] = n + 1
	}
}

// Indexes of the two ends can be the same in their namespaces, which delays
// link events.
func TestSameIndex(t *testing.T) {
	l := newLab(t, 1500)
	l.at(0, func() {
		l.check(netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "s0", Index: 4711}, PeerName: "s1",
			PeerNamespace: netlink.NsFd(l.ns[1]),
		}))
		r, err := Probe("s0")
		l.check(err)
		same := r.PeerIndex == r.Index
		if mentions(r.Reasons, "same index") != same {
			t.Errorf("%+v", r)
		}
		s, err := newSources()
		l.check(err)
		defer s.close()
		r.Device.PeerIndex = r.Index
		if !mentions(s.advice(r.Device), "same index") {
			t.Error("no advice")
		}
	})
}

// Every receive queue has a socket, or the port does without.
func TestManyQueues(t *testing.T) {
	needRoot(t)
	l := newLab(t, 1500)
	l.at(0, func() {
		l.check(netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "q0", NumTxQueues: 4, NumRxQueues: 4}, PeerName: "q1", PeerNumTxQueues: 4, PeerNumRxQueues: 4,
		}))
		for _, name := range []string{"q0", "q1"} {
			link, err := netlink.LinkByName(name)
			l.check(err)
			l.check(netlink.LinkSetUp(link))
		}
	})
	prog := newTestProgram(t)
	a := l.mustOpen(0, func(c *Config) { c.Ifname, c.Program, c.SetXSK = "q0", prog.load, prog.set })
	if a.Report().RxQueues != 4 || len(a.txqs) != 4 {
		t.Fatalf("%d queues, %d transmit", a.Report().RxQueues, len(a.txqs))
	}
	other := newTestProgram(t)
	b := l.mustOpen(0, func(c *Config) { c.Ifname, c.Program, c.SetXSK = "q1", other.load, other.set })
	if a.Mode() != ModeNative || b.Mode() != ModeNative {
		t.Fatalf("modes %s %s: %q", a.Mode(), b.Mode(), a.Reasons())
	}
	for n := range 64 {
		f := frame(0, n, 64)
		f[15] = byte(n) // the EID: spreads over the queues
		l.check(a.Send(packet.From(f)))
	}
	b.wait(t, "64 frames", func() bool { return len(b.frames) == 64 })
	l.check(a.Close())
	few := l.mustOpen(0, func(c *Config) { c.Ifname, c.MaxQueues = "q0", 2 })
	if few.Mode() != ModePacket || !mentions(few.Reasons(), "ethtool -L q0 combined 2") {
		t.Errorf("two of four queues: mode %s, reasons %q", few.Mode(), few.Reasons())
	}
}

func mentions(lines []string, what string) bool {
	for _, s := range lines {
		if strings.Contains(s, what) {
			return true
		}
	}
	return false
}
