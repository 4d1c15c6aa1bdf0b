package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/ipc"
)

// raw is a client of the local socket that does not know the protocol.
func (n *network) raw(host string) *net.UnixConn {
	n.t.Helper()
	c, err := net.Dial("unixpacket", ipc.SocketPath(n.RunDir(host)))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	return c.(*net.UnixConn)
}

// answer reads one reply; ok is false when the daemon hung up instead.
func answer(t *testing.T, c *net.UnixConn) (r ipc.Reply, ok bool) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(slack * 2 * time.Second))
	buf := make([]byte, ipc.MaxMessage+1)
	k, err := c.Read(buf)
	if k == 0 || err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("no answer, and no hang-up either")
		}
		return r, false
	}
	if err := json.Unmarshal(buf[:k], &r); err != nil {
		t.Errorf("the answer %q: %v", buf[:k], err)
	}
	return r, true
}

// count is the number of entries of a file or directory under /proc of a process.
func count(t *testing.T, pid int, what string) int {
	t.Helper()
	p := filepath.Join("/proc", fmt.Sprint(pid), what)
	if st, err := os.Stat(p); err == nil && st.IsDir() {
		es, err := os.ReadDir(p)
		if err != nil {
			t.Fatal(err)
		}
		return len(es)
	}
	b, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	lines := 0
	for _, c := range b {
		if c == '\n' {
			lines++
		}
	}
	return lines
}

// TestBadRequests sends what is no request to the local socket while programs
// use it.
func TestBadRequests(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	n.serve("h3", "echo", "uni")
	n.create("echo", "h1")
	f := n.alloc(n.client("h1", "client"), "echo")
	pingPong(t, f, 1)
	pings := startPings(f, 5*time.Millisecond)
	pid := n.daemonPID("h1")
	n.must("h1", ipc.OpShow, ipc.ShowArgs{What: "layers"})
	// The device that the client took is replaced in the store a moment later.
	eventually(t, 3*time.Second, func() error {
		if out, _, _ := n.run("h1", "o7s-router", "show", "fastpath"); strings.Count(out, "app:spare") < 2 {
			return errors.New("the store of devices is not full")
		}
		return nil
	})
	before := count(t, pid, "fd")

	for _, bad := range []string{
		"{", "null", "[]", "17", `"x"`, "{}", "\x00", "\xff\xfe\xfd", `{"id":-1}`, `{"id":1}`,
		`{"id":1,"op":"no such operation"}`, `{"id":1,"op":7}`, `{"id":1,"op":"alloc"}`, `{"id":1,"op":"alloc","args":[]}`,
		`{"id":1,"op":"alloc","args":{"name":7}}`, `{"id":1,"op":"alloc","args":{"name":""}}`,
		`{"id":1,"op":"alloc","args":{"name":"echo","timeout_ms":-5}}`,
		`{"id":1,"op":"show","args":{"what":"nothing"}}`, `{"id":1,"op":"list"}`, `{"id":1,"op":"dealloc","args":{"flow":4000000000}}`,
		`{"id":1,"op":"dealloc","args":{"flow":1}}`, `{"id":1,"op":"hello"}`, `{"id":1,"op":"hello","args":{"prog":""}}`,
		`{"id":1,"op":"ipcp-bootstrap","args":{"name":"x","layer":"y","type":"z"}}`,
		`{"id":1,"op":"ipcp-create","args":{"name":"x","type":"unicast","name":"\u0000"}}`,
		`{"id":1,"op":"bind","args":{"name":"x","pid":-3}}`,
		string(make([]byte, 5000)),
	} {
		c := n.raw("h1")
		if _, err := c.Write([]byte(bad)); err != nil {
			t.Errorf("%.60q: %v", bad, err)
			continue
		}
		if r, ok := answer(t, c); ok && r.Code >= 0 {
			t.Errorf("%.60q: answer %+v, want an error", bad, r)
		}
		c.Close()
	}
	// A wrong request is not the end of a connection on which it can be told.
	c := n.raw("h1")
	for id := uint64(1); id < 20; id++ {
		_, _ = fmt.Fprintf(c, `{"id":%d,"op":"nonsense"}`, id)
		if r, ok := answer(t, c); !ok || r.ID != id || r.Code == 0 || r.Error == "" {
			t.Fatalf("answer to request %d: %v %+v", id, ok, r)
		}
	}
	c.Close()
	// Too long.
	for _, size := range []int{ipc.MaxMessage + 1, ipc.MaxMessage + 4096, 180 << 10} {
		c := n.raw("h1")
		if _, err := c.Write([]byte(`{"id":1,"op":"show","args":{"what":"` + string(make([]byte, size)) + `"}}`)); err != nil {
			t.Logf("%d bytes: %v", size, err)
			continue
		}
		if r, ok := answer(t, c); ok && r.Code >= 0 {
			t.Errorf("%d bytes: answer %+v", size, r)
		}
		c.Close()
	}
	// Descriptors that nobody asked for are closed.
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fds := make([]int, 200)
	for i := range fds {
		fds[i] = int(null.Fd())
	}
	c = n.raw("h1")
	for id := range 5 {
		req := fmt.Sprintf(`{"id":%d,"op":"show","args":{"what":"layers"}}`, id+1)
		if _, _, err := c.WriteMsgUnix([]byte(req), unix.UnixRights(fds...), nil); err != nil {
			t.Fatal(err)
		}
		if _, ok := answer(t, c); !ok {
			c.Close() // hanging up on that is fine, too
			c = n.raw("h1")
		}
	}
	c.Close()
	// Anything at all, and nobody reads the answers.
	rng := rand.New(rand.NewPCG(3, 4))
	for range 300 {
		c := n.raw("h1")
		for range 4 {
			b := make([]byte, rng.IntN(300)+1)
			for j := range b {
				b[j] = byte(rng.Uint32())
			}
			if rng.IntN(2) == 0 {
				b = append([]byte(`{"id":5,"op":"alloc","args":`), b...)
			}
			_ = c.SetWriteDeadline(time.Now().Add(time.Second))
			if _, err := c.Write(b); err != nil {
				break
			}
		}
		c.Close()
	}
	pings.more(t, 2*time.Second, 20)
	if sent, received := pings.end(); sent-received > 2 {
		t.Errorf("%d of %d pings were answered", received, sent)
	}
	if now := n.daemonPID("h1"); now != pid {
		t.Errorf("daemon %d became %d", pid, now)
	}
	eventually(t, 3*time.Second, func() error {
		// One connection is that of the test, and the flow went meanwhile.
		if now := count(t, pid, "fd"); now > before+1 {
			return fmt.Errorf("%d descriptors, %d before", now, before)
		}
		return nil
	})
}

// TestPermissions has somebody who is not root.
func TestPermissions(t *testing.T) {
	t.Parallel()
	n := up(t, parse(t, "name = \"perm\"\nhosts = [\"h1\"]\n"))
	// The run directory is below a directory of ours that is closed to others.
	for d := n.RunDir("h1"); d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Dir(built), 0o755); err != nil {
		t.Fatal(err)
	}
	nobody := func(argv ...string) (string, int) {
		t.Helper()
		out, errs, status := n.run("h1", append([]string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}, argv...)...)
		return out + errs, status
	}
	if out, status := nobody("o7s-router", "show", "layers"); status != 0 {
		t.Errorf("show: exit status %d: %s", status, out)
	}
	for _, argv := range [][]string{
		{"o7s-router", "name", "create", "x"}, {"o7s-router", "ipcp", "create", "x", "--type", "local"},
		{"irm", "name", "create", "x"}, {"irm", "bind", "program", "sh", "name", "x"},
	} {
		if out, status := nobody(argv...); status != 1 || !oneLine(out) {
			t.Errorf("%v: exit status %d: %s", argv, status, out)
		}
	}
}
