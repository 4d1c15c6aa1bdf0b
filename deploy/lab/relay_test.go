package lab

import (
	"context"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/o7s/o7s-router/deploy/lab/impair"
)

const badLink = `
name = "t"
hosts = ["h1", "h2"]
[[link]]
ends = ["h1", "h2"]
addresses = ["10.1.2.1/24", "10.1.2.2/24"]
impair = { delay = "5ms" }
`

// udp opens a socket on a host.
func udp(t *testing.T, l *Lab, host, addr string) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	err := inNetns(l.Namespace(host), func() (err error) {
		a, err := net.ResolveUDPAddr("udp4", addr)
		if err == nil {
			c, err = net.ListenUDP("udp4", a)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// Frames pass a relay in both directions, late, not at all, or twice, as it is
// told while it runs. How many of many is for the test of package impair.
func TestRelay(t *testing.T) {
	l := newLab(t, badLink, Options{NoDaemons: true})
	if err := l.Up(context.Background()); err != nil {
		t.Fatal(err)
	}
	r, err := l.Relay("h2", "h1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Relay("h1", "h3"); err == nil {
		t.Error("no error for a link that is not there")
	}
	a, b := udp(t, l, "h1", "10.1.2.1:7"), udp(t, l, "h2", "10.1.2.2:7")
	buf := make([]byte, 2000)
	// hear returns the messages until the one called end.
	hear := func(c *net.UDPConn) (got []string) {
		t.Helper()
		if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		for {
			n, _, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				t.Fatal(err)
			}
			if string(buf[:n]) == "end" {
				return got
			}
			got = append(got, string(buf[:min(n, 4)]))
		}
	}
	send := func(c, to *net.UDPConn, msg ...string) {
		t.Helper()
		for _, m := range msg {
			if _, err := c.WriteTo([]byte(m), to.LocalAddr()); err != nil {
				t.Fatal(err)
			}
		}
	}
	long := "long" + strings.Repeat("x", 1468) // fills the MTU
	began := time.Now()
	send(a, b, "one", long, "two", "end")
	if got := strings.Join(hear(b), " "); got != "one long two" {
		t.Errorf("heard %q", got)
	}
	// ARP there and back, and the message.
	if took := time.Since(began); took < 15*time.Millisecond {
		t.Errorf("it took %v", took)
	}
	began = time.Now()
	send(b, a, "back", "end")
	if got := strings.Join(hear(a), " "); got != "back" || time.Since(began) < 5*time.Millisecond {
		t.Errorf("heard %q after %v", got, time.Since(began))
	}

	r.Set(impair.Both(impair.Impairment{Loss: 1}))
	send(a, b, "lost")
	for end := time.Now().Add(10 * time.Second); r.Stats().Lines[0].Lost == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing was lost")
		}
	}
	r.Set([2]impair.Impairment{{Duplicate: 1}, {}})
	send(a, b, "two", "end")
	if got := strings.Join(hear(b), " "); got != "two two" {
		t.Errorf("heard %q", got)
	}

	// What the relay sends is what arrives, and the rest is what it has lost.
	r.Set(impair.Both(impair.Impairment{Loss: 0.05, Delay: 2 * time.Millisecond}))
	const batches, size = 8, 125 // within a socket's buffer
	before := r.Stats().Lines[0]
	for ; before.Received < 8; before = r.Stats().Lines[0] { // ARP and seven messages
		time.Sleep(time.Millisecond)
	}
	arrived := uint64(0)
	for i := range uint64(batches) {
		for range size {
			send(a, b, "x")
		}
		line := r.Stats().Lines[0]
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			line = r.Stats().Lines[0]
			if n := line.Received - before.Received; n == (i+1)*size && line.Sent-before.Sent+line.Lost-before.Lost == n {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("after %d frames: %+v, before %+v", (i+1)*size, line, before)
			}
		}
		send(b, a, "end") // a frame of the other direction changes nothing
		if err := b.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		for ; arrived < line.Sent-before.Sent; arrived++ {
			if _, _, err := b.ReadFromUDPAddrPort(buf); err != nil {
				t.Fatalf("%d of %d arrived: %v", arrived, line.Sent-before.Sent, err)
			}
		}
	}
	if lost := batches*size - arrived; lost < 15 || lost > 100 { // 50 +- 7
		t.Errorf("%d of %d were lost", lost, batches*size)
	}
	if s := r.Stats(); s.Kernel != [2]uint64{} {
		t.Errorf("the kernel dropped: %+v", s)
	}
}

func TestBadImpairment(t *testing.T) {
	for text, want := range map[string]string{
		`impair = { loss = 2.0 }`:                  "not between 0 and 1",
		`impair = { loss = 0.1 }` + "\nmtu = 9000": "a relay takes up to",
		`impair = { lost = 0.1 }`:                  "lost",
	} {
		_, err := Parse("test", []byte("name = 't'\nhosts = ['a', 'b']\n[[link]]\nends = ['a', 'b']\n"+text))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	if _, err := os.Stat("/sys/class/net"); err == nil {
		if _, err := impair.New(impair.Config{Devices: [2]string{"no-such-dev", "nor-this"}}); err == nil {
			t.Error("no error for devices that are not there")
		}
	}
}
