// Package linkstate is the routing instance of one member of a unicast layer
// (spec 42, spec 50 §1 and §6): it floods one link-state advertisement (LSA)
// per data-transfer adjacency over the management flows, keeps the database of
// everybody's, and computes the forwarding table.
//
// An Instance is a deterministic state machine: no goroutine, no clock, no
// socket, no random numbers. The owner calls the event methods with the time
// (whose monotonic part counts), then Tick, then takes what came out:
//
//	in.Receive(now, flow, pkt)        // any number of events
//	in.Tick(now)                      // does all the work that is due
//	for _, p := range in.Output() {}  // packets to send on management flows
//	set, gone := in.Changes()         // what to write into the table
//	timer.Reset(in.NextDeadline())    // when to call Tick without an event
//
// It is not safe for concurrent use.
//
// Every usable link weighs 1 (spec 42 §7), so shortest paths are found by
// breadth-first search over dense indexes: no heap and no map in the inner
// loop. A run happens at once when the set of usable links changed, and a
// burst of changes is put together by a hold-down that doubles from HoldMin.
package linkstate

import (
	"cmp"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/o7s/o7s-router/lib/wire"
)

// Policy selects what is computed for each destination; the numbers are those
// on the wire (spec 41 §4, spec 42 §9).
type Policy uint8

// Policies.
const (
	Simple Policy = iota // one next hop
	LFA                  // one next hop and a loop-free alternate
	ECMP                 // all next hops on shortest paths
)

func (p Policy) String() string {
	switch p {
	case Simple:
		return "link-state"
	case LFA:
		return "lfa"
	case ECMP:
		return "ecmp"
	}
	return fmt.Sprintf("policy-%d", uint8(p))
}

// FlowID is the owner's number for an N-1 flow.
type FlowID uint64

// Times and sizes; those that a layer configures have the defaults of spec 42 §4.
const (
	DefaultTRecalc = 4 * time.Second
	DefaultTUpdate = 15 * time.Second
	DefaultTTimeo  = 60 * time.Second
	// DefaultSettle is how long a reference peer may take to start reading a new
	// management flow (spec 42 §12, oddity 0).
	DefaultSettle = 100 * time.Millisecond
	// DefaultMaxEntries bounds what a neighbour can make us store (LSAs are not
	// authenticated): about 30 MiB.
	DefaultMaxEntries = 1 << 18

	// HoldMin is the first pause between two computations: the two ends of a
	// link, and the links of a lost node, report within it.
	HoldMin = 5 * time.Millisecond
	// holdMax bounds the pause when TRecalc is longer: a computation for 1000
	// nodes takes well below a millisecond, so waiting longer saves nothing.
	holdMax = 500 * time.Millisecond

	// A new management flow gets the whole database. A burst larger than a
	// flow's queue (1023 packets in the reference, spec 47 §4.4) would lose the
	// rest, so a flow sends at most burst packets per pace.
	burst = 64
	pace  = time.Millisecond

	logRuns = 32 // computations remembered for show
)

// Config says who we are and how the layer routes. Zero durations and
// MaxEntries get the defaults.
type Config struct {
	Self   uint64 // own address, not 0
	Policy Policy

	TRecalc time.Duration // longest pause between a change and the computation
	TUpdate time.Duration // period of the refresh of our own LSAs
	TTimeo  time.Duration // life of an entry that is not refreshed
	Settle  time.Duration // see DefaultSettle; negative: none

	MaxEntries int

	// NoWithdraw switches spec 50 §1 off, in both directions: losses are noticed
	// by ageing, as between reference members. For tests and measurements.
	NoWithdraw bool

	Log *slog.Logger // nil: none
}

// Stats counts since the start of the instance.
type Stats struct {
	RxLSA, RxWithdraw   uint64 // well-formed packets received
	TxLSA, TxWithdraw   uint64 // packets put out
	Malformed           uint64 // wrong length, unknown kind, address 0, or a link to itself
	UnknownFlow         uint64 // received on a flow that is no management flow
	Duplicate           uint64 // not newer than what we have
	Refused             uint64 // claims to come from us, or the database is full
	Aged                uint64 // entries that timed out
	Runs                uint64 // computations
	Entries, Withdrawn  int    // in the database now
	Vertices, LinksUsed int    // in the last computation; links count once per direction
}

// Run is one computation of the table.
type Run struct {
	At       time.Time
	Trigger  string // what asked for it: announce, withdraw, age, dt-up, dt-down
	Src, Dst uint64 // the link that asked
	Changes  int    // links that changed since the run before
	Vertices int
	Links    int // usable, each direction counted
	Routes   int
}

// Instance is the routing state of one member. Create it with New.
type Instance struct {
	cfg   Config
	log   *slog.Logger
	epoch time.Time // times inside are nanoseconds since

	db   lsdb
	dt   []adjacency // by ascending address
	mgmt []*neighbor // by ascending address
	// byFlow finds the neighbour of a management flow, also of replaced ones.
	byFlow map[FlowID]*neighbor

	nextRefresh int64

	// Computation: pending since a usable link changed, due at spfAt.
	spfPending bool
	spfAt      int64
	lastRun    int64
	hold       int64
	everRan    bool
	trigger    Run
	graph      graph
	cur, prev  table
	curTaken   bool // the owner has taken cur with Changes
	removed    []uint64
	changed    []Route

	runs    [logRuns]Run
	numRuns int

	out      []Packet
	outTaken bool

	conflict    wire.LSA
	hasConflict bool

	stats Stats
}

// adjacency is a data-transfer neighbour and the flows to it, newest last.
type adjacency struct {
	peer  uint64
	flows []FlowID
}

// New returns the instance of a member with address cfg.Self. The first
// refresh of its LSAs comes TUpdate after now.
func New(cfg Config, now time.Time) (*Instance, error) {
	if cfg.Self == 0 {
		return nil, fmt.Errorf("link-state: own address is 0")
	}
	if cfg.Policy > ECMP {
		return nil, fmt.Errorf("link-state: unknown policy %d, expected 0 (link-state), 1 (lfa) or 2 (ecmp)", cfg.Policy)
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&cfg.TRecalc, DefaultTRecalc)
	def(&cfg.TUpdate, DefaultTUpdate)
	def(&cfg.TTimeo, DefaultTTimeo)
	def(&cfg.Settle, DefaultSettle)
	if cfg.TRecalc < 0 || cfg.TUpdate < 0 || cfg.TTimeo < 0 {
		return nil, fmt.Errorf("link-state: negative timer (recalc %v, update %v, timeout %v)", cfg.TRecalc, cfg.TUpdate, cfg.TTimeo)
	}
	if cfg.Settle < 0 {
		cfg.Settle = 0
	}
	if cfg.MaxEntries <= 0 {
		cfg.MaxEntries = DefaultMaxEntries
	}
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	in := &Instance{cfg: cfg, log: log, epoch: now, byFlow: make(map[FlowID]*neighbor), hold: int64(HoldMin)}
	in.nextRefresh = int64(cfg.TUpdate)
	in.db.init()
	return in, nil
}

// Self returns the own address.
func (in *Instance) Self() uint64 { return in.cfg.Self }

func (in *Instance) ns(now time.Time) int64 { return int64(now.Sub(in.epoch)) }

// DTUp reports a data-transfer flow to a neighbour. A second flow to the same
// neighbour replaces the first for sending; the adjacency lasts until all its
// flows are gone. A neighbour with our own address is a conflict, see Conflict.
func (in *Instance) DTUp(now time.Time, flow FlowID, peer uint64) {
	if peer == 0 {
		return
	}
	if peer == in.cfg.Self {
		in.setConflict(wire.LSA{Src: peer, Dst: peer})
		return
	}
	i, ok := in.findDT(peer)
	if !ok {
		in.dt = slices.Insert(in.dt, i, adjacency{peer: peer})
	}
	a := &in.dt[i]
	a.flows = append(slices.DeleteFunc(a.flows, func(f FlowID) bool { return f == flow }), flow)
	if !ok {
		in.announceOwn(in.ns(now), peer)
	}
}

// DTDown reports that a data-transfer flow is gone: disconnected, deallocated,
// its peer timed out, or the kernel reports the link down. When it was the last
// one to that neighbour the adjacency is withdrawn. Unknown flows are ignored.
func (in *Instance) DTDown(now time.Time, flow FlowID) {
	for i := range in.dt {
		a := &in.dt[i]
		j := slices.Index(a.flows, flow)
		if j < 0 {
			continue
		}
		a.flows = slices.Delete(a.flows, j, j+1)
		if len(a.flows) == 0 {
			peer := a.peer
			in.dt = slices.Delete(in.dt, i, i+1)
			in.withdrawOwn(in.ns(now), peer)
		}
		return
	}
}

// DTFlow returns the flow to use towards a neighbour: the newest.
func (in *Instance) DTFlow(peer uint64) (FlowID, bool) {
	i, ok := in.findDT(peer)
	if !ok {
		return 0, false
	}
	f := in.dt[i].flows
	return f[len(f)-1], true
}

func (in *Instance) findDT(peer uint64) (int, bool) {
	return slices.BinarySearchFunc(in.dt, peer, func(a adjacency, p uint64) int { return cmp.Compare(a.peer, p) })
}

// Leave withdraws all own LSAs, before the member shuts down or changes its
// address. Call Tick and send the Output before closing the flows.
func (in *Instance) Leave(now time.Time) {
	t := in.ns(now)
	for _, a := range in.dt {
		in.withdrawOwn(t, a.peer)
	}
	in.dt = in.dt[:0]
}

// Receive takes one packet that arrived on a management flow. Malformed ones
// are counted and dropped.
func (in *Instance) Receive(now time.Time, flow FlowID, pkt []byte) {
	if len(pkt) == 0 {
		return // keep-alive
	}
	n := in.byFlow[flow]
	if n == nil {
		in.stats.UnknownFlow++
		return
	}
	// The peer sends only after its reader runs, so it needs no more time.
	n.proven = n.proven || n.flow() == flow
	m, err := wire.ParseLSA(pkt)
	if err != nil || m.Src == 0 || m.Dst == 0 || m.Src == m.Dst || m.Withdraw && in.cfg.NoWithdraw {
		in.stats.Malformed++
		return
	}
	t := in.ns(now)
	if m.Withdraw {
		in.stats.RxWithdraw++
	} else {
		in.stats.RxLSA++
	}
	switch {
	case m.Src == in.cfg.Self:
		in.receiveOwn(t, n, m)
	case m.Withdraw:
		in.receiveWithdraw(t, n, m)
	default:
		in.receiveAnnounce(t, n, m)
	}
}

func (in *Instance) receiveAnnounce(t int64, n *neighbor, m wire.LSA) {
	s, ok := in.db.lookup(m.Src, m.Dst)
	if !ok {
		if in.db.count() >= in.cfg.MaxEntries {
			in.stats.Refused++
			return
		}
		s = in.db.insert(m.Src, m.Dst)
		in.db.set(s, live, m.Seqno, t)
		in.linkChanged(t, s, "announce")
		in.flood(s, n)
		return
	}
	e := &in.db.entries[s]
	switch {
	case m.Seqno <= e.seq:
		in.stats.Duplicate++
		if e.state == withdrawn {
			n.push(s) // the peer has an outdated entry: tell it, and only it
		} else if m.Seqno == e.seq {
			n.drop(s) // it has what we were about to send
		}
	case e.state == withdrawn:
		in.db.set(s, live, m.Seqno, t)
		in.linkChanged(t, s, "announce")
		in.flood(s, n)
	default:
		in.db.set(s, live, m.Seqno, t)
		in.flood(s, n)
	}
}

func (in *Instance) receiveWithdraw(t int64, n *neighbor, m wire.LSA) {
	s, ok := in.db.lookup(m.Src, m.Dst)
	if !ok {
		// The announcement may still come, by another way.
		if in.db.count() >= in.cfg.MaxEntries {
			in.stats.Refused++
			return
		}
		s = in.db.insert(m.Src, m.Dst)
		in.db.set(s, withdrawn, m.Seqno, t)
		in.flood(s, n)
		return
	}
	e := &in.db.entries[s]
	switch {
	case m.Seqno < e.seq:
		in.stats.Duplicate++
	case e.state == live:
		in.db.set(s, withdrawn, m.Seqno, t)
		in.linkChanged(t, s, "withdraw")
		in.flood(s, n)
	case m.Seqno == e.seq:
		in.stats.Duplicate++
		n.drop(s)
	default:
		in.db.set(s, withdrawn, m.Seqno, t)
		in.flood(s, n)
	}
}

// receiveOwn handles an LSA that names us as its originator. It never enters
// the database (spec 42 §12, oddity 3). One that we sent is an echo; what is
// newer than all we sent comes from another node with our address.
func (in *Instance) receiveOwn(t int64, n *neighbor, m wire.LSA) {
	s, ok := in.db.lookup(m.Src, m.Dst)
	if !ok {
		in.stats.Refused++
		in.setConflict(m)
		return
	}
	e := &in.db.entries[s]
	if m.Seqno > e.seq {
		in.setConflict(m)
		// Speak above it, or the others would not believe us. Not at once: two
		// nodes with one address would race each other up at the speed of the link.
		if e.jump < m.Seqno+1 {
			e.jump = m.Seqno + 1
			in.db.jumps = true
			if at := t + int64(in.cfg.TRecalc); at < in.nextRefresh {
				in.nextRefresh = at
			}
		}
		return
	}
	switch {
	case e.state == withdrawn && !m.Withdraw:
		in.stats.Refused++
		in.db.touch(s, t) // copies are still about: remember it longer
		n.push(s)
	case m.Withdraw == (e.state == withdrawn) && m.Seqno == e.seq:
		in.stats.Duplicate++
		n.drop(s)
	default:
		in.stats.Duplicate++
	}
}

func (in *Instance) setConflict(m wire.LSA) {
	if in.hasConflict {
		return
	}
	in.conflict, in.hasConflict = m, true
}

// Conflict returns, once, the LSA that shows that another node uses our
// address (spec 50 §6): the owner should draw a new address and start a new
// Instance. An LSA with Src and Dst both our own stands for a neighbour that
// connected with our address.
func (in *Instance) Conflict() (wire.LSA, bool) {
	m, ok := in.conflict, in.hasConflict
	in.hasConflict = false
	return m, ok
}

func (in *Instance) announceOwn(t int64, peer uint64) {
	if in.db.numOwn == 0 && t >= in.nextRefresh {
		in.nextRefresh = t + int64(in.cfg.TUpdate) // nothing to refresh until now
	}
	s, ok := in.db.lookup(in.cfg.Self, peer)
	var seq uint64
	if !ok {
		s = in.db.insert(in.cfg.Self, peer)
		in.db.entries[s].own = true
	} else {
		seq = in.db.nextSeq(s) // continue, others may still remember
	}
	in.db.set(s, live, seq, t)
	in.linkChanged(t, s, "dt-up")
	in.flood(s, nil)
}

func (in *Instance) withdrawOwn(t int64, peer uint64) {
	s, ok := in.db.lookup(in.cfg.Self, peer)
	if !ok || in.db.entries[s].state != live {
		return
	}
	in.db.set(s, withdrawn, in.db.entries[s].seq, t)
	in.linkChanged(t, s, "dt-down")
	in.flood(s, nil)
}

// Tick does everything that is due: ageing, refresh, computation, and moving
// queued LSAs to the output. Call it after events and at NextDeadline.
func (in *Instance) Tick(now time.Time) {
	t := in.ns(now)
	if in.outTaken {
		in.out, in.outTaken = in.out[:0], false
	}
	in.age(t)
	if t >= in.nextRefresh {
		in.refresh(t)
	}
	if in.spfPending && t >= in.spfAt {
		in.compute(t)
	}
	for _, n := range in.mgmt {
		in.send(t, n)
	}
}

// NextDeadline is when Tick has work without another event; zero means never.
func (in *Instance) NextDeadline() time.Time {
	next := int64(-1)
	at := func(t int64) {
		if next < 0 || t < next {
			next = t
		}
	}
	if in.db.numOwn > 0 || in.db.jumps {
		at(in.nextRefresh)
	}
	if in.spfPending {
		at(in.spfAt)
	}
	if t, ok := in.db.nextAge(in.life(live), in.life(withdrawn), in.life(ownWithdrawn)); ok {
		at(t)
	}
	for _, n := range in.mgmt {
		if t, ok := n.deadline(); ok {
			at(t)
		}
	}
	if next < 0 {
		return time.Time{}
	}
	return in.epoch.Add(time.Duration(next))
}

// life is how long an entry in the given list stays after its last update.
func (in *Instance) life(list uint8) int64 {
	switch list {
	case live:
		return int64(in.cfg.TTimeo)
	case withdrawn:
		// A reference node's scan keeps an entry that much longer, and may
		// replicate it to a new neighbour until then.
		return int64(in.cfg.TTimeo + in.cfg.TUpdate)
	}
	// The memory of our sequence numbers must outlast every such copy, or an echo
	// would look like a conflict. Reference members count the age from when they
	// got the copy, so it can live on in members that join one after the other.
	return 10 * int64(in.cfg.TTimeo+in.cfg.TUpdate)
}

func (in *Instance) age(t int64) {
	for list := uint8(live); list <= ownWithdrawn; list++ {
		for {
			s := in.db.lists[list].head
			if s < 0 || t <= in.db.entries[s].stamp+in.life(list) {
				break
			}
			if list == live {
				in.stats.Aged++
				e := &in.db.entries[s]
				in.log.Debug("lsa_aged", "src", e.src, "dst", e.dst, "seqno", e.seq)
				in.db.unlink(s)
				e.state = free
				in.linkChanged(t, s, "age")
			}
			for _, n := range in.mgmt {
				n.drop(s)
			}
			in.db.remove(s)
		}
	}
}

// refresh sends our LSAs with the next sequence number.
func (in *Instance) refresh(t int64) {
	in.nextRefresh = t + int64(in.cfg.TUpdate)
	for _, a := range in.dt {
		if s, ok := in.db.lookup(in.cfg.Self, a.peer); ok {
			in.db.set(s, live, in.db.nextSeq(s), t)
			in.flood(s, nil)
		}
	}
	if !in.db.jumps {
		return
	}
	// Withdrawals that somebody contradicted.
	in.db.jumps = false
	for s := in.db.lists[ownWithdrawn].head; s >= 0; {
		next := in.db.entries[s].next
		if in.db.entries[s].jump != 0 {
			in.db.set(s, withdrawn, in.db.nextSeq(s), t)
			in.flood(s, nil)
		}
		s = next
	}
}

// linkChanged notes that the entry appeared or went; only a link that both
// ends announce matters to the computation.
func (in *Instance) linkChanged(t int64, s int32, why string) {
	e := &in.db.entries[s]
	if e.rev < 0 || in.db.entries[e.rev].state != live {
		return
	}
	if in.spfPending {
		in.trigger.Changes++
		return
	}
	in.spfPending = true
	in.trigger = Run{Trigger: why, Src: e.src, Dst: e.dst, Changes: 1}
	in.spfAt = t
	if in.everRan && t < in.lastRun+in.hold {
		in.spfAt = in.lastRun + in.hold
		in.hold = min(2*in.hold, int64(min(in.cfg.TRecalc, holdMax)))
	} else {
		in.hold = min(int64(HoldMin), int64(in.cfg.TRecalc))
	}
}

func (in *Instance) compute(t int64) {
	in.spfPending = false
	in.lastRun, in.everRan = t, true
	if in.curTaken {
		in.cur, in.prev, in.curTaken = in.prev, in.cur, false
	}
	in.graph.build(&in.db)
	in.graph.routes(&in.db, in.cfg.Self, in.cfg.Policy, &in.cur)
	in.stats.Runs++
	r := in.trigger
	r.At = in.epoch.Add(time.Duration(t))
	r.Vertices, r.Links, r.Routes = in.graph.used, len(in.graph.to), len(in.cur.routes)
	in.stats.Vertices, in.stats.LinksUsed = r.Vertices, r.Links
	in.runs[in.numRuns%logRuns] = r
	in.numRuns++
	in.log.Debug("spf", "trigger", r.Trigger, "src", r.Src, "dst", r.Dst, "changes", r.Changes, "routes", r.Routes)
}

// Stats returns the counters.
func (in *Instance) Stats() Stats {
	s := in.stats
	s.Withdrawn = in.db.lists[withdrawn].n + in.db.lists[ownWithdrawn].n
	s.Entries = in.db.count() - s.Withdrawn
	return s
}

// Runs returns the last computations, at most 32, oldest first.
func (in *Instance) Runs() []Run {
	n := min(in.numRuns, logRuns)
	out := make([]Run, 0, n)
	for i := in.numRuns - n; i < in.numRuns; i++ {
		out = append(out, in.runs[i%logRuns])
	}
	return out
}
