// Package core is the protocol of an Ethernet layer (spec 10) without
// Ethernet: name resolution by broadcast, flow allocation and endpoint
// numbers. It is deterministic: no goroutine, no clock, no socket. Events go
// in together with the present time; frames, events and the next deadline
// come out. What differs between DIX and LLC is behind Framer.
package core

import (
	"container/heap"
	"slices"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/wire"
)

const (
	// QueryTimeout ends a name query (spec 10 §4).
	QueryTimeout = 2 * time.Second
	// queryStep spaces repeated queries: the n-th repetition follows n steps
	// after the one before. A repeated query is harmless, a lost one costs the
	// caller its time-out.
	queryStep = 50 * time.Millisecond
	// cacheTTL is how long an answer is believed without a new one. A query
	// costs one broadcast, a stale answer a second of silence.
	cacheTTL = time.Minute
	// Bounds of the cache: answers come unasked, too.
	maxCached        = 4096
	maxCachedPerHash = 8

	// renewAfter is the time without a reply after which the requester is asked
	// for a new request; it doubles each time (spec 10 oddity 10).
	renewAfter = time.Second
	// renewals bounds the new requests: 1, 3 and 7 s after the first one.
	renewals = 3
	// answerWithin bounds how long a request waits for its answer here. The
	// requester's default time-out is 20 s (spec 33 §3).
	answerWithin = 30 * time.Second
	// lateReply is how long an abandoned endpoint is remembered, so that the
	// peer of a late positive reply is told that nobody is there.
	lateReply = 30 * time.Second
	// maxQuarantine bounds what a program may ask for: R and the receiver's
	// inactivity of spec 30 §3.1 are below it.
	maxQuarantine = 5 * time.Minute
	// partingFor is how long the peer of a released flow is remembered, to be
	// told again when it still sends: the message was lost, then. It covers four
	// keep-alives of the default peer time-out (spec 30 §10).
	partingFor = 2 * time.Minute
	// partingEvery spaces these repetitions, per flow.
	partingEvery = time.Second
	// maxPartings bounds how many are remembered; the oldest go first.
	maxPartings = 4096
	// Bounds against floods of requests.
	maxWaiting       = 256
	maxWaitingPerMAC = 64

	// maxMgmt is the longest management payload that the reference takes.
	maxMgmt = 9000
)

// Config is what the protocol needs to know of its interface and layer.
type Config struct {
	Framer  Framer
	MAC     MAC
	MaxSDU  int // bytes of payload of a frame (spec 10 §1.1)
	HashLen int
}

// ID names an allocation, ours or a peer's, from its beginning to its end. An
// allocation may use several endpoints one after the other.
type ID uint64

// Kind says what happened.
type Kind uint8

// Kinds of events.
const (
	NameFound   Kind = iota + 1 // Hash is known now
	NameUnknown                 // nobody answered the query for Hash
	Opened                      // allocation ID uses Endpoint from now on
	Vacated                     // Endpoint of allocation ID is not in use any more; with Remote its user may still be sent to, see Stray
	Established                 // the peer accepted allocation ID
	Failed                      // allocation ID is over: Err
	Renew                       // no reply: call Supply with a fresh request for ID, or Cancel
	Arrived                     // a peer's request ID: call Respond
	Expired                     // a peer's request ID was not answered in time, or replaced
	Forgotten                   // Endpoint, which was vacated with Remote, is nothing any more
	Dealloc                     // the peer released the flow at Endpoint: call Close
)

// Event is something the shell must react to, before it sends the frames that
// came with it. Slices are the event's own.
type Event struct {
	Kind     Kind
	ID       ID
	Endpoint uint16
	Peer     MAC    // Established, Arrived
	Remote   uint16 // Established, Vacated
	QoS      qos.Spec
	Hash     []byte
	Data     []byte
	Err      error
}

// Counts are totals since New. The last three lines are disjoint reasons for
// management messages that had no effect.
type Counts struct {
	QueriesSent, QueriesReceived, AnswersSent, AnswersReceived   uint64
	RequestsSent, RequestsReceived, Renewed, Abandoned           uint64
	AcceptsSent, AcceptsReceived, RefusalsSent, RefusalsReceived uint64
	DeallocsSent, DeallocsReceived, StaleReleased                uint64
	UnknownName, Malformed, UnknownCode, Misaddressed            uint64
	Unexpected, Duplicate, Flooded, NoEndpoint, BadEndpoint      uint64
	CacheFull, RequestsExpired, LateAccept                       uint64
	DeallocsRepeated, QuarantineBroken, Quarantined              uint64 // the last: endpoints now
}

type state uint8

const (
	resolving   state = iota + 1 // ours; waits for the name
	requesting                   // ours; request sent
	renewing                     // ours; waits for Supply
	waiting                      // a peer's; waits for Respond
	established                  // both ends known
	released                     // the peer is gone; waits for Close
)

// flow is an allocation or what became of it.
type flow struct {
	id        ID
	state     state
	ep        uint16 // 0: none
	mac       MAC
	remote    uint16
	qos       qos.Spec
	hash      string
	data      []byte // while resolving
	oap       string // first bytes of the peer's request, which identify it
	renewable bool
	renewed   int
	deadline  time.Time
}

type peer struct {
	mac MAC
	ep  uint16
}

type entry struct {
	mac  MAC
	seen time.Time
}

type query struct {
	sent     int
	next     time.Time
	deadline time.Time
	asked    bool // somebody called Query
}

type abandoned struct {
	mac MAC
	end time.Time
}

// parting is a flow that we released.
type parting struct {
	ep, remote uint16
	mac        MAC
	end, next  time.Time
}

// Core is the protocol state of one IPC process. It must be used by one
// goroutine at a time.
type Core struct {
	cfg        Config
	registered map[string]struct{}
	cache      map[string][]entry // newest first
	queries    map[string]*query
	flows      map[ID]*flow
	lastID     ID
	eps        endpoints
	byPeer     map[peer]*flow // peers' requests, and flows
	waiting    map[MAC]int
	nwait      int
	late       map[uint16]abandoned
	partings   map[uint16]*parting // by our former endpoint
	parted     []*parting          // the same, and forgotten ones, oldest first
	timers     timers
	frames     [][]byte
	events     []Event
	n          Counts
}

// New returns a core without names and flows.
func New(cfg Config) *Core {
	first, last := cfg.Framer.Endpoints()
	return &Core{
		cfg:        cfg,
		registered: map[string]struct{}{},
		cache:      map[string][]entry{},
		queries:    map[string]*query{},
		flows:      map[ID]*flow{},
		eps:        newEndpoints(first, last),
		byPeer:     map[peer]*flow{},
		waiting:    map[MAC]int{},
		late:       map[uint16]abandoned{},
		partings:   map[uint16]*parting{},
	}
}

// Drain returns and forgets the frames to send and the events since the last
// call. Handle the events first: endpoints are installed before the frame that
// makes the peer use them.
func (c *Core) Drain() ([][]byte, []Event) {
	frames, events := c.frames, c.events
	c.frames, c.events = nil, nil
	return frames, events
}

// Counts returns the totals.
func (c *Core) Counts() Counts {
	n := c.n
	n.QuarantineBroken, n.Quarantined = c.eps.early, uint64(len(c.eps.held))
	return n
}

// NextDeadline is when Tick has something to do; zero: never.
func (c *Core) NextDeadline() time.Time {
	t := c.timers.next()
	if len(c.parted) > 0 && (t.IsZero() || c.parted[0].end.Before(t)) {
		t = c.parted[0].end
	}
	return t
}

func (c *Core) event(e Event) { c.events = append(c.events, e) }

func (c *Core) send(to MAC, m *wire.EthMgmt) {
	c.frames = append(c.frames, c.cfg.Framer.MgmtFrame(to, c.cfg.MAC, m))
}

// fits checks a management message with n bytes behind the fixed part.
func (c *Core) fits(n int) error {
	n += c.cfg.Framer.MgmtLen()
	if limit := min(c.cfg.MaxSDU, maxMgmt); n > limit {
		return o7serr.Wrap(o7serr.EMSGSIZE, "management message of %d bytes, limit is %d", n, limit)
	}
	return nil
}

// Tick handles the deadlines that have passed.
func (c *Core) Tick(now time.Time) {
	for len(c.parted) > 0 && !c.parted[0].end.After(now) {
		c.forgetParting()
	}
	for {
		t, ok := c.timers.expired(now)
		switch {
		case !ok:
			return
		case t.hash != "":
			c.queryTimer(now, t.hash)
		case t.id != 0:
			c.flowTimer(now, t.id)
		default:
			if z, ok := c.late[t.ep]; ok && !z.end.After(now) {
				delete(c.late, t.ep)
			}
		}
	}
}

// timers is a heap of deadlines. Entries stay when they are not needed any
// more; who takes one out checks whether it is.
type timers []timer

// timer is due for a query (hash), an allocation (id) or a late endpoint (ep).
type timer struct {
	at   time.Time
	hash string
	id   ID
	ep   uint16
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

func (t *timers) add(x timer) { heap.Push(t, x) }

func (t *timers) expired(now time.Time) (timer, bool) {
	if len(*t) == 0 || (*t)[0].at.After(now) {
		return timer{}, false
	}
	return heap.Pop(t).(timer), true
}

func (t timers) next() time.Time {
	if len(t) == 0 {
		return time.Time{}
	}
	return t[0].at
}

// endpoints hands out endpoint numbers: the one that was freed longest ago
// first, so that stale frames do not reach a new flow (spec 10 §2.4).
type endpoints struct {
	flows      []*flow // by number
	first      uint16
	free       []uint16 // a ring
	head, used int
	held       timers // in quarantine (spec 30 §9); they count as used
	early      uint64 // taken out of quarantine before their time
}

func newEndpoints(first, last uint16) endpoints {
	e := endpoints{first: first, flows: make([]*flow, int(last)+1)}
	for n := first; n <= last; n++ {
		e.free = append(e.free, n)
	}
	return e
}

// reserve puts endpoints into quarantine, before any was taken.
func (e *endpoints) reserve(until time.Time, eps map[uint16]bool) {
	if e.used > 0 || e.head > 0 {
		return
	}
	slices.SortStableFunc(e.free, func(a, b uint16) int {
		switch {
		case eps[a] == eps[b]:
			return 0
		case eps[b]:
			return -1
		}
		return 1
	})
	e.used = len(eps)
	for _, ep := range e.free[len(e.free)-e.used:] {
		e.held.add(timer{at: until, ep: ep})
	}
}

// take gives f an endpoint. One in quarantine is used only when there is no
// other: of those the one whose time is up first.
func (e *endpoints) take(now time.Time, f *flow) bool {
	e.expire(now)
	if e.used == len(e.free) {
		if len(e.held) == 0 {
			return false
		}
		e.early++
		e.put(heap.Pop(&e.held).(timer).ep)
	}
	f.ep = e.free[e.head]
	e.head = (e.head + 1) % len(e.free)
	e.used++
	e.flows[f.ep] = f
	return true
}

// release frees the endpoint of f, after its quarantine.
func (e *endpoints) release(now time.Time, f *flow, quarantine time.Duration) {
	e.flows[f.ep] = nil
	if quarantine > 0 {
		e.expire(now)
		e.held.add(timer{at: now.Add(min(quarantine, maxQuarantine)), ep: f.ep})
	} else {
		e.put(f.ep)
	}
	f.ep = 0
}

func (e *endpoints) expire(now time.Time) {
	for {
		t, ok := e.held.expired(now)
		if !ok {
			return
		}
		e.put(t.ep)
	}
}

func (e *endpoints) put(ep uint16) {
	e.free[(e.head+len(e.free)-e.used)%len(e.free)] = ep
	e.used--
}

func (e *endpoints) get(n uint16) *flow {
	if int(n) >= len(e.flows) {
		return nil
	}
	return e.flows[n]
}
