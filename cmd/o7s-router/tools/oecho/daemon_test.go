package oecho

import (
	"bytes"
	"context"
	"os"
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
	testnode.Call(t, dir, ipc.OpBind, ipc.BindArgs{Name: "oecho", Prog: "/bin/oecho"})
	var out kittest.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	n, close := kit.Library(dir, "oecho", nil)
	defer close()
	ended := make(chan int)
	go func() { ended <- run(ctx, n, opts(t, "-l"), &out, os.Stderr) }()
	c, close := kit.Library(dir, "client", nil)
	defer close()
	f(func(line string) string {
		var out bytes.Buffer
		if s := run(t.Context(), c, opts(t, "-q", line), &out, os.Stderr); s != 0 {
			t.Errorf("oecho %s: status %d", line, s)
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
	server := inDaemon(t, func(client func(string) string) {
		for _, q := range []string{"raw", "data"} {
			if got := client(q); got != golden(t, "client.golden") {
				t.Errorf("%s: %s", q, got)
			}
		}
	}, func(s string) bool { return s == golden(t, "server.golden") })
	if server != golden(t, "server.golden") {
		t.Error(server)
	}
}
