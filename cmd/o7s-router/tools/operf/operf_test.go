package operf

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit/kittest"
	"github.com/o7s/o7s-router/lib/qos"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func opts(t *testing.T, line string) options {
	t.Helper()
	o, err := parse(strings.Fields(line))
	if err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	return o
}

func golden(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var decimals = regexp.MustCompile(`[0-9]+\.[0-9]{3}`)

// converse runs a client against a server of ours in virtual time.
func converse(t *testing.T, line string, change func(a, b *kittest.Pipe)) (client, server string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		srv := &kittest.Network{Flows: make(chan kit.Flow)}
		ctx, cancel := context.WithCancel(t.Context())
		var c, s, e bytes.Buffer
		done := make(chan int)
		go func() { done <- run(ctx, srv, opts(t, "-l"), &s, &e) }()
		n := &kittest.Network{Make: change, Far: func(p *kittest.Pipe) { srv.Flows <- p }}
		if st := run(t.Context(), n, opts(t, line), &c, &e); st != 0 || e.Len() > 0 {
			t.Errorf("status %d, %s", st, e.String())
		}
		time.Sleep(10 * time.Second)
		cancel()
		<-done
		client, server = c.String(), s.String()
	})
	return client, server
}

func noTimes(s string) string { return decimals.ReplaceAllString(s, "T") }

func TestBi(t *testing.T) {
	got, server := converse(t, "-n operf -d 2s -t bi", nil)
	if want := golden(t, "bi.golden"); noTimes(got) != noTimes(want) {
		t.Errorf("got\n%s\nwant, but for times,\n%s", got, want)
	}
	if !strings.Contains(got, "time: 2000.000 ms, bandwidth: 1.002 Mb/s.") {
		t.Error(got)
	}
	if want := golden(t, "server-bi.golden"); noTimes(server) != noTimes(want) {
		t.Errorf("server\n%s\nwant\n%s", server, want)
	}
}

func TestUni(t *testing.T) {
	got, server := converse(t, "-n operf -d 2s", nil)
	if want := golden(t, "uni.golden"); noTimes(got) != noTimes(want) {
		t.Errorf("got\n%s\nwant, but for times,\n%s", got, want)
	}
	if want := golden(t, "server-uni.golden"); noTimes(server) != noTimes(want) {
		t.Errorf("server\n%s\nwant\n%s", server, want)
	}
}

// Every size, mode and quality: what is sent is known to have arrived.
func TestJSON(t *testing.T) {
	for _, line := range []string{
		"-t uni", "-t bi", "-t bi -q data", "-t uni -q data -s 1048576 -r 1G", "-t bi -q data -s 1048576 -r 1G", "-t bi -s 64 -r 300k",
	} {
		out, _ := converse(t, "-n x -d 3s -j "+line, nil)
		var r result
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatalf("%s: %v in %s", line, err, out)
		}
		if r.Transmitted < 100 || r.Received != r.Transmitted || r.Lost+r.Late+r.Duplicates > 0 || r.TimedOut || !r.Known ||
			r.Bytes != r.Received*uint64(r.Size) || len(r.Intervals) < 2 || (r.RTT == nil) == (r.Gap == nil) {
			t.Errorf("%s: %s", line, out)
		}
	}
}

// What the reference's end does, packet by packet.
func TestReferenceServer(t *testing.T) {
	for _, bi := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			line, conf := "-n x -d 1s -r 100k -s 1000 -t uni", []byte{0, 1, 0, 0}
			if bi {
				line, conf = "-n x -d 1s -r 100k -s 1000 -t bi", []byte{1, 0, 0, 0}
			}
			n := &kittest.Network{Far: func(p *kittest.Pipe) {
				b := make([]byte, 2000)
				k, _ := p.Read(b)
				start := time.Now()
				if !bytes.Equal(b[:k], conf) {
					t.Errorf("configuration % x", b[:k])
				}
				want := make([]byte, 1000)
				for i := 0; ; i++ {
					k, err := p.Read(b)
					if err != nil {
						if i != 13 {
							t.Errorf("%d packets", i)
						}
						return
					}
					if i == 0 && time.Since(start) != time.Second {
						t.Errorf("first packet after %v", time.Since(start))
					}
					want[0] = byte(i)
					if !bytes.Equal(b[:k], want) {
						t.Errorf("packet %d: % x", i, b[:k])
					}
					if bi && i != 5 && i != 7 { // lost, and late
						_, _ = p.Write(b[:k])
						if i == 9 {
							b[0] = 7
							_, _ = p.Write(b[:k])
							_, _ = p.Write(b[:k])
							b[0] = 200 // never sent
							_, _ = p.Write(b[:k])
							_, _ = p.Write([]byte("{"))
						}
					}
				}
			}}
			var out, errs bytes.Buffer
			if s := run(t.Context(), n, opts(t, line), &out, &errs); s != 0 || errs.Len() > 0 {
				t.Errorf("status %d, %s", s, errs.String())
			}
			want := "Test finished.\n\n--- x perf statistics ---\n13 packets transmitted, time: 1000.000 ms, bandwidth: 0.104 Mb/s.\nThe server does not tell what it received.\n"
			if bi {
				want = "Test finished.\nServer timed out.\n\n--- x perf statistics ---\n13 packets transmitted, 12 received, 7.69% packet loss, time: 1000.000 ms, bandwidth: 0.096 Mb/s.\n1 out of order, 1 duplicates\nrtt p50"
			}
			if !strings.Contains(out.String(), want) {
				t.Errorf("got %s", out.String())
			}
		})
	}
}

// A client of the reference: 0, a second, packets that are printed, silence.
func TestReferenceClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := &kittest.Network{Flows: make(chan kit.Flow)}
		ctx, cancel := context.WithCancel(t.Context())
		var out, errs bytes.Buffer
		done := make(chan int)
		go func() { done <- run(ctx, srv, opts(t, "-l"), &out, &errs) }()
		a, b := kittest.New(64)
		srv.Flows <- a
		_, _ = b.Write([]byte{0, 0, 0, 0})
		time.Sleep(time.Second)
		p := make([]byte, 1500)
		for i := range 3 {
			p[0] = byte(i)
			_, _ = b.Write(p)
			time.Sleep(time.Millisecond)
		}
		b.SetReadTimeout(time.Minute)
		if _, err := b.Read(p); !kit.Ended(err) {
			t.Errorf("a reference client got something (%v)", err)
		}
		// One that begins with something else does not matter.
		a, b = kittest.New(65)
		srv.Flows <- a
		_, _ = b.Write(p)
		synctest.Wait()
		cancel()
		if s := <-done; s != 0 {
			t.Errorf("status %d", s)
		}
		want := "Ouroboros perf server started.\nNew flow 64.\nDoing a unidirectional test.\n" +
			"Seqno 0 from fd 64: 946684801.000000\nSeqno 1 from fd 64: 946684801.001000\nSeqno 2 from fd 64: 946684801.002000\n" +
			"Flow 64: 3 packets, 4500 bytes in 2 ms, 18.000 Mb/s, 0 lost, 0 out of order, 0 duplicates\nFlow 64 timed out.\nNew flow 65.\n"
		if out.String() != want || errs.String() != "operf: flow 65: the flow does not begin with a configuration\n" {
			t.Errorf("got %s%s", out.String(), errs.String())
		}
	})
}

// The question for the result, or the answer, may get lost.
func TestLostQuestion(t *testing.T) {
	got, _ := converse(t, "-n x -d 1s", func(a, b *kittest.Pipe) {
		asked := 0
		a.Drop = func(m []byte) bool {
			if len(m) == confLen && m[1]&2 != 0 {
				asked++
				return asked < 3
			}
			return len(m) > confLen && m[0]%10 == 9
		}
	})
	if !strings.Contains(got, "84 packets transmitted, 76 received, 9.52% packet loss") {
		t.Error(got)
	}
}

func TestInterrupt(t *testing.T) {
	for _, line := range []string{"-t uni", "-t bi", "-f", "-f -t bi", "-q data"} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			time.AfterFunc(2500*time.Millisecond, cancel)
			var out, errs bytes.Buffer
			start := time.Now()
			s := run(ctx, &kittest.Network{Far: func(*kittest.Pipe) {}}, opts(t, "-n x "+line), &out, &errs)
			if took := time.Since(start); s != 0 || took != 2500*time.Millisecond || errs.Len() > 0 || !strings.Contains(out.String(), "packets transmitted") {
				t.Errorf("%s: status %d after %v: %s%s", line, s, took, out.String(), errs.String())
			}
		})
	}
}

func TestTrouble(t *testing.T) {
	for _, c := range []struct {
		line, want string
		far        func(*kittest.Pipe)
		max        int
	}{
		{"", "Failed to allocate flow: -1007. (", nil, 0},
		{"", "operf: flow is down\n", func(p *kittest.Pipe) { time.Sleep(2 * time.Second); p.Close() }, 1 << 20},
		{"-q data -t bi", "operf: the other end closed the flow\n", func(p *kittest.Pipe) { time.Sleep(2 * time.Second); p.Close() }, 1 << 20},
		{"-s 1500", "operf: message of 1500 bytes on a flow that carries 999: message too long; -s 999 fits, and -q data splits messages\n", func(*kittest.Pipe) {}, 999},
	} {
		synctest.Test(t, func(t *testing.T) {
			var errs bytes.Buffer
			n := &kittest.Network{Far: c.far, Make: func(a, _ *kittest.Pipe) { a.Max = c.max }}
			if s := run(t.Context(), n, opts(t, "-n x "+c.line), io.Discard, &errs); s != 1 || !strings.HasPrefix(errs.String(), c.want) {
				t.Errorf("status %d, %q", s, errs.String())
			}
		})
	}
}

// track against sets.
func TestTrack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base := rapid.SampledFrom([]uint32{0, 1 << 31, 1<<32 - 5}).Draw(t, "base")
		var tr track
		tr.next = base
		seen := map[uint32]bool{}
		high, late, dup := -1, 0, 0
		for _, d := range rapid.SliceOfN(rapid.IntRange(0, 3*window/2), 1, 60).Draw(t, "numbers") {
			if high-d >= window-1 {
				continue // beyond what it promises
			}
			fresh := tr.add(base + uint32(d))
			switch {
			case seen[uint32(d)]:
				dup++
			case d < high:
				late++
			}
			if fresh == seen[uint32(d)] {
				t.Fatalf("%d: new %v", d, fresh)
			}
			seen[uint32(d)] = true
			high = max(high, d)
		}
		if int(tr.packets) != len(seen) || int(tr.late) != late || int(tr.dup) != dup || int(tr.lost()) != high+1-len(seen) {
			t.Fatalf("%d %d %d %d, want %d %d %d %d", tr.packets, tr.late, tr.dup, tr.lost(), len(seen), late, dup, high+1-len(seen))
		}
	})
}

func TestNoAllocation(t *testing.T) {
	c := &client{o: options{size: 100}, left: make([]atomic.Int64, window), rtt: newHistogram(), clock: time.Now()}
	c.o.bi = true
	c.sent.Store(1 << 31)
	seq := uint32(0)
	if n := testing.AllocsPerRun(1000, func() {
		c.left[seq%window].Store(1)
		c.back(seq, time.Now())
		seq++
	}); n > 0 {
		t.Errorf("%v allocations for a packet", n)
	}
}

func FuzzReport(f *testing.F) {
	f.Add(report{Packets: 3, Gap: &spread{}}.encode())
	f.Add([]byte(`{"operf":"report"}`))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, ok := decodeReport(b); ok {
			if again, ok := decodeReport(r.encode()); !ok || fmt.Sprint(again.Gap == nil, again.Packets) != fmt.Sprint(r.Gap == nil, r.Packets) {
				t.Errorf("%+v, %+v", r, again)
			}
		}
	})
}

func TestReportSize(t *testing.T) {
	r := report{Final: true, Packets: 1<<64 - 1, Bytes: 1<<64 - 1, Late: 1<<64 - 1, Duplicates: 1<<64 - 1, Elapsed: 1<<63 - 1}
	r.Gap = &spread{1<<63 - 1, 1<<63 - 1, 1<<63 - 1, 1<<63 - 1, 1<<63 - 1}
	if n := len(r.encode()); n > maxReport {
		t.Errorf("%d bytes", n)
	}
}

// Who does not ask for a size gets one that the flow carries.
func TestDefaultSize(t *testing.T) {
	got, _ := converse(t, "-n x -d 1s", func(a, _ *kittest.Pipe) { a.Max = 1400 })
	if !strings.Contains(got, "Sending 1400 byte packets") || !strings.Contains(got, " 0% packet loss") {
		t.Error(got)
	}
}

func TestParse(t *testing.T) {
	o := opts(t, "-nx -d90s --size=100 -r2.5M -fq data --spin -t bi -j --run-dir /r")
	if o.name != "x" || o.duration != 90*time.Second || o.size != 100 || o.rate != 2.5e6 || !o.flood || o.qos != qos.Data || !o.spin || !o.bi || !o.json || o.runDir != "/r" {
		t.Errorf("%+v", o)
	}
	if o := opts(t, "-n x -d 1500"); o.duration != 1500*time.Millisecond {
		t.Error(o.duration)
	}
	for _, line := range []string{
		"", "-l -n x", "-n x -s 63", "-n x -s 1048577", "-n x -r 0", "-n x -r k", "-n x -t both", "-n x -d 0", "-n x -d 1y", "-n x -q good",
		"-n x --sleep --spin", "-n x --s 100", "-z", "-n x y", "-n x -r 1k", "-n x -r",
	} {
		var errs bytes.Buffer
		if s := Main(strings.Fields(line), io.Discard, &errs); s != 1 || strings.Count(errs.String(), "\n") != 1 {
			t.Errorf("operf %s: status %d, %q", line, s, errs.String())
		}
	}
	var out bytes.Buffer
	if s := Main([]string{"--help"}, &out, io.Discard); s != 0 || out.String() != usage {
		t.Errorf("--help: %d, %s", s, out.String())
	}
}
