package dht

import (
	"slices"
	"time"

	"github.com/o7s/o7s-router/lib/wire"
)

type candState uint8

const (
	candFresh    candState = iota
	candFlying             // asked
	candSlow               // asked, silent for slowAfter: somebody else is asked beside it
	candFailed             // given up
	candAnswered           // answered without a value
)

// cand is a member that a lookup may ask.
type cand struct {
	id    id
	addr  uint64
	state candState
}

// lookup is an iterative search for the k members nearest to target, or for a
// value that one of them has.
type lookup struct {
	target   id
	value    bool
	own      bool   // of our own id, to join
	pub      *local // publication that waits for the k nearest
	queries  []QueryID
	cands    []*cand // nearest first
	have     map[uint64]bool
	values   []uint64 // found, but none of them is a good answer
	deadline time.Time
	done     bool
}

// request is a FIND message without an answer.
type request struct {
	cookie uint64
	code   uint32
	key    id
	id     id
	addr   uint64
	lk     *lookup // nil: to see whether the contact lives
	cand   *cand
	tries  int
	trust  bool      // it never failed us: a loss is more likely than its death
	sent   time.Time // the first time
	next   time.Time // when something happens to it
}

func (n *Node) startLookup(now time.Time, target id, value bool) *lookup {
	l := &lookup{target: target, value: value, have: make(map[uint64]bool), deadline: now.Add(responseWait)}
	for _, c := range n.table.closest(target, 3*n.cfg.K, n.contactOK) {
		l.add(c.id, c.addr)
	}
	n.lookups = append(n.lookups, l)
	return l
}

// add makes (i, addr) a candidate, in its place by distance.
func (l *lookup) add(i id, addr uint64) {
	if l.have[addr] {
		return
	}
	at := len(l.cands)
	for at > 0 && closer(l.target, i, l.cands[at-1].id) {
		at--
	}
	if at >= maxCandidates {
		return
	}
	l.have[addr] = true
	l.cands = slices.Insert(l.cands, at, &cand{id: i, addr: addr})
	if len(l.cands) > maxCandidates {
		l.cands = l.cands[:maxCandidates]
	}
}

// advance asks the next candidates of l, alpha at a time, or ends it.
func (n *Node) advance(now time.Time, l *lookup) {
	if l.done {
		return
	}
	flying, good, open := 0, 0, false
	for _, c := range l.cands {
		if c.state == candFlying {
			flying++
		}
	}
	for _, c := range l.cands {
		if good == n.cfg.K {
			break
		}
		switch c.state {
		case candFailed:
			continue
		case candFresh:
			if !n.cfg.Reachable(c.addr) {
				c.state = candFailed
				continue
			}
			open = true
			if flying < n.cfg.Alpha {
				code := wire.DHTFindNodeReq
				if l.value {
					code = wire.DHTFindValueReq
				}
				if !n.ask(now, c.id, c.addr, code, l.target, l, c) {
					c.state = candFailed
					continue
				}
				c.state = candFlying
				flying++
			}
		case candFlying, candSlow:
			open = true
		}
		good++
	}
	if !open {
		n.finish(now, l)
	}
}

// ask sends a FIND request; it reports false when too many are outstanding.
func (n *Node) ask(now time.Time, i id, addr uint64, code uint32, key id, l *lookup, c *cand) bool {
	if len(n.pending) >= maxPending {
		return false
	}
	r := &request{
		cookie: n.cookie(), code: code, key: key, id: i, addr: addr, lk: l, cand: c,
		tries: 1, sent: now, next: now.Add(slowAfter),
	}
	if k := n.table.get(i, addr); k != nil {
		k.asked = now
		r.trust = k.fails == 0 && !k.seen.IsZero()
	}
	n.pending = append(n.pending, r)
	n.cookies[r.cookie] = r
	n.sendFind(addr, code, r.cookie, key)
	return true
}

// tickRequests repeats requests, moves lookups past silent contacts and gives
// up after responseWait. Repeats carry the same cookie, so whichever answer
// comes counts.
func (n *Node) tickRequests(now time.Time) {
	kept := n.pending[:0]
	for _, r := range n.pending {
		if now.Before(r.next) {
			if n.cookies[r.cookie] == r { // not answered in between
				kept = append(kept, r)
			}
			continue
		}
		if n.cookies[r.cookie] != r {
			continue
		}
		if now.Sub(r.sent) >= responseWait {
			delete(n.cookies, r.cookie)
			if c := n.table.get(r.id, r.addr); c != nil {
				n.table.failed(c)
			}
			r.give(candFailed)
			continue
		}
		kept = append(kept, r)
		switch {
		case r.trust && r.tries < 3:
			// At 250 ms and 750 ms; given up by the lookup at 1250 ms.
			r.give(candSlow)
			r.next = now.Add(2 * slowAfter)
			if r.lk == nil || !r.lk.done {
				n.sendFind(r.addr, r.code, r.cookie, r.key)
			}
			r.tries++
		default:
			r.give(candFailed)
			r.next = r.sent.Add(responseWait)
		}
	}
	clear(n.pending[len(kept):])
	n.pending = kept
}

func (r *request) give(s candState) {
	if r.cand != nil {
		r.cand.state = s
	}
}

func (n *Node) tickLookups(now time.Time) {
	for i := 0; i < len(n.lookups); i++ {
		l := n.lookups[i]
		if l.done {
			continue
		}
		if now.Before(l.deadline) {
			n.advance(now, l)
		} else {
			n.finish(now, l)
		}
	}
	n.lookups = slices.DeleteFunc(n.lookups, func(l *lookup) bool { return l.done })
}

// answered handles a response to r whose contacts are already checked.
func (n *Node) answered(now time.Time, r *request, contacts []cand, values []string) {
	delete(n.cookies, r.cookie) // tickRequests takes it off the list
	l := r.lk
	if l == nil || l.done {
		return
	}
	r.give(candAnswered)
	if l.value && len(values) > 0 {
		found := n.addresses(values)
		for _, a := range found {
			if !slices.Contains(l.values, a) && len(l.values) < maxValues {
				l.values = append(l.values, a)
			}
		}
		if len(n.choose(now, l.target, found, false)) > 0 {
			n.finish(now, l)
			return
		}
	}
	// From a long list the nearest: the reference does not sort its replies
	// and may exceed k, and invented contacts must not crowd out real ones.
	slices.SortStableFunc(contacts, func(a, b cand) int {
		switch {
		case closer(l.target, a.id, b.id):
			return -1
		case closer(l.target, b.id, a.id):
			return 1
		}
		return 0
	})
	for _, c := range contacts[:min(len(contacts), maxUsed)] {
		if k := n.table.byAddr[c.addr]; k != nil && (k.id != c.id && !k.seen.IsZero() || k.dead()) {
			continue // we know better
		}
		l.add(c.id, c.addr)
	}
	n.advance(now, l)
}

// finish ends l and tells who waits for it.
func (n *Node) finish(now time.Time, l *lookup) {
	if l.done {
		return
	}
	l.done = true
	if l.value {
		n.resolve(now, l.target, l.queries, l.values)
	}
	if l.own {
		n.joinDone(now)
	}
	if l.pub != nil {
		n.published(now, l)
	}
}

// Query asks for the members where the name with this key is registered. The
// answer is among Results, at once or within two seconds. Queries for one key
// share a lookup.
func (n *Node) Query(now time.Time, key []byte) QueryID {
	n.lastQuery++
	n.stats.Queries++
	q, k := n.lastQuery, id(key)
	if len(k) != n.cfg.KeyLen {
		n.resolve(now, k, []QueryID{q}, nil)
		return q
	}
	if a := n.choose(now, k, n.addresses(n.stored(k)), false); len(a) > 0 {
		n.result(q, k, a)
		return q
	}
	for _, c := range n.cache {
		if c.key == k && now.Before(c.until) {
			if a := n.choose(now, k, c.addrs, false); len(a) > 0 {
				n.result(q, k, a)
				return q
			}
		}
	}
	running := 0
	for _, l := range n.lookups {
		if l.value && !l.done {
			if l.target == k {
				l.queries = append(l.queries, q)
				return q
			}
			running++
		}
	}
	if running >= maxQueries {
		n.resolve(now, k, []QueryID{q}, nil)
		return q
	}
	l := n.startLookup(now, k, true)
	l.queries = []QueryID{q}
	n.advance(now, l)
	return q
}

// stored returns the values we hold for key: those of others in order of
// arrival, then our own.
func (n *Node) stored(key id) []string {
	var out []string
	if e := n.store.get(key); e != nil {
		for _, v := range e.vals {
			out = append(out, v.val)
		}
	}
	if n.locals[key] != nil {
		out = append(out, encodeAddr(n.cfg.Self))
	}
	return out
}

// addresses decodes values; what is not a member's address but ours or none is
// left out, so that a name registered here and elsewhere resolves to elsewhere.
func (n *Node) addresses(values []string) []uint64 {
	var out []uint64
	for _, v := range values {
		if a, ok := decodeAddr(v); ok && n.usable(a) && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

// choose returns the addresses that can be reached, those that failed lately
// last (bad) or not at all.
func (n *Node) choose(now time.Time, key id, addrs []uint64, bad bool) []uint64 {
	var good, worse []uint64
	for _, a := range addrs {
		switch {
		case !n.cfg.Reachable(a):
		case n.isBad(now, key, a):
			worse = append(worse, a)
		default:
			good = append(good, a)
		}
	}
	if bad {
		good = append(good, worse...)
	}
	return good[:min(len(good), maxValues)]
}

// resolve answers queries at the end of a lookup: with what it found, else
// with addresses that failed lately, which may be back.
func (n *Node) resolve(now time.Time, key id, queries []QueryID, found []uint64) {
	all := slices.Clone(found)
	for _, a := range n.addresses(n.stored(key)) {
		if !slices.Contains(all, a) {
			all = append(all, a)
		}
	}
	addrs := n.choose(now, key, all, true)
	if len(found) > 0 && len(addrs) > 0 {
		n.remember(now, key, addrs)
	}
	for _, q := range queries {
		n.result(q, key, addrs)
	}
}

func (n *Node) result(q QueryID, key id, addrs []uint64) {
	if len(addrs) == 0 {
		n.stats.Misses++
	}
	n.results = append(n.results, Result{ID: q, Key: []byte(key), Addrs: slices.Clone(addrs)})
}

func (n *Node) remember(now time.Time, key id, addrs []uint64) {
	n.cache = slices.DeleteFunc(n.cache, func(c cached) bool { return c.key == key })
	if len(n.cache) >= maxCache {
		n.cache = slices.Delete(n.cache, 0, 1)
	}
	n.cache = append(n.cache, cached{key, addrs, now.Add(cacheTime)})
}

func (n *Node) expireCache(now time.Time) {
	n.cache = slices.DeleteFunc(n.cache, func(c cached) bool { return !now.Before(c.until) })
	n.bad = slices.DeleteFunc(n.bad, func(b badAddr) bool { return !now.Before(b.until) })
}

// Forget says that the member at addr did not serve the name with this key
// when asked. The next query asks the layer again and prefers other
// registrants for a minute; addr is still the answer when there is no other.
func (n *Node) Forget(now time.Time, key []byte, addr uint64) {
	k := id(key)
	n.cache = slices.DeleteFunc(n.cache, func(c cached) bool { return c.key == k })
	n.bad = slices.DeleteFunc(n.bad, func(b badAddr) bool { return b.key == k && b.addr == addr })
	if len(n.bad) >= maxCache {
		n.bad = slices.Delete(n.bad, 0, 1)
	}
	n.bad = append(n.bad, badAddr{k, addr, now.Add(badTime)})
}

func (n *Node) isBad(now time.Time, key id, addr uint64) bool {
	for _, b := range n.bad {
		if b.addr == addr && b.key == key {
			return now.Before(b.until)
		}
	}
	return false
}
