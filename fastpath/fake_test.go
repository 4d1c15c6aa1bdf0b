package fastpath

import (
	"os"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/o7s/o7s-router/fastpath/port"
	"github.com/o7s/o7s-router/lib/packet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeDevice is a device in memory. Its index is that of the loopback device,
// which every namespace has, so it can be in a device map.
type fakeDevice struct {
	c   port.Config
	mac [6]byte

	mu       sync.Mutex // guards what follows
	redirect bool
	sent     [][]byte
}

func (d *fakeDevice) Index() int                   { return 1 }
func (d *fakeDevice) MAC() [6]byte                 { return d.mac }
func (d *fakeDevice) MTU() int                     { return 1500 }
func (d *fakeDevice) Mode() port.Mode              { return port.ModeNative }
func (d *fakeDevice) SetEtherTypes([]uint16) error { return nil }
func (d *fakeDevice) Up() bool                     { return true }
func (d *fakeDevice) Close() error                 { return nil }
func (d *fakeDevice) Settle()                      {}
func (d *fakeDevice) Reasons() []string            { return nil }
func (d *fakeDevice) Redirectable() (bool, string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.redirect, "made so"
}

func (d *fakeDevice) setRedirectable(ok bool) {
	d.mu.Lock()
	d.redirect = ok
	d.mu.Unlock()
	d.c.Redirect(ok)
}

func (d *fakeDevice) SendBatch(frames []*packet.Buf) error {
	for _, b := range frames {
		_ = d.Send(b)
	}
	return nil
}

func (d *fakeDevice) Send(b *packet.Buf) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sent = append(d.sent, append([]byte{}, b.Bytes()...))
	b.Release()
	return nil
}

// fakes opens fake devices and remembers them by name. Devices whose name
// starts with "user" are no redirect targets.
type fakes map[string]*fakeDevice

func (f fakes) open(c port.Config) (device, error) {
	d := &fakeDevice{c: c, mac: [6]byte{2, 0, 0, 0, 0, byte(len(f) + 1)}, redirect: c.Ifname[:4] != "user"}
	f[c.Ifname] = d
	return d, nil
}

// testPlane makes a plane with fake devices; kernel says whether it must use
// BPF (the test is skipped when it cannot) or must not.
func testPlane(t testing.TB, kernel bool, routes int) (*Plane, fakes) {
	t.Helper()
	f := fakes{}
	p, err := newPlane(Options{MaxRoutes: routes, MaxPorts: 8, MaxEthBlocks: 8, DisableXDP: !kernel}, f.open)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	if ok, why := p.Kernel(); kernel && !ok {
		skip(t, "no BPF: "+why)
	}
	return p, f
}

// skip skips a test that needs rights it does not have; where everything must
// run (continuous integration) that is a failure.
func skip(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("O7S_TEST_NO_SKIP") != "" && os.Geteuid() == 0 {
		t.Fatal(why)
	}
	t.Skip(why)
}

func must[T any](t interface{ Fatal(...any) }) func(v T, err error) T {
	return func(v T, err error) T {
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
