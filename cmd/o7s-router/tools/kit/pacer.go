package kit

import (
	"context"
	"runtime"
	"time"
)

// Pacer tells when the packets of a constant rate are due. Packet n is due at a
// fixed time after the start, so delays do not add up.
type Pacer struct {
	start time.Time
	gap   float64 // ns
	spin  bool
	timer *time.Timer
	now   func() time.Time // time.Now
}

// spinFor is how long a spinning pacer looks at the clock before a packet is
// due: longer than a timer is late.
const spinFor = time.Millisecond

// NewPacer starts a pacer for packets of size bytes at rate bit/s. spin: it
// wastes a processor to be exact.
func NewPacer(size int, rate float64, spin bool) *Pacer {
	p := &Pacer{start: time.Now(), gap: float64(size) * 8e9 / rate, spin: spin, timer: time.NewTimer(time.Hour), now: time.Now}
	p.timer.Stop()
	return p
}

// Wait waits until packet n is due, or ctx ends, and returns how many packets
// are due then, n included. What is due as ctx ends is not sent any more.
func (p *Pacer) Wait(ctx context.Context, n uint64) (uint64, error) {
	due := p.start.Add(time.Duration(float64(n) * p.gap))
	if end, ok := ctx.Deadline(); ok && !due.Before(end) {
		<-ctx.Done()
		return n, ctx.Err()
	}
	now := p.now()
	if early := due.Sub(now); !p.spin && early > 0 || early > spinFor {
		if p.spin {
			early -= spinFor
		}
		p.timer.Reset(early)
		select {
		case <-p.timer.C:
		case <-ctx.Done():
			p.timer.Stop()
			return n, ctx.Err()
		}
		now = p.now()
	}
	for now.Before(due) {
		runtime.Gosched()
		now = p.now()
	}
	// The fraction of a nanosecond that due lacks must not hold n back.
	return max(uint64(float64(now.Sub(p.start))/p.gap)+1, n+1), ctx.Err()
}
