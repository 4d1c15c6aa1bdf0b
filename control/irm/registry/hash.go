package registry

import (
	"crypto/sha3"
	"fmt"
	"strings"

	"github.com/o7s/o7s-router/ipcp"
)

// Algorithms lists the directory hashes that names are indexed by.
var Algorithms = [...]ipcp.HashAlg{ipcp.SHA3_224, ipcp.SHA3_256, ipcp.SHA3_384, ipcp.SHA3_512}

var hashNames = [...]string{"SHA3_224", "SHA3_256", "SHA3_384", "SHA3_512"}

// Hash returns the key of name in the directory of a layer that uses alg: the
// hash of its bytes without terminator (spec 45 §2). It panics for an unknown
// algorithm, which configuration never lets through.
func Hash(alg ipcp.HashAlg, name string) []byte {
	b := []byte(name)
	switch alg {
	case ipcp.SHA3_224:
		h := sha3.Sum224(b)
		return h[:]
	case ipcp.SHA3_256:
		h := sha3.Sum256(b)
		return h[:]
	case ipcp.SHA3_384:
		h := sha3.Sum384(b)
		return h[:]
	case ipcp.SHA3_512:
		h := sha3.Sum512(b)
		return h[:]
	}
	panic(fmt.Sprintf("registry: unknown hash algorithm %d", alg))
}

// HashName is the word that commands use for alg.
func HashName(alg ipcp.HashAlg) string {
	if int(alg) < len(hashNames) {
		return hashNames[alg]
	}
	return fmt.Sprintf("hash-%d", uint8(alg))
}

// ParseHash is the inverse of HashName; case and the character between the
// numbers do not matter.
func ParseHash(s string) (ipcp.HashAlg, error) {
	norm := strings.NewReplacer("-", "_").Replace(strings.ToUpper(s))
	for i, n := range hashNames {
		if norm == n {
			return ipcp.HashAlg(i), nil
		}
	}
	return 0, fmt.Errorf("unknown hash %q (expected %s)", s, strings.Join(hashNames[:], ", "))
}
