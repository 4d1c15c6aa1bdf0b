// Package tables is the memory that the XDP programs and the Go data path
// share: typed views of the arrays of bpf/structs.h, whether they are mapped
// BPF arrays or plain memory when the kernel cannot help.
//
// Readers use no lock. What a reader must see whole is one word and is loaded
// and stored here atomically; everything a word refers to is written before it
// and not reused until no reader can hold it (see package fastpath).
package tables

import (
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/o7s/o7s-router/bpf"
)

// Records, as in bpf/structs.h.
type (
	Port    = bpf.RouterPort
	Layer   = bpf.RouterLayer
	NextHop = bpf.RouterNexthop
	Wire    = bpf.RouterWire
	App     = bpf.RouterApp
	Flow    = bpf.RouterFlow
	FIB8Key = bpf.RouterFib8Key
)

// Fixed dimensions (bpf/structs.h says why).
const (
	EIDsPerBlock  = 4096
	ProtosPerPort = 4
	QueuesPerPort = 16
	FlowSlots     = 4
	ECMPWays      = 8
	Cubes         = 3
)

// Kinds of an endpoint.
const (
	EndpointNone = iota
	EndpointUser
	EndpointDT
	EndpointApp
)

// States of a wire.
const (
	WireDown = iota
	WireUp
	WirePunt
)

// Kinds of an application handle.
const (
	AppEth = 1
	AppDT  = 2
)

// PortTx marks a port whose device is in the device map.
const PortTx = 1

// Counters of a wire and cube; index into bpf.RouterDtCount.C.
const (
	DTRcvd = iota
	DTSent
	DTLocalRcvd
	DTLocalSent
	DTTTL
	DTNhop
	DTFailed
	DTCounters
)

// Config is the number of records of each table.
type Config struct {
	Ports, EthBlocks, Layers, Buckets, NextHops, Wires, Apps, FlowBuckets int
	FIB8                                                                  int // destinations with 8-byte addresses
}

// Tables are the views. The slices never change; their elements do.
type Tables struct {
	Ports     []Port
	Endpoints []uint64 // block*EIDsPerBlock + EID; see Endpoint
	Layers    []Layer
	FIB       []uint64 // words of the buckets, package fib
	NextHops  []NextHop
	Wires     []Wire
	Apps      []App
	Flows     []Flow // FlowSlots per bucket

	// FIB8 is the Go side of the hash of 8-byte addresses: FIB8Key -> uint32.
	FIB8 sync.Map
}

// Largest numbers of records where the programs fix them (structs.h); one more
// than can be used, because slot 0 means "none".
const (
	MaxPorts     = 64
	MaxEthBlocks = 64
	MaxLayers    = 64
	MaxNextHops  = 4096
	MaxWires     = 2048
)

// Names of the tables that are variables of the programs. The others are maps.
const (
	varPorts     = "ports"
	varEndpoints = "endpoints"
	varLayers    = "layers"
	varNextHops  = "nexthops"
	varWires     = "wires"
)

// Variables and Maps are the names of the tables, in package bpf.
var (
	Variables = []string{varPorts, varEndpoints, varLayers, varNextHops, varWires}
	Maps      = []string{bpf.RouterMapFib, bpf.RouterMapApps, bpf.RouterMapFlows}
)

// Records returns the number of records of every table, by name.
func (c Config) Records() map[string]int {
	return map[string]int{
		varPorts: c.Ports, varEndpoints: c.EthBlocks * EIDsPerBlock, varLayers: c.Layers,
		varNextHops: c.NextHops, varWires: c.Wires,
		bpf.RouterMapFib: c.Buckets, bpf.RouterMapApps: c.Apps, bpf.RouterMapFlows: c.FlowBuckets,
	}
}

// Bytes returns the size of every table in bytes, by name.
func (c Config) Bytes() map[string]int {
	size := map[string]uintptr{
		varPorts: unsafe.Sizeof(Port{}), varEndpoints: 8, varLayers: unsafe.Sizeof(Layer{}),
		varNextHops: unsafe.Sizeof(NextHop{}), varWires: unsafe.Sizeof(Wire{}),
		bpf.RouterMapFib:  unsafe.Sizeof(bpf.RouterBucket{}),
		bpf.RouterMapApps: unsafe.Sizeof(App{}), bpf.RouterMapFlows: unsafe.Sizeof(bpf.RouterFlowBucket{}),
	}
	m := c.Records()
	for name := range m {
		m[name] *= int(size[name])
	}
	return m
}

// New returns tables in plain memory.
func New(c Config) *Tables {
	mem := map[string][]byte{}
	for name, n := range c.Bytes() {
		words := make([]uint64, n/8+1) // aligned for 8-byte atomics
		mem[name] = unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), n)
	}
	t, err := View(c, mem)
	if err != nil {
		panic(err) // sizes are our own
	}
	return t
}

// View returns tables over the given memory, by name. The memory must be
// 8-byte aligned and outlive the tables.
func View(c Config, mem map[string][]byte) (*Tables, error) {
	for name, n := range c.Bytes() {
		if len(mem[name]) < n || n == 0 {
			return nil, fmt.Errorf("table %s has %d bytes, need %d", name, len(mem[name]), n)
		}
	}
	return &Tables{
		Ports:     view[Port](mem[varPorts], c.Ports),
		Endpoints: view[uint64](mem[varEndpoints], c.EthBlocks*EIDsPerBlock),
		Layers:    view[Layer](mem[varLayers], c.Layers),
		FIB:       view[uint64](mem[bpf.RouterMapFib], c.Buckets*8),
		NextHops:  view[NextHop](mem[varNextHops], c.NextHops),
		Wires:     view[Wire](mem[varWires], c.Wires),
		Apps:      view[App](mem[bpf.RouterMapApps], c.Apps),
		Flows:     view[Flow](mem[bpf.RouterMapFlows], c.FlowBuckets*FlowSlots),
	}, nil
}

func view[T any](b []byte, n int) []T {
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(b))), n)
}

// Endpoint is what an EID leads to, packed in one word.
type Endpoint uint64

// MakeEndpoint packs kind, layer (EndpointDT) and index: the wire (EndpointDT)
// or the slot in Apps (EndpointApp).
func MakeEndpoint(kind uint8, layer uint16, index uint32) Endpoint {
	return Endpoint(kind) | Endpoint(layer)<<16 | Endpoint(index)<<32
}

// Kind is EndpointNone, EndpointUser, EndpointDT or EndpointApp.
func (e Endpoint) Kind() uint8 { return uint8(e) }

// Layer is the layer's index.
func (e Endpoint) Layer() uint32 { return uint32(uint16(e >> 16)) }

// Index is the wire or the slot in Apps.
func (e Endpoint) Index() uint32 { return uint32(e >> 32) }

// LoadEndpoint returns the endpoint of an EID (0..4095) of a block.
func (t *Tables) LoadEndpoint(block, eid uint32) Endpoint {
	return Endpoint(atomic.LoadUint64(&t.Endpoints[block*EIDsPerBlock+eid]))
}

// StoreEndpoint sets it.
func (t *Tables) StoreEndpoint(block, eid uint32, e Endpoint) {
	atomic.StoreUint64(&t.Endpoints[block*EIDsPerBlock+eid], uint64(e))
}

// MakeProto packs an EtherType and its endpoint block for Port.Proto.
func MakeProto(etherType uint16, block uint32) uint32 {
	return uint32(etherType>>8|etherType<<8) | block<<16
}

// MAC packs the 6 bytes of an address as ports hold it.
func MAC(b []byte) (mac uint64) {
	for i := range 6 {
		mac |= uint64(b[i]) << (8 * i)
	}
	return mac
}

// Mix is the hash of two numbers that chooses among equal-cost wires and flow
// buckets (mix in pipeline.h).
func Mix(a, b uint64) uint32 {
	const multiplier = 0x9e3779b97f4a7c15
	h := (a ^ b*multiplier) * 0xff51afd7ed558ccd
	h ^= h >> 32
	return uint32((h * multiplier) >> 32)
}

// Scale maps a hash to 0..n-1.
func Scale(hash, n uint32) uint32 { return uint32(uint64(hash) * uint64(n) >> 32) }

// flowKey is the word of a Flow that holds layer and slot together.
func flowKey(f *Flow) *uint64 { return (*uint64)(unsafe.Pointer(&f.Layer)) }

func (t *Tables) flowBuckets(layer uint32, eid uint64) [2]uint32 {
	first := Scale(Mix(eid, uint64(layer)), uint32(len(t.Flows)/FlowSlots))
	return [2]uint32{first, first ^ 1}
}

// FindFlow returns the slot in Apps of the local flow (layer, eid), 0: none.
func (t *Tables) FindFlow(layer uint32, eid uint64) uint32 {
	for _, b := range t.flowBuckets(layer, eid) {
		for i := range FlowSlots {
			f := &t.Flows[b*FlowSlots+uint32(i)]
			who := atomic.LoadUint64(flowKey(f))
			if uint32(who) == layer && who>>32 != 0 && atomic.LoadUint64(&f.Eid) == eid {
				return uint32(who >> 32)
			}
		}
	}
	return 0
}

// AddFlow enters a local flow and tells whether there was room. One writer.
func (t *Tables) AddFlow(layer uint32, eid uint64, app uint32) bool {
	for _, b := range t.flowBuckets(layer, eid) {
		for i := range FlowSlots {
			f := &t.Flows[b*FlowSlots+uint32(i)]
			if atomic.LoadUint64(flowKey(f)) == 0 {
				atomic.StoreUint64(&f.Eid, eid)
				atomic.StoreUint64(flowKey(f), uint64(layer)|uint64(app)<<32)
				return true
			}
		}
	}
	return false
}

// RemoveFlow removes a local flow. One writer.
func (t *Tables) RemoveFlow(layer uint32, eid uint64) {
	for _, b := range t.flowBuckets(layer, eid) {
		for i := range FlowSlots {
			f := &t.Flows[b*FlowSlots+uint32(i)]
			if who := atomic.LoadUint64(flowKey(f)); uint32(who) == layer && who>>32 != 0 && f.Eid == eid {
				atomic.StoreUint64(flowKey(f), 0)
				return
			}
		}
	}
}
