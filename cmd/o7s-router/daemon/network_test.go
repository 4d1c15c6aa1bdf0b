package daemon

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/ipcp"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/qos"
)

// childArg makes the test binary a daemon, in a network namespace of its own.
const childArg = "o7s-test-daemon"

func childMain(dir string) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	log, err := NewLogger(os.Getenv("O7S_TEST_LOG"), "")
	if os.Getenv("O7S_TEST_LOG") == "" {
		log = slog.New(slog.DiscardHandler)
	}
	if err == nil {
		err = Run(ctx, Options{RunDir: dir, Log: log, Ready: func() { fmt.Println("ready") }})
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("stopped")
}

// host is a daemon in its own process and network namespace.
type host struct {
	t   *testing.T
	dir string
	cmd *exec.Cmd
	out *bufio.Scanner
	ipc *ipc.Client
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, dir: t.TempDir()}
	h.cmd = exec.Command(os.Args[0], childArg, h.dir)
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGTERM}
	h.cmd.Stderr = os.Stderr
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h.out = bufio.NewScanner(out)
	t.Cleanup(func() {
		_ = h.cmd.Process.Signal(syscall.SIGTERM)
		stopped := h.out.Scan() && h.out.Text() == "stopped"
		if err := h.cmd.Wait(); err != nil || !stopped {
			t.Errorf("daemon ended with %q, %v", h.out.Text(), err)
		}
	})
	if !h.out.Scan() || h.out.Text() != "ready" {
		t.Fatalf("daemon: %s", h.out.Text())
	}
	if h.ipc, err = ipc.Dial(t.Context(), h.dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.ipc.Close() })
	return h
}

// link connects two hosts by a veth pair that is called eth0 in both.
func link(t *testing.T, a, b *host) {
	t.Helper()
	name := fmt.Sprintf("irm%d", os.Getpid()%100000)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name + "a"
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: name + "b"}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	for i, h := range []*host{a, b} {
		l, err := netlink.LinkByName(name + string(rune('a'+i)))
		if err == nil {
			err = netlink.LinkSetNsPid(l, h.cmd.Process.Pid)
		}
		if err != nil {
			_ = netlink.LinkDel(veth)
			t.Fatal(err)
		}
		ns, err := netns.GetFromPid(h.cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		nl, err := netlink.NewHandleAt(ns)
		if err == nil {
			err = errors.Join(nl.LinkSetName(l, "eth0"), nl.LinkSetUp(l))
			nl.Close()
		}
		if err = errors.Join(err, ns.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

func (h *host) do(op ipc.Op, args any) {
	h.t.Helper()
	if _, err := h.ipc.Call(h.t.Context(), op, args, nil); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) flows() (out []irm.FlowInfo) {
	h.t.Helper()
	if _, err := h.ipc.Call(h.t.Context(), ipc.OpShow, ipc.ShowArgs{What: "flows"}, &out); err != nil {
		h.t.Fatal(err)
	}
	return slices.DeleteFunc(out, func(f irm.FlowInfo) bool { return f.State != "allocated" })
}

// routed waits until the host has a route to somebody.
func (h *host) routed() {
	h.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		var routes []ipcp.Route
		if _, err := h.ipc.Call(h.t.Context(), ipc.OpShow, ipc.ShowArgs{What: "routes"}, &routes); err != nil {
			h.t.Fatal(err)
		}
		if len(routes) > 0 {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatal("no route")
		}
	}
}

// accepting waits until somebody accepts flows to name.
func (h *host) accepting(name string) {
	h.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		var r ipc.ListResult
		if _, err := h.ipc.Call(h.t.Context(), ipc.OpList, ipc.ListArgs{What: "names", Prefix: name}, &r); err != nil {
			h.t.Fatal(err)
		}
		if slices.ContainsFunc(r.Names, func(i ipc.NameInfo) bool { return i.Name == name && i.Accepting > 0 }) {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("nobody accepts flows to %s: %+v", name, r.Names)
		}
	}
}

// ping allocates a flow from a to name, which this process serves at b, and
// sends n packets there and back.
func ping(t *testing.T, a, b *host, name string, n int) {
	t.Helper()
	server, client := o7s.New(o7s.Options{RunDir: b.dir, Prog: "server"}), o7s.New(o7s.Options{RunDir: a.dir, Prog: "client"})
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	done := make(chan error, 1)
	go func() {
		done <- func() error {
			f, err := server.Accept(ctx)
			if err != nil {
				return err
			}
			defer f.Close()
			buf := make([]byte, 2000)
			for {
				k, err := f.Read(buf)
				if err != nil {
					return nil // the client is done
				}
				if _, err := f.Write(buf[:k]); err != nil {
					return err
				}
			}
		}()
	}()
	b.accepting(name)
	begin := time.Now()
	f, err := client.Alloc(ctx, name, nil)
	if err != nil {
		cancel()
		t.Fatalf("%s: %v, server %v", name, err, <-done)
	}
	took := time.Since(begin)
	buf := make([]byte, 2000)
	_ = f.SetReadDeadline(time.Now().Add(20 * time.Second))
	begin = time.Now()
	for i := range n {
		msg := fmt.Sprint("packet ", i)
		if _, err := f.Write([]byte(msg)); err != nil {
			t.Fatal(err)
		}
		k, err := f.Read(buf)
		if err != nil || string(buf[:k]) != msg {
			t.Fatalf("%s: packet %d: read %q, %v; flows %+v and %+v", name, i, buf[:max(k, 0)], err, a.flows(), b.flows())
		}
	}
	rtt := time.Since(begin) / time.Duration(n)
	info := a.flows()
	if len(info) != 1 || info[0].RxPackets < uint64(n) || info[0].TxPackets < uint64(n) {
		t.Errorf("flows of the client's host: %+v", info)
	}
	t.Logf("%s: allocated in %v, round trip %v, path %s %s", name, took, rtt, info[0].Path, info[0].Why)
	_ = f.Close()
	cancel()
	_ = server.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	for _, h := range []*host{a, b} {
		for deadline := time.Now().Add(20 * time.Second); len(h.flows()) > 0; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("flows left: %+v", h.flows())
			}
		}
	}
}

// Two machines, an Ethernet layer, a unicast layer over it, and programs that
// ping each other over both.
func TestTwoNodes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes network namespaces")
	}
	a, b := newHost(t), newHost(t)
	link(t, a, b)
	eth := map[string]string{"dev": "eth0"}
	for i, h := range []*host{a, b} {
		h.do(ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: fmt.Sprint("eth-", i), Type: "eth-dix", Layer: "wire", Options: eth})
		h.do(ipc.OpNameCreate, ipc.NameArgs{Name: "srv"})
		h.do(ipc.OpNameCreate, ipc.NameArgs{Name: "srv.net"})
	}
	for _, n := range []string{"srv", "srv.net"} {
		b.do(ipc.OpBind, ipc.BindArgs{Name: n, Prog: "/bin/server"})
	}
	b.do(ipc.OpNameRegister, ipc.RegisterArgs{Name: "srv", Layers: []string{"wire"}})
	ping(t, a, b, "srv", 200)
	ping(t, a, b, "srv", 200)

	a.do(ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "n.a", Type: "unicast", Layer: "net", Autobind: true})
	for _, n := range []string{"net", "n.a"} {
		a.do(ipc.OpNameRegister, ipc.RegisterArgs{Name: n, Layers: []string{"wire"}})
		b.do(ipc.OpNameCreate, ipc.NameArgs{Name: n})
	}
	b.do(ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: "n.b", Layer: "net", Autobind: true})
	b.do(ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "n.b", Dst: "n.a"})
	b.do(ipc.OpNameRegister, ipc.RegisterArgs{Name: "srv.net", Layers: []string{"net"}})
	for _, h := range []*host{a, b} {
		h.routed()
	}
	ping(t, a, b, "srv.net", 200)
	ping(t, a, b, "srv.net", 200)

	// The same with the end-to-end protocol; within the machine it needs none.
	checked := qos.Data
	checked.BER = 0
	for _, q := range []qos.Spec{qos.Data, checked} {
		echoAll(t, a, b, "srv", q)
		echoAll(t, a, b, "srv.net", q)
		echoAll(t, b, b, "srv.net", q)
	}
}

// echoAll sends messages of all sizes over a flow to name with q, ends its
// direction, and has them back from a server that ends its own when it reads the
// end of the stream.
func echoAll(t *testing.T, a, b *host, name string, q qos.Spec) {
	t.Helper()
	server, client := o7s.New(o7s.Options{RunDir: b.dir, Prog: "server"}), o7s.New(o7s.Options{RunDir: a.dir, Prog: "client"})
	defer client.Close()
	defer server.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	served := make(chan error, 1)
	go func() {
		f, err := server.Accept(ctx)
		if err != nil {
			served <- err
			return
		}
		buf := make([]byte, 100000)
		for {
			n, err := f.Read(buf)
			if err == nil {
				_, err = f.Write(buf[:n])
			}
			if err != nil {
				served <- errors.Join(ended(err), f.CloseWrite(), f.Close())
				return
			}
		}
	}()
	b.accepting(name)
	f, err := client.Alloc(ctx, name, &q)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	message := func(i int) []byte {
		m := make([]byte, 1+i*37%1400)
		for k := range m {
			m[k] = byte(i + k)
		}
		return m
	}
	const n = 3000
	sent := make(chan error, 1)
	go func() {
		for i := range n {
			if _, err := f.Write(message(i)); err != nil {
				sent <- fmt.Errorf("message %d: %w", i, err)
				return
			}
		}
		sent <- f.CloseWrite()
	}()
	_ = f.SetReadDeadline(time.Now().Add(60 * time.Second))
	buf := make([]byte, 100000)
	for i := range n {
		k, err := f.Read(buf)
		if err != nil || !bytes.Equal(buf[:k], message(i)) {
			t.Fatalf("%s: message %d of %d bytes: %d bytes, %v; %+v", name, i, len(message(i)), k, err, f.Stats())
		}
	}
	if k, err := f.Read(buf); err != io.EOF {
		t.Errorf("%s: %d bytes and %v after the end of the stream", name, k, err)
	}
	if err := errors.Join(<-sent, <-served, f.Close()); err != nil {
		t.Errorf("%s: %v", name, err)
	}
}

// ended is nil for the end of a stream.
func ended(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}
