package wire

import (
	"fmt"

	"github.com/o7s/o7s-router/lib/wire/pb"
)

// Codes of directory messages (spec 43 §4).
const (
	DHTStoreCode    uint32 = 0
	DHTFindNodeReq  uint32 = 1
	DHTFindNodeRsp  uint32 = 2
	DHTFindValueReq uint32 = 3
	DHTFindValueRsp uint32 = 4
)

// DHTMsg is a message of the directory. Which of the parts must be there
// follows from the code.
type DHTMsg struct {
	Code  uint32
	Src   DHTContact // the sender
	Store *DHTStore  // code 0
	Find  *DHTFind   // codes 1, 3
	Node  *DHTNodeRsp
	Val   *DHTValueRsp // code 4; may have no values
}

// DHTContact is a member: its node id and layer address.
type DHTContact struct {
	ID   []byte
	Addr uint64
}

// DHTStore asks to keep a value.
type DHTStore struct {
	Key, Val []byte
	Exp      uint32 // seconds since 1970 UTC
}

// DHTFind asks for the nodes closest to a key, or for its values.
type DHTFind struct {
	Cookie uint64 // echoed in the response, not 0
	Key    []byte
}

// DHTNodeRsp answers DHTFind with contacts (codes 2, 4).
type DHTNodeRsp struct {
	Cookie   uint64
	Key      []byte
	Contacts []DHTContact
}

// DHTValueRsp carries the values found.
type DHTValueRsp struct{ Values [][]byte }

// AppendDHT appends a message with the parts that are not nil.
func AppendDHT(dst []byte, m *DHTMsg) []byte {
	p := &pb.DhtMsg{Code: &m.Code, Src: m.Src.toPB()}
	if s := m.Store; s != nil {
		p.Store = &pb.DhtStoreMsg{Key: nonNil(s.Key), Val: nonNil(s.Val), Exp: &s.Exp}
	}
	if f := m.Find; f != nil {
		p.Find = &pb.DhtFindReqMsg{Cookie: &f.Cookie, Key: nonNil(f.Key)}
	}
	if n := m.Node; n != nil {
		p.Node = &pb.DhtFindNodeRspMsg{Cookie: &n.Cookie, Key: nonNil(n.Key)}
		for i := range n.Contacts {
			p.Node.Contacts = append(p.Node.Contacts, n.Contacts[i].toPB())
		}
	}
	if v := m.Val; v != nil {
		p.Val = &pb.DhtFindValueRspMsg{Values: v.Values}
	}
	return marshal(dst, p)
}

// DecodeDHT decodes a message and checks that the sender has an address and
// that the parts the code calls for are there. Unknown codes are for the caller
// to ignore, and so are the lengths of ids and keys to check, which depend on
// the layer's hash. The result does not alias b.
func DecodeDHT(b []byte) (*DHTMsg, error) {
	var p pb.DhtMsg
	if err := unmarshal(b, &p); err != nil {
		return nil, err
	}
	m := &DHTMsg{Code: p.GetCode(), Src: contactFromPB(p.GetSrc())}
	if s := p.GetStore(); s != nil {
		m.Store = &DHTStore{Key: s.GetKey(), Val: s.GetVal(), Exp: s.GetExp()}
	}
	if f := p.GetFind(); f != nil {
		m.Find = &DHTFind{Cookie: f.GetCookie(), Key: f.GetKey()}
	}
	if n := p.GetNode(); n != nil {
		m.Node = &DHTNodeRsp{Cookie: n.GetCookie(), Key: n.GetKey()}
		for _, c := range n.GetContacts() {
			m.Node.Contacts = append(m.Node.Contacts, contactFromPB(c))
		}
	}
	if v := p.GetVal(); v != nil {
		m.Val = &DHTValueRsp{Values: v.GetValues()}
	}
	if m.Src.Addr == 0 {
		return nil, fmt.Errorf("%w: sender without address", ErrInvalid)
	}
	ok := true
	switch m.Code {
	case DHTStoreCode:
		ok = m.Store != nil && len(m.Store.Val) > 0
	case DHTFindNodeReq, DHTFindValueReq:
		ok = m.Find != nil
	case DHTFindNodeRsp:
		ok = m.Node != nil
	case DHTFindValueRsp:
		ok = m.Node != nil && m.Val != nil
	}
	if !ok {
		return nil, fmt.Errorf("%w: code %d without its part", ErrInvalid, m.Code)
	}
	return m, nil
}

func (c *DHTContact) toPB() *pb.DhtContactMsg {
	return &pb.DhtContactMsg{Id: nonNil(c.ID), Addr: &c.Addr}
}

func contactFromPB(p *pb.DhtContactMsg) DHTContact {
	return DHTContact{ID: p.GetId(), Addr: p.GetAddr()}
}

// nonNil keeps an empty required field on the wire.
func nonNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}
