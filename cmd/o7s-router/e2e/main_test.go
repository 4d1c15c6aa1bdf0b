package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// built is o7s-router, built once for all tests.
var built string

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == peerName {
		os.Exit(peerMain(os.Args[1:]))
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // everything skips
	}
	dir, err := os.MkdirTemp("", "o7s-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	built = filepath.Join(dir, "o7s-router")
	args, cgo := []string{"build", "-trimpath", "-o", built}, "CGO_ENABLED=0"
	if raced {
		args, cgo = append(args, "-race"), "CGO_ENABLED=1"
	}
	build := exec.Command("go", append(args, "github.com/o7s/o7s-router/cmd/o7s-router")...)
	build.Env = append(os.Environ(), cgo)
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build o7s-router: %v\n%s", err, out)
		return 1
	}
	self, err := os.Executable()
	if err == nil {
		err = os.Symlink(self, filepath.Join(dir, peerName))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// peerPath is the program that tests can kill.
func peerPath() string { return filepath.Join(filepath.Dir(built), peerName) }

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	const why = "needs root: makes network namespaces and loads XDP programs"
	if os.Getenv("O7S_TEST_NO_SKIP") == "1" {
		t.Fatal(why)
	}
	t.Skip(why)
}
