package ocbr

import (
	"context"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/testnode"
)

// tool runs ocbr, for testnode.Serve.
func tool(t *testing.T) testnode.Tool {
	return func(ctx context.Context, n kit.Network, line string, stdout, stderr io.Writer) int {
		return run(ctx, n, opts(t, line), stdout, stderr)
	}
}

func TestDaemon(t *testing.T) {
	var sent [][]string
	server := testnode.Serve(t, "ocbr", tool(t), func(client func(string) string) {
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
