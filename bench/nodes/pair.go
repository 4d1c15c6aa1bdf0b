package nodes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/o7s/o7s-router/bench/stream"
	"github.com/o7s/o7s-router/bench/worker"
	"github.com/o7s/o7s-router/deploy/lab"
)

// programs is a directory with this program under several names: a name is
// bound to a program by the name it was started with.
func programs(names ...string) (dir string, remove func(), err error) {
	self, err := os.Executable()
	if err != nil {
		return "", nil, err
	}
	if dir, err = os.MkdirTemp("", "o7s-bench-"); err != nil {
		return "", nil, err
	}
	remove = func() { _ = os.RemoveAll(dir) } // links only
	for _, n := range names {
		if err := os.Symlink(self, filepath.Join(dir, n)); err != nil {
			remove()
			return "", nil, err
		}
	}
	return dir, remove, nil
}

// nameOf is the name of the server of a network of package stream, and of the
// program behind it.
func nameOf(network string) string { return "bench." + network }

// server is a program that receives transfers over flows, bound to its name.
func server(t *lab.Topology, dir, host, network string, layers ...string) {
	n := nameOf(network)
	prog := filepath.Join(dir, n)
	t.Services = append(t.Services, lab.Service{Name: n, Host: host, Layers: layers, Program: prog})
	t.Runs = append(t.Runs, lab.Run{Host: host, Command: profiled("serve-"+t.Name+"-"+network, prog, worker.Command, "serve", "-net", network)})
}

// pairLink is the link of every pair of hosts, 1500 bytes without offloads:
// what the hosts send is what is on the wire.
const pairLink = `
hosts = ["h1", "h2"]
[[link]]
ends = ["h1", "h2"]
gro = false
gso = false
tx_checksum = false
`

const pairServer = "10.202.12.2"

// Ports of the IP servers.
var ports = map[string]string{stream.TCP: "5001", stream.QUIC: "5002"}

// pair is two hosts with servers of the networks on h2: those over flows with
// daemons and an eth-dix layer on the link, or the others over IP.
func (c Config) pair(ctx context.Context, down *takeDown, name, link string, networks ...string) (*lab.Lab, error) {
	ip := ports[networks[0]] != ""
	text := "name = '" + name + "'\n" + pairLink + link + "\n"
	if ip {
		text += fmt.Sprintf("addresses = ['10.202.12.1/24', '%s/24']\n", pairServer)
	} else {
		text += "layer = 'dix12'\n"
	}
	t, err := lab.Parse(name, []byte(text))
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, n := range networks {
		names = append(names, nameOf(n))
	}
	dir, remove, err := programs(names...)
	if err != nil {
		return nil, err
	}
	down.add(remove)
	for _, n := range networks {
		if ip {
			at := pairServer + ":" + ports[n]
			t.Runs = append(t.Runs, lab.Run{Host: "h2", Command: profiled("serve-"+name+"-"+n, self, worker.Command, "serve", "-net", n, "-listen", at)})
			continue
		}
		server(t, dir, "h2", n, "dix12")
		t.Services = append(t.Services, lab.Service{Name: nameOf(n), Host: "h1"})
	}
	l, d, err := c.up(ctx, t, !ip)
	if err != nil {
		return nil, err
	}
	down.add(d)
	return l, nil
}

// transfer sends from h1 to the server of a network.
func transfer(ctx context.Context, l *lab.Lab, network string, s stream.Size) (stream.Transfer, error) {
	to := nameOf(network)
	if p := ports[network]; p != "" {
		to = pairServer + ":" + p
	}
	if network == stream.Unix {
		to = sinkSocket
	}
	var t stream.Transfer
	args := profiled("send-"+l.Topology().Name+"-"+network, "send", "-net", network, "-to", to, "-total", fmt.Sprint(s.Total), "-message", fmt.Sprint(s.Message))
	if s.Sum {
		args = append(args, "-sum")
	}
	err := run(ctx, l, "h1", &t, args...)
	return t, err
}

// profiles names a directory in which both ends of transfers leave CPU
// profiles, for looking into what they do.
const profiles = "O7S_BENCH_PROFILES"

// profiled adds the file for the profile to a worker's command, if there is to
// be one.
func profiled(name string, command ...string) []string {
	if dir := os.Getenv(profiles); dir != "" {
		command = append(command, "-profile", filepath.Join(dir, name))
	}
	return command
}

// series is a measurement that several rows look at: each of them gets that of
// the same round, whichever is first.
type series[T any] struct {
	measure func(ctx context.Context) (T, error)
	done    []T
}

// row returns the Measure function of one of the rows.
func (s *series[T]) row(value func(T) float64) func(context.Context) (float64, error) {
	round := 0
	return func(ctx context.Context) (float64, error) {
		if round == len(s.done) {
			t, err := s.measure(ctx)
			if err != nil {
				return 0, err
			}
			s.done = append(s.done, t)
		}
		round++
		return value(s.done[round-1]), nil
	}
}

// note is a row's note on the last round.
func (s *series[T]) note(text func(T) string) func() string {
	return func() string {
		if len(s.done) == 0 {
			return ""
		}
		return text(s.done[len(s.done)-1])
	}
}

// allocs is a note on the heap objects of both ends for each of n things.
func allocs(what string, n func(stream.Transfer) int64) func(stream.Transfer) string {
	return func(t stream.Transfer) string {
		k := float64(n(t))
		return fmt.Sprintf("heap objects for each %s: %.4f at the sender, %.4f at the receiver", what,
			float64(t.Sender.Allocs)/k, float64(t.Receiver.Allocs)/k)
	}
}

// repeated is a note on what the end-to-end protocol sent in the last round.
func repeated(t stream.Transfer) string {
	p, back := t.Sender.Packets, t.Receiver.Packets
	return fmt.Sprintf("last round: %d packets and %d again (%d times late), %d without data to the sender", p.Sent, p.Resent, p.RTOs, back.Control)
}
