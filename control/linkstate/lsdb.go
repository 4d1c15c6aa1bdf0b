package linkstate

import (
	"cmp"
	"slices"
	"time"
)

// States of an entry. They also number the ageing lists, which hold the
// entries in the order of their last update, so that the head ages first.
// Own live entries are in no list: they go with their adjacency.
const (
	live         = 0
	withdrawn    = 1
	ownWithdrawn = 2 // list only; the state is withdrawn
	free         = 3
)

// entry is one direction of a link. A withdrawn one is remembered so that an
// older announcement does not bring it back.
type entry struct {
	src, dst   uint64
	seq        uint64
	jump       uint64 // own: sequence number to continue from, 0 for seq+1
	stamp      int64  // last accepted update
	sv, dv     int32  // vertices of src and dst
	rev        int32  // entry of the other direction, in any state, or -1
	prev, next int32  // ageing list, or free list by next
	state      uint8
	list       int8 // -1: in none
	own        bool
}

type vertex struct {
	addr uint64
	refs int32 // entries that name it; 0: free
}

type linkKey struct{ src, dst uint64 }

type ageList struct {
	head, tail int32
	n          int
}

// lsdb is the database: entries and vertices in slots that keep their index
// while they live.
type lsdb struct {
	entries   []entry
	freeEntry int32
	index     map[linkKey]int32
	lists     [3]ageList

	vertices    []vertex
	freeVertex  []int32
	vertexIndex map[uint64]int32
	newVertices bool // the set of vertices changed since the last build

	numOwn int  // own live entries
	jumps  bool // an own entry has a jump to make
}

func (d *lsdb) init() {
	d.index = make(map[linkKey]int32)
	d.vertexIndex = make(map[uint64]int32)
	d.freeEntry = -1
	for i := range d.lists {
		d.lists[i] = ageList{head: -1, tail: -1}
	}
}

func (d *lsdb) count() int { return len(d.index) }

func (d *lsdb) lookup(src, dst uint64) (int32, bool) {
	s, ok := d.index[linkKey{src, dst}]
	return s, ok
}

// insert adds an entry in state free; set must follow.
func (d *lsdb) insert(src, dst uint64) int32 {
	s := d.freeEntry
	if s >= 0 {
		d.freeEntry = d.entries[s].next
	} else {
		s = int32(len(d.entries))
		d.entries = append(d.entries, entry{})
	}
	e := &d.entries[s]
	*e = entry{src: src, dst: dst, rev: -1, prev: -1, next: -1, state: free, list: -1}
	e.sv, e.dv = d.ref(src), d.ref(dst)
	if r, ok := d.index[linkKey{dst, src}]; ok {
		e.rev = r
		d.entries[r].rev = s
	}
	d.index[linkKey{src, dst}] = s
	return s
}

func (d *lsdb) ref(addr uint64) int32 {
	v, ok := d.vertexIndex[addr]
	if !ok {
		if n := len(d.freeVertex); n > 0 {
			v = d.freeVertex[n-1]
			d.freeVertex = d.freeVertex[:n-1]
		} else {
			v = int32(len(d.vertices))
			d.vertices = append(d.vertices, vertex{})
		}
		d.vertices[v] = vertex{addr: addr}
		d.vertexIndex[addr] = v
		d.newVertices = true
	}
	d.vertices[v].refs++
	return v
}

func (d *lsdb) unref(v int32) {
	x := &d.vertices[v]
	if x.refs--; x.refs == 0 {
		delete(d.vertexIndex, x.addr)
		d.freeVertex = append(d.freeVertex, v)
		d.newVertices = true
	}
}

// set gives the entry its state and sequence number and makes it the youngest.
func (d *lsdb) set(s int32, state uint8, seq uint64, t int64) {
	e := &d.entries[s]
	if e.own {
		if e.state == live {
			d.numOwn--
		}
		if state == live {
			d.numOwn++
		}
	}
	d.unlink(s)
	e.state, e.seq, e.stamp, e.jump = state, seq, t, 0
	switch {
	case !e.own:
		d.link(s, int8(state))
	case state == withdrawn:
		d.link(s, ownWithdrawn)
	}
}

// touch makes a listed entry the youngest.
func (d *lsdb) touch(s int32, t int64) {
	list := d.entries[s].list
	d.unlink(s)
	d.entries[s].stamp = t
	d.link(s, list)
}

func (d *lsdb) nextSeq(s int32) uint64 {
	e := &d.entries[s]
	return max(e.seq+1, e.jump)
}

func (d *lsdb) link(s int32, list int8) {
	l, e := &d.lists[list], &d.entries[s]
	e.list, e.prev, e.next = list, l.tail, -1
	if l.tail >= 0 {
		d.entries[l.tail].next = s
	} else {
		l.head = s
	}
	l.tail = s
	l.n++
}

func (d *lsdb) unlink(s int32) {
	e := &d.entries[s]
	if e.list < 0 {
		return
	}
	l := &d.lists[e.list]
	if e.prev >= 0 {
		d.entries[e.prev].next = e.next
	} else {
		l.head = e.next
	}
	if e.next >= 0 {
		d.entries[e.next].prev = e.prev
	} else {
		l.tail = e.prev
	}
	e.list, e.prev, e.next = -1, -1, -1
	l.n--
}

func (d *lsdb) remove(s int32) {
	d.unlink(s)
	e := &d.entries[s]
	delete(d.index, linkKey{e.src, e.dst})
	if e.rev >= 0 {
		d.entries[e.rev].rev = -1
	}
	d.unref(e.sv)
	d.unref(e.dv)
	*e = entry{state: free, list: -1, rev: -1, prev: -1, next: d.freeEntry}
	d.freeEntry = s
}

// nextAge is when the first entry ages out, given the lives of the lists.
func (d *lsdb) nextAge(lives ...int64) (t int64, ok bool) {
	for i, l := range lives {
		if h := d.lists[i].head; h >= 0 {
			// Strictly after: an entry lives while now <= stamp + life.
			if at := d.entries[h].stamp + l + 1; !ok || at < t {
				t, ok = at, true
			}
		}
	}
	return t, ok
}

func (d *lsdb) usable(s int32) bool {
	e := &d.entries[s]
	return e.state == live && e.rev >= 0 && d.entries[e.rev].state == live
}

// sorted returns the slots of the live entries, and the withdrawn ones too
// when all is set, by destination and then source: the order of spec 42 §3.
func (d *lsdb) sorted(all bool) []int32 {
	out := make([]int32, 0, len(d.index))
	for s := range d.entries {
		if st := d.entries[s].state; st == live || all && st == withdrawn {
			out = append(out, int32(s))
		}
	}
	slices.SortFunc(out, func(a, b int32) int {
		x, y := &d.entries[a], &d.entries[b]
		return cmp.Or(cmp.Compare(x.dst, y.dst), cmp.Compare(x.src, y.src))
	})
	return out
}

// Entry is one row of the database.
type Entry struct {
	Src, Dst  uint64
	Seqno     uint64
	Age       time.Duration // since the last accepted update
	Own       bool
	Usable    bool // both directions are announced
	Withdrawn bool // remembered, not in use
}

// LSDB returns the database by destination, then source (spec 42 §3).
func (in *Instance) LSDB(now time.Time) []Entry {
	t := in.ns(now)
	slots := in.db.sorted(true)
	out := make([]Entry, len(slots))
	for i, s := range slots {
		e := &in.db.entries[s]
		out[i] = Entry{
			Src: e.src, Dst: e.dst, Seqno: e.seq, Age: time.Duration(t - e.stamp),
			Own: e.own, Usable: in.db.usable(s), Withdrawn: e.state == withdrawn,
		}
	}
	return out
}
