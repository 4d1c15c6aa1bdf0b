package oping

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit/kittest"
	"github.com/o7s/o7s-router/lib/qos"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// answer answers n requests after a delay, and ends when nothing comes.
func answer(n int, delay time.Duration) func(*kittest.Pipe) {
	return func(p *kittest.Pipe) {
		p.SetReadTimeout(time.Minute)
		b := make([]byte, maxSize)
		for range n {
			k, err := p.Read(b)
			if err != nil {
				return
			}
			time.Sleep(delay)
			b[3] = echoReply
			p.Write(b[:k])
		}
	}
}

func opts(t *testing.T, line string) options {
	t.Helper()
	o, err := parse(strings.Fields(line))
	if err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	return o
}

var times = regexp.MustCompile(`[0-9]+\.[0-9]{3}`)

// client runs a client in virtual time.
func runClient(t *testing.T, line string, far func(*kittest.Pipe)) (out string, took time.Duration) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var stdout, stderr bytes.Buffer
		if s := run(t.Context(), &kittest.Network{Far: far}, opts(t, line), &stdout, &stderr); s != 0 {
			t.Errorf("%s: status %d, %s", line, s, stderr.String())
		}
		out, took = stdout.String(), time.Since(start)
		synctest.Wait()
		time.Sleep(2 * time.Minute) // the far end ends
	})
	return out, took
}

func golden(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestClient(t *testing.T) {
	got, took := runClient(t, "-n oping.dix -c 3 -i 200ms", answer(3, time.Millisecond))
	if want := golden(t, "client.golden"); times.ReplaceAllString(got, "T") != times.ReplaceAllString(want, "T") {
		t.Errorf("got\n%s\nwant, but for times,\n%s", got, want)
	}
	for _, want := range []string{"seq=2 time=1.000 ms\n", "time: 600.000 ms\n", "= 1.000/1.000/1.000/0.000 ms\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if took != 600*time.Millisecond {
		t.Errorf("took %v", took)
	}
}

func TestClientOutput(t *testing.T) {
	for _, c := range []struct {
		line string
		far  func(*kittest.Pipe)
		want []string
	}{
		{"-n x -c 1 -s 1500", answer(1, 20*time.Microsecond), []string{"Pinging x with 1500 bytes of data (1 packets):\n\n1500 bytes from x: seq=0 time=20.000 µs\n", "= 20.000/20.000/20.000/NaN µs\n"}},
		{"-n x -c 10 -i 10ms -Q", answer(9, 0), []string{"Server timed out.\n\n--- x ping", "10 packets transmitted, 9 received, 0 out-of-order, 10% packet loss, time: 2080.000 ms\n"}},
		{"-n x -c 30 -i 100ms", answer(14, 0), []string{"30 packets transmitted, 14 received, 0 out-of-order, 54% packet loss"}},
		{"-n x -c 2 -i 3500ms", answer(0, 0), []string{"Server timed out.\n\n--- x ping statistics ---\n2 packets transmitted, 0 received, 0 out-of-order, 100% packet loss, time: 5000.000 ms\n"}},
		{"-n x -f -c 500", answer(500, time.Millisecond), []string{"seq=499 time=1.000 ms\n", "500 packets transmitted, 500 received, 0 out-of-order, 0% packet loss, time: 500.000 ms\n"}},
		{"-n x -F -c 5", answer(3, time.Millisecond), []string{"seq=2 ", "Server timed out.", "4 packets transmitted, 3 received, 0 out-of-order, 25% packet loss"}},
		{"-n x -d 1s -i 100ms -Q", answer(10, 0), []string{"10 received"}},
		{"-n x -c 1 -D", answer(1, time.Millisecond), []string{"\n[946684800.001000] 64 bytes from x"}},
		{"-n x -c 3 -i 1ms", func(p *kittest.Pipe) { // reordered, and packets that are none
			var b [3][]byte
			for i := range b {
				b[i] = make([]byte, 64)
				p.Read(b[i])
				b[i][3] = echoReply
			}
			p.Write([]byte("short"))
			p.Write(make([]byte, 64)) // a request
			wrong := bytes.Clone(b[0])
			wrong[7] = 9 // a number never sent
			p.Write(wrong)
			for _, i := range []int{0, 2, 1} {
				p.Write(b[i])
			}
		}, []string{"seq=2 ", "seq=1 time=1.000 ms [out-of-order]\n", "3 received, 1 out-of-order"}},
	} {
		got, _ := runClient(t, c.line, c.far)
		for _, want := range c.want {
			if !strings.Contains(got, want) {
				t.Errorf("oping %s: no %q in\n%s", c.line, want, got)
			}
		}
	}
}

func TestInterrupt(t *testing.T) {
	for _, mode := range []string{"", "-f", "-F"} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(2500*time.Millisecond, cancel)
			var out bytes.Buffer
			far := answer(3, 0)
			if s := run(ctx, &kittest.Network{Far: far}, opts(t, "-n x "+mode), &out, io.Discard); s != 0 {
				t.Errorf("status %d", s)
			}
			if !strings.Contains(out.String(), "packets transmitted, 3 received") {
				t.Errorf("interrupted %q: %s", mode, out.String())
			}
		})
	}
}

func TestNoFlow(t *testing.T) {
	var out, errs bytes.Buffer
	if s := run(t.Context(), &kittest.Network{}, opts(t, "-n x"), &out, &errs); s != 1 {
		t.Errorf("status %d", s)
	}
	if !strings.HasPrefix(errs.String(), "Failed to allocate flow: -1007. (") || out.Len() > 0 {
		t.Errorf("%q, %q", out.String(), errs.String())
	}
}

func TestServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &kittest.Network{Flows: make(chan kit.Flow)}
		var out bytes.Buffer
		done := make(chan int)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { done <- run(ctx, n, opts(t, "-l"), &out, io.Discard) }()
		a, b := kittest.New(64)
		n.Flows <- a
		req, got := make([]byte, 64), make([]byte, 64)
		for i := range 2 {
			stamp(req, uint32(i), 1234567890123)
			b.Write(make([]byte, 20)) // not a request
			b.Write(req)
			b.Read(got)
			req[3] = echoReply
			if !bytes.Equal(got, req) {
				t.Errorf("reply % x", got)
			}
		}
		b.Write(req) // a reply is not answered
		time.Sleep(11 * time.Second)
		cancel()
		if s := <-done; s != 0 {
			t.Errorf("status %d", s)
		}
		if want := golden(t, "server.golden"); out.String() != want {
			t.Errorf("got\n%swant\n%s", out.String(), want)
		}
	})
}

// 256 flows at once, not one more, in every mode; then the daemon dies.
func TestServerFlows(t *testing.T) {
	for mode, limit := range map[string]int{"": 256, "--poll": 3, "--busy": 1} {
		synctest.Test(t, func(t *testing.T) {
			n := &kittest.Network{Flows: make(chan kit.Flow)}
			var errs bytes.Buffer
			done := make(chan int)
			go func() { done <- run(t.Context(), n, opts(t, "-lQ "+mode), io.Discard, &errs) }()
			req, got := make([]byte, 64), make([]byte, 64)
			for i := range limit {
				a, b := kittest.New(64 + i)
				n.Flows <- a
				stamp(req, uint32(i), 0)
				b.Write(req)
				for b.SetReadTimeout(time.Second); ; {
					if _, err := b.Read(got); err != nil || binary.BigEndian.Uint32(got[offID:]) != uint32(i) {
						t.Errorf("flow %d: %v", i, err)
					}
					break
				}
			}
			if mode != "--poll" {
				full(t, n, req)
			}
			time.Sleep(12 * time.Second)
			n.Flows <- nil
			if s := <-done; s != 1 || !strings.Contains(errs.String(), "cannot talk to the resource manager") {
				t.Errorf("status %d: %s", s, errs.String())
			}
		})
	}
}

// full checks that a server takes no flow until one has been idle for long.
func full(t *testing.T, n *kittest.Network, req []byte) {
	a, b := kittest.New(1)
	select {
	case n.Flows <- a:
		t.Error("one flow too many")
	case <-time.After(9 * time.Second): // no flow is idle for long enough
	}
	select {
	case n.Flows <- a:
	case <-time.After(2 * time.Second):
		t.Error("no flow although others are idle")
	}
	b.Write(req)
	b.Read(make([]byte, 64))
}

func TestParse(t *testing.T) {
	o := opts(t, "-nx -c3 -i5s --size=100 --qos data -fQD --run-dir /r")
	if o.name != "x" || o.count != 3 || o.interval != 5*time.Second || o.size != 100 || o.qos != qos.Data || !o.flood || !o.quiet || !o.timeOfDay || o.runDir != "/r" {
		t.Errorf("%+v", o)
	}
	for line, want := range map[string]int{
		"-n x -d 1m": 60, "-n x -d 1500": 1, "-n x -d 1s -i 0": 10000, "-n x -f -d 1s": 10000, "-n x": maxCount, "-n x -d 1d -i 1ms": 86400000,
	} {
		if o := opts(t, line); o.count != want {
			t.Errorf("%s: %d packets, want %d", line, o.count, want)
		}
	}
	for _, line := range []string{
		"", "-n", "-c 3", "-n x -c 0", "-n x -c -1", "-n x -c many", "-n x -i 11s", "-n x -i 1y", "-n x -i", "-n x -i ms",
		"-n x -s 63", "-n x -s 1501", "-n x -q best-effort", "-n x -z", "-n x --none", "-n x y", "-l -n x", "-l --busy=1", "-n x -", "-n x --",
		"-n x -d 99999999999999999999d", "-n x -d 4294967295d",
	} {
		var errs bytes.Buffer
		if s := Main(strings.Fields(line), io.Discard, &errs); s != 1 || strings.Count(errs.String(), "\n") != 1 {
			t.Errorf("oping %s: status %d, %q", line, s, errs.String())
		}
	}
	var out bytes.Buffer
	if s := Main([]string{"--help"}, &out, io.Discard); s != 0 || out.String() != usage {
		t.Errorf("--help: %d, %s", s, out.String())
	}
}

// What the first 24 bytes of a captured request look like (spec 45 §12).
func TestStamp(t *testing.T) {
	b := make([]byte, 64)
	stamp(b, 1, 100*1e9+5)
	want := []byte{0, 0, 0, 0, 0, 0, 0, 1, 100, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0}
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 && !bytes.Equal(b[:24], want) {
		t.Errorf("% x", b[:24])
	}
	if sentAt(b) != 100*1e9+5 {
		t.Error(sentAt(b))
	}
}

func TestNoAllocation(t *testing.T) {
	c := &client{o: options{name: "x", count: 1 << 20, timeOfDay: true}, out: kit.NewPrinter(io.Discard), clock: newClock()}
	b := make([]byte, 64)
	if n := testing.AllocsPerRun(1000, func() {
		stamp(b, 7, c.clock.now())
		b[3] = echoReply
		if _, ok := c.reply(b); !ok {
			t.Error("no reply")
		}
	}); n > 0 {
		t.Errorf("%v allocations for a packet", n)
	}
	c.out.Flush()
}
