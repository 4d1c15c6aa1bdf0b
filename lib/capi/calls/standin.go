package calls

import (
	"os"
	"sync"
	"time"

	o7s "github.com/o7s/o7s-router/lib"
)

type setEvent struct {
	Flow  *o7s.Flow
	Event o7s.Event
}

// polled is a waiter that looks at its flows again and again.
type polled struct {
	mu    sync.Mutex // guards what follows
	flows map[*o7s.Flow]bool
	wake  bool
}

func newWaiter() waiter { return &polled{flows: map[*o7s.Flow]bool{}} }

func (p *polled) Add(f *o7s.Flow) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.flows[f] = true
	return nil
}
func (p *polled) Del(f *o7s.Flow)      { p.mu.Lock(); defer p.mu.Unlock(); delete(p.flows, f) }
func (p *polled) Has(f *o7s.Flow) bool { p.mu.Lock(); defer p.mu.Unlock(); return p.flows[f] }
func (p *polled) Zero()                { p.mu.Lock(); defer p.mu.Unlock(); clear(p.flows) }
func (p *polled) Close() error         { p.Zero(); return nil }
func (p *polled) Wake()                { p.mu.Lock(); defer p.mu.Unlock(); p.wake = true }

func (p *polled) Wait(evs []setEvent, d time.Duration) (int, error) {
	end := time.Now().Add(d)
	for {
		n := 0
		p.mu.Lock()
		wake := p.wake
		p.wake = false
		for f := range p.flows {
			if n == len(evs) {
				break
			}
			select {
			case e, ok := <-f.Events():
				if ok {
					evs[n] = setEvent{f, e}
					n++
				}
				continue
			default:
			}
			if f.RxLen() > 0 {
				evs[n] = setEvent{f, 1}
				n++
			}
		}
		p.mu.Unlock()
		if n > 0 || wake {
			return n, nil
		}
		if d >= 0 && !time.Now().Before(end) {
			return 0, os.ErrDeadlineExceeded
		}
		time.Sleep(500 * time.Microsecond)
	}
}
