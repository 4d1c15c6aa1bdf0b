package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == childArg {
		childMain(os.Args[2])
		return
	}
	goleak.VerifyTestMain(m)
}

// start runs a daemon until stop, which returns what Run did.
func start(t *testing.T, o Options) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	o.Log = slog.New(slog.DiscardHandler)
	o.Ready = func() { close(ready) }
	go func() { done <- Run(ctx, o) }()
	select {
	case <-ready:
	case err := <-done:
		cancel()
		t.Fatal(err)
	case <-time.After(10 * time.Second):
		cancel()
		t.Fatal("the daemon is not ready")
	}
	return func() error {
		cancel()
		return <-done
	}
}

func TestRun(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	stop := start(t, Options{RunDir: dir, NoXDP: true, Version: "v1", Metrics: "127.0.0.1:0"})
	c, err := ipc.Dial(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	var hello ipc.HelloResult
	if _, err := c.Call(t.Context(), ipc.OpHello, ipc.HelloArgs{Prog: "test"}, &hello); err != nil || hello.Version != "v1" {
		t.Errorf("%+v, %v", hello, err)
	}
	_, err = c.Call(t.Context(), ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "loc", Type: "local", Layer: "here"}, nil)
	if err != nil {
		t.Error(err)
	}
	// A second daemon in the same directory is refused, and disturbs nothing.
	err = Run(t.Context(), Options{RunDir: dir, NoXDP: true, Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "--run-dir") {
		t.Errorf("second daemon: %v", err)
	}
	if _, err := c.Call(t.Context(), ipc.OpList, ipc.ListArgs{What: "ipcps"}, nil); err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if _, err := c.Call(t.Context(), ipc.OpList, ipc.ListArgs{What: "ipcps"}, nil); !errors.Is(err, o7serr.EIRMD) {
		t.Errorf("call after the end: %v", err)
	}
	_ = c.Close()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range list {
		if !strings.HasSuffix(f.Name(), ".lock") {
			t.Errorf("left behind: %s", f.Name())
		}
	}
	// What a killed daemon leaves does not keep the next from starting.
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "bpf"), nil, 0o600), start(t, Options{RunDir: dir, NoXDP: true})()); err != nil {
		t.Error(err)
	}
}

// With the kernel data path, pins and their file system go with the daemon.
func TestPins(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it loads BPF programs")
	}
	dir := t.TempDir()
	stop := start(t, Options{RunDir: dir})
	pins := filepath.Join(dir, "bpf")
	if mounted, err := mountPoint(pins); err != nil || !mounted {
		_ = stop()
		t.Skipf("no kernel data path here (%v)", err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(pins); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pins are left: %v", err)
	}
}

func TestErrors(t *testing.T) {
	quiet := slog.New(slog.DiscardHandler)
	if err := Run(t.Context(), Options{RunDir: t.TempDir(), Group: "no-such-group", Log: quiet}); err == nil || err.Error() != `unknown group "no-such-group"` {
		t.Errorf("group: %v", err)
	}
	if err := Run(t.Context(), Options{RunDir: t.TempDir(), NoXDP: true, Metrics: "nowhere", Log: quiet}); err == nil || !strings.HasPrefix(err.Error(), "metrics: ") {
		t.Errorf("metrics: %v", err)
	}
	for release, ok := range map[string]bool{
		"6.1.0-21-amd64": true, "6.18.44": true, "7.0-rc1": true, "6.0.19": false, "5.15.0-100-generic": false, "x": false,
	} {
		if err := kernelAtLeast(release, minKernel); (err == nil) != ok {
			t.Errorf("%s: %v", release, err)
		}
	}
	if _, err := NewLogger("loud", ""); err == nil {
		t.Error("unknown level accepted")
	}
	if _, err := NewLogger("", "xml"); err == nil {
		t.Error("unknown format accepted")
	}
	for _, format := range []string{"text", "json"} {
		if _, err := NewLogger("warn", format); err != nil {
			t.Error(err)
		}
	}
}
