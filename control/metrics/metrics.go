// Package metrics serves the node's numbers to Prometheus. Everything is read
// at the time of the scrape from where it is counted (BPF maps, layers, the
// resource manager); the package keeps no numbers of its own.
package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// Node is where the numbers come from; *irm.IRM is one.
type Node interface {
	Stats() irm.Stats
	EachLayer(func(ipcp.Layer))
}

// Plane is the fast path; *fastpath.Plane is one.
type Plane interface {
	Kernel() (ok bool, reason string)
	Snapshot() []fastpath.PortSnapshot
}

const namespace = "o7s"

func desc(subsystem, name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(namespace, subsystem, name), help, labels, nil)
}

var (
	buildInfo = desc("", "build_info", "What this binary is; always 1.", "version", "goversion")

	fpKernel  = desc("fastpath", "kernel", "1 when packets are forwarded in the kernel.")
	fpPackets = desc("fastpath", "packets_total", "Packets by port and by what became of them; reasons are disjoint.", "port", "mode", "reason", "drop")

	dtPackets = desc("dt", "packets_total", "Packets of a data-transfer adjacency by cube and what happened (spec 20, section 9).", "ipcp", "layer", "neighbor", "cube", "event")
	dtBytes   = desc("dt", "bytes_total", "Bytes of those packets, data-transfer header included.", "ipcp", "layer", "neighbor", "cube", "event")

	layerEvents  = desc("layer", "events_total", "What happened in a layer.", "ipcp", "type", "layer", "event")
	layerDropped = desc("layer", "dropped_packets_total", "Packets that a layer dropped in user space; reasons are disjoint.", "ipcp", "type", "layer", "reason")
	layerState   = desc("layer", "entries", "Sizes of a layer's tables.", "ipcp", "type", "layer", "table")
	layerUp      = desc("layer", "operational", "1 when the IPC process is a member of its layer.", "ipcp", "type", "layer")

	neighbors = desc("layer", "neighbors", "Adjacencies by component and state.", "ipcp", "layer", "component", "state")
	lsdb      = desc("layer", "lsdb_entries", "Entries of the link-state database.", "ipcp", "layer")
	routes    = desc("layer", "routes", "Destinations of the forwarding table by path.", "ipcp", "layer", "path")
	directory = desc("layer", "directory_entries", "Values in this member's part of the directory by kind.", "ipcp", "layer", "kind")

	flows     = desc("irm", "flows", "Flows of processes by state.", "state")
	allocs    = desc("irm", "flow_allocations_total", "Flow allocations of processes by result.", "result")
	accepts   = desc("irm", "flow_accepts_total", "Accepts of processes by result.", "result")
	latency   = desc("irm", "flow_allocation_seconds", "How long successful flow allocations took.")
	refused   = desc("irm", "flow_requests_refused_total", "Flow requests from layers that were refused.")
	oapFailed = desc("irm", "oap_failures_total", "Flow requests and replies whose OAP header was refused.")
	started   = desc("irm", "programs_started_total", "Programs started because a flow arrived.")
	malformed = desc("irm", "malformed_requests_total", "Malformed requests on the local socket.")
	denied    = desc("irm", "denied_requests_total", "Management requests without the rights for them.")
	ringDrops = desc("irm", "ring_dropped_packets_total", "Packets dropped because a program did not read in time.")
	names     = desc("irm", "names", "Names that exist.")
	programs  = desc("irm", "programs", "Programs bound to names.")
	processes = desc("irm", "processes", "Processes that announced themselves.")
	accepting = desc("irm", "accepting", "Accepts that wait for a flow.")
	waiting   = desc("irm", "waiting_requests", "Flow requests that wait for a process.")
	sessions  = desc("irm", "connections", "Connections on the local socket.")
)

var all = []*prometheus.Desc{
	buildInfo, fpKernel, fpPackets, dtPackets, dtBytes, layerEvents, layerDropped, layerState, layerUp,
	neighbors, lsdb, routes, directory, flows, allocs, accepts, latency, refused, oapFailed, started,
	malformed, denied, ringDrops, names, programs, processes, accepting, waiting, sessions,
}

// Collector reads a node at every scrape. It is safe for concurrent use.
type Collector struct {
	node    Node
	plane   Plane // nil without a fast path
	version string
}

// NewCollector returns a Collector for node; plane may be nil.
func NewCollector(node Node, plane Plane, version string) *Collector {
	return &Collector{node, plane, version}
}

// Describe sends the descriptors.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range all {
		ch <- d
	}
}

// Collect reads everything.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	e := emitter{ch}
	e.gauge(buildInfo, 1, c.version, runtime.Version())
	c.fastPath(e)
	c.node.EachLayer(func(l ipcp.Layer) { layer(e, l) })
	resources(e, c.node.Stats())
}

type emitter struct{ ch chan<- prometheus.Metric }

func (e emitter) gauge(d *prometheus.Desc, v float64, labels ...string) {
	e.ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

func (e emitter) count(d *prometheus.Desc, v uint64, labels ...string) {
	e.ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
}

func flag(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func (c *Collector) fastPath(e emitter) {
	if c.plane == nil {
		e.gauge(fpKernel, 0)
		return
	}
	ok, _ := c.plane.Kernel()
	e.gauge(fpKernel, flag(ok))
	for _, p := range c.plane.Snapshot() {
		for r, n := range p.Verdicts {
			reason := bpf.Reason(r)
			e.count(fpPackets, n, p.Name, p.Mode, reason.String(), fmt.Sprint(reason.Drop()))
		}
	}
}

// gauges are those counters of layers that are sizes.
var gauges = map[string]bool{"flows": true, "fa_flows_open": true, "lsdb_entries": true, "routes": true}

func layer(e emitter, l ipcp.Layer) {
	name, typ, in := l.Name(), l.Type().String(), l.LayerName()
	up := l.State() == ipcp.StateOperational
	e.gauge(layerUp, flag(up), name, typ, in)
	if c, ok := l.(ipcp.Counter); ok {
		for n, v := range c.Counters() {
			switch reason, drop := strings.CutSuffix(n, "_dropped"); {
			case drop:
				e.count(layerDropped, v, name, typ, in, reason)
			case gauges[n]:
				e.gauge(layerState, float64(v), name, typ, in, n)
			default:
				e.count(layerEvents, v, name, typ, in, n)
			}
		}
	}
	if !up {
		return
	}
	if d, ok := l.(ipcp.DTCounter); ok {
		for _, s := range d.DTStats() {
			dataTransfer(e, name, in, s)
		}
	}
	i, ok := l.(ipcp.Inspector)
	if !ok {
		return
	}
	type pair [2]string
	count := map[pair]int{}
	for _, n := range i.Neighbors() {
		count[pair{n.Component, n.State}]++
	}
	for k, n := range count {
		e.gauge(neighbors, float64(n), name, in, k[0], k[1])
	}
	e.gauge(lsdb, float64(len(i.LSDB())), name, in)
	paths := map[string]int{"xdp": 0, "user": 0}
	for _, r := range i.Routes() {
		paths[r.Path]++
	}
	for k, n := range paths {
		e.gauge(routes, float64(n), name, in, k)
	}
	kinds := map[string]int{}
	for _, d := range i.Directory() {
		kinds[d.Kind]++
	}
	for k, n := range kinds {
		e.gauge(directory, float64(n), name, in, k)
	}
}

func dataTransfer(e emitter, name, in string, s ipcp.DTStat) {
	peer := fmt.Sprint(s.Address)
	for _, c := range s.Cubes {
		cube := fmt.Sprint(c.Cube)
		for _, x := range []struct {
			event string
			n     ipcp.DTCount
		}{
			{"rcvd", c.Rcvd}, {"sent", c.Sent}, {"local_rcvd", c.LocalRcvd}, {"local_sent", c.LocalSent},
			{"dropped_ttl", c.TTL}, {"failed_nhop", c.Nhop}, {"failed_writes", c.Failed},
		} {
			e.count(dtPackets, x.n.Packets, name, in, peer, cube, x.event)
			e.count(dtBytes, x.n.Bytes, name, in, peer, cube, x.event)
		}
	}
}

// results names the error numbers that allocations end with; a peer may send
// any number, so the others share a label.
var results = map[o7serr.Errno]string{
	o7serr.EPERM: "default_timeout", o7serr.ETIMEDOUT: "timeout", o7serr.ENAME: "unknown_name",
	o7serr.EIPCP: "no_layer", o7serr.EAUTH: "authentication", o7serr.ECRYPT: "encryption",
	o7serr.ENOTSUP: "not_supported", o7serr.EAGAIN: "no_room", o7serr.EPIPE: "cancelled",
}

func resources(e emitter, s irm.Stats) {
	for state, n := range s.FlowsByState {
		e.gauge(flows, float64(n), state)
	}
	byResult := map[string]uint64{"ok": s.AllocOK, "other": 0}
	for _, label := range results {
		byResult[label] = 0
	}
	for code, n := range s.AllocErrors {
		label, ok := results[o7serr.Errno(-code)]
		if !ok {
			label = "other"
		}
		byResult[label] += n
	}
	for label, n := range byResult {
		e.count(allocs, n, label)
	}
	e.count(accepts, s.AcceptOK, "ok")
	e.count(accepts, s.AcceptFailed, "failed")
	buckets := map[float64]uint64{}
	var sum uint64
	for i, bound := range irm.LatencyBuckets {
		sum += s.Latency.Buckets[i]
		buckets[bound.Seconds()] = sum
	}
	e.ch <- prometheus.MustNewConstHistogram(latency, s.Latency.Count, s.Latency.Sum.Seconds(), buckets)
	e.count(refused, s.Refused)
	e.count(oapFailed, s.OAPFailed)
	e.count(started, s.Started)
	e.count(malformed, s.Malformed)
	e.count(denied, s.Denied)
	e.count(ringDrops, s.RingDrops)
	e.gauge(names, float64(s.Registry.Names))
	e.gauge(programs, float64(s.Registry.Programs))
	e.gauge(processes, float64(s.Registry.Processes))
	e.gauge(accepting, float64(s.Registry.Accepting))
	e.gauge(waiting, float64(s.Registry.Waiting))
	e.gauge(sessions, float64(s.Sessions))
}

// Handler serves /metrics and /healthz.
func Handler(c *Collector) http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(c, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		// It hangs when the resource manager does, which is what probes look for.
		c.node.Stats()
		_, _ = fmt.Fprintln(w, "ok")
	})
	return mux
}

// Serve answers on l until ctx ends.
func Serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Close() })
	defer stop()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
