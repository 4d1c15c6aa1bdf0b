package ipcp

import "iter"

// What layers tell about themselves, for `show`, JSON and metrics. Addresses
// are the decimal numbers; commands print them in the dotted form of spec 20 §2.2.

// Neighbor is an adjacency of a member.
type Neighbor struct {
	IPCP      string  `json:"ipcp"`
	Layer     string  `json:"layer"`
	Address   uint64  `json:"address"`
	Component string  `json:"component"` // dt or mgmt
	Dst       string  `json:"dst"`       // name it was connected to; "" when accepted
	Via       string  `json:"via"`       // N-1 layer
	State     string  `json:"state"`     // up or down
	Path      string  `json:"path"`      // xdp or user, and why
	RxPackets uint64  `json:"rx_packets"`
	TxPackets uint64  `json:"tx_packets"`
	Silent    float64 `json:"silent_seconds"` // since the last packet received
}

// LSA is one entry of a link-state database.
type LSA struct {
	IPCP   string  `json:"ipcp"`
	Layer  string  `json:"layer"`
	Src    uint64  `json:"src"`
	Dst    uint64  `json:"dst"`
	Seqno  uint64  `json:"seqno"`
	Age    float64 `json:"age_seconds"`
	Own    bool    `json:"own"`
	Usable bool    `json:"usable"` // announced in both directions
}

// Route is one entry of a forwarding table.
type Route struct {
	IPCP      string   `json:"ipcp"`
	Layer     string   `json:"layer"`
	Dst       uint64   `json:"dst"`
	NextHops  []uint64 `json:"next_hops"`           // neighbour addresses in use (several with ECMP)
	Alternate uint64   `json:"alternate,omitempty"` // loop-free alternate
	Cost      int      `json:"cost"`
	Via       []string `json:"via"`  // N-1 layer of each next hop
	Path      string   `json:"path"` // xdp or user
}

// DirEntry is a value in a member's part of the directory.
type DirEntry struct {
	IPCP   string  `json:"ipcp"`
	Layer  string  `json:"layer"`
	Key    string  `json:"key"` // hex
	Name   string  `json:"name,omitempty"`
	Value  string  `json:"value"` // address, or hex when it is none
	Kind   string  `json:"kind"`  // local, stored or cached
	Expiry float64 `json:"expires_in_seconds,omitempty"`
}

// Inspector is implemented by layers that have such state.
type Inspector interface {
	Neighbors() []Neighbor
	LSDB() []LSA
	Routes() []Route
	Directory() []DirEntry
}

// FlowStat describes an N+1 flow of a layer.
type FlowStat struct {
	RxPackets, RxBytes, TxPackets, TxBytes uint64
}

// FlowCounter is implemented by flows that count their packets.
type FlowCounter interface{ Stat() FlowStat }

// Counter is implemented by layers that count what happens in them. Names are
// snake_case and stable; those that end in _dropped are disjoint reasons.
type Counter interface {
	Counters() iter.Seq2[string, uint64]
}

// DTCount is a number of packets and of their bytes.
type DTCount struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// DTCube is what passed a data-transfer adjacency in one QoS cube (spec 20 §9),
// in kernel and user space together. Bytes include the data-transfer header.
type DTCube struct {
	Cube      uint8   `json:"cube"`
	Rcvd      DTCount `json:"rcvd"`
	Sent      DTCount `json:"sent"`
	LocalRcvd DTCount `json:"local_rcvd"`
	LocalSent DTCount `json:"local_sent"`
	TTL       DTCount `json:"dropped_ttl"`
	Nhop      DTCount `json:"failed_nhop"`
	Failed    DTCount `json:"failed_writes"`
}

// DTStat is the statistics of one data-transfer adjacency.
type DTStat struct {
	IPCP    string   `json:"ipcp"`
	Layer   string   `json:"layer"`
	Address uint64   `json:"address"` // of the neighbour
	Cubes   []DTCube `json:"cubes"`
}

// DTCounter is implemented by layers that transfer data over N-1 flows.
type DTCounter interface{ DTStats() []DTStat }
