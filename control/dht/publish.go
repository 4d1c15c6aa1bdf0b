package dht

import (
	"slices"
	"time"
)

// Register publishes our address under key and keeps it published. It
// succeeds whether or not anybody could be told yet (spec 43 §8.3).
func (n *Node) Register(now time.Time, key []byte) error {
	k := id(key)
	if len(k) != n.cfg.KeyLen {
		return ErrKeyLength
	}
	if n.locals[k] != nil {
		return nil
	}
	l := &local{key: k}
	n.locals[k] = l
	n.names = append(n.names, l)
	// A copy of an earlier registration that came back to us would outlive it.
	n.store.drop(k, encodeAddr(n.cfg.Self))
	n.announce(now, l)
	n.publish(now)
	n.drainStores(now)
	return nil
}

// Unregister stops publishing key. Nothing is sent: copies that others hold
// live until they expire (spec 43 §8.4).
func (n *Node) Unregister(now time.Time, key []byte) error {
	k := id(key)
	l := n.locals[k]
	if l == nil {
		return ErrNotPresent
	}
	delete(n.locals, k)
	n.names = slices.DeleteFunc(n.names, func(o *local) bool { return o == l })
	n.pubq = slices.DeleteFunc(n.pubq, func(o *local) bool { return o == l })
	self := encodeAddr(n.cfg.Self)
	n.storeq = slices.DeleteFunc(n.storeq, func(s queuedStore) bool { return s.key == k && s.val == self })
	return nil
}

// announce tells the nearest members that we know now, and queues a lookup for
// those that are nearer still.
func (n *Node) announce(now time.Time, l *local) {
	for _, c := range n.table.closest(l.key, n.cfg.K, n.contactOK) {
		n.tell(now, l, c.addr)
	}
	n.enqueue(l)
}

func (n *Node) enqueue(l *local) {
	if !l.waiting {
		l.waiting = true
		n.pubq = append(n.pubq, l)
	}
}

// publish starts the next publications.
func (n *Node) publish(now time.Time) {
	for n.pubs < maxPublishing && len(n.pubq) > 0 && n.table.nlive > 0 {
		l := n.pubq[0]
		n.pubq = slices.Delete(n.pubq, 0, 1)
		n.pubs++
		lk := n.startLookup(now, l.key, false)
		lk.pub = l
		n.advance(now, lk)
	}
}

// published stores our value at the k nearest that answered.
func (n *Node) published(now time.Time, lk *lookup) {
	n.pubs--
	l := lk.pub
	l.waiting = false
	l.next = now.Add(publishRetry)
	if n.locals[l.key] != l {
		return
	}
	count := 0
	for _, c := range lk.cands {
		if c.state == candAnswered && count < n.cfg.K {
			count++
			n.tell(now, l, c.addr)
		}
	}
	if count > 0 {
		l.next = now.Add(n.jitter(n.cfg.Replicate))
	} else if l.next.Before(n.nextSweep) {
		n.nextSweep = l.next
	}
}

// tell stores our value at addr, once per publication.
func (n *Node) tell(now time.Time, l *local, addr uint64) {
	if slices.Contains(l.told, addr) || !n.usable(addr) {
		return
	}
	if n.enqueueStore(addr, l.key, encodeAddr(n.cfg.Self), n.expiry(now)) {
		l.told = append(l.told, addr)
	}
}

// expiry is the absolute expiry time of a value that is published now.
func (n *Node) expiry(now time.Time) uint32 {
	return uint32(now.Add(n.cfg.Expire).Unix())
}

// offer gives a member that we just learnt of our values that it is near
// enough to hold, at once, and queues it for those of others.
func (n *Node) offer(now time.Time, c *contact) {
	if !n.contactOK(c) {
		return
	}
	for _, l := range n.names {
		if n.table.rank(l.key, c.id, n.cfg.K, n.contactOK) < n.cfg.K {
			n.tell(now, l, c.addr)
		}
	}
	if len(n.store.entries) > 0 && len(n.offers) < maxOffers {
		n.offers = append(n.offers, handover{id: c.id, addr: c.addr})
	}
}

// handOver goes on giving new members the values of others that they are near
// enough to hold, a bounded number of keys at a time.
func (n *Node) handOver() {
	for left := handOverKeys; left > 0 && len(n.offers) > 0; {
		h := &n.offers[0]
		c := n.table.get(h.id, h.addr)
		for ; c != nil && left > 0 && h.next < len(n.store.entries); h.next++ {
			left--
			e := n.store.entries[h.next]
			// Nearer than us: c takes over. We are the nearest beside it: it
			// is up to us and to nobody else to tell it.
			if closer(e.key, c.id, n.self) && n.table.rank(e.key, n.self, 2, n.contactOK) == 1 {
				for _, v := range e.vals {
					n.enqueueStore(c.addr, e.key, v.val, v.exp)
				}
			}
		}
		if c == nil || h.next >= len(n.store.entries) {
			n.offers = slices.Delete(n.offers, 0, 1)
		}
	}
}

// replicate sends a value of somebody else to the k nearest members known,
// with its original expiry time.
func (n *Node) replicate(key id, v *value) {
	for _, c := range n.table.closest(key, n.cfg.K, n.contactOK) {
		if encodeAddr(c.addr) != v.val { // the registrant knows
			n.enqueueStore(c.addr, key, v.val, v.exp)
		}
	}
}

// relay passes on a value that its registrant stored here although we are not
// among the k nearest: a reference member publishes to alpha arbitrary
// contacts, where no lookup would look. Only what the registrant itself sent
// is passed on, so this ends after one step.
func (n *Node) relay(key id, v *value) {
	if n.table.rank(key, n.self, n.cfg.K, n.contactOK) == n.cfg.K {
		n.replicate(key, v)
	}
}

func (n *Node) enqueueStore(dst uint64, key id, val string, exp uint32) bool {
	if len(n.storeq) >= maxStoreQueue {
		return false
	}
	n.storeq = append(n.storeq, queuedStore{dst, key, val, exp})
	return true
}

func (n *Node) drainStores(now time.Time) {
	if len(n.storeq)+len(n.offers) == 0 || now.Before(n.nextPace) {
		return
	}
	n.handOver()
	count := min(len(n.storeq), storeBurst)
	for _, s := range n.storeq[:count] {
		if n.usable(s.dst) {
			n.sendStore(s)
		}
	}
	n.storeq = slices.Delete(n.storeq, 0, count)
	if len(n.storeq) == 0 {
		n.storeq = nil
	}
	n.nextPace = now.Add(storePace)
}
