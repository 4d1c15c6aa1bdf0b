package wire

import (
	"encoding/binary"
	"fmt"
)

// OAPLen is the fixed part of an OAP message (spec 32 §1).
const OAPLen = 36

// maxKexLen is what the 14-bit length of the key exchange data can say.
const maxKexLen = 1<<14 - 1

// OAP is the header that two resource managers exchange in a flow request and
// its reply (spec 32). Whether a message is a request or a response is known
// from the context only.
type OAP struct {
	ID             [16]byte // drawn by the client, repeated by the server
	Timestamp      uint64   // the sender's clock, ns since 1970 UTC
	CipherNID      uint16   // packet cipher, 0: none
	KDFNID         uint16   // digest of the key derivation, 0: none
	DigestNID      uint16   // digest of the signature and, in requests, of the request hash; 0: not set
	KexRaw         bool     // F: key exchange data is raw, not DER
	KexClientEncap bool     // R: the client encapsulates
	Cert           []byte   // X.509 DER
	Kex            []byte   // public key or KEM ciphertext
	Data           []byte   // of the application
	ReqHash        []byte   // responses only
	Sig            []byte   // only with Cert
}

// Digest NIDs (spec 32 §1): OpenSSL's object numbers.
const (
	NIDSHA256   = 672
	NIDSHA384   = 673
	NIDSHA512   = 674
	NIDSHA3256  = 1097
	NIDSHA3384  = 1098
	NIDSHA3512  = 1099
	NIDBLAKE2b  = 1056
	NIDBLAKE2s  = 1057
	nidAES128GC = 895 // first of the cipher numbers
)

// DigestLen returns the length of the digest with this number in bytes, 0 for
// an unknown number. The number 0 means SHA-384 where a request hash is
// concerned (spec 32 §3), which is up to the caller.
func DigestLen(nid uint16) int {
	switch nid {
	case NIDSHA256, NIDSHA3256, NIDBLAKE2s:
		return 32
	case NIDSHA384, NIDSHA3384:
		return 48
	case NIDSHA512, NIDSHA3512, NIDBLAKE2b:
		return 64
	}
	return 0
}

// KnownCipher reports whether nid is a packet cipher of spec 32 §1.
func KnownCipher(nid uint16) bool {
	switch nid {
	case nidAES128GC, 898, 901, 904, 905, 906, 1018:
		return true
	}
	return false
}

// AppendOAP appends a message. It fails only when a field is longer than its
// length field can say, or when there is a signature without certificate.
func AppendOAP(dst []byte, m *OAP) ([]byte, error) {
	switch {
	case len(m.Cert) > 0xffff:
		return dst, fmt.Errorf("%w: certificate of %d bytes", ErrLong, len(m.Cert))
	case len(m.Kex) > maxKexLen:
		return dst, fmt.Errorf("%w: key exchange data of %d bytes", ErrLong, len(m.Kex))
	case len(m.Data) > 0xffff:
		return dst, fmt.Errorf("%w: application data of %d bytes", ErrLong, len(m.Data))
	case len(m.Cert) == 0 && len(m.Sig) > 0:
		return dst, fmt.Errorf("%w: signature without certificate", ErrInvalid)
	}
	be := binary.BigEndian
	dst = append(dst, m.ID[:]...)
	dst = be.AppendUint64(dst, m.Timestamp)
	dst = be.AppendUint16(dst, m.CipherNID)
	dst = be.AppendUint16(dst, m.KDFNID)
	dst = be.AppendUint16(dst, m.DigestNID)
	dst = be.AppendUint16(dst, uint16(len(m.Cert)))
	kex := uint16(len(m.Kex))
	if m.KexRaw {
		kex |= 1 << 15
	}
	if m.KexClientEncap {
		kex |= 1 << 14
	}
	dst = be.AppendUint16(dst, kex)
	dst = be.AppendUint16(dst, uint16(len(m.Data)))
	for _, p := range [...][]byte{m.Cert, m.Kex, m.Data, m.ReqHash, m.Sig} {
		dst = append(dst, p...)
	}
	return dst, nil
}

// DecodeOAPRequest decodes the piggyback of a flow request (spec 32 §2).
func DecodeOAPRequest(b []byte) (OAP, error) { return decodeOAP(b, 0) }

// DecodeOAPResponse decodes the piggyback of a flow reply. hashLen is the
// length of the client's own request hash, which the message does not tell.
func DecodeOAPResponse(b []byte, hashLen int) (OAP, error) { return decodeOAP(b, hashLen) }

func decodeOAP(b []byte, hashLen int) (OAP, error) {
	if len(b) < OAPLen {
		return OAP{}, fmt.Errorf("%w: %d of %d bytes", ErrShort, len(b), OAPLen)
	}
	be := binary.BigEndian
	m := OAP{
		Timestamp: be.Uint64(b[16:]),
		CipherNID: be.Uint16(b[24:]),
		KDFNID:    be.Uint16(b[26:]),
		DigestNID: be.Uint16(b[28:]),
	}
	copy(m.ID[:], b)
	kex := be.Uint16(b[32:])
	m.KexRaw, m.KexClientEncap = kex&(1<<15) != 0, kex&(1<<14) != 0
	switch {
	case m.CipherNID != 0 && !KnownCipher(m.CipherNID):
		return OAP{}, fmt.Errorf("%w: cipher number %d", ErrInvalid, m.CipherNID)
	case m.KDFNID != 0 && DigestLen(m.KDFNID) == 0:
		return OAP{}, fmt.Errorf("%w: key derivation digest number %d", ErrInvalid, m.KDFNID)
	case m.DigestNID != 0 && DigestLen(m.DigestNID) == 0:
		return OAP{}, fmt.Errorf("%w: signature digest number %d", ErrInvalid, m.DigestNID)
	}
	c, k, d := int(be.Uint16(b[30:])), int(kex&maxKexLen), int(be.Uint16(b[34:]))
	rest := b[OAPLen:]
	if need := c + k + d + hashLen; len(rest) < need {
		return OAP{}, fmt.Errorf("%w: %d of %d bytes", ErrShort, len(b), OAPLen+need)
	}
	take := func(n int) []byte {
		p := rest[:n:n]
		rest = rest[n:]
		if n == 0 {
			return nil
		}
		return p
	}
	m.Cert, m.Kex, m.Data, m.ReqHash = take(c), take(k), take(d), take(hashLen)
	if m.Sig = take(len(rest)); c == 0 && len(m.Sig) > 0 {
		return OAP{}, fmt.Errorf("%w: %d bytes after an unsigned message", ErrInvalid, len(m.Sig))
	}
	return m, nil
}
