package wire

import (
	"fmt"

	"github.com/o7s/o7s-router/lib/wire/pb"
)

// Sizes of enrolment messages (spec 41 §2).
const (
	EnrollIDLen = 8
	// MaxEnrollLen is the longest message to send; receivers read 1024 bytes
	// and stumble over exactly that many.
	MaxEnrollLen  = 1023
	maxEnrollRead = 1024
	// MaxLayerName is the longest layer name in bytes.
	MaxLayerName = 255
)

// EnrollReq asks a member for the configuration of its layer.
type EnrollReq struct {
	ID [EnrollIDLen]byte // drawn by the joiner
}

// EnrollResp answers it.
type EnrollResp struct {
	ID       [EnrollIDLen]byte
	Sec      int64 // the enroller's clock, seconds since 1970 UTC
	Nsec     int32 // 0..999999999
	Response int32 // 0 accepted, negative refused
	Conf     *LayerConfig
}

// EnrollAck ends the exchange.
type EnrollAck struct {
	ID     [EnrollIDLen]byte
	Result int32 // 0: the joiner is a member
}

// LayerConfig is the configuration that enrolment hands on, with the numbers
// of spec 41 §4. Only unicast and broadcast layers enrol, so the parts for
// other kinds of layer do not travel.
type LayerConfig struct {
	LayerName string
	HashAlg   uint32
	Type      uint32         // 1 unicast, 2 broadcast
	Unicast   *UnicastConfig // present iff Type is 1
}

// UnicastConfig is the unicast part of a LayerConfig. Times are seconds.
type UnicastConfig struct {
	AddrSize, EIDSize, MaxTTL uint32
	RoutingPolicy             uint32
	LinkState                 *LinkStateConfig // present if RoutingPolicy is 0
	DirectoryPolicy           uint32
	DHT                       *DHTConfig // present if DirectoryPolicy is 0
	AddrAuth                  uint32
	Congestion                uint32
}

// LinkStateConfig is the link-state part of a UnicastConfig.
type LinkStateConfig struct{ Policy, TRecalc, TUpdate, TTimeo uint32 }

// DHTConfig is the directory part of a UnicastConfig. Peer is the address of
// the enroller, the joiner's first contact.
type DHTConfig struct {
	Alpha, K, TExpire, TRefresh, TReplicate uint32
	Peer                                    uint64
}

const typeUnicast = 1

// AppendEnrollReq appends a request.
func AppendEnrollReq(dst []byte, m *EnrollReq) []byte {
	return marshal(dst, &pb.EnrollReqMsg{Id: m.ID[:]})
}

// AppendEnrollResp appends a response. Conf is written unless it is nil; it
// must be there when Response is not negative.
func AppendEnrollResp(dst []byte, m *EnrollResp) []byte {
	return marshal(dst, &pb.EnrollRespMsg{
		Id: m.ID[:], TSec: &m.Sec, TNsec: &m.Nsec, Response: &m.Response, Conf: m.Conf.toPB(),
	})
}

// AppendEnrollAck appends an acknowledgement.
func AppendEnrollAck(dst []byte, m *EnrollAck) []byte {
	return marshal(dst, &pb.EnrollAckMsg{Id: m.ID[:], Result: &m.Result})
}

// DecodeEnrollReq decodes a request.
func DecodeEnrollReq(b []byte) (*EnrollReq, error) {
	if err := checkEnrollLen(b); err != nil {
		return nil, err
	}
	var p pb.EnrollReqMsg
	if err := unmarshal(b, &p); err != nil {
		return nil, err
	}
	id, err := enrollID(p.GetId())
	return &EnrollReq{ID: id}, err
}

// DecodeEnrollResp decodes a response: id of 8 bytes, clock in range, and with
// a response that is not negative a configuration with every part that its
// policies call for. The values are not checked.
func DecodeEnrollResp(b []byte) (*EnrollResp, error) {
	if err := checkEnrollLen(b); err != nil {
		return nil, err
	}
	var p pb.EnrollRespMsg
	if err := unmarshal(b, &p); err != nil {
		return nil, err
	}
	id, err := enrollID(p.GetId())
	if err != nil {
		return nil, err
	}
	m := &EnrollResp{ID: id, Sec: p.GetTSec(), Nsec: p.GetTNsec(), Response: p.GetResponse()}
	if m.Nsec < 0 || m.Nsec > 999999999 {
		return nil, fmt.Errorf("%w: %d nanoseconds", ErrInvalid, m.Nsec)
	}
	if m.Response < 0 { // what comes with a refusal has no meaning
		return m, nil
	}
	if m.Conf, err = configFromPB(p.GetConf()); err != nil {
		return nil, err
	}
	return m, nil
}

// DecodeEnrollAck decodes an acknowledgement.
func DecodeEnrollAck(b []byte) (*EnrollAck, error) {
	if err := checkEnrollLen(b); err != nil {
		return nil, err
	}
	var p pb.EnrollAckMsg
	if err := unmarshal(b, &p); err != nil {
		return nil, err
	}
	id, err := enrollID(p.GetId())
	return &EnrollAck{ID: id, Result: p.GetResult()}, err
}

func checkEnrollLen(b []byte) error {
	if len(b) > maxEnrollRead {
		return fmt.Errorf("%w: %d bytes, at most %d", ErrLong, len(b), maxEnrollRead)
	}
	return nil
}

func enrollID(b []byte) (id [EnrollIDLen]byte, err error) {
	if copy(id[:], b); len(b) != EnrollIDLen {
		return id, fmt.Errorf("%w: enrolment id of %d bytes, not %d", ErrInvalid, len(b), EnrollIDLen)
	}
	return id, nil
}

func (c *LayerConfig) toPB() *pb.IpcpConfigMsg {
	if c == nil {
		return nil
	}
	return &pb.IpcpConfigMsg{
		LayerInfo: &pb.LayerInfoMsg{Name: &c.LayerName, DirHashAlgo: &c.HashAlg},
		IpcpType:  &c.Type,
		Unicast:   c.Unicast.toPB(),
	}
}

func (u *UnicastConfig) toPB() *pb.UniConfigMsg {
	if u == nil {
		return nil
	}
	routing := &pb.RoutingConfigMsg{Pol: &u.RoutingPolicy}
	if l := u.LinkState; l != nil {
		routing.Ls = &pb.LsConfigMsg{Pol: &l.Policy, TRecalc: &l.TRecalc, TUpdate: &l.TUpdate, TTimeo: &l.TTimeo}
	}
	dir := &pb.DirConfigMsg{Pol: &u.DirectoryPolicy}
	if d := u.DHT; d != nil {
		dir.Dht = &pb.DirDhtConfigMsg{
			Alpha: &d.Alpha, K: &d.K, TExpire: &d.TExpire, TRefresh: &d.TRefresh, TReplicate: &d.TReplicate, Peer: &d.Peer,
		}
	}
	return &pb.UniConfigMsg{
		Dt:           &pb.DtConfigMsg{AddrSize: &u.AddrSize, EidSize: &u.EIDSize, MaxTtl: &u.MaxTTL, Routing: routing},
		Dir:          dir,
		AddrAuthType: &u.AddrAuth,
		CongAvoid:    &u.Congestion,
	}
}

// configFromPB takes over what the decoder has found. Required parts are there;
// optional ones are checked, because the reference crashes on a missing one and
// we must not (spec 41 §11.2).
func configFromPB(p *pb.IpcpConfigMsg) (*LayerConfig, error) {
	if p == nil {
		return nil, fmt.Errorf("%w: no layer configuration", ErrInvalid)
	}
	c := &LayerConfig{
		LayerName: p.GetLayerInfo().GetName(),
		HashAlg:   p.GetLayerInfo().GetDirHashAlgo(),
		Type:      p.GetIpcpType(),
	}
	if len(c.LayerName) > MaxLayerName {
		return nil, fmt.Errorf("%w: layer name of %d bytes, at most %d", ErrInvalid, len(c.LayerName), MaxLayerName)
	}
	if c.Type != typeUnicast {
		return c, nil
	}
	u := p.GetUnicast()
	if u == nil {
		return nil, fmt.Errorf("%w: no unicast configuration", ErrInvalid)
	}
	dt, dir := u.GetDt(), u.GetDir()
	c.Unicast = &UnicastConfig{
		AddrSize: dt.GetAddrSize(), EIDSize: dt.GetEidSize(), MaxTTL: dt.GetMaxTtl(),
		RoutingPolicy:   dt.GetRouting().GetPol(),
		DirectoryPolicy: dir.GetPol(),
		AddrAuth:        u.GetAddrAuthType(),
		Congestion:      u.GetCongAvoid(),
	}
	if ls := dt.GetRouting().GetLs(); ls != nil {
		c.Unicast.LinkState = &LinkStateConfig{
			Policy: ls.GetPol(), TRecalc: ls.GetTRecalc(), TUpdate: ls.GetTUpdate(), TTimeo: ls.GetTTimeo(),
		}
	} else if c.Unicast.RoutingPolicy == 0 {
		return nil, fmt.Errorf("%w: no link-state configuration", ErrInvalid)
	}
	if d := dir.GetDht(); d != nil {
		c.Unicast.DHT = &DHTConfig{
			Alpha: d.GetAlpha(), K: d.GetK(), TExpire: d.GetTExpire(),
			TRefresh: d.GetTRefresh(), TReplicate: d.GetTReplicate(), Peer: d.GetPeer(),
		}
	} else if c.Unicast.DirectoryPolicy == 0 {
		return nil, fmt.Errorf("%w: no directory configuration", ErrInvalid)
	}
	return c, nil
}
