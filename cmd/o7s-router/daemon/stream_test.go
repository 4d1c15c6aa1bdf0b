package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/nettest"

	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/eth"
	"github.com/o7s/o7s-router/ipcp/eth/core"
	"github.com/o7s/o7s-router/ipcp/eth/ethtest"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/ipc"
)

// site is a machine with its resource manager: a daemon in its own process, or
// one in this process, whose Ethernet is in memory.
type site struct {
	dir    string
	do     func(op ipc.Op, args any)
	routed func() // waits for a route
}

// inMemory makes a resource manager in this process, with the interface port.
func inMemory(t *testing.T, port *ethtest.Port) site {
	t.Helper()
	dir := t.TempDir()
	m := irm.New(irm.Config{
		RunDir: dir, Version: "test", Log: slog.New(slog.DiscardHandler), Factories: map[ipcp.Type]irm.Factory{
			ipcp.EthDIX: func(name string, h ipcp.Host, log *slog.Logger) (ipcp.Layer, error) {
				return eth.NewDIX(name, h, port.Open, log), nil
			},
		},
	})
	l, err := ipc.Listen(ipc.SocketPath(dir), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- m.Serve(l) }()
	c, err := ipc.Dial(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.Close(), l.Close(), <-served, m.Close()); err != nil {
			t.Error(err)
		}
	})
	return site{dir: dir, do: func(op ipc.Op, args any) {
		t.Helper()
		if _, err := c.Call(t.Context(), op, args, nil); err != nil {
			t.Fatal(err)
		}
	}}
}

// sites are a server's machine and a client's, which reaches the name srv over
// an Ethernet layer; alone, they are the same.
func sites(t *testing.T, kind string) (server, client site) {
	t.Helper()
	var list []site
	switch kind {
	case "direct":
		list = []site{inMemory(t, nil)}
	case "memory", "lossy":
		hub := new(ethtest.Hub)
		if kind == "lossy" {
			// Only data: the layer's management has time-outs of its own.
			var mu sync.Mutex
			rng := rand.New(rand.NewPCG(1, 2))
			hub.Fate = func(_ *ethtest.Port, f []byte) int {
				mu.Lock()
				defer mu.Unlock()
				if f[14] == 0 && f[15] == 0 {
					return 1
				}
				switch x := rng.Float64(); {
				case x < 0.02:
					return 0
				case x < 0.03:
					return 2
				}
				return 1
			}
		}
		for i := range 2 {
			list = append(list, inMemory(t, hub.Port(core.MAC{2, 0, 0, 0, 0, byte(i + 1)}, 1500)))
		}
	case "veth", "unicast":
		if os.Geteuid() != 0 {
			t.Skip("needs root: it makes network namespaces")
		}
		a, b := newHost(t), newHost(t)
		link(t, a, b)
		list = []site{{a.dir, a.do, a.routed}, {b.dir, b.do, b.routed}}
	}
	for i, s := range list {
		s.do(ipc.OpNameCreate, ipc.NameArgs{Name: "srv"})
		if len(list) > 1 {
			s.do(ipc.OpIPCPBootstrap, ipc.BootstrapArgs{
				Name: fmt.Sprint("eth-", i), Type: "eth-dix", Layer: "wire", Options: map[string]string{"dev": "eth0"},
			})
		}
	}
	layer := "wire"
	if kind == "unicast" { // over the Ethernet layer
		layer = "net"
		a, b := list[0], list[1]
		a.do(ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "n.a", Type: "unicast", Layer: layer, Autobind: true})
		for _, n := range []string{layer, "n.a"} {
			a.do(ipc.OpNameRegister, ipc.RegisterArgs{Name: n, Layers: []string{"wire"}})
			b.do(ipc.OpNameCreate, ipc.NameArgs{Name: n})
		}
		b.do(ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: "n.b", Layer: layer, Autobind: true})
		b.do(ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "n.b", Dst: "n.a"})
		for _, s := range list {
			s.routed()
		}
	}
	if len(list) > 1 {
		list[0].do(ipc.OpNameRegister, ipc.RegisterArgs{Name: "srv", Layers: []string{layer}})
	}
	return list[0], list[len(list)-1]
}

var siteKinds = []string{"direct", "memory", "lossy", "veth", "unicast"}

// The library's streams do what package net's do, between the programs of one
// machine and over a layer, with and without the kernel's fast path.
func TestStreams(t *testing.T) {
	for _, kind := range siteKinds {
		t.Run(kind, func(t *testing.T) {
			there, here := sites(t, kind)
			server, client := o7s.New(o7s.Options{RunDir: there.dir, Prog: "server"}), o7s.New(o7s.Options{RunDir: here.dir, Prog: "client"})
			defer server.Close()
			defer client.Close()
			l, err := server.Listen(t.Context(), "srv")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			dialer := &o7s.Dialer{Client: client}
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				if c1, err = dialer.DialContext(t.Context(), "o7s", "srv"); err != nil {
					return nil, nil, nil, err
				}
				if c2, err = l.Accept(); err != nil {
					c1.Close()
					return nil, nil, nil, err
				}
				if d := c1.(*o7s.Conn).Flow().Direct(); d != (kind == "direct") {
					t.Errorf("direct: %v", d)
				}
				return c1, c2, func() {
					_ = c2.Close() // c1 does not wait for somebody who does not read
					_ = c1.Close()
				}, nil
			})
		})
	}
}

// A server and a client of net/http that know nothing of flows but where to
// listen and how to dial.
func TestHTTP(t *testing.T) {
	for _, kind := range siteKinds {
		t.Run(kind, func(t *testing.T) {
			there, here := sites(t, kind)
			server, client := o7s.New(o7s.Options{RunDir: there.dir, Prog: "server"}), o7s.New(o7s.Options{RunDir: here.dir, Prog: "client"})
			defer server.Close()
			defer client.Close()
			l, err := server.Listen(t.Context(), "srv")
			if err != nil {
				t.Fatal(err)
			}
			large := strings.Repeat("0123456789abcdef", 1<<16)
			srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				got, err := io.ReadAll(r.Body)
				if err != nil {
					t.Error(err)
				}
				if r.URL.Path == "/large" {
					_, _ = io.WriteString(w, large)
					return
				}
				fmt.Fprintf(w, "%s %s %d", r.Host, r.URL.Path, len(got))
			})}
			done := make(chan error, 1)
			go func() { done <- srv.Serve(l) }()
			tr := &http.Transport{DialContext: (&o7s.Dialer{Client: client}).DialContext, MaxConnsPerHost: 4}
			hc := &http.Client{Transport: tr, Timeout: 20 * time.Second}
			get := func(path, body string) string {
				res, err := hc.Post("http://srv"+path, "text/plain", strings.NewReader(body))
				if err != nil {
					t.Error(err)
					return ""
				}
				defer res.Body.Close()
				got, err := io.ReadAll(res.Body)
				if err != nil {
					t.Error(err)
				}
				return string(got)
			}
			var wg sync.WaitGroup
			for i := range 20 {
				wg.Go(func() {
					if got, want := get(fmt.Sprint("/", i), large[:i*1000]), fmt.Sprintf("srv /%d %d", i, i*1000); got != want {
						t.Errorf("got %q, want %q", got, want)
					}
				})
			}
			wg.Wait()
			if got := get("/large", ""); got != large {
				t.Errorf("%d bytes of %d", len(got), len(large))
			}
			tr.CloseIdleConnections()
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			if err := srv.Shutdown(ctx); err != nil {
				t.Error(err)
			}
			if err := <-done; !errors.Is(err, http.ErrServerClosed) {
				t.Error(err)
			}
		})
	}
}
