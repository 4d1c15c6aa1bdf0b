package calls

import (
	"context"
	"time"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// op is a call that may take long and that must not be begun again when its
// wait was interrupted: a request that was answered in that moment would be
// refused.
type op struct {
	done   chan struct{} // closed when result is set
	result int           // descriptor or number
	abort  context.CancelFunc
	detach bool // goes on without its caller
}

// Alloc begins flow_alloc; Wait has its result. timeo < 0 is the default.
//
// The predefined specifications with in_order ask for a checksum in C, which
// default builds of the reference take out (spec 33 §3): so does this. One
// without in_order that asks for it, qos_raw_no_errors, asks for nothing else,
// and gets it.
func (p *Process) Alloc(name string, q *qos.Spec, timeo time.Duration) int {
	if len(name) == 0 {
		return p.failed(o7serr.EINVAL)
	}
	if q != nil && q.InOrder != 0 {
		plain := *q
		plain.BER = qos.Raw.BER
		q = &plain
	}
	ctx, cancel := within(timeo)
	return p.allocate(ctx, cancel, func(ctx context.Context) (*o7s.Flow, error) { return p.client.Alloc(ctx, name, q) })
}

// Accept begins flow_accept.
func (p *Process) Accept(timeo time.Duration) int {
	ctx, cancel := waiting(timeo)
	return p.allocate(ctx, cancel, p.client.Accept)
}

// Join begins flow_join.
func (p *Process) Join(layer string, timeo time.Duration) int {
	if len(layer) == 0 {
		return p.failed(o7serr.EINVAL)
	}
	ctx, cancel := within(timeo)
	return p.allocate(ctx, cancel, func(ctx context.Context) (*o7s.Flow, error) { return p.client.Join(ctx, layer) })
}

func (p *Process) allocate(ctx context.Context, cancel context.CancelFunc, call func(context.Context) (*o7s.Flow, error)) int {
	return p.start(&op{abort: cancel}, func() int {
		defer cancel()
		f, err := call(ctx)
		if err != nil {
			return code(err)
		}
		fd := p.add(f)
		if fd < 0 {
			f.Close()
		}
		return fd
	})
}

// Dealloc begins flow_dealloc.
func (p *Process) Dealloc(fd int) int {
	d, no := p.take(fd)
	if no == code(o7serr.EBADF) {
		no = code(o7serr.EINVAL) // as the reference does here and in AddSet
	}
	if d == nil {
		return p.start(&op{}, func() int { return no })
	}
	for _, s := range p.allSets() {
		s.drop(d)
	}
	// Not to be undone: a caller that is cancelled leaves it to go on.
	return p.start(&op{detach: true}, func() int {
		err := d.flow.Close()
		p.free(fd)
		return code(err)
	})
}

func (p *Process) failed(e o7serr.Errno) int { return p.start(&op{}, func() int { return code(e) }) }

func (p *Process) start(o *op, run func() int) int {
	o.done = make(chan struct{})
	p.mu.Lock()
	p.last++
	n := p.last
	p.ops[n] = o
	p.mu.Unlock()
	go func() {
		o.result = run()
		close(o.done)
	}()
	return n
}

// Wait waits for an op and returns its result, or Interrupted: then it is to
// be called again, or Abort.
func (p *Process) Wait(n int, seen uint32) int {
	p.mu.Lock()
	o := p.ops[n]
	p.mu.Unlock()
	kick := p.kicked(seen)
	if kick == nil {
		return Interrupted
	}
	select {
	case <-o.done:
	case <-kick:
		return Interrupted
	}
	p.mu.Lock()
	delete(p.ops, n)
	p.mu.Unlock()
	return o.result
}

// Abort ends an op whose result nobody wants. A flow that it got is released.
func (p *Process) Abort(n int) {
	p.mu.Lock()
	o := p.ops[n]
	delete(p.ops, n)
	p.mu.Unlock()
	if o.abort == nil {
		return
	}
	o.abort()
	go func() {
		if <-o.done; o.result >= 0 {
			if d, _ := p.take(o.result); d != nil {
				d.flow.Close()
				p.free(d.fd)
			}
		}
	}()
}

// grace is how much longer than a time-out the daemon has to say that it
// expired. Were it to expire on this side first, a flow that is on its way
// here would be released, and the peer would see it come and go.
const grace = 2 * time.Second

// shortest is the shortest time-out that the daemon knows. It stands for "do
// not wait", and gives it the time to say what is there already.
const shortest = time.Millisecond

// waiting gives the context of a call that waits on this side: a flow that is on
// its way when the time is up is there for the next call. timeo < 0: for ever.
func waiting(timeo time.Duration) (context.Context, context.CancelFunc) {
	if timeo < 0 {
		return context.WithCancel(context.Background())
	}
	return context.WithTimeout(context.Background(), timeo+shortest)
}

// within gives the context of a call whose time-out the daemon sees to, < 0: none.
func within(timeo time.Duration) (context.Context, context.CancelFunc) {
	if timeo < 0 {
		return context.WithCancel(context.Background())
	}
	// The daemon counts ms and is told what is left in whole ones.
	timeo = max(timeo, 0) + shortest
	at := time.Now().Add(timeo)
	ctx, cancel := context.WithTimeout(context.Background(), timeo+grace)
	return patient{ctx, at}, cancel
}

// patient is a context that ends later than the deadline that it tells.
type patient struct {
	context.Context
	at time.Time
}

func (p patient) Deadline() (time.Time, bool) { return p.at, true }
