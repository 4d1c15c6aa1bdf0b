package inbox

import (
	"encoding/binary"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/packet"
)

// record is a sink that writes down what it gets.
type record struct {
	mu     sync.Mutex
	seqs   []uint32
	events []ipcp.Event
	hook   func()
}

func (r *record) Receive(pkts []*packet.Buf) {
	r.mu.Lock()
	for _, p := range pkts {
		r.seqs = append(r.seqs, binary.BigEndian.Uint32(p.Bytes()))
		p.Release()
	}
	hook := r.hook
	r.mu.Unlock()
	if hook != nil {
		hook()
	}
}

func (r *record) FlowEvent(e ipcp.Event) {
	r.mu.Lock()
	r.events = append(r.events, e)
	r.mu.Unlock()
}

func numbered(n uint32) *packet.Buf {
	return packet.From(binary.BigEndian.AppendUint32(nil, n))
}

func batch(from, n uint32) (p []*packet.Buf) {
	for i := range n {
		p = append(p, numbered(from+i))
	}
	return p
}

func TestQueuesUntilSink(t *testing.T) {
	var b Box
	b.Deliver(batch(0, 60))
	b.Deliver(batch(60, 10)) // 4 fit
	b.Event(ipcp.EventDown)
	b.Event(ipcp.EventUp)
	b.Event(ipcp.EventDown)
	b.Event(ipcp.EventDealloc)
	var r record
	b.SetSink(&r)
	b.Deliver(batch(100, 1))
	if len(r.seqs) != 65 || r.seqs[63] != 63 || r.seqs[64] != 100 {
		t.Fatalf("sink got %v", r.seqs)
	}
	if d := cmp.Diff([]ipcp.Event{ipcp.EventDown, ipcp.EventDealloc}, r.events); d != "" {
		t.Error(d)
	}
	if b.Drops() != 6 {
		t.Errorf("%d drops, want 6", b.Drops())
	}
}

func TestReplaceSink(t *testing.T) {
	var b Box
	var r1, r2 record
	b.SetSink(&r1)
	b.Deliver(batch(1, 1))
	b.SetSink(&r2)
	b.Deliver(batch(2, 1))
	if len(r1.seqs) != 1 || len(r2.seqs) != 1 {
		t.Errorf("first sink got %v, second %v", r1.seqs, r2.seqs)
	}
}

// What arrives, and who the sink is, may change while the queue is flushed.
func TestReentrantFlush(t *testing.T) {
	var b Box
	var r1, r2 record
	r1.hook = func() {
		b.Deliver(batch(10, 2))
		b.SetSink(&r2)
	}
	b.Deliver(batch(0, 3))
	b.SetSink(&r1)
	b.Deliver(batch(20, 1))
	if d := cmp.Diff([]uint32{0, 1, 2}, r1.seqs); d != "" {
		t.Error("first sink:", d)
	}
	if d := cmp.Diff([]uint32{10, 11, 20}, r2.seqs); d != "" {
		t.Error("second sink:", d)
	}
}

func TestClose(t *testing.T) {
	var b Box
	b.Deliver(batch(0, 5))
	if first, second := b.Close(), b.Close(); !first || !second {
		t.Fatal("close of an idle box had to wait")
	}
	var r record
	b.SetSink(&r)
	b.Deliver(batch(5, 5))
	b.Event(ipcp.EventDown)
	if len(r.seqs)+len(r.events) != 0 {
		t.Errorf("closed box delivered %v %v", r.seqs, r.events)
	}
	if b.Drops() != 10 || !b.Closed() {
		t.Errorf("drops %d, closed %v", b.Drops(), b.Closed())
	}
}

// Close waits for the call that runs and stops the following ones.
func TestCloseIsABarrier(t *testing.T) {
	var b Box
	var r record
	entered, leave := make(chan struct{}), make(chan struct{})
	r.hook = func() { close(entered); <-leave }
	b.SetSink(&r)
	go b.Deliver(batch(0, 1))
	<-entered
	done := make(chan bool)
	go func() { done <- b.Close() }()
	select {
	case <-done:
		t.Fatal("closed while the sink ran")
	case <-time.After(5 * time.Millisecond):
	}
	close(leave)
	if !<-done {
		t.Error("close gave up")
	}
	b.Deliver(batch(1, 1))
	if len(r.seqs) != 1 {
		t.Errorf("sink got %v", r.seqs)
	}
}

// A close from the sink itself is a mistake that must not hang the layer.
func TestCloseFromSink(t *testing.T) {
	var b Box
	var r record
	clean := true
	r.hook = func() { clean = b.Close() }
	b.SetSink(&r)
	b.Deliver(batch(0, 1))
	if clean {
		t.Error("close from the sink reported a clean end")
	}
}

// Whatever the interleaving of delivery and SetSink, nothing is reordered,
// doubled or (below the limit) lost.
func TestOrder(t *testing.T) {
	for range 200 {
		var b Box
		var r record
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := range uint32(50) {
				b.Deliver(batch(i, 1))
			}
		})
		wg.Go(func() { b.SetSink(&r); b.SetSink(&r) })
		wg.Wait()
		if len(r.seqs) != 50 {
			t.Fatalf("%d of 50 packets", len(r.seqs))
		}
		for i, s := range r.seqs {
			if s != uint32(i) {
				t.Fatalf("order %v", r.seqs)
			}
		}
	}
}

// Every packet ends in exactly one place: sink or drop counter.
func TestConservation(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var b Box
		var r record
		sent := uint32(0)
		t.Repeat(map[string]func(*rapid.T){
			"deliver": func(t *rapid.T) {
				n := rapid.Uint32Range(0, 70).Draw(t, "n")
				b.Deliver(batch(sent, n))
				sent += n
			},
			"sink":  func(*rapid.T) { b.SetSink(&r) },
			"event": func(*rapid.T) { b.Event(ipcp.EventUp) },
			"close": func(t *rapid.T) {
				if rapid.IntRange(0, 9).Draw(t, "dice") == 0 {
					b.Close()
				}
			},
			"": func(t *rapid.T) {
				b.mu.Lock()
				waiting := len(b.queue)
				b.mu.Unlock()
				if got := uint64(len(r.seqs)+waiting) + b.Drops(); got != uint64(sent) {
					t.Fatalf("%d packets sent, %d accounted for", sent, got)
				}
			},
		})
	})
}

func BenchmarkDeliver(b *testing.B) {
	var box Box
	box.SetSink(sinkNothing{})
	pkts := batch(0, 32)
	b.ReportAllocs()
	for b.Loop() {
		box.Deliver(pkts)
	}
}

type sinkNothing struct{}

func (sinkNothing) Receive([]*packet.Buf) {}
func (sinkNothing) FlowEvent(ipcp.Event)  {}
