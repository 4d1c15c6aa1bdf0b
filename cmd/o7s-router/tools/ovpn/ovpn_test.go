package ovpn

import (
	"bytes"
	"encoding/binary"
	"io"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit/kittest"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/qos"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeDevice keeps what is written to it.
type fakeDevice struct {
	mu  sync.Mutex
	got [][]byte
	mtu int
}

func (d *fakeDevice) Write(b []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.got = append(d.got, bytes.Clone(b))
	return len(b), nil
}

func (d *fakeDevice) SetMTU(n int) error { d.mtu = n; return nil }

func (d *fakeDevice) take() [][]byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	got := d.got
	d.got = nil
	return got
}

// network is a hub with peers, each with the far end of its flow.
type network struct {
	t     *testing.T
	dev   *fakeDevice
	hub   *hub
	peers []*peer
	far   []*kittest.Pipe
	now   time.Time
}

func newNetwork(t *testing.T, tap bool, limits ...int) *network {
	n := &network{t: t, dev: &fakeDevice{}, now: time.Unix(1000, 0)}
	n.hub = newHub(n.dev, tap, netip.MustParsePrefix("10.0.0.1/24"), 1500)
	n.hub.clock = func() time.Time { return n.now }
	for _, l := range limits {
		n.add(l)
	}
	return n
}

func (n *network) add(limit int) int {
	a, b := kittest.New(64 + len(n.far))
	a.Max = limit
	p, err := n.hub.join(a)
	if err != nil {
		n.t.Fatal(err)
	}
	n.peers, n.far = append(n.peers, p), append(n.far, b)
	return len(n.far) - 1
}

// device stands for the device where a peer's number is wanted.
const dev = -1

func (n *network) from(who int, b []byte) {
	if who == dev {
		n.hub.fromDevice(b)
	} else {
		n.hub.fromPeer(n.peers[who], b)
	}
}

// at returns what arrived, for each place that something arrived at.
func (n *network) at() map[int][][]byte {
	got := map[int][][]byte{}
	if d := n.dev.take(); d != nil {
		got[dev] = d
	}
	for i, f := range n.far {
		_ = f.SetReadDeadline(time.Now())
		b := make([]byte, 1<<17)
		for {
			k, err := f.Read(b)
			if err != nil {
				break
			}
			got[i] = append(got[i], bytes.Clone(b[:k]))
		}
	}
	return got
}

// check sends b from somewhere and checks where it arrives, and nothing else.
func (n *network) check(from int, b []byte, where ...int) {
	n.t.Helper()
	n.from(from, b)
	got := n.at()
	for _, w := range where {
		if len(got[w]) != 1 || !bytes.Equal(got[w][0], b) {
			n.t.Errorf("from %d: at %d arrived % x", from, w, got[w])
		}
		delete(got, w)
	}
	if len(got) > 0 {
		n.t.Errorf("from %d: arrived also %v", from, got)
	}
}

// ip4 is a UDP packet of size bytes.
func ip4(src, dst string, size int, df bool) []byte {
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(i)
	}
	clear(p[:28])
	header4(p, netip.MustParseAddr(src), netip.MustParseAddr(dst), 17)
	if df {
		p[6] = 0x40
	}
	sum4(p)
	return p
}

func ip6(src, dst string, size int) []byte {
	return header6(make([]byte, size), netip.MustParseAddr(src), netip.MustParseAddr(dst), 17, 64)
}

func frame(src, dst byte, payload []byte) []byte {
	f := []byte{2, 0, 0, 0, 0, dst, 2, 0, 0, 0, 0, src, 8, 0}
	if dst == 0xff {
		copy(f, "\xff\xff\xff\xff\xff\xff")
	}
	if len(payload) > 0 && payload[0]>>4 == 6 {
		f[12], f[13] = 0x86, 0xdd
	}
	return append(f, payload...)
}

func TestRoute(t *testing.T) {
	n := newNetwork(t, false, 1500)
	n.check(dev, ip4("10.0.0.1", "10.0.0.2", 100, false), 0) // the only one there is
	n.check(dev, ip4("10.0.0.1", "8.8.8.8", 100, false), 0)
	n.add(1500)
	// Unknown: an error comes back.
	n.from(dev, ip4("10.0.0.1", "10.0.0.2", 100, false))
	if got := n.at(); len(got) != 1 || len(got[dev]) != 1 || got[dev][0][20] != 3 || got[dev][0][21] != 1 {
		t.Errorf("got %v", got)
	}
	n.check(0, hello(netip.MustParseAddr("10.0.0.2")))
	n.check(1, ip4("10.0.0.3", "10.0.0.1", 100, false), dev)
	n.check(dev, ip4("10.0.0.1", "10.0.0.2", 100, false), 0)
	n.check(dev, ip4("10.0.0.1", "10.0.0.3", 100, false), 1)
	n.check(0, ip4("10.0.0.2", "10.0.0.3", 100, false), 1)
	n.check(1, ip4("10.0.0.3", "10.0.0.9", 100, false), dev)
	n.check(dev, ip4("10.0.0.1", "224.0.0.9", 100, false), 0, 1)
	n.check(0, ip4("10.0.0.2", "255.255.255.255", 100, false), 1, dev)
	n.check(0, ip4("10.0.0.2", "10.0.0.255", 100, false), 1, dev)
	n.check(0, hello(netip.MustParseAddr("fd00::2")))
	n.check(dev, ip6("fd00::1", "fd00::2", 100), 0)
	n.check(1, ip6("fe80::1", "ff02::1", 100), 0, dev)
	// Padding goes.
	n.from(dev, append(ip4("10.0.0.1", "10.0.0.2", 100, false), 0, 0))
	if got := n.at()[0]; len(got) != 1 || len(got[0]) != 100 {
		t.Errorf("%v", got)
	}
	// An address of the device cannot be taken, one of an older flow can, one of
	// a newer flow cannot.
	n.check(0, ip4("10.0.0.1", "10.0.0.1", 100, false), dev)
	n.check(0, ip4("10.0.0.3", "10.0.0.1", 100, false), dev)
	n.check(dev, ip4("10.0.0.1", "10.0.0.3", 100, false), 1)
	n.check(1, ip4("10.0.0.2", "10.0.0.1", 100, false), dev)
	n.check(dev, ip4("10.0.0.1", "10.0.0.2", 100, false), 1)
	n.hub.leave(n.peers[1])
	n.check(dev, ip4("10.0.0.1", "10.0.0.2", 100, false), 0)
	// No packets.
	for _, b := range [][]byte{nil, {0x45}, make([]byte, 100), frame(1, 2, make([]byte, 60)), ip4("10.0.0.1", "10.0.0.2", 100, false)[:99], ip6("fd00::1", "fd00::2", 100)[:39]} {
		n.check(dev, b)
	}
	if k := n.hub.malformed.Load(); k != 6 {
		t.Errorf("%d malformed", k)
	}
}

func TestStationLimit(t *testing.T) {
	n := newNetwork(t, false, 1500, 1500)
	for i := range maxStations + 10 {
		a := netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})
		n.hub.fromPeer(n.peers[0], hello(a))
	}
	if k := len(n.hub.addrs); k != maxStations || n.peers[0].known != k {
		t.Errorf("%d stations, %d", k, n.peers[0].known)
	}
	n.hub.leave(n.peers[0])
	if len(n.hub.addrs) != 0 {
		t.Error("stations of a peer that left")
	}
	n = newNetwork(t, true, 1514)
	for i := range maxStations + 10 {
		f := frame(0, 1, nil)
		f[8], f[9] = byte(i>>8), byte(i)
		n.hub.fromPeer(n.peers[0], f)
	}
	if k := len(n.hub.macs); k != maxStations || n.peers[0].known != k {
		t.Errorf("%d stations, %d", k, n.peers[0].known)
	}
	n.now = n.now.Add(stationAge + 2*time.Second)
	n.hub.fromPeer(n.peers[0], frame(9, 1, nil))
	if k := len(n.hub.macs); k != 1 {
		t.Errorf("%d stations after ageing", k)
	}
}

func TestBridge(t *testing.T) {
	n := newNetwork(t, true, 1514, 1514, 1514)
	n.check(0, frame(1, 9, nil), 1, 2, dev)
	n.check(1, frame(2, 1, nil), 0)
	n.check(0, frame(1, 2, nil), 1)
	n.check(dev, frame(9, 1, nil), 0)
	n.check(2, frame(3, 9, nil), dev)
	n.check(2, frame(3, 0xff, nil), 0, 1, dev)
	n.check(2, frame(3, 3, nil))      // to itself
	n.check(1, frame(1, 9, nil), dev) // it moved
	n.check(dev, frame(9, 1, nil), 1)
	n.now = n.now.Add(stationAge + time.Second)
	n.check(dev, frame(9, 1, nil), 0, 1, 2)
	n.hub.leave(n.peers[1])
	n.check(dev, frame(9, 2, nil), 0, 2)
	n.check(0, []byte("short"))
	if n.dev.mtu != 1500 {
		t.Errorf("MTU %d", n.dev.mtu)
	}
}

func TestMTU(t *testing.T) {
	n := newNetwork(t, false, 4000)
	if n.dev.mtu != 1500 {
		t.Error(n.dev.mtu)
	}
	n.add(1400)
	n.add(1450)
	if n.dev.mtu != 1400 {
		t.Error(n.dev.mtu)
	}
	n.hub.leave(n.peers[1])
	if n.dev.mtu != 1450 {
		t.Error(n.dev.mtu)
	}
	n.hub.leave(n.peers[2])
	if n.dev.mtu != 1500 {
		t.Error(n.dev.mtu)
	}
	n.hub.leave(n.peers[0])
	if n.dev.mtu != 1500 {
		t.Error(n.dev.mtu)
	}
	n = newNetwork(t, true, 1496)
	if n.dev.mtu != 1482 {
		t.Error(n.dev.mtu)
	}
}

// A flow that cannot split messages after all.
func TestNoFragments(t *testing.T) {
	n := newNetwork(t, false)
	a, b := kittest.New(64)
	a.Spec, a.Max = qos.Data, 1000
	p, err := n.hub.join(splitting{a})
	if err != nil || n.dev.mtu != 1500 {
		t.Fatal(err, n.dev.mtu)
	}
	n.peers, n.far = append(n.peers, p), append(n.far, b)
	n.from(dev, ip4("10.0.0.1", "10.0.0.2", 1500, true))
	if got := n.at()[dev]; n.dev.mtu != 1000 || len(got) != 1 || binary.BigEndian.Uint16(got[0][26:]) != 1000 {
		t.Errorf("MTU %d, %v", n.dev.mtu, got)
	}
	n.check(dev, ip4("10.0.0.1", "10.0.0.2", 1000, true), 0)
}

type splitting struct{ *kittest.Pipe }

func (splitting) MaxMessage() int { return 1 << 20 }

// Packets that are too long for where they go.
func TestTooLong(t *testing.T) {
	n := newNetwork(t, false, 1400, 1300)
	n.check(0, hello(netip.MustParseAddr("10.0.0.2")))
	n.check(1, hello(netip.MustParseAddr("10.0.0.3")))
	n.check(0, hello(netip.MustParseAddr("fd00::2")))
	n.check(1, hello(netip.MustParseAddr("fd00::3")))
	for _, from := range []int{dev, 0} {
		src4, src6 := "10.0.0.1", "fd00::1"
		if from == 0 {
			src4, src6 = "10.0.0.2", "fd00::2"
		}
		n.from(from, ip4(src4, "10.0.0.3", 1400, true))
		got := n.at()
		if len(got) != 1 || len(got[from]) != 1 {
			t.Fatalf("%d: %v", from, got)
		}
		pkt := gopacket.NewPacket(got[from][0], layers.LayerTypeIPv4, gopacket.Default)
		ip, icmp := pkt.Layer(layers.LayerTypeIPv4).(*layers.IPv4), pkt.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4)
		if ip.SrcIP.String() != "10.0.0.1" || ip.DstIP.String() != src4 || icmp.TypeCode != layers.CreateICMPv4TypeCode(3, 4) || icmp.Seq != 1300 || len(got[from][0]) != 576 {
			t.Errorf("%v", pkt)
		}
		if checksum(0, got[from][0][:20]) != 0 || checksum(0, got[from][0][20:]) != 0 {
			t.Error("checksum")
		}
		n.from(from, ip6(src6, "fd00::3", 1400))
		got = n.at()
		if len(got) != 1 || len(got[from]) != 1 {
			t.Fatalf("%d: %v", from, got)
		}
		p := got[from][0]
		pkt = gopacket.NewPacket(p, layers.LayerTypeIPv6, gopacket.Default)
		six, icmp6 := pkt.Layer(layers.LayerTypeIPv6).(*layers.IPv6), pkt.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6)
		if six.DstIP.String() != src6 || icmp6.TypeCode != layers.CreateICMPv6TypeCode(2, 0) || binary.BigEndian.Uint32(p[44:]) != 1300 || len(p) != 1280 {
			t.Errorf("%v", pkt)
		}
		pseudo := append(append([]byte{}, p[8:40]...), 0, 0, byte((len(p)-40)>>8), byte(len(p)-40), 0, 0, 0, 58)
		if checksum(0, append(pseudo, p[40:]...)) != 0 {
			t.Error("checksum of ICMPv6")
		}
	}
	// Without DF the packet arrives in parts.
	n.from(dev, ip4("10.0.0.1", "10.0.0.3", 1400, false))
	if got := n.at(); len(got) != 1 || len(got[1]) != 2 || len(got[1][0]) != 1300 {
		t.Errorf("%v", got)
	}
	// No error for an error, nor too many.
	errorPacket := ip4("10.0.0.1", "10.0.0.3", 1400, true)
	errorPacket[9], errorPacket[20] = protoICMP, 3
	n.check(dev, errorPacket)
	n.now = n.now.Add(time.Second)
	for range 200 {
		n.from(dev, ip4("10.0.0.1", "10.0.0.3", 1400, true))
	}
	if got := n.at()[dev]; len(got) != errorsPerSecond {
		t.Errorf("%d errors", len(got))
	}
	// The same in frames.
	n = newNetwork(t, true, 1400, 1300)
	n.from(0, frame(2, 0xff, nil))
	n.from(1, frame(3, 0xff, nil))
	n.at()
	n.from(0, frame(2, 3, ip4("10.0.0.2", "10.0.0.3", 1380, true)))
	got := n.at()
	if len(got) != 1 || len(got[0]) != 1 || !bytes.HasPrefix(got[0][0], frame(3, 2, nil)) || binary.BigEndian.Uint16(got[0][0][14+26:]) != 1286 {
		t.Errorf("%v", got)
	}
	n.from(0, frame(2, 3, ip4("10.0.0.2", "10.0.0.3", 1380, false)))
	if got := n.at(); len(got) != 1 || len(got[1]) != 2 || len(got[1][0]) > 1300 {
		t.Errorf("%v", got)
	}
}

// Fragments put together are the packet.
func TestFragment(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(28, 5000).Draw(t, "size")
		mtu := rapid.IntRange(28, 1500).Draw(t, "mtu")
		p := ip4("10.0.0.1", "10.0.0.2", size, false)
		binary.BigEndian.PutUint16(p[6:], 7) // a fragment itself, and more to come
		p[6] |= 0x20
		sum4(p)
		h, ok := parse(p)
		if !ok {
			t.Fatal("no packet")
		}
		whole := append([]byte{}, p[:20]...)
		fragment(p, h, mtu, func(q []byte) {
			f, ok := parse(q)
			if !ok || len(q) > mtu || f.length != len(q) || f.src != h.src || f.dst != h.dst || checksum(0, q[:20]) != 0 {
				t.Fatalf("% x", q[:20])
			}
			w := binary.BigEndian.Uint16(q[6:])
			if int(w&0x1fff) != 7+(len(whole)-20)/8 || w&0x2000 == 0 {
				t.Fatalf("offset %#x at %d", w, len(whole)-20)
			}
			whole = append(whole, q[20:]...)
		})
		if !bytes.Equal(whole, p) {
			t.Fatal("not the same")
		}
	})
}

func FuzzForward(f *testing.F) {
	f.Add(ip4("10.0.0.1", "10.0.0.2", 100, false), false)
	f.Add(ip4("10.0.0.1", "10.0.0.2", 300, true), false)
	f.Add(ip6("fd00::1", "fd00::2", 300), false)
	f.Add(frame(1, 2, ip6("fd00::1", "fd00::2", 300)), true)
	f.Add(frame(1, 2, ip4("10.0.0.1", "10.0.0.2", 300, false)), true)
	f.Fuzz(func(t *testing.T, b []byte, tap bool) {
		n := newNetwork(t, tap, 200, 100)
		n.from(0, b)
		n.from(dev, b)
		for who, got := range n.at() {
			for _, p := range got {
				if who >= 0 && len(p) > []int{200, 100}[who] {
					t.Errorf("%d bytes at %d", len(p), who)
				}
			}
		}
	})
}

func TestForwardNoAllocation(t *testing.T) {
	h := newHub(nullDevice{}, false, netip.MustParsePrefix("10.0.0.1/24"), 1500)
	p, err := h.join(nullFlow{})
	if err != nil {
		t.Fatal(err)
	}
	in, out := ip4("10.0.0.2", "10.0.0.1", 1000, true), ip4("10.0.0.1", "10.0.0.2", 1000, true)
	if n := testing.AllocsPerRun(1000, func() { h.fromPeer(p, in); h.fromDevice(out) }); n > 0 {
		t.Errorf("%v allocations for a packet", n)
	}
}

type nullDevice struct{}

func (nullDevice) Write(b []byte) (int, error) { return len(b), nil }
func (nullDevice) SetMTU(int) error            { return nil }

// nullFlow takes everything.
type nullFlow struct{ *kittest.Pipe }

func (nullFlow) Write(b []byte) (int, error)   { return len(b), nil }
func (nullFlow) MTU() int                      { return 1500 }
func (nullFlow) QoS() qos.Spec                 { return qos.Raw }
func (nullFlow) SetWriteTimeout(time.Duration) {}
func (nullFlow) SetFlags(o7s.Flags) error      { return nil }

func TestParse(t *testing.T) {
	for line, want := range map[string]string{
		"-i 10.0.0.1 -m 255.255.255.0": "10.0.0.1/24", "-i10.0.0.1 -m24": "10.0.0.1/24", "-i 10.0.0.1/8 -n x": "10.0.0.1/8",
		"--ip=fd00::1 --mask 64": "fd00::1/64", "--tap": "invalid Prefix", "--tap -i 1.2.3.4 -m 30": "1.2.3.4/30", "-n x --retry -i 1.2.3.4/30": "1.2.3.4/30",
	} {
		if o, err := parseArgs(strings.Fields(line)); err != nil || o.addr.String() != want {
			t.Errorf("%s: %v, %v", line, o.addr, err)
		}
	}
	for _, line := range []string{
		"", "-i 10.0.0.1", "-m 24", "-i x -m 24", "-i 10.0.0.1 -m 33", "-i 10.0.0.1 -m 255.0.255.0", "-i fd00::1 -m 255.255.255.0", "-i 0.0.0.0 -m 8",
		"-i 224.0.0.1 -m 8", "-i 10.0.0.1 -m 24 --mtu 500", "-i 10.0.0.1 -m 24 --retry", "-i 10.0.0.1 -m 24 --dev a-name-that-is-too-long", "--tap -m 24", "-x", "y",
	} {
		var errs bytes.Buffer
		if s := Main(strings.Fields(line), io.Discard, &errs); s != 1 || strings.Count(errs.String(), "\n") != 1 {
			t.Errorf("ovpn %s: status %d, %q", line, s, errs.String())
		}
	}
	var out bytes.Buffer
	if s := Main([]string{"--help"}, &out, io.Discard); s != 0 || out.String() != usage {
		t.Errorf("--help: %d, %s", s, out.String())
	}
}
