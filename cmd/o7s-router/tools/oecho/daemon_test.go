package oecho

import (
	"context"
	"io"
	"strings"
	"testing"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/testnode"
)

// tool runs oecho, for testnode.Serve.
func tool(t *testing.T) testnode.Tool {
	return func(ctx context.Context, n kit.Network, line string, stdout, stderr io.Writer) int {
		return run(ctx, n, opts(t, strings.Fields(line)...), stdout, stderr)
	}
}

func TestDaemon(t *testing.T) {
	server := testnode.Serve(t, "oecho", tool(t), func(client func(string) string) {
		for _, q := range []string{"raw", "data"} {
			if got := client("-q " + q); got != golden(t, "client.golden") {
				t.Errorf("%s: %s", q, got)
			}
		}
	}, func(s string) bool { return s == golden(t, "server.golden") })
	if server != golden(t, "server.golden") {
		t.Error(server)
	}
}
