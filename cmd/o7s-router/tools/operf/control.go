package operf

import (
	"encoding/binary"
	"encoding/json"
	"time"
)

// The configuration word. To the reference 1 is a bidirectional test and all
// else a unidirectional one, which leaves room for more between our own ends. A
// client of a unidirectional test sets confOurs and gets from a server of ours,
// and from no other, a report: one at once, which says what the server is, some
// each second, and one for each word with confEnd, which the client sends to a
// server of ours only. A report is a JSON object.
const (
	confUni  = 0
	confBi   = 1
	confOurs = 1 << 8
	confEnd  = 1 << 9

	confLen = 4
)

// config is a configuration as it is sent.
func config(w uint32) []byte {
	return binary.NativeEndian.AppendUint32(nil, w)
}

// report is what a server of ours tells about a flow.
type report struct {
	Operf      string        `json:"operf"` // reportMagic
	Final      bool          `json:"final,omitempty"`
	Packets    uint64        `json:"packets"`
	Bytes      uint64        `json:"bytes"`
	Late       uint64        `json:"out_of_order"`
	Duplicates uint64        `json:"duplicates"`
	Elapsed    time.Duration `json:"elapsed_ns"` // from the first packet to the last
	Gap        *spread       `json:"gap,omitempty"`
}

// reportMagic makes a report, and nothing else, a report.
const reportMagic = "report"

// maxReport is the longest report in bytes.
const maxReport = 1024

func (r report) encode() []byte {
	r.Operf = reportMagic
	b, _ := json.Marshal(r) // cannot fail
	return b
}

// decodeReport is the inverse; ok is false for what is no report.
func decodeReport(b []byte) (r report, ok bool) {
	if len(b) == 0 || b[0] != '{' || json.Unmarshal(b, &r) != nil {
		return report{}, false
	}
	return r, r.Operf == reportMagic
}
