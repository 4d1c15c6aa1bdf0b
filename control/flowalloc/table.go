package flowalloc

import (
	"container/heap"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/lib/qos"
)

const (
	firstEID = 64 // smaller EIDs are components of the member (spec 20 §2.3)
	// lastDesc is 4095 in the reference (spec 21 §4). Only the member that made
	// an EID looks into it, so there may be more: all that fit 16 bits, the
	// flows of a node.
	lastDesc = 65535
	maxFlows = lastDesc - firstEID + 1
)

type state uint8

const (
	requesting  state = iota + 1 // REQ sent
	waiting                      // REQ received, not answered
	established                  // both EIDs known
	released                     // the peer said that it released the flow
)

// Flow is one end of a flow of the layer. EID, Peer, QoS, Remote, User,
// Congestion, Updates and Since may be called from any goroutine.
type Flow struct {
	eid, peer uint64
	qos       qos.Spec
	remote    atomic.Uint64 // the peer's EID; 0: not known yet
	ece       atomic.Uint32
	updates   atomic.Uint64
	since     atomic.Int64 // ns since 1970
	user      atomic.Pointer[any]

	// Of the allocator's goroutine:
	state     state
	renewable bool
	renewed   int
	hash      []byte
	deadline  time.Time
}

// EID is our endpoint ID: the destination of the data that we receive.
func (f *Flow) EID() uint64 { return f.eid }

// Peer is the address of the member at the other end.
func (f *Flow) Peer() uint64 { return f.peer }

// QoS is as the request carried it.
func (f *Flow) QoS() qos.Spec { return f.qos }

// Remote is the peer's endpoint ID, the destination of the data that we send;
// 0 while our request has no reply.
func (f *Flow) Remote() uint64 { return f.remote.Load() }

// Congestion is the level that the peer reported last (spec 21 §5).
func (f *Flow) Congestion() uint16 { return uint16(f.ece.Load()) }

// Updates counts the congestion reports of the peer.
func (f *Flow) Updates() uint64 { return f.updates.Load() }

// Since is when the flow was established; zero before.
func (f *Flow) Since() time.Time {
	if ns := f.since.Load(); ns != 0 {
		return time.Unix(0, ns)
	}
	return time.Time{}
}

// SetUser attaches what the packet path needs to deliver data.
func (f *Flow) SetUser(u any) { f.user.Store(&u) }

// User is what SetUser attached last; nil when nothing was.
func (f *Flow) User() any {
	if u := f.user.Load(); u != nil {
		return *u
	}
	return nil
}

// table finds flows by EID. The low half of an EID is the index, the high half
// is random, new for each flow: a descriptor that is used again has a new EID.
type table struct {
	slot [maxFlows]atomic.Pointer[Flow]
	// free is a queue of free indexes: the one that was freed longest ago is
	// used first.
	free       [maxFlows]uint16
	head, used int
}

func (t *table) init() {
	for i := range t.free {
		t.free[i] = uint16(i)
	}
}

// insert gives f an EID with the random half high; false when all are in use.
func (t *table) insert(f *Flow, high uint32) bool {
	if t.used == maxFlows {
		return false
	}
	i := t.free[t.head]
	t.head = (t.head + 1) % maxFlows
	t.used++
	f.eid = uint64(high)<<32 | uint64(i+firstEID)
	t.slot[i].Store(f)
	return true
}

func (t *table) remove(f *Flow) {
	i := uint32(f.eid) - firstEID
	if t.slot[i].CompareAndSwap(f, nil) {
		t.free[(t.head+maxFlows-t.used)%maxFlows] = uint16(i)
		t.used--
	}
}

func (t *table) lookup(eid uint64) *Flow {
	i := uint32(eid) - firstEID
	if i >= maxFlows {
		return nil
	}
	if f := t.slot[i].Load(); f != nil && f.eid == eid {
		return f
	}
	return nil
}

func (t *table) all(yield func(*Flow) bool) {
	for i := range t.slot {
		if f := t.slot[i].Load(); f != nil && !yield(f) {
			return
		}
	}
}

// timers is a heap of deadlines. Entries are not removed when a flow does not
// need them any more; who takes one out compares it with the flow's deadline.
type timers []timer

type timer struct {
	at  time.Time
	eid uint64
}

func (t timers) Len() int           { return len(t) }
func (t timers) Less(i, j int) bool { return t[i].at.Before(t[j].at) }
func (t timers) Swap(i, j int)      { t[i], t[j] = t[j], t[i] }
func (t *timers) Push(x any)        { *t = append(*t, x.(timer)) }
func (t *timers) Pop() any {
	old := *t
	x := old[len(old)-1]
	*t = old[:len(old)-1]
	return x
}

func (t *timers) add(at time.Time, eid uint64) { heap.Push(t, timer{at, eid}) }

func (t *timers) expired(now time.Time) (eid uint64, ok bool) {
	if len(*t) == 0 || (*t)[0].at.After(now) {
		return 0, false
	}
	return heap.Pop(t).(timer).eid, true
}

func (t timers) next() time.Time {
	if len(t) == 0 {
		return time.Time{}
	}
	return t[0].at
}
