package o7s

import (
	"errors"
	"io"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// Close of an ordered flow is an end for the peer, Abort is a failure, also for
// a reader that is blocked; what was written before is read first.
func TestAbort(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(*Flow) error
		want error
	}{
		{"close", (*Flow).Close, io.EOF},
		{"abort", (*Flow).Abort, o7serr.EFLOWDOWN},
		{"abort after the end", func(f *Flow) error { return errors.Join(f.CloseWrite(), f.Abort()) }, io.EOF},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newFake(t)
			a, b := d.client(t), d.client(t)
			accepted := make(chan *Flow, 1)
			go func() {
				y, err := b.Accept(t.Context())
				if err != nil {
					t.Error(err)
				}
				accepted <- y
			}()
			x, err := a.Alloc(t.Context(), "direct", &qos.Data)
			y := <-accepted
			if err != nil || y == nil {
				t.Fatal(err)
			}
			if _, err := x.Write([]byte("last")); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 100)
			if n, err := y.Read(buf); err != nil || string(buf[:n]) != "last" {
				t.Fatalf("%q, %v", buf[:n], err)
			}
			got := make(chan error, 1)
			go func() {
				_, err := y.Read(buf)
				got <- err
			}()
			if err := tc.end(x); err != nil {
				t.Error(err)
			}
			select {
			case err = <-got:
			case <-time.After(10 * time.Second):
				t.Fatal("the reader hears nothing")
			}
			if !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
			if _, err := x.Write([]byte("x")); !errors.Is(err, o7serr.ENOTALLOC) {
				t.Errorf("write after it: %v", err)
			}
		})
	}
}

// Over a layer Abort does not wait for a peer that is silent, and ends a Close
// that does.
func TestAbortSilentPeer(t *testing.T) {
	d := newFake(t)
	for _, closing := range []bool{false, true} {
		f, _ := d.flow1(t, d.client(t), &qos.Data)
		if _, err := f.Write([]byte("lost")); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 2)
		if closing {
			go func() { done <- f.Close() }()
			select {
			case err := <-done:
				t.Fatalf("Close did not wait: %v", err)
			case <-time.After(50 * time.Millisecond):
			}
		}
		go func() {
			err := f.Abort()
			if closing && errors.Is(err, o7serr.ENOTALLOC) {
				err = nil // it was Close that closed it
			}
			done <- err
		}()
		for range cap(done) - 1 {
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("closing %v: %v", closing, err)
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("closing %v: Abort waits", closing)
			}
		}
	}
}
