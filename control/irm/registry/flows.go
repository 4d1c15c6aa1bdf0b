package registry

import (
	"fmt"
	"math/bits"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// MaxFlow is the largest flow id; ids start at 1. The reference has 10239 (spec
// 45 §1), which one program with 10 000 flows to another uses up twice. The ids
// are the node's own, so there may be more: as many as 16 bits count, four times
// what a process may have.
const MaxFlow = 65535

// FlowState is where a flow is in its life (spec 45 §5).
type FlowState uint8

// States of a flow, numbered as in the specification; 6 is unused there.
const (
	FlowInit           FlowState = 0
	FlowAllocPending   FlowState = 1
	FlowAcceptPending  FlowState = 2
	FlowAllocated      FlowState = 3
	FlowDeallocPending FlowState = 4
	FlowDeallocated    FlowState = 5
	FlowNull           FlowState = 7
)

// FlowStates lists every state in which a flow of the table can be.
var FlowStates = []FlowState{FlowInit, FlowAllocPending, FlowAcceptPending, FlowAllocated, FlowDeallocPending}

func (s FlowState) String() string {
	switch s {
	case FlowInit:
		return "init"
	case FlowAllocPending:
		return "alloc-pending"
	case FlowAcceptPending:
		return "accept-pending"
	case FlowAllocated:
		return "allocated"
	case FlowDeallocPending:
		return "dealloc-pending"
	case FlowDeallocated:
		return "deallocated"
	case FlowNull:
		return "null"
	}
	return fmt.Sprintf("state-%d", uint8(s))
}

// next says which states may follow a state. Every state may end in null: a
// process can die at any time.
var next = map[FlowState][]FlowState{
	FlowInit:           {FlowAllocPending, FlowAcceptPending, FlowNull},
	FlowAllocPending:   {FlowAllocated, FlowNull},
	FlowAcceptPending:  {FlowAllocated, FlowNull},
	FlowAllocated:      {FlowDeallocPending, FlowNull},
	FlowDeallocPending: {FlowDeallocated, FlowNull},
	FlowDeallocated:    {FlowNull},
}

// Flow is one end of a flow in the hands of a process or an IPC process.
type Flow struct {
	ID     uint32
	State  FlowState
	Client uint64 // the process that holds it; 0: an IPC process
	PID    int32  // of the process
	UID    uint32
	IPCP   string // the IPC process that holds it; "": a process
	Name   string // the name it was allocated to or accepted for
	QoS    qos.Spec
	MPL    uint32 // ms
	Layer  string // layer that carries it; "" for a direct flow
	Lower  string // IPC process that carries it; "" for a direct flow
	Direct bool   // both ends on this machine, no IPC process between them
}

// Flows is the table of flow ids. It is not safe for concurrent use.
type Flows struct {
	used   [MaxFlow/64 + 1]uint64
	table  map[uint32]*Flow
	counts [8]int
}

func (t *Flows) init() {
	t.table = map[uint32]*Flow{}
	t.used[0] = 1 // id 0 is never given out
}

// New takes the lowest free id for f, in state init. It fails with EAGAIN when
// all ids are in use.
func (t *Flows) New(f Flow) (uint32, error) {
	for w, word := range t.used {
		if word == ^uint64(0) {
			continue
		}
		id := uint32(w*64 + bits.TrailingZeros64(^word))
		if id > MaxFlow {
			break
		}
		t.used[w] |= 1 << (id % 64)
		f.ID, f.State = id, FlowInit
		t.table[id] = &f
		t.counts[FlowInit]++
		return id, nil
	}
	return 0, fail(o7serr.EAGAIN, "all %d flows of the system are in use", MaxFlow)
}

// Get returns a copy of flow id.
func (t *Flows) Get(id uint32) (Flow, bool) {
	f, ok := t.table[id]
	if !ok {
		return Flow{}, false
	}
	return *f, true
}

// Move takes flow id to state to, and applies set (which may be nil) to it.
// State null frees the id. It fails with ENOTALLOC for an unknown id and with
// EINVAL for a step that the life cycle does not have.
func (t *Flows) Move(id uint32, to FlowState, set func(*Flow)) error {
	f, ok := t.table[id]
	if !ok {
		return fail(o7serr.ENOTALLOC, "flow %d", id)
	}
	legal := false
	for _, s := range next[f.State] {
		legal = legal || s == to
	}
	if !legal {
		return fail(o7serr.EINVAL, "flow %d: no way from %s to %s", id, f.State, to)
	}
	t.counts[f.State]--
	f.State = to
	if set != nil {
		set(f)
	}
	if to == FlowNull {
		delete(t.table, id)
		t.used[id/64] &^= 1 << (id % 64)
		return nil
	}
	t.counts[to]++
	return nil
}

// Len is the number of flows.
func (t *Flows) Len() int { return len(t.table) }

// Count is the number of flows in state s.
func (t *Flows) Count(s FlowState) int { return t.counts[s&7] }

// All returns copies of all flows by ascending id.
func (t *Flows) All() []Flow {
	out := make([]Flow, 0, len(t.table))
	for w, word := range t.used {
		if w == 0 {
			word &^= 1
		}
		for ; word != 0; word &= word - 1 {
			out = append(out, *t.table[uint32(w*64+bits.TrailingZeros64(word))])
		}
	}
	return out
}
