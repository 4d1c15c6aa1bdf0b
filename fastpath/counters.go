package fastpath

import (
	"sync/atomic"

	"github.com/o7s/o7s-router/fastpath/tables"
)

// Count is a number of packets and of their bytes.
type Count struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// DTCounters are the statistics of an N-1 flow for one QoS cube (spec 20 §9).
// Bytes include the data-transfer header.
type DTCounters struct {
	Rcvd      Count `json:"rcvd"`
	Sent      Count `json:"sent"`
	LocalRcvd Count `json:"local_rcvd"`
	LocalSent Count `json:"local_sent"`
	TTL       Count `json:"dropped_ttl"`   // on the incoming flow
	Nhop      Count `json:"failed_nhop"`   // on the incoming flow
	Failed    Count `json:"failed_writes"` // on the outgoing flow
}

// at returns the counter with an index of package tables.
func (c *DTCounters) at(which int) *Count {
	return [...]*Count{
		tables.DTRcvd: &c.Rcvd, tables.DTSent: &c.Sent,
		tables.DTLocalRcvd: &c.LocalRcvd, tables.DTLocalSent: &c.LocalSent,
		tables.DTTTL: &c.TTL, tables.DTNhop: &c.Nhop, tables.DTFailed: &c.Failed,
	}[which]
}

// goCounters are the packets that user space handled, for one cube.
type goCounters [tables.DTCounters]struct{ packets, bytes atomic.Uint64 }

func (w *Wire) count(which int, cube uint8, bytes int) {
	if int(cube) >= len(w.cubes) {
		cube = 0
	}
	n := &w.cubes[cube][which]
	n.packets.Add(1)
	n.bytes.Add(uint64(bytes))
}

// The Count methods count a packet that user space handled: cube is the
// packet's qc, bytes its length with the data-transfer header. Packets that
// XDP finishes are counted by XDP.

// CountRcvd counts a packet read from the flow.
func (w *Wire) CountRcvd(cube uint8, bytes int) { w.count(tables.DTRcvd, cube, bytes) }

// CountSent counts a packet written to the flow, own or forwarded.
func (w *Wire) CountSent(cube uint8, bytes int) { w.count(tables.DTSent, cube, bytes) }

// CountLocalRcvd counts a packet from the flow for this node.
func (w *Wire) CountLocalRcvd(cube uint8, bytes int) { w.count(tables.DTLocalRcvd, cube, bytes) }

// CountLocalSent counts a packet of this node written to the flow.
func (w *Wire) CountLocalSent(cube uint8, bytes int) { w.count(tables.DTLocalSent, cube, bytes) }

// CountTTL counts a packet from the flow whose hop limit was reached.
func (w *Wire) CountTTL(cube uint8, bytes int) { w.count(tables.DTTTL, cube, bytes) }

// CountNhop counts a packet from the flow that has no next hop.
func (w *Wire) CountNhop(cube uint8, bytes int) { w.count(tables.DTNhop, cube, bytes) }

// CountFailed counts a packet that could not be written to the flow.
func (w *Wire) CountFailed(cube uint8, bytes int) { w.count(tables.DTFailed, cube, bytes) }

// Counters returns what kernel and user space counted, by cube.
func (w *Wire) Counters() (sum [tables.Cubes]DTCounters) {
	if k := w.plane.kernel; k != nil {
		sum = k.wireCounters(w.slot)
	}
	for cube := range sum {
		for which := range tables.DTCounters {
			n := sum[cube].at(which)
			n.Packets += w.cubes[cube][which].packets.Load()
			n.Bytes += w.cubes[cube][which].bytes.Load()
		}
	}
	return sum
}

// KernelActivity returns how many packets XDP received from and sent on the
// wire, for keep-alives and peer time-outs (spec 30 §10).
func (w *Wire) KernelActivity() (rx, tx uint64) {
	if k := w.plane.kernel; k != nil {
		for _, c := range k.wireCounters(w.slot) {
			rx += c.Rcvd.Packets
			tx += c.Sent.Packets
		}
	}
	return rx, tx
}
