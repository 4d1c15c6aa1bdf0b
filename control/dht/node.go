package dht

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/o7s/o7s-router/lib/wire"
)

// EID is the endpoint of the directory at every member (spec 43 §2).
const EID = 1

// Times of the protocol that the layer does not configure.
const (
	// responseWait is the reference's limit for a query and for a response.
	responseWait = 2 * time.Second
	// slowAfter is when a lookup asks somebody else beside a silent contact.
	// It is well above the round trip in any layer that works.
	slowAfter = 250 * time.Millisecond
	// cacheTime is how long an answer is used again: long enough for the two
	// queries of one flow allocation and for a burst of clients, short enough
	// that a name that moved is found again soon.
	cacheTime = 5 * time.Second
	// badTime is how long an address that did not answer a flow request is the
	// last choice for that name.
	badTime = 60 * time.Second
	// peerRetryMin and Max bound the retries of the first request: the
	// reference starts at 2 ms while sending fails locally, and so do we; a
	// request that did leave gets time for its answer.
	routeRetryMin = 2 * time.Millisecond
	routeRetryMax = time.Second
	peerRetryMin  = slowAfter
	peerRetryMax  = 15 * time.Second
	// Publishing again after a lookup that nobody answered.
	publishRetry = 5 * time.Second
	// STORE messages leave in bursts of storeBurst every storePace, so that a
	// member with many names does not overrun the queues of its neighbours.
	storePace  = 5 * time.Millisecond
	storeBurst = 32
)

// Bounds on our own state; what exceeds them fails at once or waits.
const (
	maxQueries    = 1024 // keys looked up at the same time
	maxPublishing = 16   // background lookups at the same time
	maxPending    = 4096 // requests without an answer
	maxStoreQueue = 16384
	maxOffers     = 256  // new members that wait for values of others
	handOverKeys  = 1024 // looked at for them every storePace
	maxCache      = 1024
	maxCandidates = 160 // of one lookup
	maxUsed       = 64  // contacts taken from one reply
	maxValues     = 8   // values in a reply and in a result (spec 43 §5)
)

// Errors of Register and Unregister.
var (
	ErrKeyLength  = errors.New("key has the wrong length for this layer's directory hash")
	ErrNotPresent = errors.New("key is not registered by this member")
)

// Config configures a Node. Zero counts and times get the defaults of spec 43 §5.
type Config struct {
	Self     uint64 // own layer address
	Peer     uint64 // the enroller's address, 0 at the bootstrapped first member
	AddrSize int    // size of a layer address in bytes; 0 means 8
	KeyLen   int    // length of keys and node ids in bytes; 0 means 32 (SHA3-256)

	Alpha, K                   int
	Expire, Refresh, Replicate time.Duration

	// MaxMessage bounds the replies in bytes; 0 means 1400, which fits every
	// path that carries a full Ethernet frame.
	MaxMessage int

	// Rand gives ids, cookies and jitter. Cookies are what makes answers hard
	// to forge, so the owner seeds it with real randomness (ChaCha8).
	Rand *rand.Rand

	// Reachable, when set, reports whether the layer has a route to an address
	// now. Members without a route are not asked, and registrants without one
	// are not answers. The owner calls RouteUp when a route appears.
	Reachable func(addr uint64) bool
}

// Message is a directory message to send: the payload of one data-transfer
// packet to Dst, endpoint EID, cube 0.
type Message struct {
	Dst     uint64
	Payload []byte
}

// QueryID names a query; it is never 0.
type QueryID uint64

// Result answers a query: the addresses of members where the name is
// registered, the best choice first, our own never among them. None means that
// the name is not known anywhere.
type Result struct {
	ID    QueryID
	Key   []byte
	Addrs []uint64
}

// Stats counts what a Node did since its creation.
type Stats struct {
	Received   uint64 // messages, valid or not
	Malformed  uint64 // dropped: undecodable, wrong lengths, missing parts
	Unexpected uint64 // dropped: a response to no request of ours
	Unknown    uint64 // dropped: unknown code
	Refused    uint64 // values not stored: expired, too long, no room
	Sent       uint64
	Queries    uint64
	Misses     uint64 // queries that found nothing
}

// local is a key that this member registered.
type local struct {
	key     id
	told    []uint64  // who has our value since the last publication
	next    time.Time // of the next publication
	waiting bool      // in the publication queue or being published
}

type cached struct {
	key   id
	addrs []uint64
	until time.Time
}

type badAddr struct {
	key   id
	addr  uint64
	until time.Time
}

type queuedStore struct {
	dst uint64
	key id
	val string
	exp uint32
}

// handover is a new member that is given values of others, and how far that is.
type handover struct {
	id   id
	addr uint64
	next int // index of the next entry of the store
}

// probe is an address that we want to know the id of: the enroller, or a
// member that routing told us of.
type probe struct {
	addr  uint64
	next  time.Time
	wait  time.Duration
	tries int
	sent  bool
}

// Node is the directory component of one member. See the package comment.
type Node struct {
	cfg   Config
	self  id
	magic uint64 // cookie of all requests that are not part of a lookup of a known member
	table *table
	store *store

	locals   map[id]*local
	names    []*local // the same, in order of registration
	pubq     []*local
	pubs     int // publications running
	storeq   []queuedStore
	offers   []handover
	nextPace time.Time

	lookups []*lookup
	pending []*request
	cookies map[uint64]*request
	probes  []*probe
	joined  bool // a lookup of our own id was started since we have contacts
	nextOwn time.Time

	cache []cached
	bad   []badAddr

	nextSweep time.Time
	sweep     time.Duration

	lastQuery QueryID
	out       []Message
	results   []Result
	stats     Stats
}

// New returns a Node that is about to join through cfg.Peer: its first
// messages are there after the first Tick.
func New(cfg Config, now time.Time) (*Node, error) {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	defd := func(v *time.Duration, d time.Duration) {
		if *v == 0 {
			*v = d
		}
	}
	def(&cfg.AddrSize, 8)
	def(&cfg.KeyLen, 32)
	def(&cfg.Alpha, 3)
	def(&cfg.K, 8)
	def(&cfg.MaxMessage, 1400)
	defd(&cfg.Expire, 86400*time.Second)
	defd(&cfg.Refresh, 900*time.Second)
	defd(&cfg.Replicate, 900*time.Second)
	switch {
	case cfg.Rand == nil:
		return nil, errors.New("dht: no random source")
	case cfg.Self == 0:
		return nil, errors.New("dht: own address is 0")
	case cfg.KeyLen < 8 || cfg.KeyLen > 64:
		return nil, fmt.Errorf("dht: key length %d is not that of a directory hash", cfg.KeyLen)
	case cfg.Alpha < 0 || cfg.K < 0 || cfg.Expire < time.Second || cfg.Refresh < time.Second || cfg.Replicate < time.Second:
		return nil, errors.New("dht: alpha, k, t_expire, t_refresh and t_replicate must be positive")
	}
	if cfg.Reachable == nil {
		cfg.Reachable = func(uint64) bool { return true }
	}
	n := &Node{
		cfg:     cfg,
		locals:  make(map[id]*local),
		cookies: make(map[uint64]*request),
	}
	n.self = n.randomID()
	n.magic = n.cookie()
	n.table = newTable(n.self, cfg.K)
	n.store = newStore(n.self)
	// A sweep finds what is due: often enough that periods are kept within an
	// eighth, seldom enough that it costs nothing.
	n.sweep = min(max(min(cfg.Expire, cfg.Refresh, cfg.Replicate)/8, time.Second), time.Minute)
	n.nextSweep = now.Add(n.jitter(n.sweep))
	if cfg.Peer != 0 && cfg.Peer != cfg.Self {
		n.probes = append(n.probes, &probe{addr: cfg.Peer, next: now})
	}
	return n, nil
}

func (n *Node) randomID() id {
	b := make([]byte, n.cfg.KeyLen+7)
	for i := 0; i < n.cfg.KeyLen; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], n.cfg.Rand.Uint64())
	}
	return id(b[:n.cfg.KeyLen])
}

// cookie draws a random number that is not 0 and not in use.
func (n *Node) cookie() uint64 {
	for {
		if c := n.cfg.Rand.Uint64(); c != 0 && c != n.magic && n.cookies[c] == nil {
			return c
		}
	}
}

// jitter returns d plus or minus an eighth, so that members do not act in step.
func (n *Node) jitter(d time.Duration) time.Duration {
	return d - d/8 + time.Duration(n.cfg.Rand.Int64N(int64(d/4)+1))
}

// usable reports whether addr can be a member's: it has the layer's size, is
// not 0 and not our own.
func (n *Node) usable(addr uint64) bool {
	return addr != 0 && addr != n.cfg.Self && (n.cfg.AddrSize >= 8 || addr>>(8*n.cfg.AddrSize) == 0)
}

func (n *Node) contactOK(c *contact) bool { return !c.dead() && n.cfg.Reachable(c.addr) }

// ID returns our node id.
func (n *Node) ID() []byte { return []byte(n.self) }

// Self returns our address.
func (n *Node) Self() uint64 { return n.cfg.Self }

// Stats returns the counters.
func (n *Node) Stats() Stats { return n.stats }

// Contacts returns the number of members in the contact table.
func (n *Node) Contacts() int { return n.table.nlive }

// Messages returns the messages to send and forgets them.
func (n *Node) Messages() []Message {
	m := n.out
	n.out = nil
	return m
}

// Results returns the answered queries and forgets them.
func (n *Node) Results() []Result {
	r := n.results
	n.results = nil
	return r
}

// NextDeadline is when Tick must be called next, if nothing else happens.
func (n *Node) NextDeadline() time.Time {
	d := n.nextSweep
	earlier := func(t time.Time) {
		if t.Before(d) {
			d = t
		}
	}
	for _, r := range n.pending {
		earlier(r.next)
	}
	for _, l := range n.lookups {
		earlier(l.deadline)
	}
	for _, p := range n.probes {
		earlier(p.next)
	}
	if len(n.storeq)+len(n.offers) > 0 {
		earlier(n.nextPace)
	}
	return d
}

// Tick does what is due at now.
func (n *Node) Tick(now time.Time) {
	n.tickProbes(now)
	n.tickRequests(now)
	n.tickLookups(now)
	if !now.Before(n.nextSweep) {
		n.nextSweep = now.Add(n.jitter(n.sweep))
		n.maintain(now)
	}
	n.publish(now)
	n.drainStores(now)
}

// SetSelf changes our address after it was drawn again: other members learn it
// from our messages, and our names are published under it.
func (n *Node) SetSelf(now time.Time, addr uint64) {
	if addr == 0 || addr == n.cfg.Self {
		return
	}
	n.cfg.Self = addr
	if c := n.table.byAddr[addr]; c != nil {
		n.table.remove(c)
	}
	n.storeq = nil // stores of the old value
	n.joined = false
	for _, l := range n.names {
		l.told = nil
		n.announce(now, l)
	}
	n.join(now)
	n.publish(now)
	n.drainStores(now)
}

// RouteUp says that routing has a (new) way to each of addrs. It starts or
// resumes joining at once instead of at the next retry.
func (n *Node) RouteUp(now time.Time, addrs ...uint64) {
	// Which members of a large layer get to know us first is left to chance.
	order := n.cfg.Rand.Perm(len(addrs))
	for _, i := range order {
		a := addrs[i]
		if !n.usable(a) {
			continue
		}
		if c := n.table.byAddr[a]; c != nil {
			c.fails = 0
			if !c.seen.IsZero() {
				n.offer(now, c)
			}
			continue
		}
		if p := n.probeFor(a); p != nil {
			p.next, p.wait, p.tries = now, 0, 0
			continue
		}
		// Members that routing knows are found without anybody's help, as long
		// as we know too few: partitions heal, and it does not matter who
		// enrolled whom. In a large layer the lookups do the rest.
		if n.table.nlive+len(n.probes) < n.cfg.K {
			n.probes = append(n.probes, &probe{addr: a, next: now})
		}
	}
	n.tickProbes(now)
	n.join(now)
	n.publish(now)
	n.drainStores(now)
}

func (n *Node) probeFor(addr uint64) *probe {
	for _, p := range n.probes {
		if p.addr == addr {
			return p
		}
	}
	return nil
}

func (n *Node) tickProbes(now time.Time) {
	kept := n.probes[:0]
	for _, p := range n.probes {
		if now.Before(p.next) {
			kept = append(kept, p)
			continue
		}
		if p.addr != n.cfg.Peer && p.tries >= 4 {
			continue
		}
		kept = append(kept, p)
		lo, hi := routeRetryMin, routeRetryMax
		if n.cfg.Reachable(p.addr) {
			n.sendFind(p.addr, wire.DHTFindNodeReq, n.magic, n.self)
			p.tries++
			if lo, hi = peerRetryMin, peerRetryMax; !p.sent {
				p.sent, p.wait = true, 0
			}
		} else if p.addr != n.cfg.Peer {
			kept = kept[:len(kept)-1] // RouteUp brings it back
			continue
		}
		p.wait = min(max(2*p.wait, lo), hi)
		p.next = now.Add(p.wait)
	}
	clear(n.probes[len(kept):])
	n.probes = kept
}

// maintain is the periodic sweep over all state.
func (n *Node) maintain(now time.Time) {
	n.store.expire(now.Unix())
	n.expireCache(now)
	for _, l := range n.names {
		if !l.waiting && !now.Before(l.next) {
			l.told = nil
			n.enqueue(l)
		}
	}
	for _, e := range n.store.entries {
		for i := range e.vals {
			if v := &e.vals[i]; now.Sub(v.repl) >= n.cfg.Replicate {
				v.repl = now
				n.replicate(e.key, v)
			}
		}
	}
	n.refresh(now)
	if n.table.nlive == 0 {
		n.joined = false
		if p := n.cfg.Peer; n.usable(p) && n.probeFor(p) == nil {
			n.probes = append(n.probes, &probe{addr: p, next: now})
		}
		n.tickProbes(now)
	}
	n.join(now)
}

// refresh asks the contacts that were silent for long about ids of their
// neighbourhood, which tells whether they live and fills the table, and looks
// up our own id.
func (n *Node) refresh(now time.Time) {
	var stale []*contact
	n.table.each(func(c *contact) {
		if now.Sub(c.seen) >= n.cfg.Refresh && now.Sub(c.asked) >= n.cfg.Refresh/2 && n.cfg.Reachable(c.addr) {
			stale = append(stale, c)
		}
	})
	const perSweep = 64
	for _, c := range stale[:min(len(stale), perSweep)] {
		n.ask(now, c.id, c.addr, wire.DHTFindNodeReq, n.idNear(commonBits(n.self, c.id)), nil, nil)
	}
	if n.joined && !now.Before(n.nextOwn) {
		n.joined = false
	}
}

// idNear returns a random id that shares exactly nbits leading bits with ours.
func (n *Node) idNear(nbits int) id {
	r := []byte(n.randomID())
	full := nbits / 8
	copy(r[:full], n.self[:full])
	if full < len(r) {
		keep := byte(0xff) << (8 - nbits%8) // bits equal to ours
		flip := byte(0x80) >> (nbits % 8)   // the first that differs
		r[full] = n.self[full]&keep | (n.self[full]^flip)&flip | r[full]&^(keep|flip)
	}
	return id(r)
}

// join looks up our own id once we know somebody, which makes our neighbours
// in id space known to us and us to them.
func (n *Node) join(now time.Time) {
	if n.joined || n.table.nlive == 0 {
		return
	}
	l := n.startLookup(now, n.self, false)
	l.own = true
	n.joined = true
	n.nextOwn = now.Add(n.jitter(n.cfg.Refresh))
	n.advance(now, l)
}

// joinDone fills the buckets between us and our nearest neighbours.
func (n *Node) joinDone(now time.Time) {
	const most = 16 // 2^16 members; deeper buckets are filled by the own lookup
	for i := range min(len(n.table.buckets)-1, most) {
		if len(n.table.buckets[i].live) < n.cfg.K {
			n.advance(now, n.startLookup(now, n.idNear(i), false))
		}
	}
}
