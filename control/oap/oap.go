// Package oap is the exchange between two resource managers in every flow
// request and reply (spec 32), in its plain form: no certificates, no key
// exchange. Client and Server do no input or output; the time and the source
// of random numbers are passed in. Neither is safe for concurrent use.
//
// Authentication and encryption belong in authenticate and exchangeKeys, which
// today refuse what a node without them must refuse.
package oap

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha3"
	"crypto/sha512"
	"fmt"
	"hash"
	"io"
	"time"

	"golang.org/x/crypto/blake2b"
	"golang.org/x/crypto/blake2s"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/wire"
)

// defaultHash is the digest of request hashes when the request names none
// (spec 32 §3).
const defaultHash = wire.NIDSHA384

// requestHash is the digest of a whole request by its signature digest number,
// which the decoder has checked.
func requestHash(nid uint16, request []byte) []byte {
	if nid == 0 {
		nid = defaultHash
	}
	var h hash.Hash
	switch nid {
	case wire.NIDSHA256:
		h = sha256.New()
	case wire.NIDSHA384:
		h = sha512.New384()
	case wire.NIDSHA512:
		h = sha512.New()
	case wire.NIDSHA3256:
		h = sha3.New256()
	case wire.NIDSHA3384:
		h = sha3.New384()
	case wire.NIDSHA3512:
		h = sha3.New512()
	case wire.NIDBLAKE2b:
		h, _ = blake2b.New512(nil) // fails for long keys only
	case wire.NIDBLAKE2s:
		h, _ = blake2s.New256(nil)
	default:
		panic(fmt.Sprintf("oap: digest number %d passed the decoder", nid))
	}
	h.Write(request)
	return h.Sum(nil)
}

// authenticate checks the peer's certificate and signature (spec 32 §4). This
// node has no certificate store, so no certificate can be verified.
func authenticate(m *wire.OAP) error {
	if len(m.Cert) > 0 {
		return o7serr.Wrap(o7serr.EAUTH, "cannot verify the peer's certificate: no authority is configured")
	}
	return nil
}

// exchangeKeys is the server's part of a key exchange (spec 32 §6). This node
// cannot encrypt, so a client that wants to is refused rather than answered in
// clear text.
func exchangeKeys(m *wire.OAP) error {
	if len(m.Kex) > 0 {
		return o7serr.Wrap(o7serr.ECRYPT, "client asks for encryption, which is not available")
	}
	return nil
}

// Client is the side that asks for a flow; one Client makes one request.
type Client struct {
	id      [16]byte
	request []byte
	hash    []byte
}

// NewClient prepares a request that carries the application's data, if any.
// random must be a cryptographic source: the id keeps strangers from answering.
// A repeated allocation needs a new Client, since servers refuse a request that
// they have seen (spec 32 §7).
func NewClient(now time.Time, random io.Reader, data []byte) (*Client, error) {
	c := &Client{}
	if _, err := io.ReadFull(random, c.id[:]); err != nil {
		return nil, fmt.Errorf("allocation id: %w", err)
	}
	var err error
	c.request, err = wire.AppendOAP(nil, &wire.OAP{ID: c.id, Timestamp: uint64(now.UnixNano()), Data: data})
	if err != nil {
		return nil, err
	}
	c.hash = requestHash(0, c.request)
	return c, nil
}

// Request is the piggyback of the flow request. It must not be changed.
func (c *Client) Request() []byte { return c.request }

// Complete checks the piggyback of a positive flow reply, in the order of spec
// 32 §5, and returns the server's application data. Every failure is ECRYPT for
// the program, and the flow is to be released.
func (c *Client) Complete(response []byte) (data []byte, err error) {
	m, err := wire.DecodeOAPResponse(response, len(c.hash))
	switch {
	case err != nil:
		return nil, fmt.Errorf("response: %v: %w", err, o7serr.ECRYPT)
	case m.ID != c.id:
		return nil, o7serr.Wrap(o7serr.ECRYPT, "response to another request")
	}
	if err := authenticate(&m); err != nil {
		return nil, fmt.Errorf("response: %v: %w", err, o7serr.ECRYPT)
	}
	if !bytes.Equal(m.ReqHash, c.hash) {
		return nil, o7serr.Wrap(o7serr.ECRYPT, "response to an altered request")
	}
	// No key exchange was asked for, so the flow is not encrypted, whatever the
	// response says.
	return m.Data, nil
}

// Freshness of requests (spec 32 §7).
const (
	maxAge   = 20 * time.Second       // also how long a request is remembered
	maxAhead = 100 * time.Millisecond // of our clock
)

// maxRemembered bounds the memory that a flood of requests can take: 13000
// requests a second for maxAge.
const maxRemembered = 1 << 18

// Server is the side that accepts flows. One Server serves all names of a node,
// because requests must be fresh node-wide.
type Server struct {
	// seen holds the requests of the last maxAge by the second of their time
	// stamp, so that the old ones go a second at a time.
	seen map[int64]map[seen]struct{}
	n    int
}

type seen struct {
	timestamp uint64
	id        [16]byte
}

// NewServer returns a Server that remembers no requests.
func NewServer() *Server { return &Server{seen: make(map[int64]map[seen]struct{})} }

// Request is a request that passed all checks.
type Request struct {
	// Data is what the client's application sent; valid as long as the bytes
	// given to Receive.
	Data []byte

	id   [16]byte
	hash []byte
}

// Receive checks the piggyback of a flow request when a process is there to
// accept it (spec 32 §6). The code of the error is what the flow is to be
// refused with.
func (s *Server) Receive(now time.Time, request []byte) (*Request, error) {
	m, err := wire.DecodeOAPRequest(request)
	if err != nil {
		return nil, fmt.Errorf("request: %v: %w", err, o7serr.EAUTH)
	}
	if err := s.fresh(now, &m); err != nil {
		return nil, err
	}
	if err := authenticate(&m); err != nil {
		return nil, err
	}
	if err := exchangeKeys(&m); err != nil {
		return nil, err
	}
	return &Request{Data: m.Data, id: m.ID, hash: requestHash(m.DigestNID, request)}, nil
}

// Respond gives the piggyback of the positive reply, with the accepting
// program's data, if any.
func (r *Request) Respond(now time.Time, data []byte) ([]byte, error) {
	return wire.AppendOAP(nil, &wire.OAP{ID: r.id, Timestamp: uint64(now.UnixNano()), Data: data, ReqHash: r.hash})
}

// fresh refuses requests that are too old, too far ahead or seen before.
func (s *Server) fresh(now time.Time, m *wire.OAP) error {
	t := now.UnixNano()
	s.purge(t)
	// A time stamp beyond the year 2262 becomes negative: that is ahead, too.
	switch age := time.Duration(t - int64(m.Timestamp)); {
	case int64(m.Timestamp) < 0, age < -maxAhead:
		return o7serr.Wrap(o7serr.EAUTH, "request is ahead of our clock by more than %v", maxAhead)
	case age > maxAge:
		return o7serr.Wrap(o7serr.EAUTH, "request is older than %v", maxAge)
	}
	key := seen{m.Timestamp, m.ID}
	second := int64(m.Timestamp) / int64(time.Second)
	if _, dup := s.seen[second][key]; dup {
		return o7serr.Wrap(o7serr.EAUTH, "request was seen before")
	}
	if s.n >= maxRemembered {
		return o7serr.Wrap(o7serr.EAGAIN, "more than %d flow requests in %v", maxRemembered, maxAge)
	}
	if s.seen[second] == nil {
		s.seen[second] = make(map[seen]struct{})
	}
	s.seen[second][key] = struct{}{}
	s.n++
	return nil
}

// purge forgets requests that are too old to be accepted again.
func (s *Server) purge(t int64) {
	for second, m := range s.seen { // two dozen at most while the clock runs steadily
		if t-int64(maxAge) >= (second+1)*int64(time.Second) {
			s.n -= len(m)
			delete(s.seen, second)
		}
	}
}
