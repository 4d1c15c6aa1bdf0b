package unicast

import (
	"sync"
	"time"
)

// loop runs the control part of one IPC process: every event is a function
// that is called with the current time, one after the other, so the protocol
// cores need no locks. Posting never blocks, which lets receive goroutines of
// lower layers post.
type loop struct {
	mu     sync.Mutex // guards queue and closed
	queue  []func(now time.Time)
	closed bool
	wake   chan struct{}
	done   chan struct{}
}

func newLoop() *loop {
	return &loop{wake: make(chan struct{}, 1), done: make(chan struct{})}
}

// post queues f; it reports false when the loop has ended and f will not run.
func (l *loop) post(f func(now time.Time)) bool {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return false
	}
	l.queue = append(l.queue, f)
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
	return true
}

// maxQueued bounds what waits for the loop because of the network: a few tens
// of megabytes of messages, and more than a neighbour has a reason to send at
// once.
const maxQueued = 8192

// offer is post for what others make us do, a message of a neighbour: it is
// refused while the loop cannot keep up.
func (l *loop) offer(f func(now time.Time)) bool {
	l.mu.Lock()
	full := len(l.queue) >= maxQueued
	l.mu.Unlock()
	return !full && l.post(f)
}

// call runs f in the loop and waits for it; false when the loop has ended.
func (l *loop) call(f func(now time.Time)) bool {
	ran := make(chan struct{})
	if !l.post(func(now time.Time) { f(now); close(ran) }) {
		return false
	}
	select {
	case <-ran:
		return true
	case <-l.done:
		return false
	}
}

// run executes events until stop is closed. After each batch step is called;
// it returns when the cores want to be called again (zero: not at all).
func (l *loop) run(stop <-chan struct{}, step func(now time.Time) time.Time) {
	defer close(l.done)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var batch []func(time.Time)
	for {
		l.mu.Lock()
		batch, l.queue = l.queue, batch[:0]
		l.mu.Unlock()
		now := time.Now()
		for i, f := range batch {
			f(now)
			batch[i] = nil
		}
		next := step(now)
		wait := time.Hour
		if !next.IsZero() {
			wait = max(time.Until(next), 0)
		}
		timer.Reset(wait)
		select {
		case <-stop:
			l.mu.Lock()
			l.closed = true
			batch, l.queue = l.queue, nil
			l.mu.Unlock()
			// Whoever posted before the end is served: callers may wait for it.
			for _, f := range batch {
				f(time.Now())
			}
			return
		case <-l.wake:
		case <-timer.C:
		}
	}
}
