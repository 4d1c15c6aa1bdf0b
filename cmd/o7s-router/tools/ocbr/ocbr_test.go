package ocbr

import (
	"bytes"
	"context"
	"fmt"
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

func golden(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func opts(t *testing.T, line string) options {
	t.Helper()
	o, err := parse(strings.Fields(line))
	if err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	return o
}

// numbers are right-aligned: with the blanks before them.
var numbers = regexp.MustCompile(`[0-9]+(\.[0-9]+)?`)

// shape is a text with the same widths and no numbers.
func shape(s string) string {
	return numbers.ReplaceAllStringFunc(s, func(n string) string { return strings.Repeat(" ", len(n)) })
}

// session runs a client against a server in virtual time.
func session(t *testing.T, clientLine, serverLine string, change func(a, b *kittest.Pipe)) (client, server, errs string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		srv := &kittest.Network{Flows: make(chan kit.Flow)}
		ctx, cancel := context.WithCancel(t.Context())
		var c, s, e bytes.Buffer
		done := make(chan int)
		go func() { done <- run(ctx, srv, opts(t, serverLine), &s, &e) }()
		n := &kittest.Network{Make: change, Far: func(p *kittest.Pipe) { srv.Flows <- p }}
		if st := run(t.Context(), n, opts(t, clientLine), &c, &e); st != 0 {
			t.Errorf("status %d, %s", st, e.String())
		}
		time.Sleep(2 * time.Second)
		cancel()
		<-done
		client, server, errs = c.String(), s.String(), e.String()
	})
	return
}

func TestRate(t *testing.T) {
	client, server, errs := session(t, "-n x -d 3", "-l", nil)
	if shape(client) != shape(golden(t, "client.golden")) {
		t.Errorf("client\n%s", client)
	}
	// The flow ends as the client closes it, which the reference does not tell.
	lines := strings.SplitAfter(server, "\n")
	want := strings.SplitAfter(golden(t, "server.golden"), "\n")
	if len(lines) != len(want)+1 || errs != "" {
		t.Fatalf("server\n%s%s", server, errs)
	}
	for i := range 5 {
		if shape(lines[i]) != shape(want[i]) {
			t.Errorf("%q, want %q", lines[i], want[i])
		}
	}
	for _, want := range []string{
		"sent statistics:       375 packets,       375000 bytes in      3000 ms, 1.0000 Mb/s\n",
	} {
		if !strings.Contains(client, want) {
			t.Errorf("no %q in\n%s", want, client)
		}
	}
	for _, want := range []string{
		"Flow   64:       125 packets (      125000 bytes) in      1000 ms =>  125.0000 pps,    1.0000 Mbps\n",
		"Test on flow 64 ended\n",
		"375 packets (      375000 bytes) in      2992 ms =>  125.3342 pps,    1.0027 Mbps in total\n",
	} {
		if !strings.Contains(server, want) {
			t.Errorf("no %q in\n%s", want, server)
		}
	}
}

// A client of the reference goes without a word: silence ends the test, and is
// not part of what is measured.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := &kittest.Network{Flows: make(chan kit.Flow)}
		ctx, cancel := context.WithCancel(t.Context())
		var s bytes.Buffer
		done := make(chan int)
		go func() { done <- run(ctx, srv, opts(t, "-l -t 3 -i 500ms"), &s, io.Discard) }()
		a, b := kittest.New(70)
		srv.Flows <- a
		time.Sleep(2 * time.Second)
		for range 13 {
			_, _ = b.Write(make([]byte, 1000))
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(4 * time.Second)
		a, _ = kittest.New(71) // one that never sends
		srv.Flows <- a
		time.Sleep(4 * time.Second)
		cancel()
		<-done
		want := `Server started, interval is 0.5 s, timeout is 3 s.
New flow.
Flow   70:         5 packets (        5000 bytes) in       500 ms =>   10.0000 pps,    0.0800 Mbps
Flow   70:         5 packets (        5000 bytes) in       500 ms =>   10.0000 pps,    0.0800 Mbps
Flow   70:         3 packets (        3000 bytes) in       500 ms =>    6.0000 pps,    0.0480 Mbps
`
		if got := s.String(); !strings.HasPrefix(got, want) || !strings.Contains(got, "Test on flow 70 timed out\nFlow   70:        13 packets (       13000 bytes) in      1200 ms =>   10.8333 pps,    0.0867 Mbps in total\nNew flow.\nTest on flow 71 timed out\n") {
			t.Errorf("%s", got)
		}
	})
}

func TestPackets(t *testing.T) {
	for _, c := range []struct {
		line string
		size int
		want []byte
	}{
		{"-n x -d 1 -s 1000 -q data", 1000, []byte{5, 0, 0, 0, 0, 0, 0, 0, 0}}, // spec 45 §12
		{"-n x -d 1 -s 7", 7, make([]byte, 7)},
		{"-n x -d 1 -s 524288 -r 100M", 524288, []byte{5, 0, 0, 0, 0, 0, 0, 0, 0}},
	} {
		synctest.Test(t, func(t *testing.T) {
			got := make(chan string, 1)
			n := &kittest.Network{Far: func(p *kittest.Pipe) {
				b := make([]byte, 1<<20)
				for i := range 6 {
					k, err := p.Read(b)
					if err != nil {
						got <- err.Error()
						return
					}
					if i == 5 {
						got <- fmt.Sprintf("%d % x", k, b[:len(c.want)])
					}
				}
			}}
			if s := run(t.Context(), n, opts(t, c.line), io.Discard, os.Stderr); s != 0 {
				t.Error(s)
			}
			if got, want := <-got, fmt.Sprintf("%d % x", c.size, c.want); got != want {
				t.Errorf("%s: %s, want %s", c.line, got, want)
			}
		})
	}
}

// A flow that takes nothing more does not keep the client from ending; nor does
// an interrupt.
func TestStalled(t *testing.T) {
	for _, mode := range []string{"-f", "-r 1G"} {
		for _, interrupt := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				want := 7 * time.Second
				if interrupt {
					want = 3 * time.Second
					time.AfterFunc(want, cancel)
				}
				var out, errs bytes.Buffer
				start := time.Now()
				s := run(ctx, &kittest.Network{Far: func(*kittest.Pipe) {}}, opts(t, "-n x -d 7 "+mode), &out, &errs)
				if took := time.Since(start); s != 0 || took != want || errs.Len() > 0 {
					t.Errorf("%s: status %d after %v, %s", mode, s, took, errs.String())
				}
				if !strings.Contains(out.String(), fmt.Sprintf("sent statistics:      1024 packets,      1024000 bytes in %9d ms", want.Milliseconds())) {
					t.Error(out.String())
				}
			})
		}
	}
}

func TestTrouble(t *testing.T) {
	for _, c := range []struct {
		far  func(*kittest.Pipe)
		max  int
		want string
	}{
		{nil, 0, "Failed to allocate flow: -1007. ("},
		{func(p *kittest.Pipe) { p.Close() }, 1000, "ocbr: flow is down\n"},
		{func(p *kittest.Pipe) {}, 999, "ocbr: message of 1000 bytes on a flow that carries 999: message too long; -s 999"},
	} {
		synctest.Test(t, func(t *testing.T) {
			var errs bytes.Buffer
			n := &kittest.Network{Far: c.far, Make: func(a, _ *kittest.Pipe) { a.Max = c.max }}
			if s := run(t.Context(), n, opts(t, "-n x"), io.Discard, &errs); s != 1 || !strings.HasPrefix(errs.String(), c.want) {
				t.Errorf("status %d, %q", s, errs.String())
			}
		})
	}
}

// Ten flows at a time, and the eleventh when one is over.
func TestFlows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := &kittest.Network{Flows: make(chan kit.Flow)}
		var errs bytes.Buffer
		done := make(chan int)
		go func() { done <- run(t.Context(), srv, opts(t, "-l"), io.Discard, &errs) }()
		for i := range maxFlows {
			a, _ := kittest.New(64 + i)
			srv.Flows <- a
		}
		a, _ := kittest.New(99)
		start := time.Now()
		srv.Flows <- a
		if d := time.Since(start); d != time.Second {
			t.Errorf("accepted after %v", d)
		}
		time.Sleep(2 * time.Second)
		srv.Flows <- nil
		if s := <-done; s != 1 || !strings.Contains(errs.String(), "cannot talk to the resource manager") {
			t.Errorf("status %d: %s", s, errs.String())
		}
	})
}

func TestParse(t *testing.T) {
	o := opts(t, "-nx -d90 --size=100 -r2.5M -fq data --spin --run-dir /r")
	if o.name != "x" || o.duration != 90*time.Second || o.size != 100 || o.rate != 2.5e6 || !o.flood || o.qos != qos.Data || !o.spin || o.runDir != "/r" {
		t.Errorf("%+v", o)
	}
	for line, want := range map[string]float64{"1": 1, "64000": 64000, "8k": 8000, "3G": 3e9} {
		if o := opts(t, "-n x -r "+line); o.rate != want {
			t.Errorf("-r %s is %v", line, o.rate)
		}
	}
	for _, line := range []string{
		"", "-l -n x", "-n x -s 0", "-n x -s 524289", "-n x -r 0", "-n x -r k", "-n x -r 1m", "-n x -r 1e9", "-n x -r -1", "-n x -r 10000000G",
		"-n x -d 0", "-l -i 0", "-l -t 1x", "-n x --sleep --spin", "-n x --s 3", "-z", "-n x y", "-n x -r Inf",
	} {
		var errs bytes.Buffer
		if s := Main(strings.Fields(line), io.Discard, &errs); s != 1 || strings.Count(errs.String(), "\n") != 1 {
			t.Errorf("ocbr %s: status %d, %q", line, s, errs.String())
		}
	}
	var out bytes.Buffer
	if s := Main([]string{"--help"}, &out, io.Discard); s != 0 || out.String() != usage {
		t.Errorf("--help: %d, %s", s, out.String())
	}
}
