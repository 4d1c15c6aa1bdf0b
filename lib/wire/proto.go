package wire

import (
	"fmt"

	"google.golang.org/protobuf/proto"
)

// marshal appends m. Fields come out in ascending order, as protobuf-c writes
// them; a message whose required fields are all set cannot fail.
func marshal(dst []byte, m proto.Message) []byte {
	out, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend(dst, m)
	if err != nil {
		panic("wire: required field left out: " + err.Error()) // a mistake in this package
	}
	return out
}

// unmarshal decodes into m, which then does not alias b. Unknown fields are
// skipped, missing required ones refused.
func unmarshal(b []byte, m proto.Message) error {
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, m); err != nil {
		return fmt.Errorf("%w: %v", ErrInvalid, err)
	}
	return nil
}
