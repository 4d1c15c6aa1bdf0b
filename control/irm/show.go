package irm

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/control/irm/registry"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// The results of OpShow. Names of fields are stable; new ones may be added.
// names gives []ipc.NameInfo, neighbors []ipcp.Neighbor, lsdb []ipcp.LSA,
// routes []ipcp.Route, directory []ipcp.DirEntry; the others are below. An
// empty list is [] and never null.

// LayerInfo is a row of `show layers`: one member of a layer on this machine.
type LayerInfo struct {
	ID       int32             `json:"id"`
	IPCP     string            `json:"ipcp"`
	Type     string            `json:"type"`
	Layer    string            `json:"layer"` // "" when not enrolled
	State    string            `json:"state"`
	Hash     string            `json:"hash"`
	Address  uint64            `json:"address,omitempty"` // unicast
	Names    []string          `json:"names"`             // registered from here
	Counters map[string]uint64 `json:"counters"`
}

// FlowInfo is a row of `show flows`: one end of a flow in the hands of a process.
type FlowInfo struct {
	ID        uint32   `json:"id"`
	State     string   `json:"state"`
	PID       int32    `json:"pid"`
	Prog      string   `json:"prog"`
	UID       uint32   `json:"uid"`
	Name      string   `json:"name"`
	Layer     string   `json:"layer"` // "" for a direct flow
	IPCP      string   `json:"ipcp"`  // that carries it
	Direct    bool     `json:"direct"`
	Local     string   `json:"local"`
	Remote    string   `json:"remote"`
	QoS       qos.Spec `json:"qos"`
	MPL       uint32   `json:"mpl_ms"`
	MTU       int      `json:"mtu"`
	Path      string   `json:"path"` // direct, xdp, or user
	Why       string   `json:"path_reason,omitempty"`
	Down      bool     `json:"down"`
	RxPackets uint64   `json:"rx_packets"` // 0 for direct flows: nobody counts them
	RxBytes   uint64   `json:"rx_bytes"`
	TxPackets uint64   `json:"tx_packets"`
	TxBytes   uint64   `json:"tx_bytes"`
	RxDropped uint64   `json:"rx_dropped"` // because the program did not read
}

// FastPathInfo is the result of `show fastpath`.
type FastPathInfo struct {
	Kernel bool       `json:"kernel"`           // packets are forwarded in the kernel
	Reason string     `json:"reason,omitempty"` // why not
	Ports  []PortInfo `json:"ports"`
	// Slow are the data-transfer adjacencies on which user space forwards.
	Slow []SlowInfo `json:"user_space,omitempty"`
}

// SlowInfo is a data-transfer adjacency on which user space forwards.
type SlowInfo struct {
	IPCP    string `json:"ipcp"`
	Address uint64 `json:"address"` // of the neighbour
	Via     string `json:"via"`     // N-1 layer
	Reason  string `json:"reason"`
}

// PortInfo is a port of the fast path.
type PortInfo struct {
	Name     string        `json:"name"`
	Slot     uint32        `json:"slot"`
	Mode     string        `json:"mode"`    // native, generic or packet
	Reasons  []string      `json:"reasons"` // why not native, and what would lose packets
	PID      int32         `json:"pid,omitempty"`
	Verdicts []VerdictInfo `json:"verdicts"` // those that occurred
}

// VerdictInfo counts packets by what became of them.
type VerdictInfo struct {
	Reason  string `json:"reason"`
	Help    string `json:"help"`
	Packets uint64 `json:"packets"`
	Drop    bool   `json:"drop"`
}

// DropInfo is a row of `show drops`: packets lost for one reason at one place.
type DropInfo struct {
	Where   string `json:"where"` // a port, an IPC process, or "programs"
	Reason  string `json:"reason"`
	Help    string `json:"help"`
	Packets uint64 `json:"packets"`
}

// showWords are what Show knows.
var showWords = []string{"layers", "flows", "names", "neighbors", "lsdb", "routes", "directory", "fastpath", "drops"}

// Show answers OpShow.
func (m *IRM) Show(what string) (any, error) {
	switch what {
	case "layers":
		return m.Layers(), nil
	case "flows":
		return m.Flows(), nil
	case "names":
		m.mu.Lock()
		defer m.mu.Unlock()
		return list(m.reg.Names("")), nil
	case "neighbors":
		return inspect(m, ipcp.Inspector.Neighbors), nil
	case "lsdb":
		return inspect(m, ipcp.Inspector.LSDB), nil
	case "routes":
		return inspect(m, ipcp.Inspector.Routes), nil
	case "directory":
		return m.directory(), nil
	case "fastpath":
		return m.FastPath(), nil
	case "drops":
		return m.Drops(), nil
	}
	return nil, fail(o7serr.EINVAL, "unknown show %q (expected %s)", what, strings.Join(showWords, ", "))
}

// list never returns nil, so that JSON has [] for an empty list.
func list[T any](l []T) []T {
	if l == nil {
		return []T{}
	}
	return l
}

// EachLayer calls f for every IPC process, in the order of preference.
func (m *IRM) EachLayer(f func(ipcp.Layer)) {
	for _, p := range m.processes() {
		f(m.layerOf(p))
	}
}

func inspect[T any](m *IRM, get func(ipcp.Inspector) []T) []T {
	out := []T{}
	m.EachLayer(func(l ipcp.Layer) {
		if i, ok := l.(ipcp.Inspector); ok && l.State() == ipcp.StateOperational {
			out = append(out, get(i)...)
		}
	})
	return out
}

// Layers describes the IPC processes, by id.
func (m *IRM) Layers() []LayerInfo {
	out := []LayerInfo{}
	for _, p := range m.processes() {
		l := m.layerOf(p)
		m.mu.Lock()
		names := m.reg.RegisteredWith(p.id)
		m.mu.Unlock()
		info := LayerInfo{
			ID: p.id, IPCP: p.name, Type: l.Type().String(), Layer: l.LayerName(),
			State: string(l.State()), Names: list(names), Counters: map[string]uint64{},
		}
		if info.Layer != "" {
			info.Hash = registry.HashName(l.HashAlg())
		}
		if a, ok := l.(interface{ Address() uint64 }); ok {
			info.Address = a.Address()
		}
		if c, ok := l.(ipcp.Counter); ok {
			for n, v := range c.Counters() {
				info.Counters[n] = v
			}
		}
		out = append(out, info)
	}
	slices.SortFunc(out, func(a, b LayerInfo) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// Flows describes the flows of processes, by id.
func (m *IRM) Flows() []FlowInfo {
	out := []FlowInfo{}
	var held []*flow // of the rows, nil: not complete
	m.mu.Lock()
	for _, r := range m.reg.Flows.All() {
		info := FlowInfo{
			ID: r.ID, State: r.State.String(), PID: r.PID, UID: r.UID, Name: r.Name, Layer: r.Layer,
			IPCP: r.Lower, Direct: r.Direct, QoS: r.QoS, MPL: r.MPL,
		}
		if s := m.sessions[r.Client]; s != nil {
			info.Prog = s.prog
		}
		out, held = append(out, info), append(held, m.flows[r.ID])
	}
	m.mu.Unlock()
	// The rest takes system calls for every flow, for which nobody has to wait.
	for i, f := range held {
		if f != nil {
			f.describe(&out[i])
		}
	}
	return out
}

// describe fills in what only the flow knows.
func (f *flow) describe(info *FlowInfo) {
	i := f.lower.Info()
	info.Local, info.Remote, info.MTU, info.Down = i.Local, i.Remote, i.MTU, f.down.Load()
	if f.pump == nil {
		info.Path = "direct"
		return
	}
	info.Path, info.Why = "user", f.why
	info.RxDropped = f.pump.dropped.Load()
	if c, ok := f.lower.(ipcp.FlowCounter); ok {
		s := c.Stat()
		info.RxPackets, info.RxBytes, info.TxPackets, info.TxBytes = s.RxPackets, s.RxBytes, s.TxPackets, s.TxBytes
	}
	if a := f.app; a != nil {
		info.Path = "xdp"
		if _, ok := f.lower.(appUnloader); ok {
			return // its Stat has all
		}
		rx, tx := a.port.app.Counters(a.handle)
		info.RxPackets += rx.Packets
		info.RxBytes += rx.Bytes
		info.TxPackets += tx.Packets
		info.TxBytes += tx.Bytes
	}
}

// directory fills in the names of the keys that belong to names created here.
func (m *IRM) directory() []ipcp.DirEntry {
	algs := map[string]ipcp.HashAlg{}
	m.EachLayer(func(l ipcp.Layer) { algs[l.Name()] = l.HashAlg() })
	out := inspect(m, ipcp.Inspector.Directory)
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range out {
		if out[i].Name != "" {
			continue
		}
		if key, err := hex.DecodeString(out[i].Key); err == nil {
			out[i].Name, _ = m.reg.NameByHash(algs[out[i].IPCP], key)
		}
	}
	return out
}

// FastPath describes the fast path and its ports.
func (m *IRM) FastPath() FastPathInfo {
	out := FastPathInfo{Ports: []PortInfo{}}
	if m.cfg.Plane == nil {
		out.Reason = "the daemon runs without a fast path"
		return out
	}
	out.Kernel, out.Reason = m.cfg.Plane.Kernel()
	owners := m.appOwners()
	for _, s := range m.cfg.Plane.Snapshot() {
		p := PortInfo{Name: s.Name, Slot: s.Slot, Mode: s.Mode, Reasons: list(s.Reasons), Verdicts: []VerdictInfo{}}
		if o, ok := owners[s.Slot]; ok {
			p.Name, p.PID = fmt.Sprintf("app:%s/%d", o.prog, o.pid), o.pid
		}
		for r, n := range s.Verdicts {
			if reason := bpf.Reason(r); n > 0 {
				p.Verdicts = append(p.Verdicts, VerdictInfo{reason.String(), reason.Help(), n, reason.Drop()})
			}
		}
		out.Ports = append(out.Ports, p)
	}
	if !out.Kernel {
		return out // one reason for all
	}
	m.EachLayer(func(l ipcp.Layer) {
		i, ok := l.(ipcp.Inspector)
		if !ok {
			return
		}
		for _, n := range i.Neighbors() {
			if why, slow := strings.CutPrefix(n.Path, "user"); slow && n.Component == "dt" {
				out.Slow = append(out.Slow, SlowInfo{n.IPCP, n.Address, n.Via, strings.TrimPrefix(why, ": ")})
			}
		}
	})
	return out
}

// Drops lists every reason for which packets were lost.
func (m *IRM) Drops() []DropInfo {
	out := []DropInfo{}
	for _, p := range m.FastPath().Ports {
		for _, v := range p.Verdicts {
			if v.Drop {
				out = append(out, DropInfo{p.Name, v.Reason, v.Help, v.Packets})
			}
		}
	}
	m.EachLayer(func(l ipcp.Layer) {
		c, ok := l.(ipcp.Counter)
		if !ok {
			return
		}
		for n, v := range c.Counters() {
			if reason, ok := strings.CutSuffix(n, "_dropped"); ok && v > 0 {
				out = append(out, DropInfo{"ipcp:" + l.Name(), reason, "dropped by the layer in user space", v})
			}
		}
	})
	if n := m.stats.ringDrops.Load(); n > 0 {
		out = append(out, DropInfo{"programs", "ring_full", "a program did not read its flow in time", n})
	}
	return out
}

// Stats are counters and sizes of the resource manager, for metrics.
type Stats struct {
	AllocOK, AllocFailed   uint64
	AllocErrors            map[int32]uint64 // by negative error number
	AcceptOK, AcceptFailed uint64
	Refused                uint64 // requests from layers that nobody took
	OAPFailed              uint64
	Started                uint64 // programs, because a flow arrived
	Malformed, Denied      uint64 // requests on the local socket
	RingDrops              uint64
	Latency                Latency
	FlowsByState           map[string]int
	Registry               registry.Counts
	Sessions               int
}

// Stats returns the counters.
func (m *IRM) Stats() Stats {
	s := Stats{
		AllocOK: m.stats.allocOK.Load(), AllocFailed: m.stats.allocFailed.Load(), AllocErrors: map[int32]uint64{},
		AcceptOK: m.stats.acceptOK.Load(), AcceptFailed: m.stats.acceptFailed.Load(),
		Refused: m.stats.refused.Load(), OAPFailed: m.stats.oapFailed.Load(), Started: m.stats.started.Load(),
		Malformed: m.stats.malformed.Load(), Denied: m.stats.denied.Load(), RingDrops: m.stats.ringDrops.Load(),
		Latency: m.stats.latency.read(), FlowsByState: map[string]int{},
	}
	m.stats.allocErrors.Range(func(k, v any) bool {
		s.AllocErrors[k.(int32)] = v.(*counter).Load()
		return true
	})
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, st := range registry.FlowStates {
		s.FlowsByState[st.String()] = m.reg.Flows.Count(st)
	}
	s.Registry, s.Sessions = m.reg.Counts(), len(m.sessions)
	return s
}

// LatencyBuckets are the upper bounds of Latency.Buckets.
var LatencyBuckets = [...]time.Duration{
	250 * time.Microsecond, 500 * time.Microsecond, time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond,
	10 * time.Millisecond, 50 * time.Millisecond, 200 * time.Millisecond, time.Second, 5 * time.Second,
}

// Latency is how long successful allocations took.
type Latency struct {
	Count   uint64
	Sum     time.Duration
	Buckets [len(LatencyBuckets)]uint64 // not cumulative; longer ones are in none
}

type histogram struct {
	count, sum atomic.Uint64
	buckets    [len(LatencyBuckets)]atomic.Uint64
}

func (h *histogram) add(d time.Duration) {
	h.count.Add(1)
	h.sum.Add(uint64(d))
	for i, bound := range LatencyBuckets {
		if d <= bound {
			h.buckets[i].Add(1)
			return
		}
	}
}

func (h *histogram) read() (l Latency) {
	for i := range h.buckets { // before the count, which must not be smaller
		l.Buckets[i] = h.buckets[i].Load()
	}
	l.Count, l.Sum = h.count.Load(), time.Duration(h.sum.Load())
	return l
}
