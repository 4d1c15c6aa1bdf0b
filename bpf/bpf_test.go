package bpf

import (
	"bytes"
	"crypto/sha256"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

var update = flag.Bool("update", false, "record the sources' hash (make generate does)")

// sourceHash covers names and contents of everything the compiler reads here.
func sourceHash(t *testing.T) string {
	var files []string
	for _, p := range []string{"*.c", "*.h"} {
		m, err := filepath.Glob(p)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, m...)
	}
	slices.Sort(files)
	h := sha256.New()
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(h, "%s %d\n", f, len(b))
		h.Write(b)
	}
	return fmt.Sprintf("%x\n", h.Sum(nil))
}

// The committed objects were compiled from the sources beside them.
func TestSourcesAreCompiled(t *testing.T) {
	const file = "sources.sha256"
	got := sourceHash(t)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, []byte(got)) {
		t.Fatal("C sources changed since the objects were compiled: run make generate")
	}
}

func TestReasonsAreNamed(t *testing.T) {
	seen := map[string]bool{}
	for r := range NumReasons {
		if r.String() == "" || r.Help() == "" || seen[r.String()] {
			t.Errorf("reason %d: name %q, help %q", r, r.String(), r.Help())
		}
		seen[r.String()] = true
	}
}

// The specifications parse and have what the loader replaces and sets.
func TestSpecs(t *testing.T) {
	r, err := LoadRouter()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"xdp_o7s", "xdp_app", "xdp_pass", "xdp_array"} {
		if r.Programs[p] == nil {
			t.Errorf("no program %s", p)
		}
	}
	for _, v := range []string{"port_slot", "flow_buckets"} {
		if r.Variables[v] == nil {
			t.Errorf("no variable %s", v)
		}
	}
	if _, err := LoadBench(); err != nil {
		t.Fatal(err)
	}
}
