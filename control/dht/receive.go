package dht

import (
	"encoding/binary"
	"slices"
	"time"

	"github.com/o7s/o7s-router/lib/wire"
)

// encodeAddr gives the value that a registrant with address a publishes.
func encodeAddr(a uint64) string {
	return string(binary.BigEndian.AppendUint64(nil, a))
}

func decodeAddr(v string) (uint64, bool) {
	if len(v) != 8 {
		return 0, false
	}
	return binary.BigEndian.Uint64([]byte(v)), true
}

// Receive handles the payload of a packet that arrived for the directory's
// endpoint. It keeps no reference to payload. What is invalid is dropped and
// counted (spec 43 §6).
func (n *Node) Receive(now time.Time, payload []byte) {
	n.stats.Received++
	m, err := wire.DecodeDHT(payload)
	if err != nil || len(m.Src.ID) != n.cfg.KeyLen || !n.usable(m.Src.Addr) {
		n.stats.Malformed++
		return
	}
	switch m.Code {
	case wire.DHTStoreCode:
		if m.Store == nil || len(m.Store.Key) != n.cfg.KeyLen || len(m.Store.Val) == 0 {
			n.stats.Malformed++
			return
		}
		n.met(now, m.Src)
		n.receiveStore(now, m)
	case wire.DHTFindNodeReq, wire.DHTFindValueReq:
		if m.Find == nil || len(m.Find.Key) != n.cfg.KeyLen {
			n.stats.Malformed++
			return
		}
		n.met(now, m.Src)
		n.reply(m)
	case wire.DHTFindNodeRsp, wire.DHTFindValueRsp:
		if m.Node == nil || len(m.Node.Key) != n.cfg.KeyLen || m.Code == wire.DHTFindValueRsp && m.Val == nil {
			n.stats.Malformed++
			return
		}
		n.receiveResponse(now, m)
	default:
		n.stats.Unknown++
		return
	}
	n.join(now)
	n.publish(now)
	n.drainStores(now)
}

// met notes that the sender of a valid message exists.
func (n *Node) met(now time.Time, src wire.DHTContact) {
	c, fresh := n.table.observe(id(src.ID), src.Addr, now)
	n.probes = slices.DeleteFunc(n.probes, func(p *probe) bool { return p.addr == src.Addr })
	if fresh && c != nil {
		n.offer(now, c)
	}
}

func (n *Node) receiveStore(now time.Time, m *wire.DHTMsg) {
	key, val, exp := id(m.Store.Key), string(m.Store.Val), m.Store.Exp
	wall := now.Unix()
	switch {
	case int64(exp) < wall, len(val) > maxValueLen:
		n.stats.Refused++
		return
	case val == encodeAddr(n.cfg.Self):
		return // we know best what we have registered
	}
	// Nobody has reason to publish for much longer than the layer's t_expire;
	// the slack is for clocks that disagree.
	if most := wall + int64((n.cfg.Expire+clockSlack)/time.Second); int64(exp) > most {
		exp = uint32(most)
	}
	fresh, ok := n.store.put(key, val, exp, now, n.cfg.Rand)
	if !ok {
		n.stats.Refused++
		return
	}
	if fresh && val == encodeAddr(m.Src.Addr) {
		n.relay(key, &value{val: val, exp: exp})
	}
}

func (n *Node) receiveResponse(now time.Time, m *wire.DHTMsg) {
	key := id(m.Node.Key)
	r := n.cookies[m.Node.Cookie]
	switch {
	case m.Node.Cookie == n.magic && key == n.self && m.Code == wire.DHTFindNodeRsp:
		r = nil
	case r == nil || r.key != key || r.addr != m.Src.Addr || m.Code != r.code+1:
		n.stats.Unexpected++ // also a second answer to a repeated request
		return
	}
	n.met(now, m.Src)
	var contacts []cand
	for _, c := range m.Node.Contacts {
		// The reference does not check these, so neither need they be right.
		if len(c.ID) != n.cfg.KeyLen || !n.usable(c.Addr) || id(c.ID) == n.self {
			continue
		}
		contacts = append(contacts, cand{id: id(c.ID), addr: c.Addr})
	}
	for _, c := range contacts[:min(len(contacts), maxUsed)] {
		n.table.hear(c.id, c.addr)
	}
	if r == nil {
		return
	}
	var values []string
	if m.Val != nil {
		for _, v := range m.Val.Values {
			values = append(values, string(v))
		}
	}
	n.answered(now, r, contacts, values)
}

// reply answers a FIND request. The reply has at least one contact, the
// requester if need be: debug builds of the reference insist (spec 43 §11.8).
func (n *Node) reply(m *wire.DHTMsg) {
	key := id(m.Find.Key)
	rsp := wire.DHTMsg{Code: wire.DHTFindNodeRsp, Src: n.src()}
	rsp.Node = &wire.DHTNodeRsp{Cookie: m.Find.Cookie, Key: m.Find.Key}
	room := n.cfg.MaxMessage - 2*(n.cfg.KeyLen+16) - 24
	if m.Code == wire.DHTFindValueReq {
		rsp.Code = wire.DHTFindValueRsp
		rsp.Val = &wire.DHTValueRsp{}
		for _, v := range n.stored(key) {
			if len(rsp.Val.Values) == maxValues || len(v)+2 > room-n.cfg.KeyLen-16 {
				break
			}
			room -= len(v) + 2
			rsp.Val.Values = append(rsp.Val.Values, []byte(v))
		}
	}
	most := max(1, min(n.cfg.K, room/(n.cfg.KeyLen+16)))
	for _, c := range n.table.closest(key, most, n.contactOK) {
		rsp.Node.Contacts = append(rsp.Node.Contacts, wire.DHTContact{ID: []byte(c.id), Addr: c.addr})
	}
	if len(rsp.Node.Contacts) == 0 {
		rsp.Node.Contacts = []wire.DHTContact{m.Src}
	}
	n.send(m.Src.Addr, &rsp)
}

func (n *Node) src() wire.DHTContact {
	return wire.DHTContact{ID: []byte(n.self), Addr: n.cfg.Self}
}

func (n *Node) send(dst uint64, m *wire.DHTMsg) {
	n.stats.Sent++
	n.out = append(n.out, Message{Dst: dst, Payload: wire.AppendDHT(nil, m)})
}

func (n *Node) sendFind(dst uint64, code uint32, cookie uint64, key id) {
	n.send(dst, &wire.DHTMsg{
		Code: code, Src: n.src(),
		Find: &wire.DHTFind{Cookie: cookie, Key: []byte(key)},
	})
}

func (n *Node) sendStore(s queuedStore) {
	n.send(s.dst, &wire.DHTMsg{
		Code: wire.DHTStoreCode, Src: n.src(),
		Store: &wire.DHTStore{Key: []byte(s.key), Val: []byte(s.val), Exp: s.exp},
	})
}
