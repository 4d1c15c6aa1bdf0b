package wire

import (
	"crypto/sha3"
	"fmt"
)

// Directory hash algorithms by their number in the configuration (spec 41 §4).
const (
	HashSHA3_224 uint8 = iota
	HashSHA3_256
	HashSHA3_384
	HashSHA3_512
)

// HashLen is the length of a directory hash in bytes, 0 for an unknown number.
func HashLen(alg uint8) int {
	switch alg {
	case HashSHA3_224:
		return 28
	case HashSHA3_256:
		return 32
	case HashSHA3_384:
		return 48
	case HashSHA3_512:
		return 64
	}
	return 0
}

// HashName gives the directory key of a service name: the hash of its bytes,
// without terminator (spec 10 §1, spec 43 §3).
func HashName(alg uint8, name string) ([]byte, error) {
	b := []byte(name)
	switch alg {
	case HashSHA3_224:
		h := sha3.Sum224(b)
		return h[:], nil
	case HashSHA3_256:
		h := sha3.Sum256(b)
		return h[:], nil
	case HashSHA3_384:
		h := sha3.Sum384(b)
		return h[:], nil
	case HashSHA3_512:
		h := sha3.Sum512(b)
		return h[:], nil
	}
	return nil, fmt.Errorf("%w: directory hash algorithm %d", ErrInvalid, alg)
}
