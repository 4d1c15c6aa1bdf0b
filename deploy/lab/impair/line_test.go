package impair

import (
	"math"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

const second = int64(time.Second)

// run offers n frames of size bytes, one every gap, and returns the times at
// which each number came out, in the order of coming out.
func run(l *line, im *Impairment, n int, size uint32, gap int64) (out []frame) {
	now := int64(0)
	again := func(a uint64) func() (uint64, bool) { return func() (uint64, bool) { return a, true } }
	take := func(until int64) {
		for {
			due, ok := l.next()
			if !ok || due > until {
				return
			}
			f, ok := l.pop(due)
			if !ok {
				panic("due, but not there")
			}
			out = append(out, f)
		}
	}
	for i := range uint64(n) {
		take(now)
		l.offer(now, im, i, size, again(i))
		now += gap
	}
	take(math.MaxInt64)
	return out
}

// within checks a count of independent events with probability p: five standard
// deviations are passed by one run in two million, and the seed is fixed.
func within(t *testing.T, what string, got uint64, n int, p float64) {
	t.Helper()
	want, dev := p*float64(n), math.Sqrt(p*(1-p)*float64(n))
	if math.Abs(float64(got)-want) > 5*dev {
		t.Errorf("%s: %d of %d, want %.0f +- %.0f", what, got, n, want, dev)
	}
}

func TestLoss(t *testing.T) {
	const n = 200_000
	for _, p := range []float64{0, 0.01, 0.05, 1} {
		l := newLine(1, 0)
		out := run(l, &Impairment{Loss: p}, n, 100, 1000)
		within(t, "lost", l.n.Lost, n, p)
		if uint64(len(out))+l.n.Lost != n {
			t.Errorf("%d came out and %d were lost of %d", len(out), l.n.Lost, n)
		}
	}
	// Losses are independent: of two neighbours both are lost with p*p.
	l := newLine(2, 0)
	im := &Impairment{Loss: 0.05}
	out := run(l, im, n, 100, 1000)
	there := make([]bool, n)
	for _, f := range out {
		there[f.addr] = true
	}
	pairs := uint64(0)
	for i := 0; i+1 < n; i += 2 {
		if !there[i] && !there[i+1] {
			pairs++
		}
	}
	within(t, "pairs", pairs, n/2, 0.05*0.05)
}

func TestSameSeedSameFate(t *testing.T) {
	im := &Impairment{Loss: 0.1, Duplicate: 0.1, Reorder: 0.1, Delay: time.Millisecond, HoldBack: time.Millisecond}
	a := run(newLine(7, 1), im, 10_000, 100, 1000)
	b := run(newLine(7, 1), im, 10_000, 100, 1000)
	if !slices.Equal(a, b) {
		t.Error("one seed, two outcomes")
	}
	if slices.Equal(a, run(newLine(7, 0), im, 10_000, 100, 1000)) {
		t.Error("both directions have the same chances")
	}
	// What is lost does not hang on what else the line does.
	other := *im
	other.Reorder, other.Duplicate = 0, 0
	lost := func(fs []frame) map[uint64]bool {
		m := map[uint64]bool{}
		for _, f := range fs {
			m[f.addr] = true
		}
		return m
	}
	x, y := lost(a), lost(run(newLine(7, 1), &other, 10_000, 100, 1000))
	if len(x) != len(y) {
		t.Errorf("%d and %d frames were lost", 10_000-len(x), 10_000-len(y))
	}
}

func TestDelayAndOrder(t *testing.T) {
	const gap = 10_000
	l := newLine(3, 0)
	out := run(l, &Impairment{Delay: 20 * time.Millisecond}, 5000, 1514, gap)
	for i, f := range out {
		if f.addr != uint64(i) || f.due != int64(i)*gap+int64(20*time.Millisecond) {
			t.Fatalf("frame %d: number %d at %d", i, f.addr, f.due)
		}
	}
	if len(out) != 5000 {
		t.Errorf("%d frames", len(out))
	}
}

func TestReorderAndDuplicate(t *testing.T) {
	const n, gap = 100_000, 10_000
	l := newLine(4, 0)
	im := &Impairment{Delay: time.Millisecond, Reorder: 0.02, HoldBack: 3 * gap, Duplicate: 0.03}
	out := run(l, im, n, 100, gap)
	within(t, "held back", l.n.HeldBack, n, 0.02)
	within(t, "duplicated", l.n.Duplicated, n, 0.03)
	if len(out) != n+int(l.n.Duplicated) {
		t.Errorf("%d frames came out", len(out))
	}
	overtaken := 0
	for i := 1; i < len(out); i++ {
		if out[i].addr < out[i-1].addr {
			overtaken++
		}
		if out[i].due < out[i-1].due {
			t.Fatal("came out before its time")
		}
	}
	if overtaken == 0 {
		t.Error("nothing was overtaken")
	}
}

func TestRate(t *testing.T) {
	const rate, size = 100_000_000, 1250 // 10 000 bits: 100 us a frame
	l := newLine(5, 0)
	im := &Impairment{Rate: rate, Delay: 5 * time.Millisecond, Backlog: 10 * time.Millisecond}
	out := run(l, im, 100_000, size, 50_000) // twice as fast as it takes
	took := out[len(out)-1].due - out[0].due
	if got := float64(len(out)-1) * size * 8 / float64(took) * float64(second); math.Abs(got-rate) > rate/1000 {
		t.Errorf("%.0f bit/s", got)
	}
	within(t, "dropped", l.n.Dropped, 100_000, 0.5)
	// The longest wait is the backlog and the own turn.
	for _, f := range out {
		if wait := f.due - int64(f.addr)*50_000 - int64(im.Delay); wait > int64(im.Backlog)+100_000 {
			t.Fatalf("frame %d waited %v", f.addr, time.Duration(wait))
		}
	}
}

func TestCheck(t *testing.T) {
	for _, im := range []Impairment{{Loss: -0.1}, {Loss: 1.1}, {Duplicate: math.NaN()}, {Delay: -1}, {Rate: -1}} {
		if im.Check() == nil {
			t.Errorf("%+v is good", im)
		}
	}
	if err := (Impairment{Loss: 1, Delay: time.Second}).Check(); err != nil {
		t.Error(err)
	}
}

// The heap against sorting.
func TestHeap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var h heap
		var all []frame
		for i, due := range rapid.SliceOf(rapid.Int64Range(0, 20)).Draw(t, "due") {
			f := frame{due: due, order: uint64(i)}
			h.push(f)
			all = append(all, f)
		}
		slices.SortFunc(all, func(a, b frame) int {
			if a.before(&b) {
				return -1
			}
			return 1
		})
		for _, want := range all {
			if got := h.pop(); got != want {
				t.Fatalf("%v, want %v", got, want)
			}
		}
		if len(h) != 0 {
			t.Fatal("something is left")
		}
	})
}
