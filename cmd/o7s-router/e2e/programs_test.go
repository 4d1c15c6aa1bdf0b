package e2e

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// needProgram skips the test for want of a program, unless nothing may be skipped.
func needProgram(t *testing.T, names ...string) {
	t.Helper()
	for _, n := range names {
		if _, err := exec.LookPath(n); err == nil {
			continue
		}
		if os.Getenv("O7S_TEST_NO_SKIP") == "1" {
			t.Fatal("needs the program " + n)
		}
		t.Skip("needs the program " + n)
	}
}

// Programs that know nothing of the network talk over it by name, through a
// router: with a shim (run) and through TCP ports (proxy).
func TestPrograms(t *testing.T) {
	needRoot(t)
	needProgram(t, "iperf3", "curl", "python3")
	n := up(t, topology(t, "line3", false))
	n.create("perf", "h1", "h3")
	n.create("web", "h1", "h3")

	if _, err := n.Start(t.Context(), "h3", built, "run", "--layer", "uni", "--listen", "5201=perf", "--", "iperf3", "-s"); err != nil {
		t.Fatal(err)
	}
	n.accepting("h3", "perf", 1)
	// The server stops when the client says so, and leaves unread what is on its
	// way: a receiver keeps up to 32 MiB for a program that is slow.
	for _, args := range [][]string{{"-n", "60M"}, {"-n", "60M", "-R"}} {
		out := n.ok("h1", append([]string{built, "run", "--", "iperf3", "-c", "perf", "-J"}, args...)...)
		var r struct {
			Error string
			End   struct {
				Received struct{ Bytes int64 } `json:"sum_received"`
			}
		}
		if err := json.Unmarshal([]byte(out), &r); err != nil || r.Error != "" || r.End.Received.Bytes < 20<<20 {
			t.Errorf("iperf3 %v: %v %q, %d bytes", args, err, r.Error, r.End.Received.Bytes)
		}
	}

	dir := t.TempDir()
	data := make([]byte, 5<<20)
	src := rand.NewChaCha8([32]byte{1})
	_, _ = src.Read(data)
	if err := os.WriteFile(filepath.Join(dir, "file"), data, 0o644); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%x", sha256.Sum256(data))
	// The server is run with the shim; clients come with it, and without.
	if _, err := n.Start(t.Context(), "h3", built, "run", "--layer", "uni", "--listen", "80=web", "--",
		"python3", "-m", "http.server", "80", "-d", dir); err != nil {
		t.Fatal(err)
	}
	n.accepting("h3", "web", 1)
	get := func(argv ...string) {
		t.Helper()
		got := filepath.Join(dir, "got")
		n.ok("h1", append(argv, "-sSf", "-m", "60", "-o", got)...)
		b, err := os.ReadFile(got)
		if err != nil {
			t.Fatal(err)
		}
		if sum := fmt.Sprintf("%x", sha256.Sum256(b)); sum != want {
			t.Errorf("%v: %d bytes that differ from the %d served", argv, len(b), len(data))
		}
	}
	get(built, "run", "--only", "--", "curl", "http://web/file")
	if _, err := n.Start(t.Context(), "h1", built, "proxy", "--forward", "8080=web", "--socks", "1080"); err != nil {
		t.Fatal(err)
	}
	retry := []string{"curl", "--retry", "20", "--retry-connrefused", "--retry-delay", "1"}
	get(append(retry, "http://127.0.0.1:8080/file")...)
	get(append(retry, "--proxy", "socks5h://127.0.0.1:1080", "http://web/file")...)
	if _, stderr, status := n.run("h1", "curl", "-sS", "--proxy", "socks5h://127.0.0.1:1080", "http://no-such-name/"); status != 97 || !strings.Contains(stderr, "(4)") {
		t.Errorf("a name that is not there: status %d, %s", status, stderr)
	}

	// What a program sends before it ends arrives, at a server that is slow; one
	// whose agent is killed has not ended.
	n.create("sink", "h1", "h3")
	count := filepath.Join(dir, "count")
	if _, err := n.Start(t.Context(), "h3", built, "run", "--layer", "uni", "--listen", "7=sink", "--", "python3", "-c", `
import socket, sys, time
l = socket.create_server(("", 7))
while True:
    c = l.accept()[0]; total = 0; how = "end"
    try:
        while b := c.recv(100000):
            total += len(b); time.sleep(0.005)
    except ConnectionResetError:
        how = "reset"
    open(sys.argv[1], "w").write("%s %d" % (how, total))`, count); err != nil {
		t.Fatal(err)
	}
	n.accepting("h3", "sink", 1)
	const send = "import socket, os, time; s = socket.create_connection(('sink', 7)); s.sendall(b'x' * 3000000)"
	n.ok("h1", built, "run", "--", "python3", "-c", send)
	arrives := func(want string) {
		t.Helper()
		eventually(t, 10*time.Second, func() error {
			if b, _ := os.ReadFile(count); !strings.HasPrefix(string(b), want) {
				return fmt.Errorf("the server got %q, want %q", b, want)
			}
			return nil
		})
	}
	arrives("end 3000000")
	tmp, err := os.MkdirTemp("/tmp", "o7s-e2e-") // it leaves its directory
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	if _, _, status := n.run("h1", "env", "TMPDIR="+tmp, built, "run", "--", "python3", "-c", send+"; os.kill(os.getppid(), 9)"); status == 0 {
		t.Error("a killed run ends well")
	}
	arrives("reset ")
}
