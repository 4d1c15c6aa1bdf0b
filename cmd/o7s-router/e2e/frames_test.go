package e2e

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/lib/wire"
)

// injector puts frames on a wire, from the device of a host to that of another.
type injector struct {
	n        *network
	fd       int
	to       unix.SockaddrLinklayer
	src, dst [6]byte
	peer     string // the host that gets them
	port     string // and its device
}

func (n *network) injector(host, dev, peer, port string) *injector {
	n.t.Helper()
	i := &injector{n: n, fd: -1, peer: peer, port: port}
	err := n.inside(host, func() error {
		l, err := netlink.LinkByName(dev)
		if err != nil {
			return err
		}
		copy(i.src[:], l.Attrs().HardwareAddr)
		i.to.Ifindex = l.Attrs().Index
		i.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { unix.Close(i.fd) })
	err = n.inside(peer, func() error {
		l, err := netlink.LinkByName(port)
		if err == nil {
			copy(i.dst[:], l.Attrs().HardwareAddr)
		}
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return i
}

func (i *injector) send(frame []byte) {
	i.n.t.Helper()
	for {
		err := unix.Sendto(i.fd, frame, 0, &i.to)
		if err == unix.ENOBUFS {
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			i.n.t.Fatalf("inject %d bytes: %v", len(frame), err)
		}
		return
	}
}

// dix is a frame to an endpoint.
func (i *injector) dix(eid uint16, payload []byte) []byte {
	return wire.AppendDIX(nil, i.dst, i.src, wire.DefaultEtherType, eid, payload)
}

func dt(h wire.DT, payload string) []byte {
	b := make([]byte, wire.DTLen(4))
	wire.PutDT(b, 4, h)
	return append(b, payload...)
}

// rises runs f and waits until a reason's count rose by exactly want.
func (i *injector) rises(reason string, want uint64, f func()) {
	i.n.t.Helper()
	before := i.n.verdicts(i.peer, i.port)[reason]
	f()
	var got uint64
	eventually(i.n.t, 2*time.Second, func() error {
		if got = i.n.verdicts(i.peer, i.port)[reason] - before; got < want {
			return fmt.Errorf("%s counts %d of %s, want %d", i.port, got, reason, want)
		}
		return nil
	})
	if got != want {
		i.n.t.Errorf("%s counts %d of %s, want %d", i.port, got, reason, want)
	}
}

// endpoint finds the data-transfer endpoint behind a port: the only one that
// looks at the cube.
func (i *injector) endpoint() uint16 {
	i.n.t.Helper()
	for eid := uint16(wire.MinEID); eid < wire.MinEID+32; eid++ {
		before := i.n.verdicts(i.peer, i.port)
		i.send(i.dix(eid, dt(wire.DT{Dst: 1, QC: 7, TTL: 9, EID: 64}, "")))
		var after map[string]uint64
		eventually(i.n.t, time.Second, func() error {
			after = i.n.verdicts(i.peer, i.port)
			for _, r := range []string{"drop_cube", "drop_eid", "user_flow"} {
				if after[r] != before[r] {
					return nil
				}
			}
			return fmt.Errorf("probe of endpoint %d has no verdict", eid)
		})
		if after["drop_cube"] != before["drop_cube"] {
			return eid
		}
	}
	i.n.t.Fatalf("no data-transfer endpoint on %s", i.port)
	return 0
}

// dropped adds up the drops of a layer in user space.
func (n *network) dropped(host, ipcp string) (sum uint64) {
	for _, l := range show[[]irm.LayerInfo](n, host, "layers") {
		if l.IPCP == ipcp {
			for c, v := range l.Counters {
				if strings.HasSuffix(c, "_dropped") {
					sum += v
				}
			}
		}
	}
	return sum
}

// received is what the kernel says that a device received, and the sum of the
// port's verdicts, at one moment: between two frames.
func (n *network) received(host, dev string) (kernel, verdicts uint64) {
	n.t.Helper()
	packets := func() (p uint64) {
		err := n.inside(host, func() error {
			l, err := netlink.LinkByName(dev)
			if err == nil {
				p = l.Attrs().Statistics.RxPackets
			}
			return err
		})
		if err != nil {
			n.t.Fatal(err)
		}
		return p
	}
	eventually(n.t, 5*time.Second, func() error {
		kernel, verdicts = packets(), 0
		for _, v := range n.verdicts(host, dev) {
			verdicts += v
		}
		if now := packets(); now != kernel {
			return fmt.Errorf("%s received %d frames meanwhile", dev, now-kernel)
		}
		return nil
	})
	return kernel, verdicts
}

// TestBadFrames injects what must not come, in every direction, while pings
// run. Every frame is counted, once, and the pings go on.
func TestBadFrames(t *testing.T) {
	t.Parallel()
	top := topology(t, "line3", false)
	top.Links[0].MTU = 2000 // so that h1 can send what is too long for h3
	n := up(t, top)
	n.serve("h3", "echo", "uni")
	n.create("echo", "h1")
	f := n.alloc(n.client("h1", "client"), "echo")
	pingPong(t, f, 1)
	pings := startPings(f, 5*time.Millisecond)
	h1, h3 := n.address("h1", "uni"), n.address("h3", "uni")
	daemons := map[string]int{}
	for _, h := range top.Hosts {
		daemons[h] = n.daemonPID(h)
	}

	wires := []struct {
		*injector
		ipcp, uni string
		beyond    uint64 // address on the other side, 0: the peer is an end
	}{
		{n.injector("h1", "e12", "h2", "e21"), "dix12", "uni.h2", h3},
		{n.injector("h3", "e32", "h2", "e23"), "dix23", "uni.h2", h1},
		{n.injector("h2", "e21", "h1", "e12"), "dix12", "uni.h1", 0},
		{n.injector("h2", "e23", "h3", "e32"), "dix23", "uni.h3", 0},
	}
	const count = 20
	for _, w := range wires {
		self := n.address(w.peer, "uni")
		eid := w.endpoint()
		kernel, verdicts := n.received(w.peer, w.port)
		each := func(reason string, frames ...[]byte) {
			t.Helper()
			w.rises(reason, uint64(count*len(frames)), func() {
				for range count {
					for _, b := range frames {
						w.send(b)
					}
				}
			})
		}
		elsewhere := [6]byte{2, 0, 0, 9, 9, 9}
		each("drop_mac",
			wire.AppendDIX(nil, elsewhere, w.src, wire.DefaultEtherType, eid, dt(wire.DT{Dst: self, TTL: 9, EID: 64}, "")),
			wire.AppendDIX(nil, w.src, w.src, wire.DefaultEtherType, 0, make([]byte, 60)))
		each("drop_truncated", w.dix(eid, nil)[:14], w.dix(eid, nil)[:15], w.dix(eid, nil)[:17])
		long := w.dix(eid, dt(wire.DT{Dst: self, TTL: 9, EID: 64}, "hello"))
		binary.BigEndian.PutUint16(long[16:], uint16(len(long)-18+1))
		longest := w.dix(eid, nil)
		binary.BigEndian.PutUint16(longest[16:], 65535)
		each("drop_length", long, longest, long[:len(long)-7])
		each("drop_eid", w.dix(1, []byte("x")), w.dix(63, nil), w.dix(4000, make([]byte, 100)), w.dix(4096+eid, []byte("x")), w.dix(65535, nil))
		each("drop_dt_truncated", w.dix(eid, []byte{1}), w.dix(eid, make([]byte, wire.DTLen(4)-1)),
			// padding does not make up for what the length lacks
			append(w.dix(eid, make([]byte, 5)), make([]byte, 60)...))
		each("drop_cube", w.dix(eid, dt(wire.DT{Dst: self, QC: 3, TTL: 9, EID: 64}, "")), w.dix(eid, dt(wire.DT{Dst: 77, QC: 255, TTL: 9, EID: 64}, "")))
		each("drop_ttl", w.dix(eid, dt(wire.DT{Dst: self ^ 1, TTL: 1, EID: 64}, "")), w.dix(eid, dt(wire.DT{Dst: 0, TTL: 0, EID: 64}, "")))
		each("drop_no_route", w.dix(eid, dt(wire.DT{Dst: self ^ 0x55aa55aa, TTL: 60, EID: 64}, "")), w.dix(eid, dt(wire.DT{Dst: 0, TTL: 60, EID: 64}, "")))
		each("user_keepalive", w.dix(eid, nil), append(w.dix(eid, nil), make([]byte, 42)...))
		each("pass_other",
			wire.AppendDIX(nil, w.dst, w.src, 0xA001, eid, make([]byte, 46)),
			wire.AppendDIX(nil, w.dst, w.src, 0, eid, make([]byte, 46)),
			append(append(w.dst[:len(w.dst):len(w.dst)], w.src[:]...), 0xff, 0xff))

		// Management: unknown codes, garbage, too short.
		before := n.dropped(w.peer, w.ipcp)
		unknown := wire.AppendDIXMgmt(nil, &wire.EthMgmt{Code: 99})
		dealloc := wire.AppendDIXMgmt(nil, &wire.EthMgmt{Code: wire.EthDealloc, SrcEID: 999, DstEID: 999})
		each("user_mgmt", w.dix(0, unknown), w.dix(0, unknown[:20]), w.dix(0, nil), w.dix(0, []byte{1, 2, 3}), w.dix(0, dealloc))
		eventually(t, 2*time.Second, func() error {
			if got := n.dropped(w.peer, w.ipcp) - before; got != 5*count {
				return fmt.Errorf("%s %s dropped %d, want %d", w.peer, w.ipcp, got, 5*count)
			}
			return nil
		})
		// To components and endpoints of the unicast layer that are not there, or not like this.
		before = n.dropped(w.peer, w.uni)
		each("user_local",
			w.dix(eid, dt(wire.DT{Dst: self, TTL: 1, EID: 2}, "no such component")),
			w.dix(eid, dt(wire.DT{Dst: self, TTL: 0, EID: 1 << 40}, "no such endpoint")),
			w.dix(eid, dt(wire.DT{Dst: self, TTL: 9, EID: 0}, "no flow allocator message")),
			append(w.dix(eid, dt(wire.DT{Dst: self, TTL: 9, EID: 1}, "\xff\xffno directory message")), make([]byte, 30)...))
		eventually(t, 2*time.Second, func() error {
			if got := n.dropped(w.peer, w.uni) - before; got != 4*count {
				return fmt.Errorf("%s %s dropped %d, want %d", w.peer, w.uni, got, 4*count)
			}
			return nil
		})
		// Forwarded as if good, padding and all; the other side drops it.
		if w.beyond != 0 {
			end, uni := "h3", "uni.h3"
			if w.beyond == h1 {
				end, uni = "h1", "uni.h1"
			}
			before := n.dropped(end, uni)
			for range count {
				w.send(append(w.dix(eid, dt(wire.DT{Dst: w.beyond, TTL: 2, EID: 1 << 50}, "padded")), make([]byte, 77)...))
			}
			eventually(t, 2*time.Second, func() error {
				if got := n.dropped(end, uni) - before; got != count {
					return fmt.Errorf("%s dropped %d, want %d", uni, got, count)
				}
				return nil
			})
		}
		if w.beyond == h3 {
			each("drop_mtu", w.dix(eid, dt(wire.DT{Dst: h3, TTL: 60, EID: 1 << 50}, string(make([]byte, 1700)))))
		}

		random(w.injector, eid)
		// Every frame that the kernel saw has exactly one verdict.
		eventually(t, 3*time.Second, func() error {
			k, v := n.received(w.peer, w.port)
			if k-kernel != v-verdicts {
				return fmt.Errorf("%s: the kernel received %d frames, the verdicts say %d", w.port, k-kernel, v-verdicts)
			}
			return nil
		})
		if v := n.verdicts(w.peer, w.port); v["aborted"] != 0 || v["pass_no_socket"] != 0 {
			t.Errorf("%s: %v", w.port, v)
		}
	}
	pings.more(t, 2*time.Second, 50)
	if sent, received := pings.end(); sent-received > 2 {
		t.Errorf("%d of %d pings were answered", received, sent)
	}
	now := map[string]int{}
	for _, h := range top.Hosts {
		now[h] = n.daemonPID(h)
	}
	if !maps.Equal(now, daemons) {
		t.Errorf("daemons %v, now %v", daemons, now)
	}
}

// random sends frames of random length and content, most of them with a
// beginning that leads them some way into the node.
func random(i *injector, eid uint16) {
	rng := rand.New(rand.NewPCG(7, uint64(eid)))
	for n := range 3000 {
		b := make([]byte, 14+rng.IntN(1400))
		for j := range b {
			b[j] = byte(rng.Uint32())
		}
		if n%8 != 0 {
			copy(b, i.dst[:])
			if n%5 == 0 {
				copy(b, wire.Broadcast[:])
			}
			copy(b[6:], i.src[:])
			binary.BigEndian.PutUint16(b[12:], wire.DefaultEtherType)
		}
		if n%4 != 0 && len(b) > 18 {
			// An LSA of random content would be believed, as from any member.
			binary.BigEndian.PutUint16(b[14:], []uint16{0, eid, eid, uint16(rng.IntN(wire.MinEID))}[rng.IntN(4)])
			binary.BigEndian.PutUint16(b[16:], uint16(len(b)-18-rng.IntN(2)*rng.IntN(len(b)-17)))
		}
		i.send(b)
		if n%64 == 0 {
			time.Sleep(time.Millisecond) // a thousand frames are the queue of the user-space path
		}
	}
}
