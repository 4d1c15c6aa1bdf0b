package impair

import (
	"math/rand/v2"
	"time"
)

// Impairment is what a line does to the frames of one direction. The zero value
// passes them on as they are.
type Impairment struct {
	Loss      float64       // share of the frames that is lost, each independent of the others
	Duplicate float64       // share that arrives twice
	Delay     time.Duration // of every frame
	// Reorder is the share that is held back for HoldBack beyond Delay, so that
	// the frames behind it overtake it.
	Reorder  float64
	HoldBack time.Duration
	// Rate limits the bits per second of whole frames, 0 does not. Frames wait
	// for their turn for at most Backlog (100 ms when 0); later ones are dropped.
	Rate    int64
	Backlog time.Duration
}

// defaultBacklog is the queue of a rate-limited line: what a router of the
// usual make has.
const defaultBacklog = 100 * time.Millisecond

// Counters of one direction, in frames.
type Counters struct {
	Received   uint64
	Sent       uint64 // duplicates included
	Lost       uint64 // by chance, as asked for
	Duplicated uint64
	HeldBack   uint64
	Dropped    uint64 // the backlog of the rate limit was full
}

// line is one direction as a state machine: frames and the time in, frames that
// are due out. Frames are known by their address; the line never looks inside.
type line struct {
	rng   *rand.Rand
	queue heap
	order uint64 // of entering, so that equal times keep it
	idle  int64  // when the rate-limited wire is free, ns
	n     Counters
}

// frame is a frame under way.
type frame struct {
	due   int64 // ns
	order uint64
	addr  uint64
	size  uint32
}

func newLine(seed, stream uint64) *line { return &line{rng: rand.New(rand.NewPCG(seed, stream))} }

// chance draws always, so that a seed gives the same losses whatever else a
// line does.
func (l *line) chance(p float64) bool { return l.rng.Float64() < p }

// offer takes a frame that arrived now. copies is how many of it the line took:
// 0 when it is lost, 2 when it is duplicated. For the second one it is called
// with the address that again returns.
func (l *line) offer(now int64, im *Impairment, addr uint64, size uint32, again func() (uint64, bool)) (copies int) {
	l.n.Received++
	lost, twice, late := l.chance(im.Loss), l.chance(im.Duplicate), l.chance(im.Reorder)
	if lost {
		l.n.Lost++
		return 0
	}
	at := now
	if im.Rate > 0 {
		backlog := im.Backlog
		if backlog == 0 {
			backlog = defaultBacklog
		}
		if l.idle-now > int64(backlog) {
			l.n.Dropped++
			return 0
		}
		at = max(now, l.idle) + int64(size)*8*int64(time.Second)/im.Rate
		l.idle = at
	}
	at += int64(im.Delay)
	if late {
		l.n.HeldBack++
		at += int64(im.HoldBack)
	}
	l.push(at, addr, size)
	if !twice {
		return 1
	}
	a, ok := again()
	if !ok {
		return 1 // no memory is left: it arrives once
	}
	l.n.Duplicated++
	l.push(at, a, size)
	return 2
}

func (l *line) push(due int64, addr uint64, size uint32) {
	l.order++
	l.queue.push(frame{due, l.order, addr, size})
}

// pop returns the next frame that is due.
func (l *line) pop(now int64) (f frame, ok bool) {
	if len(l.queue) == 0 || l.queue[0].due > now {
		return frame{}, false
	}
	return l.queue.pop(), true
}

// next is when the next frame is due; ok is false when there is none.
func (l *line) next() (due int64, ok bool) {
	if len(l.queue) == 0 {
		return 0, false
	}
	return l.queue[0].due, true
}

// heap is a binary heap with the frame that is due first at the top. Frames of
// a plain line come in order, and entering one is then a single comparison.
type heap []frame

func (f *frame) before(g *frame) bool { return f.due < g.due || f.due == g.due && f.order < g.order }

func (h *heap) push(f frame) {
	*h = append(*h, f)
	s := *h
	for i := len(s) - 1; i > 0; {
		up := (i - 1) / 2
		if !s[i].before(&s[up]) {
			return
		}
		s[i], s[up] = s[up], s[i]
		i = up
	}
}

func (h *heap) pop() frame {
	s := *h
	top, last := s[0], len(s)-1
	s[0] = s[last]
	s = s[:last]
	*h = s
	for i := 0; ; {
		first := 2*i + 1
		if first >= last {
			return top
		}
		if second := first + 1; second < last && s[second].before(&s[first]) {
			first = second
		}
		if !s[first].before(&s[i]) {
			return top
		}
		s[i], s[first] = s[first], s[i]
		i = first
	}
}
