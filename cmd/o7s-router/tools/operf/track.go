package operf

import (
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// window is how far back, in packets, a duplicate is told from a packet that is
// late; a power of two.
const window = 1 << 16

// track counts numbered packets. Numbers wrap around.
type track struct {
	next    uint32 // after the highest number
	packets uint64 // received, each number once
	late    uint64 // of those, after a higher number
	dup     uint64 // received again
	highest uint64 // numbers up to the highest
	seen    [window / 64]uint64
}

// add notes a number and reports whether it is new.
func (t *track) add(seq uint32) bool {
	d := int32(seq - t.next)
	word, bit := &t.seen[seq%window/64], uint64(1)<<(seq%64)
	switch {
	case d >= 0:
		if d >= window {
			clear(t.seen[:])
		} else {
			for s := t.next; s != seq; s++ {
				t.seen[s%window/64] &^= 1 << (s % 64)
			}
		}
		t.next = seq + 1
		t.highest += uint64(d) + 1
	case d < -window:
		// Too old to tell.
		t.packets++
		t.late++
		return true
	case *word&bit != 0:
		t.dup++
		return false
	default:
		t.late++
	}
	*word |= bit
	t.packets++
	return true
}

// lost is how many numbers are missing up to the highest seen.
func (t *track) lost() uint64 { return t.highest - min(t.packets, t.highest) }

// Times from 1 ns to a minute are kept with 3 digits.
const longest = time.Minute

func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(1, int64(longest), 3) }

// spread describes many times.
type spread struct {
	P50  time.Duration `json:"p50_ns"`
	P90  time.Duration `json:"p90_ns"`
	P99  time.Duration `json:"p99_ns"`
	P999 time.Duration `json:"p99.9_ns"`
	Max  time.Duration `json:"max_ns"`
}

// spreadOf describes h; nil when there is nothing in it.
func spreadOf(h *hdrhistogram.Histogram) *spread {
	if h.TotalCount() == 0 {
		return nil
	}
	q := func(p float64) time.Duration { return time.Duration(h.ValueAtQuantile(p)) }
	return &spread{P50: q(50), P90: q(90), P99: q(99), P999: q(99.9), Max: time.Duration(h.Max())}
}

// note records a time; what is out of range counts as the nearest that is not.
func note(h *hdrhistogram.Histogram, d time.Duration) {
	_ = h.RecordValue(int64(min(max(d, 1), longest))) // cannot fail
}
