package operf

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
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
	testnode.Call(t, dir, ipc.OpBind, ipc.BindArgs{Name: "operf", Prog: "/bin/operf"})
	var out kittest.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	n, close := kit.Library(dir, "operf", nil)
	defer close()
	ended := make(chan int)
	go func() { ended <- run(ctx, n, opts(t, "-l"), &out, os.Stderr) }()
	c, close := kit.Library(dir, "client", nil)
	defer close()
	f(func(line string) string {
		var out bytes.Buffer
		if s := run(t.Context(), c, opts(t, line), &out, os.Stderr); s != 0 {
			t.Errorf("operf %s: status %d", line, s)
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
	inDaemon(t, func(client func(string) string) {
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
