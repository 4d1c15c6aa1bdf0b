package wire

import (
	"fmt"

	"github.com/o7s/o7s-router/lib/wire/pb"
)

// MaxCEPLen is the longest connection establishment message to send: the
// reference reads 128 bytes and stumbles over exactly 128 (spec 40 §10.1).
const MaxCEPLen = 127

// maxCEPRead is the longest one a receiver takes.
const maxCEPRead = 128

// Concrete syntaxes (spec 40 §3).
const (
	SyntaxGPB   = 0
	SyntaxASN1  = 1
	SyntaxFixed = 2
)

// CEP opens a connection between two components of a layer (spec 40). The zero
// value is the refusal.
type CEP struct {
	Component string
	Protocol  string
	Version   int32
	Syntax    int32
	Address   uint64 // of the sender in the layer; 0: none
}

// Refusal reports whether m says that the acceptor has no such component. It
// goes by the component name: the broadcast layer's own message has an empty
// protocol too (spec 40 §10.3).
func (m *CEP) Refusal() bool { return m.Component == "" }

// AppendCEP appends a message. The strings must be short enough for MaxCEPLen;
// those of spec 40 §4 are.
func AppendCEP(dst []byte, m *CEP) []byte {
	return marshal(dst, &pb.CepMsg{
		CompName:    &m.Component,
		Protocol:    &m.Protocol,
		PrefVersion: &m.Version,
		PrefSyntax:  &m.Syntax,
		Address:     &m.Address,
	})
}

// DecodeCEP decodes a message. The fields that nobody sends are ignored.
func DecodeCEP(b []byte) (*CEP, error) {
	if len(b) > maxCEPRead {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrLong, len(b), maxCEPRead)
	}
	var m pb.CepMsg
	if err := unmarshal(b, &m); err != nil {
		return nil, err
	}
	return &CEP{
		Component: m.GetCompName(),
		Protocol:  m.GetProtocol(),
		Version:   m.GetPrefVersion(),
		Syntax:    m.GetPrefSyntax(),
		Address:   m.GetAddress(),
	}, nil
}
