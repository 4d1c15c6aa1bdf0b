package operf

import (
	"context"
	"encoding/json"
	"io"
	"strings"
	"testing"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/testnode"
)

// tool runs operf, for testnode.Serve.
func tool(t *testing.T) testnode.Tool {
	return func(ctx context.Context, n kit.Network, line string, stdout, stderr io.Writer) int {
		return run(ctx, n, opts(t, line), stdout, stderr)
	}
}

func TestDaemon(t *testing.T) {
	testnode.Serve(t, "operf", tool(t), func(client func(string) string) {
		for _, line := range []string{
			"-t uni -r 10M", "-t bi -r 10M", "-t uni -f", "-t bi -f", "-t uni -f -q data", "-t bi -f -q data -s 100000", "-t bi --spin -s 64", "-t uni -r 1G -s 200000",
		} {
			var r result
			out := client("-n operf -d 150ms -j " + line)
			if err := json.Unmarshal([]byte(out), &r); err != nil {
				t.Errorf("%s: %v in %s", line, err, out)
			}
			if !r.Known || r.Transmitted == 0 || r.Lost+r.Late+r.Duplicates > 0 || r.TimedOut {
				t.Errorf("%s: %s", line, out)
			}
		}
	}, func(s string) bool { return strings.Count(s, " closed.") == 8 })
}
