package oecho

import (
	"bytes"
	"context"
	"io"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit/kittest"
	"github.com/o7s/o7s-router/lib/qos"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func golden(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func opts(t *testing.T, args ...string) options {
	t.Helper()
	o, err := parse(args)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestEcho(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := &kittest.Network{Flows: make(chan kit.Flow)}
		ctx, cancel := context.WithCancel(t.Context())
		var server, client, errs bytes.Buffer
		done := make(chan int)
		go func() { done <- run(ctx, srv, opts(t, "-l"), &server, &errs) }()
		n := &kittest.Network{Far: func(p *kittest.Pipe) { srv.Flows <- p }}
		for range 2 {
			client.Reset()
			if s := run(t.Context(), n, opts(t), &client, &errs); s != 0 || client.String() != golden(t, "client.golden") {
				t.Errorf("status %d, %s", s, client.String())
			}
		}
		synctest.Wait()
		cancel()
		if s := <-done; s != 0 || server.String() != golden(t, "server.golden") || errs.Len() > 0 {
			t.Errorf("status %d: %s%s", s, server.String(), errs.String())
		}
	})
}

// The 16 bytes of spec 45 §12.
func TestBytes(t *testing.T) {
	got := make(chan []byte, 1)
	n := &kittest.Network{Far: func(p *kittest.Pipe) {
		b := make([]byte, 300)
		k, _ := p.Read(b)
		got <- b[:k]
		_, _ = p.Write([]byte("\xff no zero"))
	}}
	var out bytes.Buffer
	if s := run(t.Context(), n, opts(t, "-q", "data", "-n", "x"), &out, io.Discard); s != 0 || out.String() != "Server replied with \xff no zero\n" {
		t.Errorf("status %d, %q", s, out.String())
	}
	if b := <-got; string(b) != "Client says hi!\x00" || n.QoS != qos.Data {
		t.Errorf("%q, %+v", b, n.QoS)
	}
}

func TestTrouble(t *testing.T) {
	for _, c := range []struct {
		far  func(*kittest.Pipe)
		want string
	}{
		{nil, "Failed to allocate flow: -1007. ("},
		{func(p *kittest.Pipe) { p.Close() }, "oecho: flow is down\n"},
		{func(*kittest.Pipe) {}, "oecho: the server did not reply\n"},
	} {
		synctest.Test(t, func(t *testing.T) {
			var errs bytes.Buffer
			if s := run(t.Context(), &kittest.Network{Far: c.far}, opts(t), io.Discard, &errs); s != 1 || !strings.HasPrefix(errs.String(), c.want) {
				t.Errorf("status %d, %q", s, errs.String())
			}
		})
	}
	// Clients that send too much, nothing, or go away do not stop the server.
	synctest.Test(t, func(t *testing.T) {
		srv := &kittest.Network{Flows: make(chan kit.Flow)}
		ctx, cancel := context.WithCancel(t.Context())
		var out, errs bytes.Buffer
		done := make(chan int)
		go func() { done <- run(ctx, srv, opts(t, "-l"), &out, &errs) }()
		for i := range 4 {
			a, b := kittest.New(64)
			srv.Flows <- a
			switch i {
			case 0:
				_, _ = b.Write(make([]byte, 257))
			case 1:
				time.Sleep(11 * time.Second)
			case 2:
				b.Close()
			case 3:
				_, _ = b.Write([]byte("last\x00"))
			}
			synctest.Wait()
		}
		cancel()
		if s := <-done; s != 0 || !strings.HasSuffix(out.String(), "New flow.\nMessage from client is last.\n") || strings.Count(errs.String(), "\n") != 3 {
			t.Errorf("status %d: %s%s", s, out.String(), errs.String())
		}
	})
}

func TestParse(t *testing.T) {
	for _, line := range []string{"-x", "x", "-l -n a", "-n", "-q none", "-m " + strings.Repeat("x", 256), "--listen=1", "-n "} {
		var errs bytes.Buffer
		if s := Main(strings.Split(line, " "), io.Discard, &errs); s != 1 || strings.Count(errs.String(), "\n") != 1 {
			t.Errorf("oecho %s: status %d, %q", line, s, errs.String())
		}
	}
	var out bytes.Buffer
	if s := Main([]string{"--help"}, &out, io.Discard); s != 0 || out.String() != usage {
		t.Errorf("--help: %d, %s", s, out.String())
	}
}
