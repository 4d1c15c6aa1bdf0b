package dht

import (
	"math/bits"
	"time"
)

// id is a node id or a key: KeyLen bytes. A string, so that it is immutable,
// comparable and a map key.
type id string

// closer reports whether a is nearer to target than b by XOR distance over the
// whole id.
func closer(target, a, b id) bool {
	for i := range len(target) {
		x, y := target[i]^a[i], target[i]^b[i]
		if x != y {
			return x < y
		}
	}
	return false
}

// commonBits is the length in bits of the common prefix of a and b.
func commonBits(a, b id) int {
	for i := range len(a) {
		if x := a[i] ^ b[i]; x != 0 {
			return 8*i + bits.LeadingZeros8(x)
		}
	}
	return 8 * len(a)
}

// How many requests in a row a contact leaves unanswered before it counts as
// dead (not used, not reported) and before it is forgotten. Dead contacts are
// kept for a while because a partition of the layer looks the same and must
// heal. Reference members never ping, so silence alone says nothing.
const (
	deadAfter   = 3
	forgetAfter = 6
)

// contact is a member that we know of.
type contact struct {
	id    id
	addr  uint64
	seen  time.Time // last message from it; zero while it is known by hearsay only
	asked time.Time // last request to it
	fails int       // requests unanswered since the last message
}

func (c *contact) dead() bool {
	// Hearsay may be invention: one unanswered request discredits it.
	return c.fails >= deadAfter || c.fails > 0 && c.seen.IsZero()
}

// bucket holds the contacts that share exactly i leading bits with our id.
type bucket struct {
	live  []*contact // at most k, least recently seen first
	spare []*contact // replacement cache, at most k, least recently seen first
}

// table is the routing table of Kademlia: one bucket per length of the prefix
// shared with our own id. An address appears once. The number of contacts is
// bounded by 2k per bucket, whatever peers claim.
type table struct {
	self    id
	k       int
	buckets []bucket // grown to the deepest one that is in use
	byAddr  map[uint64]*contact
	nlive   int
}

func newTable(self id, k int) *table {
	return &table{self: self, k: k, byAddr: make(map[uint64]*contact)}
}

func (t *table) bucket(i id) *bucket {
	n := commonBits(t.self, i)
	for len(t.buckets) <= n {
		t.buckets = append(t.buckets, bucket{})
	}
	return &t.buckets[n]
}

func index(l []*contact, i id) int {
	for n, c := range l {
		if c.id == i {
			return n
		}
	}
	return -1
}

func cut(l []*contact, n int) []*contact {
	copy(l[n:], l[n+1:])
	l[len(l)-1] = nil
	return l[:len(l)-1]
}

// observe notes a message from (i, addr). It returns the contact, and whether
// it is new to us at that address: one we had no message from, or that was dead.
// A contact for which only the replacement cache has room does not count.
func (t *table) observe(i id, addr uint64, now time.Time) (c *contact, fresh bool) {
	if i == t.self {
		return nil, false
	}
	// A member that restarted has a new id at the old address.
	if old := t.byAddr[addr]; old != nil && old.id != i {
		t.remove(old)
	}
	b := t.bucket(i)
	if n := index(b.live, i); n >= 0 {
		c = b.live[n]
		b.live = append(cut(b.live, n), c)
	} else if n := index(b.spare, i); n >= 0 {
		c = b.spare[n]
		b.spare = cut(b.spare, n)
		t.place(b, c)
	}
	if c == nil {
		c = &contact{id: i, addr: addr, seen: now}
		t.byAddr[addr] = c
		return c, t.place(b, c)
	}
	if c.addr != addr { // it drew a new address
		delete(t.byAddr, c.addr)
		c.addr = addr
		t.byAddr[addr] = c
		fresh = true
	}
	fresh = fresh || c.seen.IsZero() || c.dead()
	c.seen, c.fails = now, 0
	return c, fresh
}

// place puts a contact that was just heard of first hand into its bucket: into
// a free place, else instead of a dead contact or of one known by hearsay
// only, else into the replacement cache (false).
func (t *table) place(b *bucket, c *contact) bool {
	if len(b.live) < t.k {
		b.live = append(b.live, c)
		t.nlive++
		return true
	}
	for n, old := range b.live {
		if old.dead() || old.seen.IsZero() {
			b.live = append(cut(b.live, n), c)
			if old.dead() || len(b.spare) == t.k {
				delete(t.byAddr, old.addr)
			} else {
				b.spare = append([]*contact{old}, b.spare...)
			}
			return true
		}
	}
	if len(b.spare) == t.k {
		delete(t.byAddr, b.spare[0].addr)
		b.spare = cut(b.spare, 0)
	}
	b.spare = append(b.spare, c)
	return false
}

// hear notes a contact that somebody told us of. It fills free places only and
// never changes what we know first hand.
func (t *table) hear(i id, addr uint64) {
	if i == t.self || t.byAddr[addr] != nil {
		return
	}
	b := t.bucket(i)
	if index(b.live, i) >= 0 || index(b.spare, i) >= 0 {
		return
	}
	c := &contact{id: i, addr: addr}
	switch {
	case len(b.live) < t.k:
		b.live = append([]*contact{c}, b.live...)
		t.nlive++
	case len(b.spare) < t.k:
		b.spare = append([]*contact{c}, b.spare...)
	default:
		return
	}
	t.byAddr[addr] = c
}

// get returns the contact with id i at addr, or nil.
func (t *table) get(i id, addr uint64) *contact {
	if c := t.byAddr[addr]; c != nil && c.id == i {
		return c
	}
	return nil
}

func (t *table) remove(c *contact) {
	delete(t.byAddr, c.addr)
	b := t.bucket(c.id)
	if n := index(b.spare, c.id); n >= 0 {
		b.spare = cut(b.spare, n)
	} else if n := index(b.live, c.id); n >= 0 {
		b.live = cut(b.live, n)
		t.nlive--
		t.promote(b)
	}
}

// promote fills a place in the bucket from its replacement cache.
func (t *table) promote(b *bucket) {
	if n := len(b.spare); n > 0 && len(b.live) < t.k {
		b.live = append(b.live, b.spare[n-1])
		b.spare = cut(b.spare, n-1)
		t.nlive++
	}
}

// failed notes that c left a request unanswered. A dead contact gives its
// place to a spare one; without one it stays until it failed forgetAfter times.
func (t *table) failed(c *contact) {
	c.fails++
	if !c.dead() {
		return
	}
	b := t.bucket(c.id)
	if len(b.spare) > 0 || c.fails >= forgetAfter || c.seen.IsZero() {
		t.remove(c)
	}
}

// each calls f for every live contact, deepest bucket last.
func (t *table) each(f func(*contact)) {
	for i := range t.buckets {
		for _, c := range t.buckets[i].live {
			f(c)
		}
	}
}

// closest returns at most n contacts that ok accepts (nil: all), nearest to
// target first.
func (t *table) closest(target id, n int, ok func(*contact) bool) []*contact {
	out := make([]*contact, 0, min(n, t.nlive)+1)
	t.each(func(c *contact) {
		if len(out) == n && !closer(target, c.id, out[n-1].id) || ok != nil && !ok(c) {
			return
		}
		at := len(out)
		for at > 0 && closer(target, c.id, out[at-1].id) {
			at--
		}
		out = append(out, nil)
		copy(out[at+1:], out[at:])
		out[at] = c
		if len(out) > n {
			out = out[:n]
		}
	})
	return out
}

// rank counts the contacts that ok accepts and that are nearer to target than
// i; it stops counting at limit.
func (t *table) rank(target, i id, limit int, ok func(*contact) bool) int {
	n := 0
	for b := range t.buckets {
		for _, c := range t.buckets[b].live {
			if closer(target, c.id, i) && c.id != i && ok(c) {
				if n++; n == limit {
					return n
				}
			}
		}
	}
	return n
}
