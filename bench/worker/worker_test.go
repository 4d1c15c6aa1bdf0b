package worker

import (
	"context"
	"net"
	"testing"
	"time"
)

// echoServer returns the address of a running UDP echo.
func echoServer(t *testing.T) string {
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := c.LocalAddr().String()
	c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	end := make(chan error, 1)
	go func() { end <- echoUDP(ctx, addr) }()
	t.Cleanup(func() {
		cancel()
		if err := <-end; err != nil {
			t.Error(err)
		}
	})
	conn, err := net.Dial("udp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// The server may not listen yet: then the first messages are refused.
	buf := make([]byte, 1)
	for end := time.Now().Add(5 * time.Second); ; {
		_, werr := conn.Write(buf)
		_ = conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		if _, err := conn.Read(buf); werr == nil && err == nil {
			return addr
		}
		if time.Now().After(end) {
			t.Fatal("the echo server does not answer")
		}
	}
}

func TestPingAndGap(t *testing.T) {
	addr := echoServer(t)
	conn := func() net.Conn {
		c, err := dial(t.Context(), "udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	if err := once(conn(), time.Second); err != nil {
		t.Error(err)
	}
	if p, err := ping(conn(), 0, 100*time.Millisecond); err != nil || p.Median <= 0 || p.Received == 0 || p.Lost != 0 {
		t.Errorf("ping: %+v, %v", p, err)
	}
	if g, err := gap(conn(), time.Millisecond, 500*time.Millisecond); err != nil || g.Longest <= 0 || g.Received < 50 {
		t.Errorf("gap: %+v, %v", g, err)
	}
}

// A server that falls silent shows as a gap up to the end.
func TestGapAtTheEnd(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	go func() {
		buf := make([]byte, 2*size)
		for n := 0; ; n++ {
			k, err := b.Read(buf)
			if err != nil {
				return
			}
			if n < 100 {
				_, _ = b.Write(buf[:k])
			}
		}
	}()
	defer b.Close()
	if g, err := gap(a, time.Millisecond, time.Second); err != nil || g.Longest < 200 || g.Received != 100 {
		t.Errorf("gap: %+v, %v", g, err)
	}
}

func TestUnknown(t *testing.T) {
	for _, args := range [][]string{nil, {"nosuch"}, {"ping", "-nosuch"}} {
		if Main(args) == nil {
			t.Errorf("%q did nothing and succeeded", args)
		}
	}
}
