package ocbr

import (
	"bytes"
	"context"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit/kittest"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/testnode"
	"github.com/o7s/o7s-router/lib/ipc"
)

// inDaemon runs f with a daemon and a server, ends the server when it has
// printed what done looks for, and returns all that it printed.
func inDaemon(t *testing.T, f func(client func(line string) string), done func(server string) bool) (server string) {
	t.Helper()
	dir := testnode.Start(t)
	testnode.Call(t, dir, ipc.OpBind, ipc.BindArgs{Name: "ocbr", Prog: "/bin/ocbr"})
	var out kittest.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	n, close := kit.Library(dir, "ocbr", nil)
	defer close()
	ended := make(chan int)
	go func() { ended <- run(ctx, n, opts(t, "-l"), &out, os.Stderr) }()
	c, close := kit.Library(dir, "client", nil)
	defer close()
	f(func(line string) string {
		var out bytes.Buffer
		if s := run(t.Context(), c, opts(t, line), &out, os.Stderr); s != 0 {
			t.Errorf("ocbr %s: status %d", line, s)
		}
		return out.String()
	})
	out.Await(t, done)
	cancel()
	if s := <-ended; s != 0 {
		t.Errorf("server: status %d", s)
	}
	return out.String()
}

func TestDaemon(t *testing.T) {
	var sent [][]string
	server := inDaemon(t, func(client func(string) string) {
		for _, line := range []string{"-d 200ms -r 10M", "-d 200ms -f", "-d 200ms -f -q data -s 60000", "-d 100ms -r 10M --spin -s 1"} {
			got := client("-n ocbr " + line)
			if !strings.Contains(got, "sent statistics: ") || strings.Contains(got, ": 0 packets") {
				t.Errorf("%s: %s", line, got)
			}
			m := regexp.MustCompile(`statistics: +([0-9]+) packets, +([0-9]+) bytes`).FindStringSubmatch(got)
			sent = append(sent, m[1:])
		}
	}, func(s string) bool { return strings.Count(s, "in total") == len(sent) })
	// What was sent was received, on flows within a machine.
	totals := regexp.MustCompile(`Flow +[0-9]+: +([0-9]+) packets \( +([0-9]+) bytes\) .* in total`).FindAllStringSubmatch(server, -1)
	if len(totals) != len(sent) {
		t.Fatal(server)
	}
	for i, s := range sent {
		if got := totals[i][1:]; !slices.Equal(got, s) {
			t.Errorf("test %d: received %v, sent %v", i, got, s)
		}
	}
}
