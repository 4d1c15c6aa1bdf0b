package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/ipcp"
)

const metricsAddr = "127.0.0.1:9479" // of every host; each has a loopback of its own

// scrape fetches the metrics of a host.
func (n *network) scrape(host string) []byte {
	n.t.Helper()
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
			e := n.inside(host, func() error {
				conn, err = new(net.Dialer).DialContext(ctx, network, addr)
				return err
			})
			return conn, e
		},
	}}
	r, err := c.Get("http://" + metricsAddr + "/metrics")
	if err != nil {
		n.t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		n.t.Fatalf("metrics of %s: %s %v", host, r.Status, err)
	}
	return b
}

// metric adds up the samples of a metric whose labels contain all of labels.
func metric(t *testing.T, text []byte, name string, labels ...string) (sum float64) {
	t.Helper()
	found := false
samples:
	for line := range strings.Lines(string(text)) {
		series, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		base, have, _ := strings.Cut(series, "{")
		if !ok || base != name {
			continue
		}
		for _, l := range labels {
			if !strings.Contains(have, l) {
				continue samples
			}
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		sum += v
		found = true
	}
	if !found {
		t.Errorf("no metric %s %v", name, labels)
	}
	return sum
}

// use is what a daemon holds.
type use struct{ goroutines, fds, maps int }

func (n *network) use(host string) use {
	n.t.Helper()
	pid := n.daemonPID(host)
	return use{
		goroutines: int(metric(n.t, n.scrape(host), "go_goroutines")),
		fds:        count(n.t, pid, "fd"), maps: count(n.t, pid, "maps"),
	}
}

// spares counts the devices that a daemon has in store for programs.
func (n *network) spares(host string) (count int) {
	n.t.Helper()
	for _, p := range show[irm.FastPathInfo](n, host, "fastpath").Ports {
		if strings.HasPrefix(p.Name, "app:spare/") {
			count++
		}
	}
	return count
}

// resident is a daemon's memory in bytes less BPF maps and the rings and frames
// that it shares with the kernel.
func resident(t *testing.T, pid int) (rest, shared int) {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	special := false
	for sc := bufio.NewScanner(f); sc.Scan(); {
		fields := strings.Fields(sc.Text())
		if len(fields) >= 5 && strings.Contains(fields[0], "-") {
			special = strings.Contains(sc.Text(), "bpf-map") || strings.Contains(sc.Text(), "[anon:o7s") || strings.Contains(sc.Text(), "AF_XDP") || strings.Contains(sc.Text(), "XDP")
		}
		if len(fields) == 3 && fields[0] == "Rss:" {
			kb, err := strconv.Atoi(fields[1])
			if err != nil {
				t.Fatal(err)
			}
			if special {
				shared += kb << 10
			} else {
				rest += kb << 10
			}
		}
	}
	return rest, shared
}

// TestManyFlows opens and closes a thousand flows: the daemons hold what they
// held before.
func TestManyFlows(t *testing.T) {
	t.Parallel()
	top := topology(t, "line3", false)
	top.Defaults.Daemon = []string{"--metrics", metricsAddr}
	n := up(t, top)
	server := n.serve("h3", "echo", "uni")
	n.create("echo", "h1")
	c := n.client("h1", "client")
	run := func(flows int) {
		t.Helper()
		// A few are open at a time.
		var open []interface{ Close() error }
		for i := range flows {
			f := n.alloc(c, "echo")
			if got, err := ask(f, "hello"); err != nil || got != "hello" {
				t.Fatalf("flow %d: %q %v", i, got, err)
			}
			if open = append(open, f); len(open) > 4 {
				open[0].Close()
				open = open[1:]
			}
		}
		for _, f := range open {
			f.Close()
		}
		eventually(t, 5*time.Second, func() error {
			if _, open := server.accepted(); open != 0 {
				return fmt.Errorf("the server has %d flows", open)
			}
			for _, h := range top.Hosts {
				if f := n.flows(h); f != 0 {
					return fmt.Errorf("%s has %d flows", h, f)
				}
			}
			return nil
		})
	}
	run(50)
	before := map[string]use{}
	for _, h := range top.Hosts {
		last := use{}
		eventually(t, 5*time.Second, func() error { // settled
			// A device that a program took is replaced when the machine has time.
			if s := n.spares(h); s != 2 {
				return fmt.Errorf("%s has %d devices in store", h, s)
			}
			u := n.use(h)
			same := u == last
			last = u
			if !same {
				return fmt.Errorf("%s: %+v", h, u)
			}
			return nil
		})
		before[h] = last
	}
	run(1000)
	for _, h := range top.Hosts {
		eventually(t, 10*time.Second, func() error {
			u, b := n.use(h), before[h]
			// The Go runtime maps more for its heap as it sees fit; the race
			// detector, too.
			if u.goroutines > b.goroutines || u.fds > b.fds || u.maps > b.maps+4 && !raced {
				return fmt.Errorf("%s has %+v, %+v before", h, u, b)
			}
			return nil
		})
	}
	if flows, _ := server.accepted(); flows != 1050 {
		t.Errorf("the server accepted %d flows", flows)
	}
	for _, h := range top.Hosts {
		rest, shared := resident(t, n.daemonPID(h))
		t.Logf("%s: %.1f MiB, and %.1f MiB of maps and frames", h, float64(rest)/(1<<20), float64(shared)/(1<<20))
		if h == "h2" && rest > 48<<20 && !raced {
			t.Errorf("h2's daemon has %d MiB, want less than 48", rest>>20)
		}
	}
}

// TestMetrics compares what Prometheus gets with what show tells.
func TestMetrics(t *testing.T) {
	t.Parallel()
	top := topology(t, "line3", false)
	top.Defaults.Daemon = []string{"--metrics", metricsAddr}
	n := up(t, top)
	n.serve("h3", "echo", "uni")
	n.create("echo", "h1")
	pingPong(t, n.alloc(n.client("h1", "client"), "echo"), 100)
	for _, h := range top.Hosts {
		text := n.scrape(h)
		problems, err := promlint.New(bytes.NewReader(text)).Lint()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range problems {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
		if h == "h1" {
			if v := metric(t, text, "o7s_layer_routes", `layer="uni"`); v != float64(len(show[[]ipcp.Route](n, h, "routes"))) {
				t.Errorf("h1 has %v routes", v)
			}
		}
		if h == "h2" {
			before := n.verdicts(h)["forward"]
			v := metric(t, n.scrape(h), "o7s_fastpath_packets_total", `reason="forward"`)
			if after := n.verdicts(h)["forward"]; v < float64(before) || v > float64(after) || v < 200 {
				t.Errorf("h2 forwarded %v packets by its metrics, %d to %d by show", v, before, after)
			}
		}
	}
}
