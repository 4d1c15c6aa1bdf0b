package port

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/packet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testType = 0xa000

var macs = [2]net.HardwareAddr{{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}}

// lab is a veth pair between two namespaces: "v0" in the first, "v1" in the
// second.
type lab struct {
	t    testing.TB
	ns   [2]netns.NsHandle
	name [2]string
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, XDP, AF_XDP")
	}
}

var labCount int

func newLab(t testing.TB, mtu int) *lab {
	t.Helper()
	needRoot(t)
	labCount++
	l := &lab{t: t}
	for i := range l.ns {
		l.name[i] = fmt.Sprintf("xsktest-%d-%d-%d", os.Getpid(), labCount, i)
		runtime.LockOSThread()
		old, err := netns.Get()
		if err != nil {
			t.Fatal(err)
		}
		if l.ns[i], err = netns.NewNamed(l.name[i]); err != nil {
			t.Fatal(err)
		}
		if err := netns.Set(old); err != nil {
			t.Fatal(err)
		}
		old.Close()
		runtime.UnlockOSThread()
		t.Cleanup(func() {
			l.ns[i].Close()
			if err := netns.DeleteNamed(l.name[i]); err != nil {
				t.Error(err)
			}
		})
	}
	l.veth(mtu)
	return l
}

func (l *lab) veth(mtu int) {
	l.t.Helper()
	l.at(0, func() {
		v := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "v0", Index: 100 + labCount, MTU: mtu, HardwareAddr: macs[0]},
			PeerName:  "v1", PeerHardwareAddr: macs[1], PeerNamespace: netlink.NsFd(l.ns[1]),
		}
		l.check(netlink.LinkAdd(v))
	})
	l.setUp(0, true)
	l.setUp(1, true)
}

func (l *lab) check(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// at runs f in a namespace.
func (l *lab) at(i int, f func()) {
	l.t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	old, err := netns.Get()
	l.check(err)
	defer old.Close()
	l.check(netns.Set(l.ns[i]))
	defer func() { l.check(netns.Set(old)) }()
	f()
}

func (l *lab) dev(i int) string { return fmt.Sprintf("v%d", i) }

func (l *lab) setUp(i int, up bool) {
	l.t.Helper()
	l.at(i, func() {
		link, err := netlink.LinkByName(l.dev(i))
		l.check(err)
		if up {
			l.check(netlink.LinkSetUp(link))
		} else {
			l.check(netlink.LinkSetDown(link))
		}
	})
}

// setFeature changes an offload, as ethtool -K does.
func (l *lab) setFeature(i int, name string, on bool) {
	l.t.Helper()
	l.at(i, func() {
		e, err := newEthtool()
		l.check(err)
		defer e.close()
		ne := binary.NativeEndian
		switch name {
		case "gro": // the old commands are enough for tests
			buf := make([]byte, 8)
			ne.PutUint32(buf, 0x2c) // ETHTOOL_SGRO
			if on {
				ne.PutUint32(buf[4:], 1)
			}
			l.check(e.call(l.dev(i), buf))
		case "tx":
			buf := make([]byte, 8)
			ne.PutUint32(buf, 0x17) // ETHTOOL_STXCSUM
			if on {
				ne.PutUint32(buf[4:], 1)
			}
			l.check(e.call(l.dev(i), buf))
		default:
			l.t.Fatal(name)
		}
	})
}

// testProgram is the smallest useful XDP program: frames of testType go to the
// socket of their queue, others pass.
type testProgram struct{ xsks *ebpf.Map }

func newTestProgram(t testing.TB) *testProgram {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.XSKMap, KeySize: 4, ValueSize: 4, MaxEntries: MaxQueues})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return &testProgram{m}
}

func (p *testProgram) load() (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "Dual BSD/GPL", Name: "xsktest", Instructions: asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R2, asm.R1, 4, asm.Word), // data_end
		asm.LoadMem(asm.R1, asm.R1, 0, asm.Word), // data
		asm.Mov.Reg(asm.R3, asm.R1),
		asm.Add.Imm(asm.R3, ethHeader),
		asm.JGT.Reg(asm.R3, asm.R2, "pass"),
		asm.LoadMem(asm.R4, asm.R1, 12, asm.Half),
		asm.HostTo(asm.BE, asm.R4, asm.Half),
		asm.JNE.Imm(asm.R4, testType, "pass"),
		asm.LoadMem(asm.R2, asm.R6, 16, asm.Word), // rx_queue_index
		asm.LoadMapPtr(asm.R1, p.xsks.FD()),
		asm.Mov.Imm(asm.R3, 2), // XDP_PASS when there is no socket
		asm.FnRedirectMap.Call(),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 2).WithSymbol("pass"),
		asm.Return(),
	}})
}

func (p *testProgram) set(queue, fd int) error {
	if fd < 0 {
		return p.xsks.Delete(uint32(queue))
	}
	return p.xsks.Put(uint32(queue), uint32(fd))
}

// end is one open port with what it received.
type end struct {
	*Port
	mu     sync.Mutex // guards what follows
	frames [][]byte
	events []bool
	redir  []bool
	news   chan struct{}
}

// open opens a port on one end; adjust may change the configuration.
func (l *lab) open(i int, adjust func(*Config)) (*end, error) {
	l.t.Helper()
	prog := newTestProgram(l.t)
	e := &end{news: make(chan struct{}, 1)}
	note := func(f func()) {
		e.mu.Lock()
		f()
		e.mu.Unlock()
		select {
		case e.news <- struct{}{}:
		default:
		}
	}
	c := Config{
		Ifname: l.dev(i), Program: prog.load, SetXSK: prog.set, EtherTypes: []uint16{testType},
		Rx: func(frames []*packet.Buf) {
			note(func() {
				for _, b := range frames {
					e.frames = append(e.frames, bytes.Clone(b.Bytes()))
					b.Release()
				}
			})
		},
		State:    func(up bool) { note(func() { e.events = append(e.events, up) }) },
		Redirect: func(ok bool) { note(func() { e.redir = append(e.redir, ok) }) },
		Log:      slog.New(slog.NewTextHandler(testWriter{l.t}, nil)),
	}
	if adjust != nil {
		adjust(&c)
	}
	var err error
	l.at(i, func() { e.Port, err = Open(c) })
	return e, err
}

func (l *lab) mustOpen(i int, adjust func(*Config)) *end {
	l.t.Helper()
	e, err := l.open(i, adjust)
	l.check(err)
	l.t.Cleanup(func() {
		if err := e.Close(); err != nil {
			l.t.Error(err)
		}
	})
	return e
}

// wait waits until cond, called with the lock held, is true.
func (e *end) wait(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.NewTimer(5 * time.Second)
	defer deadline.Stop()
	for {
		e.mu.Lock()
		ok := cond()
		e.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-e.news:
		case <-deadline.C:
			e.mu.Lock()
			defer e.mu.Unlock()
			t.Fatalf("no %s: %d frames, states %v, redirect %v, %+v", what, len(e.frames), e.events, e.redir, e.Counters())
		}
	}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// frame is a frame from one end to the other, with a number and content that
// depends on it.
func frame(from, n, size int) []byte {
	f := make([]byte, size)
	copy(f, macs[1-from])
	copy(f[6:], macs[from])
	binary.BigEndian.PutUint16(f[12:], testType)
	binary.BigEndian.PutUint32(f[16:], uint32(n))
	for i := 20; i < size; i++ {
		f[i] = byte(n + i)
	}
	return f
}

// exchange sends frames of several sizes from each end and checks that they
// arrive unchanged and in order.
func exchange(t testing.TB, a, b *end, sizes ...int) {
	t.Helper()
	const each = 40
	for from, e := range []*end{a, b} {
		to := []*end{b, a}[from]
		to.mu.Lock()
		to.frames = nil
		to.mu.Unlock()
		var want [][]byte
		for n := range each {
			f := frame(from, n, sizes[n%len(sizes)])
			want = append(want, f)
			if err := e.Send(packet.From(f)); err != nil {
				t.Fatal(err)
			}
		}
		to.wait(t, fmt.Sprintf("%d frames from end %d", each, from), func() bool { return len(to.frames) >= each })
		to.mu.Lock()
		for i, f := range want {
			if !bytes.Equal(to.frames[i], f) {
				t.Errorf("frame %d from end %d: got %x..., want %x...", i, from, to.frames[i][:20], f[:20])
			}
		}
		to.mu.Unlock()
	}
}

// foreign attaches a program that is not the port's.
func (l *lab) foreign(i int, generic bool) {
	l.t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Name: "stranger", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R0, 2), asm.Return(),
	}})
	l.check(err)
	defer p.Close()
	flags := unix.XDP_FLAGS_DRV_MODE
	if generic {
		flags = unix.XDP_FLAGS_SKB_MODE
	}
	l.at(i, func() {
		link, err := netlink.LinkByName(l.dev(i))
		l.check(err)
		l.check(netlink.LinkSetXdpFdWithFlags(link, p.FD(), flags))
	})
}

func (l *lab) detach(i int, generic bool) {
	flags := unix.XDP_FLAGS_DRV_MODE
	if generic {
		flags = unix.XDP_FLAGS_SKB_MODE
	}
	l.at(i, func() {
		link, err := netlink.LinkByName(l.dev(i))
		l.check(err)
		l.check(netlink.LinkSetXdpFdWithFlags(link, -1, flags))
	})
}
