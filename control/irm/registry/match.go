package registry

import (
	"cmp"
	"slices"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
)

// Verdict is what became of a search for an acceptor.
type Verdict uint8

// Verdicts.
const (
	Found   Verdict = iota + 1 // Acceptor takes the flow
	Nobody                     // nobody will
	Waiting                    // a later Answer with the same ticket tells
	Start                      // start Exec; the ticket goes on waiting
)

// Acceptor is who takes a flow: a pending accept of a process, or an IPC process.
type Acceptor struct {
	Accept uint64 // key of the accept; 0: an IPC process
	Client uint64 // process of the accept
	Member int32  // id of the IPC process
}

// Exec is a program to start.
type Exec struct {
	Name string   // on whose behalf
	Path string   // absolute
	Args []string // without argv[0]
}

// Answer is what the registry wants of its owner.
type Answer struct {
	Ticket   uint64
	Verdict  Verdict
	Acceptor Acceptor
	Exec     Exec
}

// ticket is a request that waits for an acceptor.
type ticket struct {
	id       uint64
	name     *name
	seeker   int32 // IPC process that asks; it is never its own acceptor
	deadline time.Time
	started  bool // no further program is started for it
}

// Request is a search for somebody who accepts a flow.
type Request struct {
	Name string
	// Seeker is the IPC process that asks, 0 for others: no IPC process is
	// connected to itself.
	Seeker int32
	// Remote requests wait AcceptWait for a program that is bound but does not
	// run (it may be restarting); local ones go on to the layers at once.
	Remote bool
}

// Seek looks for an acceptor. The verdict is Found, Nobody or Waiting; when a
// program must be started, Take has a Start with the same ticket. The wait is
// AcceptWait when a process is bound, and one more for a started program.
func (r *Registry) Seek(now time.Time, q Request) (Answer, error) {
	x, ok := r.names[q.Name]
	if !ok {
		return Answer{Verdict: Nobody}, unknownName(q.Name)
	}
	if a, ok := r.pop(x, q.Seeker); ok {
		return Answer{Verdict: Found, Acceptor: a}, nil
	}
	r.serial++
	t := &ticket{id: r.serial, name: x, seeker: q.Seeker}
	switch {
	case len(x.pids) > 0:
		t.deadline = now.Add(AcceptWait)
	case x.starting.After(now): // one start serves all that wait
		t.started, t.deadline = true, x.starting
	case r.start(now, t, 2*AcceptWait):
	case q.Remote && len(x.programs) > 0:
		t.deadline = now.Add(AcceptWait)
	default:
		return Answer{Verdict: Nobody}, nil
	}
	r.tickets[t.id] = t
	x.waiting = append(x.waiting, t)
	return Answer{Ticket: t.id, Verdict: Waiting}, nil
}

// start asks for the auto-start program of t's name that was bound last.
func (r *Registry) start(now time.Time, t *ticket, patience time.Duration) bool {
	x := t.name
	for _, b := range slices.Backward(x.programs) {
		if !b.auto {
			continue
		}
		t.started, t.deadline = true, now.Add(patience)
		x.starting = t.deadline
		r.out = append(r.out, Answer{
			Ticket: t.id, Verdict: Start,
			Exec: Exec{Name: x.name, Path: b.prog.path, Args: slices.Clone(b.args)},
		})
		return true
	}
	return false
}

// Ended says that a program started for name n ended, or did not start.
func (r *Registry) Ended(n string) {
	if x, ok := r.names[n]; ok {
		x.starting = time.Time{}
		r.recheck(x)
	}
}

// Abandon gives up a waiting search.
func (r *Registry) Abandon(id uint64) {
	if t, ok := r.tickets[id]; ok {
		r.forget(t)
	}
}

// Accept adds a pending accept of process client. key must be new.
func (r *Registry) Accept(client, key uint64) error {
	c, ok := r.clients[client]
	if !ok {
		return fail(o7serr.EINVAL, "accept before hello")
	}
	a := &accept{key: key, client: c}
	r.accepts[key] = a
	c.accepts[a] = struct{}{}
	// Several names may have a request for it: the first by name gets it.
	var names []*name
	for x := range r.bound[c.pid] {
		names = append(names, x)
	}
	slices.SortFunc(names, func(a, b *name) int { return cmp.Compare(a.name, b.name) })
	for _, x := range names {
		if r.accepts[key] == nil {
			break
		}
		r.enqueue(x, entry{accept: a})
	}
	return nil
}

// CancelAccept withdraws a pending accept; it reports whether there was one.
func (r *Registry) CancelAccept(key uint64) bool {
	a, ok := r.accepts[key]
	if !ok {
		return false
	}
	delete(r.accepts, key)
	delete(a.client.accepts, a)
	for x := range r.bound[a.client.pid] {
		x.queue = slices.DeleteFunc(x.queue, func(e entry) bool { return e.accept == a })
	}
	return true
}

// enqueue puts e where the policy of x wants it and serves who waits.
func (r *Registry) enqueue(x *name, e entry) {
	if x.lb == Spillover {
		x.queue = slices.Insert(x.queue, 0, e)
	} else {
		x.queue = append(x.queue, e)
	}
	if e.accept != nil {
		x.starting = time.Time{}
	}
	r.serve(x)
}

// serve hands acceptors to waiting requests, oldest first.
func (r *Registry) serve(x *name) {
	for _, t := range slices.Clone(x.waiting) {
		if a, ok := r.pop(x, t.seeker); ok {
			r.settle(t, Answer{Verdict: Found, Acceptor: a})
		}
	}
}

// pop takes the first acceptor that may serve seeker.
func (r *Registry) pop(x *name, seeker int32) (Acceptor, bool) {
	for i, e := range x.queue {
		if m := e.member; m != nil {
			if !m.ready || m.id == seeker {
				continue
			}
			if x.lb == RoundRobin { // it accepts again at once
				x.queue = append(slices.Delete(x.queue, i, i+1), e)
			}
			return Acceptor{Member: m.id}, true
		}
		r.CancelAccept(e.accept.key)
		return Acceptor{Accept: e.accept.key, Client: e.accept.client.key}, true
	}
	return Acceptor{}, false
}

// recheck answers requests for x that can no longer be served.
func (r *Registry) recheck(x *name) {
	if len(x.pids) > 0 || !x.starting.IsZero() {
		return
	}
	for _, t := range slices.Clone(x.waiting) {
		if t.started || len(x.programs) == 0 {
			r.settle(t, Answer{Verdict: Nobody})
		}
	}
}

func (r *Registry) settle(t *ticket, a Answer) {
	r.forget(t)
	a.Ticket = t.id
	r.out = append(r.out, a)
}

func (r *Registry) forget(t *ticket) {
	delete(r.tickets, t.id)
	if i := slices.Index(t.name.waiting, t); i >= 0 {
		t.name.waiting = slices.Delete(t.name.waiting, i, i+1)
	}
}

// Take returns the answers since the last call, in order.
func (r *Registry) Take() []Answer {
	out := r.out
	r.out = nil
	return out
}

// Expire handles deadlines up to now: a program is started, or nobody accepts.
func (r *Registry) Expire(now time.Time) {
	var due []*ticket
	for _, t := range r.tickets {
		if !t.deadline.After(now) {
			due = append(due, t)
		}
	}
	slices.SortFunc(due, func(a, b *ticket) int { return cmp.Compare(a.id, b.id) })
	for _, t := range due {
		if !t.started {
			if t.name.starting.After(now) {
				t.started, t.deadline = true, t.name.starting
				continue
			}
			if r.start(now, t, AcceptWait) {
				continue
			}
		}
		if !t.name.starting.After(now) {
			t.name.starting = time.Time{}
		}
		r.settle(t, Answer{Verdict: Nobody})
	}
}

// Deadline is when Expire has work to do; false when nothing waits.
func (r *Registry) Deadline() (time.Time, bool) {
	var first time.Time
	for _, t := range r.tickets {
		if first.IsZero() || t.deadline.Before(first) {
			first = t.deadline
		}
	}
	return first, !first.IsZero()
}
