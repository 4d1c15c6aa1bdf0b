package stream

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
)

// free is an address that nobody uses now.
func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func serve(t *testing.T, network, at string) (bad chan error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l, err := Listen(ctx, network, at)
	if err != nil {
		t.Fatal(err)
	}
	bad = make(chan error, 1)
	end := make(chan error, 1)
	go func() { end <- Serve(ctx, l, func(err error) { bad <- err }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-end; err != nil {
			t.Error(err)
		}
	})
	return bad
}

func TestTransfer(t *testing.T) {
	for _, tc := range []struct {
		network, at string
		size        Size
	}{
		{TCP, free(t), Size{5_000_001, 32 << 10, true}},
		{QUIC, free(t), Size{5_000_001, 1400, true}},
		{Unix, "@o7s-stream-test", Size{64_003, 64, false}},
	} {
		serve(t, tc.network, tc.at)
		l, err := Dial(t.Context(), tc.network, tc.at)
		if err != nil {
			t.Fatal(tc.network, err)
		}
		got, err := Send(l, tc.size)
		if err != nil {
			t.Error(tc.network, err)
		}
		if got.Receiver.Bytes != tc.size.Total || got.Seconds <= 0 || (got.Receiver.Sum != 0) != tc.size.Sum {
			t.Errorf("%s: %+v", tc.network, got)
		}
		if want := (tc.size.Total + tc.size.Message - 1) / tc.size.Message; got.Sender.Messages != want {
			t.Errorf("%s: %d messages, want %d", tc.network, got.Sender.Messages, want)
		}
		_ = l.Close()
	}
}

// spoiler loses or changes what passes it.
type spoiler struct {
	Link
	n    int
	drop bool
}

func (s *spoiler) Write(p []byte) (int, error) {
	if s.n++; s.n == 5 {
		if s.drop {
			return len(p), nil
		}
		p = append([]byte(nil), p...)
		p[20] ^= 1
	}
	return s.Link.Write(p)
}

func TestSpoiltContentIsNoticed(t *testing.T) {
	at := free(t)
	serve(t, TCP, at)
	l, err := Dial(t.Context(), TCP, at)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := Send(&spoiler{Link: l}, Size{100_000, 1000, true}); err == nil || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("error %v", err)
	}
	bad := serve(t, Unix, "@o7s-stream-test2")
	u, err := Dial(t.Context(), Unix, "@o7s-stream-test2")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if _, err := Send(&spoiler{Link: u, drop: true}, Size{10_000, 100, false}); err == nil {
		t.Error("a lost message was not noticed")
	}
	if err := <-bad; !strings.Contains(err.Error(), "message 3") {
		t.Error(err)
	}
}

func TestBadSize(t *testing.T) {
	for _, s := range []Size{{10, 4, true}, {100, 1 << 30, true}, {10, 100, true}} {
		if _, err := Send(nil, s); err == nil {
			t.Errorf("%+v is good", s)
		}
	}
	if _, err := Listen(t.Context(), "pigeon", "x"); err == nil {
		t.Error("unknown network")
	}
	a, b := net.Pipe()
	_ = a.Close()
	if err := readFull(b, make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
}
