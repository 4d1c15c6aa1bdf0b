package live

import (
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/bpf"
)

// inNamespace runs f in a network namespace of its own; the thread, and with it
// the namespace, ends with f.
func inNamespace(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes devices and loads XDP programs")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	<-done
}

// Every frame of the generator passes the redirect and is counted.
func TestPath(t *testing.T) {
	inNamespace(t, func() {
		p, err := NewPath("t")
		if err != nil {
			t.Error(err)
			return
		}
		defer p.Close()
		down, err := p.Bare()
		if err != nil {
			t.Error(err)
			return
		}
		defer down()
		if err := p.Generate(Config{Program: bpf.BenchProgGenO7s, First: 1, Count: 10}); err != nil {
			t.Error(err)
			return
		}
		before, err := p.sink.Received()
		if err != nil {
			t.Error(err)
			return
		}
		const n = 1000
		if _, err := p.gen.Send(n); err != nil {
			t.Error(err)
			return
		}
		if after, err := p.sink.Received(); err != nil || after-before < n {
			t.Errorf("%d of %d frames arrived, %v", after-before, n, err)
		}
	})
}

func TestIdle(t *testing.T) {
	a, err := idle(0)
	if err != nil {
		t.Fatal(err)
	}
	b, err := idle(0)
	if err != nil || b < a || b-a > time.Second {
		t.Errorf("idle times %v, %v, %v", a, b, err)
	}
	if _, err := idle(1 << 20); err == nil {
		t.Error("a CPU that is not there has an idle time")
	}
}
