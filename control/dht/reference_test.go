package dht

import (
	"math/rand/v2"
	"slices"
	"time"

	"github.com/o7s/o7s-router/lib/wire"
)

// reference behaves like a member of the reference prototype, as far as spec
// 43 §8 and §11 describe what others can see of it: contacts in buckets by the
// first byte of their id and reported in index order, values published once to
// alpha contacts, lookups that do not go beyond one hop, replication of one
// key per cycle.
type reference struct {
	id     id
	self   uint64
	peer   uint64
	rnd    *rand.Rand
	magic  uint64
	table  [256][]wire.DHTContact
	n      int
	values map[id][]value
	keys   []id
	locals map[id]bool
	reqs   map[id]*refRequest
	next   time.Time
	ids    QueryID
	out    []Message
	res    []Result
}

type refRequest struct {
	query   QueryID
	asked   map[uint64]uint64 // address to cookie
	expires time.Time
}

const refAlpha, refK = 3, 8

func newReference(self, peer uint64, rnd *rand.Rand, now time.Time) *reference {
	b := make([]byte, 32)
	for i := range b {
		b[i] = byte(rnd.Uint32())
	}
	r := &reference{
		id: id(b), self: self, peer: peer, rnd: rnd, magic: rnd.Uint64() | 1,
		values: map[id][]value{}, locals: map[id]bool{}, reqs: map[id]*refRequest{},
		next: now.Add(time.Millisecond),
	}
	return r
}

func (r *reference) send(dst uint64, m wire.DHTMsg) {
	if dst == r.self {
		return
	}
	m.Src = wire.DHTContact{ID: []byte(r.id), Addr: r.self}
	r.out = append(r.out, Message{dst, wire.AppendDHT(nil, &m)})
}

func (r *reference) insert(c wire.DHTContact) bool {
	if c.Addr == r.self || len(c.ID) != 32 {
		return false
	}
	b := &r.table[c.ID[0]]
	had := slices.ContainsFunc(*b, func(o wire.DHTContact) bool { return o.Addr == c.Addr })
	*b = slices.DeleteFunc(*b, func(o wire.DHTContact) bool { return o.Addr == c.Addr })
	if len(*b) < refK {
		*b = append(*b, wire.DHTContact{ID: slices.Clone(c.ID), Addr: c.Addr})
	}
	if !had {
		r.n++
	}
	return !had
}

func (r *reference) contacts(key id) []wire.DHTContact {
	if b := r.table[key[0]]; len(b) == refK {
		return b
	}
	var out []wire.DHTContact
	for i := range r.table {
		for _, c := range r.table[i] {
			if len(out) < refK {
				out = append(out, c)
			}
		}
	}
	return out
}

func (r *reference) Receive(now time.Time, p []byte) {
	m, err := wire.DecodeDHT(p)
	if err != nil {
		return
	}
	switch m.Code {
	case wire.DHTStoreCode:
		r.insert(m.Src)
		k := id(m.Store.Key)
		if r.locals[k] && string(m.Store.Val) == encodeAddr(r.self) {
			return
		}
		for i, v := range r.values[k] {
			if v.val == string(m.Store.Val) {
				r.values[k][i].exp = max(v.exp, m.Store.Exp)
				return
			}
		}
		if r.values[k] == nil {
			r.keys = append(r.keys, k)
		}
		r.values[k] = append(r.values[k], value{string(m.Store.Val), m.Store.Exp, now})
	case wire.DHTFindNodeReq, wire.DHTFindValueReq:
		r.insert(m.Src)
		k := id(m.Find.Key)
		rsp := wire.DHTMsg{Code: m.Code + 1, Node: &wire.DHTNodeRsp{
			Cookie: m.Find.Cookie, Key: m.Find.Key, Contacts: r.contacts(k),
		}}
		if m.Code == wire.DHTFindValueReq {
			rsp.Val = &wire.DHTValueRsp{}
			for _, v := range r.values[k] {
				rsp.Val.Values = append(rsp.Val.Values, []byte(v.val))
			}
			if r.locals[k] {
				rsp.Val.Values = append(rsp.Val.Values, []byte(encodeAddr(r.self)))
			}
			rsp.Val.Values = rsp.Val.Values[:min(len(rsp.Val.Values), 8)]
		}
		r.send(m.Src.Addr, rsp)
	case wire.DHTFindNodeRsp, wire.DHTFindValueRsp:
		k := id(m.Node.Key)
		q := r.reqs[k]
		if m.Node.Cookie != r.magic && (q == nil || q.asked[m.Src.Addr] != m.Node.Cookie) {
			return
		}
		r.insert(m.Src)
		fresh := false
		for _, c := range m.Node.Contacts {
			if c.Addr == r.self {
				continue
			}
			r.insert(c)
			if q != nil && q.asked[c.Addr] == 0 {
				q.asked[c.Addr] = ^uint64(0) // recorded as asked, never sent to
				fresh = true
			}
		}
		if q == nil || q.query == 0 || m.Val == nil {
			return
		}
		if len(m.Val.Values) > 0 {
			r.answer(q, k, m.Val.Values)
		} else if !fresh {
			r.askMore(q, k)
		}
	}
}

func (r *reference) answer(q *refRequest, k id, vals [][]byte) {
	var addrs []uint64
	for _, v := range vals[:min(2, len(vals))] {
		if a, ok := decodeAddr(string(v)); ok && a != r.self && len(addrs) == 0 {
			addrs = append(addrs, a)
		}
	}
	r.res = append(r.res, Result{ID: q.query, Key: []byte(k), Addrs: addrs})
	q.query = 0
}

func (r *reference) askMore(q *refRequest, k id) int {
	n := 0
	for _, c := range r.contacts(k) {
		if n == refAlpha {
			break
		}
		if q.asked[c.Addr] == 0 {
			q.asked[c.Addr] = r.rnd.Uint64() | 1
			r.send(c.Addr, wire.DHTMsg{Code: wire.DHTFindValueReq, Find: &wire.DHTFind{Cookie: q.asked[c.Addr], Key: []byte(k)}})
			n++
		}
	}
	return n
}

func (r *reference) Register(now time.Time, key []byte) error {
	k := id(key)
	r.locals[k] = true
	exp := uint32(now.Unix() + 86400)
	for i, c := range r.contacts(k) {
		if i < refAlpha {
			r.send(c.Addr, wire.DHTMsg{Code: wire.DHTStoreCode, Store: &wire.DHTStore{Key: key, Val: []byte(encodeAddr(r.self)), Exp: exp}})
		}
	}
	return nil
}

func (r *reference) Query(now time.Time, key []byte) QueryID {
	r.ids++
	k := id(key)
	q := &refRequest{query: r.ids, asked: map[uint64]uint64{}, expires: now.Add(2 * time.Second)}
	if v := r.values[k]; len(v) > 0 {
		r.answer(q, k, [][]byte{[]byte(v[0].val)})
		return r.ids
	}
	r.reqs[k] = q
	if r.askMore(q, k) == 0 {
		r.answer(q, k, nil)
	}
	return r.ids
}

func (r *reference) Tick(now time.Time) {
	var due []id
	for k, q := range r.reqs {
		if !now.Before(q.expires) {
			due = append(due, k)
		}
	}
	slices.Sort(due)
	for _, k := range due {
		if q := r.reqs[k]; q.query != 0 {
			r.answer(q, k, nil)
		}
		delete(r.reqs, k)
	}
	if now.Before(r.next) {
		return
	}
	r.next = now.Add(90 * time.Second)
	if r.n == 0 {
		r.next = now.Add(time.Second)
		if r.peer != 0 {
			find := wire.DHTMsg{Code: wire.DHTFindNodeReq, Find: &wire.DHTFind{Cookie: r.magic, Key: []byte(r.id)}}
			r.send(r.peer, find)
			r.send(r.peer, find) // it does appear twice
		}
	}
	far := id("")
	for _, k := range r.keys {
		if far == "" || closer(r.id, far, k) {
			far = k
		}
	}
	for i, v := range r.values[far] {
		if now.Sub(v.repl) > 900*time.Second {
			r.values[far][i].repl = now
			for j, c := range r.contacts(far) {
				if j < refAlpha {
					r.send(c.Addr, wire.DHTMsg{Code: wire.DHTStoreCode, Store: &wire.DHTStore{Key: []byte(far), Val: []byte(v.val), Exp: v.exp}})
				}
			}
		}
	}
}

func (r *reference) NextDeadline() time.Time {
	d := r.next
	for _, q := range r.reqs {
		if q.expires.Before(d) {
			d = q.expires
		}
	}
	return d
}

func (r *reference) Messages() []Message { m := r.out; r.out = nil; return m }
func (r *reference) Results() []Result   { m := r.res; r.res = nil; return m }
