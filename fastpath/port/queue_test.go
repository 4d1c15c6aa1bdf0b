package port

import (
	"encoding/binary"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/lib/packet"
)

func numbered(n uint32) *packet.Buf {
	b := packet.Get(64)
	binary.BigEndian.PutUint32(b.Bytes(), n)
	return b
}

func number(b *packet.Buf) uint32 { return binary.BigEndian.Uint32(b.Bytes()) }

func TestQueue(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := 1 << rapid.IntRange(1, 4).Draw(t, "log size")
		q := newQueue(size)
		var oracle []uint32
		next := uint32(0)
		t.Repeat(map[string]func(*rapid.T){
			"push": func(t *rapid.T) {
				if ok := q.push(numbered(next)); ok != (len(oracle) < size) {
					t.Fatalf("push %v with %d of %d", ok, len(oracle), size)
				} else if ok {
					oracle = append(oracle, next)
				}
				next++
			},
			"pop": func(t *rapid.T) {
				out := make([]*packet.Buf, rapid.IntRange(0, size+1).Draw(t, "n"))
				n := q.pop(out)
				if n != min(len(out), len(oracle)) {
					t.Fatalf("pop gave %d of %d", n, len(oracle))
				}
				for i, b := range out[:n] {
					if number(b) != oracle[i] {
						t.Fatalf("got %d, want %d", number(b), oracle[i])
					}
				}
				oracle = oracle[n:]
			},
			"": func(t *rapid.T) {
				if q.ready(q.head) != (len(oracle) > 0) {
					t.Fatalf("ready %v with %d", q.ready(q.head), len(oracle))
				}
			},
		})
	})
}

// device is a transmitter that takes a random number of frames and is busy at
// times.
type device struct {
	got    []uint32
	takes  []int // of each call; then everything
	errs   []error
	inside bool
}

func (d *device) transmit(frames []*packet.Buf, c *counters) (int, error) {
	if d.inside {
		panic("two transmit at once")
	}
	d.inside = true
	defer func() { d.inside = false }()
	n := len(frames)
	var err error
	if len(d.takes) > 0 {
		n, err = min(n, d.takes[0]), d.errs[0]
		d.takes, d.errs = d.takes[1:], d.errs[1:]
	}
	for _, b := range frames[:n] {
		d.got = append(d.got, number(b))
	}
	c.txFrames.Add(uint64(n))
	return n, err
}

func (d *device) unsent() bool { return false }

// A busy device delays frames and loses none.
func TestBusyDevice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := &device{}
		var c counters
		q := newTxq(d, &c)
		total := rapid.IntRange(1, 300).Draw(t, "frames")
		for range rapid.IntRange(0, 20).Draw(t, "busy calls") {
			d.takes = append(d.takes, rapid.IntRange(0, batchSize).Draw(t, "takes"))
			d.errs = append(d.errs, rapid.SampledFrom([]error{nil, unix.EAGAIN, unix.ENOBUFS}).Draw(t, "error"))
		}
		for n := range total {
			if !q.put(numbered(uint32(n))) {
				t.Fatal("full")
			}
			if rapid.IntRange(0, 3).Draw(t, "flush") == 0 {
				if _, err := q.flush(txRounds); err != nil {
					t.Fatal(err)
				}
			}
		}
		for {
			state, err := q.flush(1)
			if err != nil {
				t.Fatal(err)
			}
			if state == txIdle {
				break
			}
		}
		if len(d.got) != total || c.txDropped.Load() != 0 {
			t.Fatalf("%d of %d arrived", len(d.got), total)
		}
		for i, n := range d.got {
			if int(n) != i {
				t.Fatalf("frame %d at place %d", n, i)
			}
		}
	})
}

// An error that does not go away drops what waits, and says so.
func TestBrokenDevice(t *testing.T) {
	d := &device{takes: []int{2}, errs: []error{unix.ENETDOWN}}
	var c counters
	q := newTxq(d, &c)
	for n := range 5 {
		q.put(numbered(uint32(n)))
	}
	if state, err := q.flush(txRounds); state != txIdle || err != unix.ENETDOWN {
		t.Errorf("state %d, %v", state, err)
	}
	if c.txDropped.Load() != 3 || c.txErrors.Load() != 1 {
		t.Errorf("dropped %d, errors %d", c.txDropped.Load(), c.txErrors.Load())
	}
}

// Frames of competing senders are all sent, whoever does it, without anybody
// else's help.
func TestCompetingSenders(t *testing.T) {
	const senders, each = 8, 2000
	d := &device{}
	var c counters
	q := newTxq(d, &c)
	var wg sync.WaitGroup
	for s := range senders {
		wg.Go(func() {
			for n := range each {
				b := numbered(uint32(s<<16 | n))
				for !q.put(b) {
					q.flush(0)
				}
				q.flush(0)
			}
		})
	}
	wg.Wait()
	if len(d.got) != senders*each {
		t.Fatalf("%d of %d sent", len(d.got), senders*each)
	}
	var next [senders]uint32
	for _, n := range d.got {
		if n&0xffff != next[n>>16] {
			t.Fatalf("sender %d: frame %d, want %d", n>>16, n&0xffff, next[n>>16])
		}
		next[n>>16]++
	}
}
