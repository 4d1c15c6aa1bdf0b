// Package qos holds the quality-of-service specification of a flow, the
// predefined specifications and the mapping to QoS cubes (spec 33 §5, §6).
package qos

import (
	"fmt"
	"math"
)

// Spec is what a program asks of a flow. It travels unchanged in every flow
// request, so both ends enable the same machinery. The zero value is a
// reliability request without a peer time-out; most callers want Raw or Data.
type Spec struct {
	Delay        uint32 `json:"delay_ms"`      // ms, cube selection only
	Bandwidth    uint64 `json:"bandwidth_bps"` // bit/s, cube selection only
	Availability uint8  `json:"availability"`  // number of nines, cube selection only
	Loss         uint32 `json:"loss"`          // 0: retransmission (with InOrder)
	BER          uint32 `json:"ber"`           // errors per 10^9 bits; 0: CRC32 trailer
	InOrder      uint8  `json:"in_order"`      // not 0: end-to-end protocol (FRCP)
	MaxGap       uint32 `json:"max_gap_ms"`    // ms, cube selection only
	Timeout      uint32 `json:"timeout_ms"`    // ms, peer time-out; 0: none
}

// DefaultTimeout is the peer time-out of every predefined specification.
const DefaultTimeout = 120000 // ms

// Predefined specifications, as requests carry them: default builds of the
// reference force BER to 1 (no CRC), and all but RawNoErrors have it (spec 33
// §5).
var (
	Raw = Spec{Delay: math.MaxUint32, Loss: 1, BER: 1, MaxGap: math.MaxUint32, Timeout: DefaultTimeout}
	// RawNoErrors asks for a checksum, which default builds of the reference
	// cannot: towards those use it only if they were built to have it.
	RawNoErrors = Spec{Delay: math.MaxUint32, Loss: 1, BER: 0, MaxGap: math.MaxUint32, Timeout: DefaultTimeout}
	BestEffort  = Spec{Delay: math.MaxUint32, Loss: 1, BER: 1, InOrder: 1, MaxGap: math.MaxUint32, Timeout: DefaultTimeout}
	Video       = Spec{Delay: 100, Bandwidth: math.MaxUint64, Availability: 3, Loss: 1, BER: 1, InOrder: 1, MaxGap: 100, Timeout: DefaultTimeout}
	Voice       = Spec{Delay: 50, Bandwidth: 100000, Availability: 5, Loss: 1, BER: 1, InOrder: 1, MaxGap: 50, Timeout: DefaultTimeout}
	Data        = Spec{Delay: 1000, Loss: 0, BER: 1, InOrder: 1, MaxGap: 2000, Timeout: DefaultTimeout}
)

// ByName returns the specification the tools call raw, best, voice, video or data.
func ByName(name string) (Spec, error) {
	switch name {
	case "raw", "":
		return Raw, nil
	case "best":
		return BestEffort, nil
	case "video":
		return Video, nil
	case "voice":
		return Voice, nil
	case "data":
		return Data, nil
	}
	return Spec{}, fmt.Errorf("unknown qos %q (expected raw, best, voice, video or data)", name)
}

// Cube is the internal class that a unicast layer serves a flow in.
type Cube uint8

// The three cubes of every unicast layer.
const (
	CubeBestEffort Cube = 0
	CubeVideo      Cube = 1
	CubeVoice      Cube = 2
	NumCubes            = 3
)

// Cube selects the cube of s by spec 33 §6.
func (s Spec) Cube() Cube {
	switch {
	case s.Delay <= 50 && s.Bandwidth <= 100000 && s.Availability >= 5 && s.MaxGap <= 50:
		return CubeVoice
	case s.Delay <= 100 && s.Availability >= 3 && s.MaxGap <= 100:
		return CubeVideo
	}
	return CubeBestEffort
}

// IsRaw reports whether packets of the flow travel bare: no FRCP, no CRC.
func (s Spec) IsRaw() bool { return s.InOrder == 0 && s.BER != 0 }
