package run

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/testnode"
	"github.com/o7s/o7s-router/lib/ipc"
)

// Programs that everybody has, and that know nothing of this: they talk over
// flows by name.

// payload is a file of random bytes.
func payload(t *testing.T, path string, size int) []byte {
	t.Helper()
	b := make([]byte, size)
	_, _ = rand.Read(b)
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return b
}

func same(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s has %d bytes that differ from the %d sent", filepath.Base(path), len(got), len(want))
	}
}

func TestIperf3(t *testing.T) {
	iperf := tool(t, "iperf3")
	n := newNode(t)
	n.start("Server listening", 1, "--listen", "5201=perf", "--", iperf, "-s", "--forceflush")
	// Both ways at once ends when one way is done.
	for _, args := range [][]string{{"-n", "200M"}, {"-n", "100M", "-R", "-P", "3"}, {"-n", "100M", "--bidir"}} {
		least := int64(100 << 20)
		if args[len(args)-1] == "--bidir" {
			least = 1
		}
		out := n.want(append([]string{"--", iperf, "-c", "perf", "-J"}, args...)...)
		var r struct {
			Error string
			End   struct {
				Received struct{ Bytes int64 } `json:"sum_received"`
			}
		}
		if err := json.Unmarshal([]byte(out), &r); err != nil || r.Error != "" || r.End.Received.Bytes < least {
			t.Errorf("%v: %v %q, %d bytes\n%s", args, err, r.Error, r.End.Received.Bytes, out)
		}
	}
}

// nginx: two workers that share the port, one that forwards to another name;
// curl gets files from both, and puts one.
func TestNginxCurl(t *testing.T) {
	nginx, curl, py := tool(t, "nginx"), tool(t, "curl"), tool(t, "python3")
	n := newNode(t)
	dir := t.TempDir()
	for d := dir; d != "/tmp" && d != "/"; d = filepath.Dir(d) { // for the workers' user
		if err := os.Chmod(d, 0o755); err != nil {
			break
		}
	}
	want := payload(t, filepath.Join(dir, "file"), 3<<20)
	testnode.Call(t, n.dir, ipc.OpNameCreate, ipc.NameArgs{Name: "idle"})
	n.start("Serving HTTP", 1, "--listen", "8000=backend", "--", py, "-u", "-m", "http.server", "8000", "-d", dir)
	conf := fmt.Sprintf(`
worker_processes 2;
daemon off;
error_log stderr notice;
pid %[1]s/pid;
events { worker_connections 64; }
http {
	access_log off;
	client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
	server {
		listen 80 reuseport; listen [::]:80;
		location / { root %[1]s; }
		location /from/ { proxy_pass http://backend/; }
	}
}`, dir)
	if err := os.WriteFile(filepath.Join(dir, "nginx.conf"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	// It resolves the name of the other server when it starts.
	s := n.start("start worker process", 2, "--listen", "80=www", "--", nginx, "-c", filepath.Join(dir, "nginx.conf"))
	got := filepath.Join(dir, "got")
	for range 3 {
		n.want("--only", "--", curl, "-sSf", "-o", got, "http://www/file")
		same(t, got, want)
	}
	n.want("--only", "--", curl, "-sSf", "-o", got, "http://www/from/file")
	same(t, got, want)
	// Many at once, over one curl.
	out := n.want("--", curl, "-sSf", "--parallel", "-o", got+"#1", "-w", "%{http_code}\n", "http://www/file?[1-20]")
	if c := strings.Count(out, "200"); c != 20 {
		t.Errorf("%d of 20 in parallel\n%s", c, out)
	}
	if out, err := n.run("--", curl, "-sS", "http://idle/"); err == nil || !strings.Contains(out, "curl: (7)") {
		t.Errorf("a name that nobody serves: %v %s", err, out)
	}
	if out, err := n.run("--only", "--", curl, "-sS", "http://no-such-name/"); err == nil || !strings.Contains(out, "curl: (6)") {
		t.Errorf("a name that is not there: %v %s", err, out)
	}
	s.signal(unix.SIGQUIT) // graceful; it has unbound nothing itself
	if s.err != nil {
		t.Errorf("nginx: %v\n%s", s.err, s.out.String())
	}
}

func TestSSH(t *testing.T) {
	sshd, ssh, keygen := tool(t, "sshd"), tool(t, "ssh"), tool(t, "ssh-keygen")
	if os.Geteuid() != 0 {
		lacks(t, "root: sshd changes users")
	}
	n := newNode(t)
	dir := t.TempDir()
	if _, err := os.Stat("/run/sshd"); os.IsNotExist(err) { // where it locks its network process in
		if err := os.Mkdir("/run/sshd", 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove("/run/sshd") })
	}
	for _, k := range []string{"host", "id"} {
		if out, err := exec.Command(keygen, "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, k)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	conf := fmt.Sprintf(`
Port 22
HostKey %[1]s/host
AuthorizedKeysFile %[1]s/id.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
`, dir)
	if err := os.WriteFile(filepath.Join(dir, "conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	n.start("Server listening on ::", 1, "--listen", "22=shell", "--", sshd, "-D", "-e", "-f", filepath.Join(dir, "conf"))
	opts := []string{"--", ssh, "-F", "none", "-i", filepath.Join(dir, "id"), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
		"-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR", "root@shell"}
	if out := n.want(append(opts, "echo $SSH_CONNECTION; echo $LD_PRELOAD")...); !strings.HasPrefix(out, "198.19.0.2 ") || strings.Contains(out, "shim") {
		t.Errorf("connection: %q", out)
	}
	want := payload(t, filepath.Join(dir, "file"), 5<<20)
	ctx := t.Context()
	c := n.command(ctx, append(opts, "cat > "+filepath.Join(dir, "got")+"; exit 7")...)
	c.Stdin = bytes.NewReader(want)
	if out, err := c.CombinedOutput(); c.ProcessState.ExitCode() != 7 {
		t.Errorf("%v\n%s", err, out)
	}
	same(t, filepath.Join(dir, "got"), want)
	out, err := n.command(ctx, append(opts, "cat "+filepath.Join(dir, "file"))...).Output()
	if err != nil || !bytes.Equal(out, want) {
		t.Errorf("%v, %d bytes", err, len(out))
	}
}
