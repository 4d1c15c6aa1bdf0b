package unicast

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/o7s/o7s-router/ipcp"
)

// adjacencies returns those of l, and fails unless there is one for management
// and one for data transfer, both up.
func (w *world) adjacencies(l *Layer) []ipcp.Neighbor {
	w.t.Helper()
	list := l.Neighbors()
	if len(list) != 2 || list[0].State != "up" || list[1].State != "up" {
		w.t.Errorf("adjacencies of %s: %+v, want two that are up", l.Name(), list)
	}
	return list
}

// A neighbour is killed and comes back as a new member, and says nothing of it.
// Whoever had made the adjacency finds out soon after it has sent something.
func TestNeighbourStartsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b")
		w.echo("a")
		old, b := w.members["a"], w.members["b"]
		w.must(old.Register(nameHash("svc")))
		time.Sleep(time.Second)
		f, c := w.dial("b", "svc")
		if !ping(f, c, "before") {
			t.Fatal("no echo")
		}
		was := w.adjacencies(b)[0].Address

		w.cut("a", "b", false, true) // the old flows are dead, without a word
		anew := w.member("a")
		w.must(anew.Enroll(t.Context(), "b"))
		for range 10 * doubtPackets {
			ping(f, c, "into the void")
			time.Sleep(2 * doubtAfter / (10 * doubtPackets))
		}
		time.Sleep(2 * doubtAfter)
		for _, n := range w.adjacencies(b) {
			if n.Address == was || n.Address != anew.addr.Load() {
				t.Errorf("adjacency with %x, which was %x and is %x", n.Address, was, anew.addr.Load())
			}
		}
		if r := b.Routes(); len(r) != 1 {
			t.Errorf("routes: %+v", r)
		}
		f.Close()
		end()
		w.must(old.Close())
		time.Sleep(time.Second)
	})
}

// A neighbour that answers nothing, because it has nothing to say, keeps its
// adjacency however much is sent to it.
func TestQuietNeighbour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b")
		a, b := w.members["a"], w.members["b"]
		got := new(collector)
		w.mu.Lock()
		w.apps["a"] = func(in ipcp.Incoming) {
			f, err := in.Accept([]byte("reply to " + string(in.Data())))
			if err != nil {
				t.Errorf("accept: %v", err)
				return
			}
			f.SetSink(got)
		}
		w.mu.Unlock()
		w.must(a.Register(nameHash("sink")))
		time.Sleep(time.Second)
		f, c := w.dial("b", "sink")
		first := dtConn(b)
		const sent = 3000
		for range sent {
			ping(f, c, "one way")
			time.Sleep(100 * time.Millisecond)
		}
		w.adjacencies(a)
		w.adjacencies(b)
		if now := dtConn(b); now != first {
			t.Error("the adjacency was replaced although the neighbour lives")
		}
		if pkts, _ := got.take(); len(pkts) != sent {
			t.Errorf("%d of %d packets arrived", len(pkts), sent)
		}
		w.mu.Lock()
		tries := len(w.ends[pairKey("a", "b")]) - 2
		w.mu.Unlock()
		if tries < 1 || tries > sent/10/30+2 {
			t.Errorf("%d tries to make it again in %d s", tries, sent/10)
		}
		f.Close()
		end()
	})
}

// A path that is dead for what was there, and works for what is new: the
// adjacency moves long before the peer time-out.
func TestSilentPath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.line(ipcp.LinkState, "a", "b")
		w.echo("a")
		w.must(w.members["a"].Register(nameHash("svc")))
		time.Sleep(time.Second)
		f, c := w.dial("b", "svc")
		if !ping(f, c, "before") {
			t.Fatal("no echo")
		}
		w.cut("a", "b", false, true)
		begin := time.Now()
		for !ping(f, c, "again") {
			if time.Since(begin) > time.Minute {
				t.Fatalf("no echo after %v: %+v", time.Since(begin), w.members["b"].Neighbors())
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Logf("after %v", time.Since(begin))
		f.Close()
		end()
	})
}
