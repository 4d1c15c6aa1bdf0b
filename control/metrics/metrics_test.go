package metrics

import (
	"context"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/fastpath"
	"github.com/o7s/o7s-router/ipcp"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// layerStub has one of everything that a layer can tell.
type layerStub struct{ ipcp.Layer }

func (layerStub) Name() string      { return "n1" }
func (layerStub) LayerName() string { return "net" }
func (layerStub) Type() ipcp.Type   { return ipcp.Unicast }
func (layerStub) State() ipcp.State { return ipcp.StateOperational }
func (layerStub) Counters() iter.Seq2[string, uint64] {
	return func(yield func(string, uint64) bool) {
		_ = yield("lsa_received", 7) && yield("no_route_dropped", 3) && yield("routes", 2)
	}
}
func (layerStub) DTStats() []ipcp.DTStat {
	return []ipcp.DTStat{{IPCP: "n1", Layer: "net", Address: 99, Cubes: []ipcp.DTCube{{Cube: 1, Rcvd: ipcp.DTCount{Packets: 5, Bytes: 600}}}}}
}
func (layerStub) Neighbors() []ipcp.Neighbor {
	return []ipcp.Neighbor{{Component: "dt", State: "up"}, {Component: "dt", State: "up"}, {Component: "mgmt", State: "down"}}
}
func (layerStub) LSDB() []ipcp.LSA           { return make([]ipcp.LSA, 4) }
func (layerStub) Routes() []ipcp.Route       { return []ipcp.Route{{Path: "xdp"}, {Path: "user"}} }
func (layerStub) Directory() []ipcp.DirEntry { return []ipcp.DirEntry{{Kind: "local"}} }

type nodeStub struct{}

func (nodeStub) EachLayer(f func(ipcp.Layer)) { f(layerStub{}) }
func (nodeStub) Stats() irm.Stats {
	s := irm.Stats{AllocOK: 3, AllocErrors: map[int32]uint64{-1007: 2, -77777: 1, -99999: 1}, FlowsByState: map[string]int{"allocated": 4}}
	s.Latency.Count, s.Latency.Sum = 3, 4*time.Millisecond
	s.Latency.Buckets[2], s.Latency.Buckets[3] = 2, 1
	return s
}

type planeStub struct{}

func (planeStub) Kernel() (bool, string) { return true, "" }
func (planeStub) Snapshot() []fastpath.PortSnapshot {
	p := fastpath.PortSnapshot{Name: "eth0", Mode: "native"}
	p.Verdicts[bpf.Forward] = 1000
	return []fastpath.PortSnapshot{p}
}

func TestLint(t *testing.T) {
	for _, c := range []*Collector{NewCollector(nodeStub{}, planeStub{}, "v1"), NewCollector(nodeStub{}, nil, "v1")} {
		reg := prometheus.NewPedanticRegistry()
		reg.MustRegister(c)
		problems, err := testutil.GatherAndLint(reg)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range problems {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

func TestValues(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(NewCollector(nodeStub{}, planeStub{}, "v1"))
	want := `
# HELP o7s_dt_packets_total Packets of a data-transfer adjacency by cube and what happened (spec 20, section 9).
# TYPE o7s_dt_packets_total counter
o7s_dt_packets_total{cube="1",event="dropped_ttl",ipcp="n1",layer="net",neighbor="99"} 0
o7s_dt_packets_total{cube="1",event="failed_nhop",ipcp="n1",layer="net",neighbor="99"} 0
o7s_dt_packets_total{cube="1",event="failed_writes",ipcp="n1",layer="net",neighbor="99"} 0
o7s_dt_packets_total{cube="1",event="local_rcvd",ipcp="n1",layer="net",neighbor="99"} 0
o7s_dt_packets_total{cube="1",event="local_sent",ipcp="n1",layer="net",neighbor="99"} 0
o7s_dt_packets_total{cube="1",event="rcvd",ipcp="n1",layer="net",neighbor="99"} 5
o7s_dt_packets_total{cube="1",event="sent",ipcp="n1",layer="net",neighbor="99"} 0
# HELP o7s_irm_flow_allocation_seconds How long successful flow allocations took.
# TYPE o7s_irm_flow_allocation_seconds histogram
o7s_irm_flow_allocation_seconds_bucket{le="0.00025"} 0
o7s_irm_flow_allocation_seconds_bucket{le="0.0005"} 0
o7s_irm_flow_allocation_seconds_bucket{le="0.001"} 2
o7s_irm_flow_allocation_seconds_bucket{le="0.002"} 3
o7s_irm_flow_allocation_seconds_bucket{le="0.005"} 3
o7s_irm_flow_allocation_seconds_bucket{le="0.01"} 3
o7s_irm_flow_allocation_seconds_bucket{le="0.05"} 3
o7s_irm_flow_allocation_seconds_bucket{le="0.2"} 3
o7s_irm_flow_allocation_seconds_bucket{le="1"} 3
o7s_irm_flow_allocation_seconds_bucket{le="5"} 3
o7s_irm_flow_allocation_seconds_bucket{le="+Inf"} 3
o7s_irm_flow_allocation_seconds_sum 0.004
o7s_irm_flow_allocation_seconds_count 3
# HELP o7s_layer_dropped_packets_total Packets that a layer dropped in user space; reasons are disjoint.
# TYPE o7s_layer_dropped_packets_total counter
o7s_layer_dropped_packets_total{ipcp="n1",layer="net",reason="no_route",type="unicast"} 3
# HELP o7s_layer_neighbors Adjacencies by component and state.
# TYPE o7s_layer_neighbors gauge
o7s_layer_neighbors{component="dt",ipcp="n1",layer="net",state="up"} 2
o7s_layer_neighbors{component="mgmt",ipcp="n1",layer="net",state="down"} 1
`
	err := testutil.GatherAndCompare(reg, strings.NewReader(want), "o7s_dt_packets_total",
		"o7s_layer_dropped_packets_total", "o7s_layer_neighbors", "o7s_irm_flow_allocation_seconds")
	if err != nil {
		t.Error(err)
	}
}

func TestServe(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	h := Handler(NewCollector(nodeStub{}, planeStub{}, "v1"))
	go func() { done <- Serve(ctx, l, h, slog.New(slog.DiscardHandler)) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for path, want := range map[string]string{
		"/healthz": "ok",
		"/metrics": `o7s_fastpath_packets_total{drop="false",mode="native",port="eth0",reason="forward"} 1000`,
	} {
		r, err := client.Get("http://" + l.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r.Body)
		_ = r.Body.Close()
		if err != nil || r.StatusCode != 200 || !strings.Contains(string(b), want) {
			t.Errorf("%s: %d, %v", path, r.StatusCode, err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
