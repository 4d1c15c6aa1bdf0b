package kit

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParse(t *testing.T) {
	type all struct {
		n          string
		i          int
		d          time.Duration
		r          float64
		f, g, name bool
	}
	parse := func(line string) (v all, err error) {
		err = Parse(strings.Fields(line), []Opt{
			String("n", "name", &v.n), Int("i", "int", &v.i, 1, 9), Time("d", "duration", &v.d, time.Second, time.Millisecond, time.Hour),
			Rate("r", "rate", &v.r), Flag("f", "flood", &v.f), Flag("g", "", &v.g), Flag("", "named", &v.name),
		})
		return v, err
	}
	for line, want := range map[string]all{
		"":                         {},
		"-fgnx -i3":                {f: true, g: true, n: "x", i: 3},
		"-n -x --int=3 --flo":      {n: "-x", i: 3, f: true},
		"--name x --named --dur 5": {n: "x", name: true, d: 5 * time.Second},
		"-n a=b -n c -d 250ms":     {n: "c", d: 250 * time.Millisecond},
		"--name=a=b -r 1.5k":       {n: "a=b", r: 1500},
		"-r 2G -d 1m":              {r: 2e9, d: time.Minute},
	} {
		if got, err := parse(line); err != nil || got != want {
			t.Errorf("%s: %+v, %v", line, got, err)
		}
	}
	for line, want := range map[string]string{
		"-n":          "option -n needs a value",
		"--name":      "option --name needs a value",
		"--flood=1":   "option --flood has no value",
		"-x":          "unknown option -x",
		"-fx":         "unknown option -x",
		"--x":         "unknown option --x",
		"--nam x":     "option --nam may be --name or --named",
		"x":           `unexpected argument "x"`,
		"-":           `unexpected argument "-"`,
		"-i 10":       "-i 10: expected a number from 1 to 9",
		"--int x":     "-i x: expected a number from 1 to 9",
		"-d 2h":       "-d 2h: expected at most 1h0m0s",
		"-d 0":        "-d 0: expected at least 1ms",
		"-d 1.5s":     "-d 1.5s: expected a time such as 200ms, 3s, 5m, 1h or 1d",
		"-r 1m":       "-r 1m: expected a rate in bit/s such as 64000, 500k, 10M or 1G",
		"-r 0x10":     "-r 0x10: expected a rate in bit/s such as 64000, 500k, 10M or 1G",
		"-r 1.2.3":    "-r 1.2.3: expected a rate in bit/s such as 64000, 500k, 10M or 1G",
		"-r 9999999G": "-r 9999999G: expected a rate in bit/s such as 64000, 500k, 10M or 1G",
	} {
		if _, err := parse(line); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", line, err, want)
		}
	}
}

// A rate is kept whatever the fraction of a nanosecond between packets, and
// caught up with after a delay.
func TestPacer(t *testing.T) {
	for _, rate := range []float64{1e6, 3e6, 7777777} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			p := NewPacer(1000, rate, false)
			sent, calls := uint64(0), 0
			for {
				all, err := p.Wait(ctx, sent)
				if err != nil {
					break
				}
				if all <= sent {
					t.Fatalf("%d are due after %d", all, sent)
				}
				sent = all
				if calls++; calls == 100 {
					time.Sleep(time.Second / 2)
				}
			}
			want := rate * 3 / 8000
			if d := float64(sent) - want; d < -1 || d > 1 {
				t.Errorf("%v bit/s: %d packets, want %v", rate, sent, want)
			}
		})
	}
}

// Spinning, in real time.
func TestPacerSpin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		p := NewPacer(1000, 8e6, true)
		looks := 0
		p.now = func() time.Time { // virtual time stands still while somebody runs
			looks++
			time.Sleep(10 * time.Microsecond)
			return time.Now()
		}
		n := uint64(0)
		for {
			all, err := p.Wait(ctx, n)
			if err != nil {
				break
			}
			if all != n+1 {
				t.Errorf("%d packets are due after %d", all, n)
			}
			n = all
		}
		if n != 100 || looks < 100*50 {
			t.Errorf("%d packets, want 100; %d looks at the clock", n, looks)
		}
		ended, cancel2 := context.WithCancel(t.Context())
		cancel2()
		if _, err := p.Wait(ended, 1<<30); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

func TestPrinter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		p := NewPrinter(&b)
		p.Begin().Str("a ").Num(-3).Str(" ").Fixed(1.0005).End()
		p.mu.Lock() // as whoever writes to b
		if b.Len() > 0 {
			t.Error("written at once")
		}
		p.mu.Unlock()
		time.Sleep(flushAfter)
		synctest.Wait()
		p.Line("x")
		_, _ = After(p, &b).Write([]byte("err\n"))
		if got := b.String(); got != "a -3 1.000\nx\nerr\n" && got != "a -3 1.001\nx\nerr\n" {
			t.Errorf("%q", got)
		}
		if n := testing.AllocsPerRun(100, func() { p.Begin().Str("a ").Num(7).Fixed(2).End(); p.Flush() }); n > 1 {
			t.Errorf("%v allocations", n)
		}
	})
	if Terminal(io.Discard) {
		t.Error("a terminal")
	}
}
