package tables

import (
	"os"
	"regexp"
	"strings"
	"testing"
	"unsafe"

	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/bpf"
)

// Records that share a line by mistake would cost every packet a cache miss.
func TestRecordSizes(t *testing.T) {
	for name, got := range map[string]uintptr{
		"next hop": unsafe.Sizeof(NextHop{}), "wire": unsafe.Sizeof(Wire{}), "app": unsafe.Sizeof(App{}),
		"bucket": unsafe.Sizeof(bpf.RouterBucket{}), "flow bucket": unsafe.Sizeof(bpf.RouterFlowBucket{}),
	} {
		if got != 64 {
			t.Errorf("%s has %d bytes, not a cache line", name, got)
		}
	}
	if n := unsafe.Sizeof(bpf.RouterDtCount{}); n != 128 {
		t.Errorf("counters have %d bytes", n)
	}
}

// The constants of this package and package bpf are those of structs.h.
func TestConstants(t *testing.T) {
	src, err := os.ReadFile("../../bpf/structs.h")
	if err != nil {
		t.Fatal(err)
	}
	text := regexp.MustCompile(`(?s)/\*.*?\*/`).ReplaceAllString(string(src), "")
	enum := map[string]int{}
	for _, m := range regexp.MustCompile(`(?s)enum[^{;]*\{(.*?)\}`).FindAllStringSubmatch(text, -1) {
		next := 0
		for _, item := range strings.Split(m[1], ",") {
			name, value, found := strings.Cut(strings.TrimSpace(item), "=")
			if name == "" {
				continue
			}
			if found {
				next = 0
				for _, d := range strings.TrimSpace(value) {
					next = next*10 + int(d-'0')
				}
			}
			enum[strings.TrimSpace(name)] = next
			next++
		}
	}
	want := map[string]int{
		"EIDS_PER_BLOCK": EIDsPerBlock, "PROTOS_PER_PORT": ProtosPerPort, "QUEUES_PER_PORT": QueuesPerPort,
		"FLOW_SLOTS": FlowSlots, "ECMP_WAYS": ECMPWays, "CUBES": Cubes, "PORT_TX": PortTx,
		"EP_NONE": EndpointNone, "EP_USER": EndpointUser, "EP_DT": EndpointDT, "EP_APP": EndpointApp,
		"WIRE_DOWN": WireDown, "WIRE_UP": WireUp, "WIRE_PUNT": WirePunt, "APP_ETH": AppEth, "APP_DT": AppDT,
		"DT_RCVD": DTRcvd, "DT_SENT": DTSent, "DT_LOCAL_RCVD": DTLocalRcvd, "DT_LOCAL_SENT": DTLocalSent,
		"DT_TTL": DTTTL, "DT_NHOP": DTNhop, "DT_FAILED": DTFailed, "DT_COUNTERS": DTCounters,
		"MAX_PORTS": MaxPorts, "MAX_BLOCKS": MaxEthBlocks, "MAX_LAYERS": MaxLayers,
		"MAX_NEXTHOPS": MaxNextHops, "MAX_WIRES": MaxWires,
		"REASONS": int(bpf.NumReasons),
	}
	for r := range bpf.NumReasons {
		want["R_"+strings.ToUpper(r.String())] = int(r)
	}
	for name, v := range want {
		if got, ok := enum[name]; !ok || got != v {
			t.Errorf("%s is %d (%v) in C, %d in Go", name, got, ok, v)
		}
	}
}

func TestFlowsAreMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tab := New(Config{Ports: 1, EthBlocks: 1, Layers: 1, Buckets: 1, NextHops: 1, Wires: 1, Apps: 1, FlowBuckets: 4})
		type key struct {
			layer uint32
			eid   uint64
		}
		oracle := map[key]uint32{}
		keys := rapid.Custom(func(t *rapid.T) key {
			return key{rapid.Uint32Range(0, 2).Draw(t, "layer"), rapid.Uint64Range(64, 70).Draw(t, "eid")}
		})
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				k := keys.Draw(t, "key")
				if _, ok := oracle[k]; ok {
					t.Skip()
				}
				app := rapid.Uint32Range(1, 9).Draw(t, "app")
				if tab.AddFlow(k.layer, k.eid, app) {
					oracle[k] = app
				} else if len(oracle) < 8 {
					t.Fatalf("no room beside %d flows", len(oracle))
				}
			},
			"remove": func(t *rapid.T) {
				k := keys.Draw(t, "key")
				tab.RemoveFlow(k.layer, k.eid)
				delete(oracle, k)
			},
			"": func(t *rapid.T) {
				for l := range uint32(3) {
					for e := uint64(64); e < 71; e++ {
						if got := tab.FindFlow(l, e); got != oracle[key{l, e}] {
							t.Fatalf("flow %d/%d: %d, want %d", l, e, got, oracle[key{l, e}])
						}
					}
				}
			},
		})
	})
}
