// Package testnode runs a daemon for the tests of tools.
package testnode

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/o7s/o7s-router/cmd/o7s-router/daemon"
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
