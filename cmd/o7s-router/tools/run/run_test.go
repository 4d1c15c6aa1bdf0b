package run

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/testnode"
	"github.com/o7s/o7s-router/lib/ipc"
)

// What a program sees of its sockets is what TCP would show it.
func TestClient(t *testing.T) {
	p := program(t)
	n := newNode(t)
	n.start("ready", 1, "--listen", "7=echo:7", "--", p, "fork-server", "7")
	n.start("ready", 1, "--name", "six", "--", p, "epoll-server", "7")
	n.start("ready", 1, "--name", "rude", "--", p, "rude-server", "7")
	testnode.Call(t, n.dir, ipc.OpNameCreate, ipc.NameArgs{Name: "idle"})
	for _, c := range []struct {
		name string
		args []string
	}{
		{"Addresses", []string{"--", p, "addresses", "echo", "7"}},
		{"Options", []string{"--", p, "options", "echo", "7"}},
		{"Epoll", []string{"--", p, "epoll", "echo", "7"}},
		{"Threads", []string{"--", p, "threads", "echo", "7"}},
		{"EpollSix", []string{"--", p, "epoll", "six", "7"}},
		{"ThreadsSix", []string{"--", p, "threads", "six", "7"}},
		{"Inherit", []string{"--", p, "inherit", "echo", "7"}},
		{"Bound", []string{"--", p, "bound-client", "echo", "7"}},
		{"Refused", []string{"--", p, "refused", "idle", "7"}},
		// A map leads to a name that is not there.
		{"Unreachable", []string{"--map", "nowhere:7=no-such-name", "--", p, "unreachable", "nowhere", "7"}},
		{"Reset", []string{"--", p, "reset", "rude", "7"}},
		{"Only", []string{"--only", "--", p, "no-host", "localhost", "7"}},
		{"OtherPort", []string{"--only", "--", p, "no-host", "echo", "8"}},
		{"Map", []string{"--map", "Alias=echo:7", "--", p, "options", "alias", "99"}},
		{"InUse", []string{"--listen", "9=used", "--", p, "in-use", "9"}},
		{"Address", []string{"--map", "10.1.2.3:7=echo:7", "--", p, "inherit", "10.1.2.3", "7"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := *n
			m.t = t
			if out := m.want(c.args...); !strings.Contains(out, "fine") {
				t.Error(out)
			}
		})
	}
}

// Flows go round the sockets that share a port.
func TestReusePort(t *testing.T) {
	p := program(t)
	n := newNode(t)
	n.start("ready", 2, "--listen", "7=shared", "--", p, "reuse-server", "7")
	py := tool(t, "python3")
	out := n.want("--", py, "-c", `
import socket
seen = set()
for i in range(10):
    s = socket.create_connection(("shared", 7)); seen.add(s.makefile().read())
print(len(seen))`)
	if strings.TrimSpace(out) != "2" {
		t.Errorf("connections went to %s processes, want 2", out)
	}
}

// A peer that is killed is no end of stream.
func TestPeerDies(t *testing.T) {
	p := program(t)
	n := newNode(t)
	s := n.start("ready", 1, "--listen", "7=mute", "--", p, "mute-server", "7")
	c := n.start("ready", 1, "--", p, "peer-dies", "mute", "7")
	s.kill()
	select {
	case <-c.done:
	case <-time.After(limit):
		t.Fatal("the client hears nothing")
	}
	if c.err != nil {
		t.Errorf("%v\n%s", c.err, c.out.String())
	}
	n.clean()
}

// Nor for a server that only reads; a client that closes is one.
func TestClientDies(t *testing.T) {
	p, py := program(t), tool(t, "python3")
	n := newNode(t)
	s := n.start("ready", 1, "--listen", "7=sink", "--", p, "sink-server", "7")
	n.want("--", py, "-c", `import socket; socket.create_connection(("sink", 7)).sendall(b"x"*100000)`)
	s.await("end")
	// More than fits in between: the server has accepted it.
	c := n.start("sent", 1, "--", py, "-uc", `
import socket, time
s = socket.create_connection(("sink", 7)); s.sendall(b"x"*(8 << 20)); print("sent"); time.sleep(60)`)
	c.kill()
	s.await("reset")
	n.clean()
}

// A client that dies before the server accepts it is passed over.
func TestDeadInQueue(t *testing.T) {
	py := tool(t, "python3")
	n := newNode(t)
	s := n.start("ready", 1, "--verbose", "--listen", "7=late", "--", py, "-uc", `
import signal, socket
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
l = socket.create_server(("", 7)); print("ready")
signal.sigwait({signal.SIGUSR1})
print("first:", l.accept()[0].recv(100))`)
	c := n.start("sent", 1, "--", py, "-uc", `
import socket, time
s = socket.create_connection(("late", 7)); s.sendall(b"dead"); print("sent"); time.sleep(60)`)
	c.kill()
	s.await("connection failed")
	n.clean()
	alive := n.start("sent", 1, "--", py, "-uc", `
import socket
s = socket.create_connection(("late", 7)); s.sendall(b"alive"); print("sent"); s.recv(1)`)
	_ = unix.Kill(s.cmd.Process.Pid, unix.SIGUSR1)
	s.await("first: b'alive'")
	<-alive.done
}

// What a program sends before it ends arrives, however slow the other end is.
func TestLastWords(t *testing.T) {
	py := tool(t, "python3")
	n := newNode(t)
	s := n.start("ready", 1, "--listen", "7=slow", "--", py, "-uc", `
import socket, time
l = socket.create_server(("", 7)); print("ready")
while True:
    c = l.accept()[0]; total = 0
    while True:
        b = c.recv(100000)
        if not b: break
        total += len(b); time.sleep(0.01)
    print("got", total)`)
	n.want("--", py, "-c", `import socket; socket.create_connection(("slow", 7)).sendall(b"x"*3000000)`)
	s.await("got 3000000")
	// It is the same for one that is killed: the kernel sends what it has.
	c := n.start("sent", 1, "--", py, "-uc", `
import socket, os
s = socket.create_connection(("slow", 7)); s.sendall(b"x"*2000000); print("sent"); os.kill(os.getpid(), 9)`)
	s.await("got 2000000")
	select {
	case <-c.done:
	case <-time.After(limit):
		t.Error("run goes on")
	}
	// A connection that does not come about keeps nobody.
	testnode.Call(t, n.dir, ipc.OpNameCreate, ipc.NameArgs{Name: "idle"})
	begin := time.Now()
	n.want("--", py, "-c", `
import socket
s = socket.socket(); s.setblocking(False); s.connect_ex((socket.gethostbyname("idle"), 7))`)
	if d := time.Since(begin); d > 10*time.Second {
		t.Errorf("took %v", d)
	}
}

// Statuses, signals, and what is left behind.
func TestExit(t *testing.T) {
	sh := tool(t, "sh")
	n := newNode(t)
	for _, c := range []struct {
		args []string
		want int
	}{
		{[]string{"--", sh, "-c", "exit 7"}, 7},
		{[]string{"--", sh, "-c", "kill -KILL $$"}, 128 + 9},
		{[]string{sh, "-c", "exit 3"}, 3},
		{[]string{"--", "no-such-program"}, exitNotFound},
		{[]string{"--", os.Args[0]}, exitCannot}, // a Go program
		{[]string{"--nonsense"}, exitFailed},
		{[]string{}, exitFailed},
		{[]string{"--listen", "80", "true"}, exitFailed},
		{[]string{"--qos", "raw", "true"}, exitFailed},
		{[]string{"--map", "x", "true"}, exitFailed},
	} {
		out, err := n.run(c.args...)
		var e *exec.ExitError
		if !errors.As(err, &e) || e.ExitCode() != c.want {
			t.Errorf("%v: %v, want status %d\n%s", c.args, err, c.want, out)
		}
		if c.want >= exitFailed && c.want <= exitNotFound && strings.Count(out, "\n") != 1 {
			t.Errorf("%v: %q, want one line", c.args, out)
		}
	}
	// It stays for what the program left in the background.
	begin := time.Now()
	out := n.want("--", sh, "-c", "(sleep 0.3; echo late) & exit 0")
	if time.Since(begin) < 300*time.Millisecond || !strings.Contains(out, "late") {
		t.Errorf("did not wait: %q", out)
	}
	// And passes signals on.
	s := n.start("ready", 1, "--", sh, "-c", `trap 'echo got; exit 5' USR1; echo ready; while :; do sleep 0.05; done`)
	s.signal(unix.SIGUSR1)
	var e *exec.ExitError
	if !errors.As(s.err, &e) || e.ExitCode() != 5 || !strings.Contains(s.out.String(), "got") {
		t.Errorf("%v %s", s.err, s.out.String())
	}
}

// A port is served as long as somebody has its socket.
func TestUnbind(t *testing.T) {
	py := tool(t, "python3")
	n := newNode(t)
	s := n.start("closed", 1, "--listen", "7=brief", "--", py, "-uc", `
import socket, sys, time
s = socket.create_server(("", 7)); s.close(); print("closed"); sys.stdin.read(); time.sleep(60)`)
	defer s.stop()
	c, err := ipc.Dial(t.Context(), n.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	deadline := time.Now().Add(20 * time.Second)
	for {
		var l ipc.ListResult
		if _, err := c.Call(t.Context(), ipc.OpList, ipc.ListArgs{What: "names"}, &l); err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(l.Names, func(x ipc.NameInfo) bool { return x.Name == "brief" })
		if i >= 0 && len(l.Names[i].Processes) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("still bound: %+v", l.Names)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		return p
	}
	sh := tool(t, "sh")
	for _, c := range []struct{ path, want string }{
		{sh, ""},
		{write("script", "#! "+sh+" -e\n"), ""},
		{write("goscript", "#!"+os.Args[0]+"\n"), "is a Go program"},
		{write("empty", ""), ""},
		{write("text", "hello"), ""},
	} {
		err := check(c.path, 0)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.path, err, c.want)
		}
	}
	cc := tool(t, "cc")
	src := write("static.c", "int main(void) { return 0; }\n")
	bin := filepath.Join(dir, "static")
	if out, err := exec.Command(cc, "-static", "-o", bin, src).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := check(bin, 0); err == nil || !strings.Contains(err.Error(), "is linked statically") {
		t.Errorf("static: %v", err)
	}
	if os.Geteuid() == 0 {
		p := write("setuid", "#!"+sh+"\n")
		if err := errors.Join(os.Chown(p, 1, 1), unix.Chmod(p, 0o4755)); err != nil {
			t.Fatal(err)
		}
		if err := check(p, 0); err == nil || !strings.Contains(err.Error(), "is a setuid program") {
			t.Errorf("setuid: %v", err)
		}
	}
}

// A writer that waits for room gets it once the other end has read everything,
// however much of its buffer the last piece took: sendfile, splice from a full
// pipe, a small SO_SNDBUF.
func TestRoom(t *testing.T) {
	py := tool(t, "python3")
	n := newNode(t)
	file := filepath.Join(t.TempDir(), "file")
	want := payload(t, file, 4<<20)
	n.start("ready", 1, "--listen", "7=room", "--", py, "-uc", `
import ctypes, os, select, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
SIZE, MANY = 4 << 20, 1 << 20
file = os.open(sys.argv[1], os.O_RDONLY)
data = memoryview(os.pread(file, SIZE, 0))
# Two sockets of the machine and a large pipe make pieces that are larger than pages.
near, far = socket.socketpair()
r, w = os.pipe()
def wait(s): assert select.select([], [s], [], 20)[1], "not writable"
def splice(a, b, n): return libc.splice(a, None, b, None, ctypes.c_size_t(n), 0)
l = socket.create_server(("", 7)); print("ready")
while True:
    s = l.accept()[0]; how = s.recv(1); done = 0
    if how == b"p":
        libc.fcntl(w, 1031, MANY) # F_SETPIPE_SZ
    else:
        s.setblocking(False)
    if how == b"b": s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    while done < SIZE:
        if how == b"p":
            near.sendall(data[done:done + 65536]); n = 0
            while n < 65536: n += splice(far.fileno(), w, 65536 - n)
            while n: k = splice(r, s.fileno(), MANY); n -= k; done += k
            continue
        try: done += os.sendfile(s.fileno(), file, done, SIZE) if how == b"f" else s.send(data[done:])
        except BlockingIOError: wait(s)
    s.close()`, file)
	for _, how := range []string{"f", "b", "p"} {
		got := filepath.Join(t.TempDir(), "got")
		n.want("--", py, "-c", `
import socket, sys
s = socket.create_connection(("room", 7)); s.settimeout(20); s.sendall(sys.argv[1].encode())
with open(sys.argv[2], "wb") as f:
    while True:
        b = s.recv(65536)
        if not b: break
        f.write(b)`, how, got)
		same(t, got, want)
	}
}
