package core

import (
	"iter"
	"slices"
	"time"

	"github.com/o7s/o7s-router/lib/wire"
)

// Register adds a name that this member answers for. Nothing is sent.
func (c *Core) Register(hash []byte) { c.registered[string(hash)] = struct{}{} }

// Unregister removes a name. Nothing is sent.
func (c *Core) Unregister(hash []byte) { delete(c.registered, string(hash)) }

// Names returns the registered hashes, in no order.
func (c *Core) Names() []string {
	var names []string
	for h := range c.registered {
		names = append(names, h)
	}
	return names
}

// Learnt is a directory entry: a member that answered, and for how long the
// answer is still believed.
type Learnt struct {
	MAC  MAC
	Left time.Duration
}

// Cached yields the valid directory entries by hash.
func (c *Core) Cached(now time.Time) iter.Seq2[string, Learnt] {
	return func(yield func(string, Learnt) bool) {
		for h, entries := range c.cache {
			for _, e := range entries {
				if left := e.seen.Add(cacheTTL).Sub(now); left > 0 && !yield(h, Learnt{e.mac, left}) {
					return
				}
			}
		}
	}
}

// Query reports whether hash is known. If not, it broadcasts a query, and
// NameFound or, at the deadline but after QueryTimeout at the latest,
// NameUnknown follows.
func (c *Core) Query(now time.Time, hash []byte, deadline time.Time) bool {
	if _, ok := c.resolve(now, string(hash)); ok {
		return true
	}
	c.ask(now, string(hash), deadline).asked = true
	return false
}

// CancelQuery says that nobody waits for hash any more.
func (c *Core) CancelQuery(hash []byte) {
	q := c.queries[string(hash)]
	if q == nil {
		return
	}
	q.asked = false
	if !c.resolvingFor(string(hash)) {
		delete(c.queries, string(hash))
	}
}

func (c *Core) resolvingFor(hash string) bool {
	for _, f := range c.flows {
		if f.state == resolving && f.hash == hash {
			return true
		}
	}
	return false
}

// resolve finds the member to ask for hash: the one heard of last, else
// ourselves. Names that are registered here and elsewhere are served here by
// the resource manager already, before it asks a layer.
func (c *Core) resolve(now time.Time, hash string) (MAC, bool) {
	entries := c.cache[hash]
	fresh := slices.DeleteFunc(entries, func(e entry) bool { return !e.seen.Add(cacheTTL).After(now) })
	switch {
	case len(fresh) > 0:
		c.cache[hash] = fresh
		return fresh[0].mac, true
	case len(entries) > 0:
		delete(c.cache, hash)
	}
	_, own := c.registered[hash]
	return c.cfg.MAC, own
}

// forget drops a member that did not answer a request (spec 10 oddity 6).
func (c *Core) forget(hash string, mac MAC) {
	left := slices.DeleteFunc(c.cache[hash], func(e entry) bool { return e.mac == mac })
	if len(left) == 0 {
		delete(c.cache, hash)
	} else {
		c.cache[hash] = left
	}
}

// ask starts a query, or extends the one that runs.
func (c *Core) ask(now time.Time, hash string, deadline time.Time) *query {
	if last := now.Add(QueryTimeout); deadline.IsZero() || deadline.After(last) {
		deadline = last
	}
	q := c.queries[hash]
	if q == nil {
		q = &query{deadline: deadline}
		c.queries[hash] = q
		c.broadcast(now, hash, q)
	} else if deadline.After(q.deadline) {
		q.deadline = deadline
		c.timers.add(timer{at: deadline, hash: hash})
	}
	return q
}

func (c *Core) broadcast(now time.Time, hash string, q *query) {
	c.n.QueriesSent++
	c.send(wire.Broadcast, &wire.EthMgmt{Code: wire.NameQueryReq, Hash: []byte(hash)})
	q.sent++
	q.next = now.Add(time.Duration(q.sent) * queryStep)
	at := q.next
	if q.deadline.Before(at) {
		at = q.deadline
	}
	c.timers.add(timer{at: at, hash: hash})
}

func (c *Core) queryTimer(now time.Time, hash string) {
	q := c.queries[hash]
	switch {
	case q == nil:
	case !q.deadline.After(now):
		delete(c.queries, hash)
		if q.asked {
			c.event(Event{Kind: NameUnknown, Hash: []byte(hash)})
		}
		c.unresolved(now, hash)
	case !q.next.After(now):
		c.broadcast(now, hash, q)
	}
}

// queried answers for a registered name and is silent otherwise.
func (c *Core) queried(from MAC, m *wire.EthMgmt) {
	c.n.QueriesReceived++
	if _, ok := c.registered[string(m.Hash)]; !ok {
		return
	}
	c.n.AnswersSent++
	c.send(from, &wire.EthMgmt{Code: wire.NameQueryReply, Hash: m.Hash})
}

// answered learns from a reply, asked for or not.
func (c *Core) answered(now time.Time, from MAC, m *wire.EthMgmt) {
	c.n.AnswersReceived++
	hash := string(m.Hash)
	entries, known := c.cache[hash]
	if q := c.queries[hash]; !known && q == nil && !c.room(now) {
		c.n.CacheFull++
		return
	}
	entries = slices.DeleteFunc(entries, func(e entry) bool { return e.mac == from })
	entries = slices.Insert(entries, 0, entry{from, now})
	c.cache[hash] = entries[:min(len(entries), maxCachedPerHash)]
	if q := c.queries[hash]; q != nil {
		delete(c.queries, hash)
		if q.asked {
			c.event(Event{Kind: NameFound, Hash: []byte(hash)})
		}
	}
	c.resolved(now, hash, from)
}

// room makes sure that an answer nobody asked for does not fill the memory.
func (c *Core) room(now time.Time) bool {
	if len(c.cache) < maxCached {
		return true
	}
	for hash := range c.cache {
		c.resolve(now, hash) // drops what has expired
	}
	return len(c.cache) < maxCached
}
