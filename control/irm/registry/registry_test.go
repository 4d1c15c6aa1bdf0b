package registry

import (
	"encoding/hex"
	"errors"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
)

var epoch = time.Unix(1_700_000_000, 0)

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// The hashes of spec 45 §2.
func TestHash(t *testing.T) {
	want := map[ipcp.HashAlg]string{
		ipcp.SHA3_224: "e098ae7fb0190561dffca699eccb4dcf605f900ee2fe18c71b5efee7",
		ipcp.SHA3_256: "42dee3b0415b4f690fd91cbd99876f1e9bd8d9745ef7fa32b142773af0349d54",
		ipcp.SHA3_384: "f4bc2e52efd45603cca0ec4354a721c800d6249f1605b709ed4c8a173345ffb0a0813ce0e5bb1c2671c6490481bfaee0",
		ipcp.SHA3_512: "154543ae811fc58c39527179b48c4c2cf0ba817b3d785a49e878584514eeeffd19e861cbcd22d07488f1c713ae63e697eaa3b3ddfc43cb2078b0f9e1ed42511f",
	}
	r := New()
	must(t, r.CreateName("oping", RoundRobin))
	for alg, hash := range want {
		h := Hash(alg, "oping")
		if got := hex.EncodeToString(h); got != hash {
			t.Errorf("%s: %s", HashName(alg), got)
		}
		if n, ok := r.NameByHash(alg, h); !ok || n != "oping" {
			t.Errorf("%s: reverse lookup gives %q %v", HashName(alg), n, ok)
		}
		if back, err := ParseHash(HashName(alg)); err != nil || back != alg {
			t.Errorf("%s: parsed as %v, %v", HashName(alg), back, err)
		}
	}
	if _, err := r.DestroyName("oping"); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.NameByHash(ipcp.SHA3_256, Hash(ipcp.SHA3_256, "oping")); ok {
		t.Error("a destroyed name is still found")
	}
}

// serve announces a process that serves n, and lets it accept with keys.
func serve(t *testing.T, r *Registry, client uint64, pid int32, n string, keys ...uint64) {
	t.Helper()
	must(t, r.Announce(client, pid, 0, 0, "prog", nil), r.BindProcess(pid, n))
	for _, k := range keys {
		must(t, r.Accept(client, k))
	}
}

func found(t *testing.T, r *Registry, q Request) Acceptor {
	t.Helper()
	a, err := r.Seek(epoch, q)
	if err != nil || a.Verdict != Found {
		t.Fatalf("verdict %d, %v", a.Verdict, err)
	}
	return a.Acceptor
}

func TestLoadBalancing(t *testing.T) {
	for _, tc := range []struct {
		lb   LB
		want []uint64
	}{
		{RoundRobin, []uint64{11, 21, 12}},
		{Spillover, []uint64{12, 21, 11}},
	} {
		r := New()
		must(t, r.CreateName("n", tc.lb))
		serve(t, r, 1, 100, "n", 11)
		serve(t, r, 2, 200, "n", 21)
		must(t, r.Accept(1, 12))
		var got []uint64
		for range 3 {
			got = append(got, found(t, r, Request{Name: "n"}).Accept)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: served %v, want %v", tc.lb, got, tc.want)
		}
	}
}

func TestMembers(t *testing.T) {
	r := New()
	must(t, r.CreateName("net", RoundRobin))
	for id := int32(1); id <= 3; id++ {
		r.AddMember(id, string(rune('a'+id)))
		must(t, r.BindMember(id, "net"))
	}
	r.SetReady(1, true)
	r.SetReady(2, true) // 3 is not a member of a layer
	var got []int32
	for range 4 {
		got = append(got, found(t, r, Request{Name: "net"}).Member)
	}
	if !slices.Equal(got, []int32{1, 2, 1, 2}) {
		t.Errorf("served %v", got)
	}
	for range 3 {
		if a := found(t, r, Request{Name: "net", Seeker: 1}); a.Member != 2 {
			t.Errorf("ipcp 1 was connected to %d", a.Member)
		}
	}
	r.RemoveMember(2)
	if a, _ := r.Seek(epoch, Request{Name: "net", Seeker: 1}); a.Verdict != Nobody {
		t.Errorf("verdict %d without another member", a.Verdict)
	}
}

// A remote name does not wait; a bound process is waited for; a program is
// started once for all who wait.
func TestWaiting(t *testing.T) {
	r := New()
	must(t, r.CreateName("n", RoundRobin))
	seek := func(now time.Time, q Request) Answer {
		t.Helper()
		a, err := r.Seek(now, q)
		must(t, err)
		return a
	}
	q := Request{Name: "n"}
	if a := seek(epoch, q); a.Verdict != Nobody {
		t.Fatalf("nothing bound: verdict %d", a.Verdict)
	}
	if _, err := r.Seek(epoch, Request{Name: "x"}); !errors.Is(err, o7serr.ENAME) {
		t.Fatalf("unknown name: %v", err)
	}

	must(t, r.BindProgram("/bin/srv", nil, false, "n"))
	if a := seek(epoch, q); a.Verdict != Nobody {
		t.Errorf("program without auto: verdict %d", a.Verdict)
	}
	if a := seek(epoch, Request{Name: "n", Remote: true}); a.Verdict != Waiting {
		t.Errorf("program without auto, remote: verdict %d", a.Verdict)
	}
	must(t, r.BindProgram("/bin/auto", []string{"-l"}, true, "n"))
	first, second := seek(epoch, q), seek(epoch.Add(time.Millisecond), q)
	if first.Verdict != Waiting || second.Verdict != Waiting {
		t.Fatalf("verdicts %d %d", first.Verdict, second.Verdict)
	}
	out := r.Take()
	if len(out) != 1 || out[0].Verdict != Start || out[0].Exec.Path != "/bin/auto" || !slices.Equal(out[0].Exec.Args, []string{"-l"}) {
		t.Fatalf("answers %+v", out)
	}
	// It announces itself and accepts: the name of its program binds it.
	must(t, r.Announce(1, 100, 0, 0, "/usr/bin/auto", nil), r.Accept(1, 11))
	out = r.Take()
	if len(out) != 1 || out[0].Verdict != Found || out[0].Acceptor.Accept != 11 {
		t.Fatalf("answers %+v", out)
	}
	// The process is busy now: the others wait a second, then one more starts.
	at, ok := r.Deadline()
	if !ok || at.After(epoch.Add(2*AcceptWait)) {
		t.Fatalf("deadline %v", at.Sub(epoch))
	}
	r.Leave(1)
	r.Expire(epoch.Add(3 * AcceptWait))
	if n := r.Counts(); n.Waiting > 1 { // the remote one may have started a program
		t.Errorf("%d wait", n.Waiting)
	}
	r.Expire(epoch.Add(5 * AcceptWait))
	if n := r.Counts(); n.Waiting != 0 {
		t.Errorf("%d wait for ever", n.Waiting)
	}
	for _, a := range r.Take() {
		if a.Verdict == Found {
			t.Errorf("answer %+v", a)
		}
	}
}

func TestStartFails(t *testing.T) {
	r := New()
	must(t, r.BindProgram("/bin/auto", nil, true, "n"))
	a, err := r.Seek(epoch, Request{Name: "n"})
	must(t, err)
	r.Ended("n")
	out := r.Take()
	if len(out) != 2 || out[1].Verdict != Nobody || out[1].Ticket != a.Ticket {
		t.Errorf("answers %+v", out)
	}
}

func TestBindRunning(t *testing.T) {
	r := New()
	serve(t, r, 1, 100, "a", 11)
	must(t, r.BindProcess(100, "b"))
	if a := found(t, r, Request{Name: "b"}); a.Accept != 11 {
		t.Errorf("accept %d", a.Accept)
	}
	if n := r.Names("a")[0]; n.Accepting != 0 {
		t.Errorf("%d accepting for a name whose acceptor was taken by another", n.Accepting)
	}
	must(t, r.Accept(1, 12), r.UnbindProcess(100, "b"))
	if a, _ := r.Seek(epoch, Request{Name: "b"}); a.Verdict != Nobody {
		t.Errorf("verdict %d after unbind", a.Verdict)
	}
	if err := r.BindProcess(4711, "a"); !errors.Is(err, o7serr.EINVAL) {
		t.Errorf("bind of an unknown process: %v", err)
	}
}

func TestFlowIDs(t *testing.T) {
	r := New()
	for i := uint32(1); i <= MaxFlow; i++ {
		if id, err := r.New(Flow{}); err != nil || id != i {
			t.Fatalf("id %d, %v, want %d", id, err, i)
		}
	}
	if _, err := r.New(Flow{}); !errors.Is(err, o7serr.EAGAIN) {
		t.Errorf("one too many: %v", err)
	}
	must(t, r.Move(77, FlowNull, nil), r.Move(5, FlowNull, nil))
	if id, err := r.New(Flow{}); err != nil || id != 5 {
		t.Errorf("id %d, %v", id, err)
	}
	if err := r.Move(5, FlowAllocated, nil); !errors.Is(err, o7serr.EINVAL) {
		t.Errorf("init to allocated: %v", err)
	}
	must(t, r.Move(5, FlowAllocPending, nil), r.Move(5, FlowAllocated, nil),
		r.Move(5, FlowDeallocPending, nil), r.Move(5, FlowDeallocated, nil), r.Move(5, FlowNull, nil))
	if err := r.Move(5, FlowNull, nil); !errors.Is(err, o7serr.ENOTALLOC) {
		t.Errorf("freed twice: %v", err)
	}
	if n := len(r.Flows.All()); n != r.Len() || n != MaxFlow-2 {
		t.Errorf("%d flows", n)
	}
}

// Every request gets exactly one answer, every accept serves at most one
// request, nobody serves a name it is not bound to, and nothing is left when
// everybody leaves.
func TestProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := New()
		now := epoch
		names := []string{"a", "b", "c"}
		open := map[uint64]string{}            // tickets without an answer: their name
		accepts := map[uint64]uint64{}         // pending accepts: their process
		bound := map[string]map[int32]bool{}   // name -> pids
		clients := map[uint64]int32{}          // process -> pid
		members := map[int32]map[string]bool{} // ipcp -> names
		var serial uint64
		for _, n := range names {
			bound[n] = map[int32]bool{}
			if err := r.CreateName(n, LB(rapid.IntRange(0, 1).Draw(t, "lb"))); err != nil {
				t.Fatal(err)
			}
		}
		served := func(n string, seeker int32, a Acceptor) {
			if a.Member != 0 {
				if !members[a.Member][n] || a.Member == seeker {
					t.Fatalf("ipcp %d serves %s for %d", a.Member, n, seeker)
				}
				return
			}
			c, ok := accepts[a.Accept]
			if !ok || c != a.Client || !bound[n][clients[c]] {
				t.Fatalf("accept %d serves %s", a.Accept, n)
			}
			delete(accepts, a.Accept)
		}
		take := func() {
			for _, a := range r.Take() {
				switch a.Verdict {
				case Start:
					if _, ok := open[a.Ticket]; !ok {
						t.Fatalf("start for ticket %d, which is answered", a.Ticket)
					}
				case Found, Nobody:
					n, ok := open[a.Ticket]
					if !ok {
						t.Fatalf("second answer to ticket %d", a.Ticket)
					}
					delete(open, a.Ticket)
					if a.Verdict == Found {
						served(n, 0, a.Acceptor)
					}
				default:
					t.Fatalf("answer %+v", a)
				}
			}
		}
		name := func() string { return rapid.SampledFrom(names).Draw(t, "name") }
		client := func() (uint64, bool) {
			if len(clients) == 0 {
				return 0, false
			}
			keys := make([]uint64, 0, len(clients))
			for k := range clients {
				keys = append(keys, k)
			}
			slices.Sort(keys)
			return rapid.SampledFrom(keys).Draw(t, "client"), true
		}
		t.Repeat(map[string]func(*rapid.T){
			"announce": func(*rapid.T) {
				serial++
				pid := rapid.Int32Range(1, 4).Draw(t, "pid")
				prog := rapid.SampledFrom([]string{"p", "q"}).Draw(t, "prog")
				if err := r.Announce(serial, pid, 0, 0, prog, nil); err != nil {
					t.Fatal(err)
				}
				clients[serial] = pid
				for _, n := range names {
					if slices.Contains(r.Names(n)[0].Programs, prog) {
						bound[n][pid] = true
					}
				}
			},
			"leave": func(*rapid.T) {
				c, ok := client()
				if !ok {
					return
				}
				pid := clients[c]
				delete(clients, c)
				for k, owner := range accepts {
					if owner == c {
						delete(accepts, k)
					}
				}
				last := true
				for _, p := range clients {
					last = last && p != pid
				}
				if last {
					for _, n := range names {
						delete(bound[n], pid)
					}
				}
				r.Leave(c)
			},
			"accept": func(*rapid.T) {
				if c, ok := client(); ok {
					serial++
					accepts[serial] = c
					if err := r.Accept(c, serial); err != nil {
						t.Fatal(err)
					}
				}
			},
			"cancel": func(*rapid.T) {
				for k := range accepts {
					if !r.CancelAccept(k) {
						t.Fatalf("accept %d is not pending", k)
					}
					delete(accepts, k)
					break
				}
			},
			"bind process": func(*rapid.T) {
				if c, ok := client(); ok {
					n := name()
					was := bound[n][clients[c]]
					bound[n][clients[c]] = true
					if err := r.BindProcess(clients[c], n); (err != nil) != was {
						t.Fatal(err)
					}
				}
			},
			"unbind process": func(*rapid.T) {
				if c, ok := client(); ok {
					n := name()
					was := bound[n][clients[c]]
					delete(bound[n], clients[c])
					if err := r.UnbindProcess(clients[c], n); (err == nil) != was {
						t.Fatal(err)
					}
				}
			},
			"bind program": func(*rapid.T) {
				prog := rapid.SampledFrom([]string{"/p", "/q"}).Draw(t, "path")
				_ = r.BindProgram(prog, nil, rapid.Bool().Draw(t, "auto"), name())
			},
			"unbind program": func(*rapid.T) { _ = r.UnbindProgram("p", name()) },
			"member": func(*rapid.T) {
				id := rapid.Int32Range(1, 3).Draw(t, "id")
				if members[id] == nil {
					members[id] = map[string]bool{}
					r.AddMember(id, "ipcp")
				}
				n := name()
				if !members[id][n] {
					members[id][n] = true
					if err := r.BindMember(id, n); err != nil {
						t.Fatal(err)
					}
				}
				r.SetReady(id, rapid.Bool().Draw(t, "ready"))
			},
			"remove member": func(*rapid.T) {
				id := rapid.Int32Range(1, 3).Draw(t, "id")
				delete(members, id)
				r.RemoveMember(id)
			},
			"seek": func(*rapid.T) {
				q := Request{Name: name(), Remote: rapid.Bool().Draw(t, "remote")}
				a, err := r.Seek(now, q)
				if err != nil {
					t.Fatal(err)
				}
				switch a.Verdict {
				case Found:
					served(q.Name, 0, a.Acceptor)
				case Waiting:
					open[a.Ticket] = q.Name
				}
			},
			"abandon": func(*rapid.T) {
				for k := range open {
					r.Abandon(k)
					delete(open, k)
					break
				}
			},
			"ended": func(*rapid.T) { r.Ended(name()) },
			"time": func(*rapid.T) {
				now = now.Add(time.Duration(rapid.IntRange(0, 1500).Draw(t, "ms")) * time.Millisecond)
				r.Expire(now)
			},
			"": func(*rapid.T) {
				take()
				if len(open) != r.Counts().Waiting || len(accepts) != r.Counts().Accepting {
					t.Fatalf("%+v, want %d waiting, %d accepting", r.Counts(), len(open), len(accepts))
				}
				if at, ok := r.Deadline(); ok != (len(open) > 0) || ok && at.After(now.Add(2*AcceptWait)) {
					t.Fatalf("deadline in %v with %d waiting", at.Sub(now), len(open))
				}
			},
		})
		for c := range clients {
			r.Leave(c)
		}
		clear(accepts)
		r.Expire(now.Add(2 * AcceptWait))
		r.Expire(now.Add(4 * AcceptWait))
		take()
		for _, n := range names {
			if _, err := r.DestroyName(n); err != nil {
				t.Fatal(err)
			}
		}
		if n := r.Counts(); n != (Counts{}) || len(open) != 0 {
			t.Fatalf("left: %+v, %d without an answer", n, len(open))
		}
	})
}
