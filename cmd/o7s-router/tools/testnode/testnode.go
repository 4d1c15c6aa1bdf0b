// Package testnode runs a daemon for the tests of tools.
package testnode

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/o7s/o7s-router/cmd/o7s-router/daemon"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit/kittest"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/ipc"
)

// Start runs a daemon until the test ends, and returns its run directory.
func Start(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- daemon.Run(ctx, daemon.Options{
			RunDir: dir, NoXDP: true, Log: slog.New(slog.DiscardHandler), Ready: func() { close(ready) },
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("daemon: %v", err)
		}
	})
	select {
	case <-ready:
	case err := <-done:
		done <- err
		t.Fatal(err)
	case <-time.After(20 * time.Second):
		t.Fatal("the daemon is not ready")
	}
	return dir
}

// Call makes a request to the daemon.
func Call(t testing.TB, runDir string, op ipc.Op, args any) {
	t.Helper()
	c, err := ipc.Dial(t.Context(), runDir)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Call(t.Context(), op, args, nil); err != nil {
		t.Fatal(err)
	}
}

// Client returns a client of the daemon that is closed with the test.
func Client(t testing.TB, runDir, prog string) *o7s.Client {
	c := o7s.New(o7s.Options{RunDir: runDir, Prog: prog})
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// Tool runs a tool: its command line, where its flows come from, its output.
type Tool func(ctx context.Context, n kit.Network, line string, stdout, stderr io.Writer) int

// Serve runs a daemon, and the tool called name in it, which serves the name
// name when its command line is "-l". Once it accepts flows, clients is called
// with a function that runs the tool with another command line and returns what
// it printed; then the server is ended, when it has printed what done looks
// for. All that it printed is returned.
func Serve(t *testing.T, name string, tool Tool, clients func(client func(line string) string), done func(server string) bool) (server string) {
	t.Helper()
	dir := Start(t)
	Call(t, dir, ipc.OpBind, ipc.BindArgs{Name: name, Prog: "/bin/" + name})
	var out kittest.Buffer
	ctx, cancel := context.WithCancel(context.Background())
	n, end := kit.Library(dir, name, nil)
	defer end()
	ended := make(chan int, 1)
	go func() { ended <- tool(ctx, n, "-l", &out, os.Stderr) }()
	defer func() {
		cancel()
		if s := <-ended; s != 0 {
			t.Errorf("server: status %d", s)
		}
	}()
	Accepting(t, dir, name)
	c, end := kit.Library(dir, "client", nil)
	defer end()
	clients(func(line string) string {
		var out bytes.Buffer
		if s := tool(t.Context(), c, line, &out, os.Stderr); s != 0 {
			t.Errorf("%s %s: status %d", name, line, s)
		}
		return out.String()
	})
	out.Await(t, done)
	return out.String()
}

// Accepting waits until somebody accepts flows to name.
func Accepting(t testing.TB, runDir, name string) {
	t.Helper()
	c, err := ipc.Dial(t.Context(), runDir)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var r ipc.ListResult
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		if _, err := c.Call(t.Context(), ipc.OpList, ipc.ListArgs{What: "names", Prefix: name}, &r); err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(r.Names, func(i ipc.NameInfo) bool { return i.Name == name && i.Accepting > 0 }) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("nobody accepts flows to %s: %+v", name, r.Names)
		}
	}
}
