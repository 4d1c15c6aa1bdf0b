package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// accepting waits until count accepts wait for flows to a name.
func (n *network) accepting(host, name string, count int) {
	n.t.Helper()
	eventually(n.t, 3*time.Second, func() error {
		var r ipc.ListResult
		if err := n.call(host, ipc.OpList, ipc.ListArgs{What: "names", Prefix: name}, &r); err != nil {
			return err
		}
		for _, i := range r.Names {
			if i.Name == name && i.Accepting == count {
				return nil
			}
		}
		return fmt.Errorf("want %d accepting: %+v", count, r.Names)
	})
}

// who allocates a flow and tells which server answers.
func (n *network) who(c *o7s.Client, name string) string {
	n.t.Helper()
	f := n.alloc(c, name)
	defer f.Close()
	got, err := ask(f, "?")
	if err != nil {
		n.t.Fatal(err)
	}
	return strings.TrimSuffix(got, "?")
}

// TestBalancing has two processes of one program serve a name.
func TestBalancing(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	c := n.client("h1", "client")
	for _, lb := range []string{"round-robin", "spillover"} {
		n.must("h3", ipc.OpNameCreate, ipc.NameArgs{Name: lb, LB: lb})
		n.must("h3", ipc.OpBind, ipc.BindArgs{Name: lb, Prog: peerPath()})
		n.must("h3", ipc.OpNameRegister, ipc.RegisterArgs{Name: lb, Layers: []string{"uni"}})
		n.create(lb, "h1")
	}
	n.start("h3", "echo", "A").expect(5*time.Second, "ready")
	n.start("h3", "echo", "B").expect(5*time.Second, "ready")
	const flows = 8
	for lb, turns := range map[string]bool{"round-robin": true, "spillover": false} {
		n.accepting("h3", lb, 2)
		last := n.who(c, lb)
		for range flows {
			n.accepting("h3", lb, 2) // the process of the last flow accepts again
			who := n.who(c, lb)
			if (who != last) != turns {
				t.Errorf("%s: flow to %s after one to %s", lb, who, last)
			}
			last = who
		}
	}
}

// TestBindAtRunTime binds and unbinds programs and processes while they run.
func TestBindAtRunTime(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	c := n.client("h1", "client")
	a, b := n.start("h3", "echo", "A"), n.start("h3", "echo", "B")
	a.expect(5*time.Second, "ready")
	b.expect(5*time.Second, "ready")
	n.must("h3", ipc.OpNameRegister, ipc.RegisterArgs{Name: "svc", Layers: []string{"uni"}})
	n.create("svc", "h1")
	// The processes have announced themselves by now, so a binding of their
	// program comes too late for them (spec 45 §3); those of processes do not.
	n.refused(c, "svc", 3*time.Second, o7serr.ENAME)
	bind := func(op ipc.Op, p *program) {
		t.Helper()
		pid := int32(p.cmd.Process.Pid)
		eventually(t, 2*time.Second, func() error { return n.call("h3", op, ipc.BindArgs{Name: "svc", PID: pid}, nil) })
	}
	bind(ipc.OpBind, a)
	if who := n.who(c, "svc"); who != "A" {
		t.Errorf("%q answers, want A", who)
	}
	bind(ipc.OpBind, b)
	bind(ipc.OpUnbind, a)
	for range 3 {
		if who := n.who(c, "svc"); who != "B" {
			t.Errorf("%q answers, want B", who)
		}
	}
	bind(ipc.OpUnbind, b)
	n.refused(c, "svc", 3*time.Second, o7serr.ENAME)

	// A program that is bound serves with all processes that start later.
	n.must("h3", ipc.OpBind, ipc.BindArgs{Name: "svc", Prog: peerPath()})
	d := n.start("h3", "echo", "D")
	d.expect(5*time.Second, "ready")
	if who := n.who(c, "svc"); who != "D" {
		t.Errorf("%q answers, want D", who)
	}
	// Two names, one process: N to M.
	n.must("h3", ipc.OpBind, ipc.BindArgs{Name: "svc2", PID: int32(d.cmd.Process.Pid)})
	n.must("h3", ipc.OpNameRegister, ipc.RegisterArgs{Name: "svc2", Layers: []string{"uni"}})
	n.create("svc2", "h1")
	if who := n.who(c, "svc2"); who != "D" {
		t.Errorf("%q answers to svc2, want D", who)
	}

	// Unregistered, the name still leads here from where the directory has it
	// copied (spec 43 §8.4), and is served as long as somebody accepts; then the
	// answer is clear and comes at once.
	f := n.alloc(c, "svc")
	n.must("h3", ipc.OpNameUnregister, ipc.RegisterArgs{Name: "svc", Layers: []string{"uni"}})
	n.must("h3", ipc.OpNameDestroy, ipc.NameArgs{Name: "svc"})
	fastest := time.Minute
	for range 3 {
		fastest = min(fastest, n.refused(c, "svc", time.Second, o7serr.EIPCP, o7serr.ENAME))
	}
	if fastest > slack*200*time.Millisecond {
		t.Errorf("a name that is gone was refused after %v at best", fastest)
	}
	if got, err := ask(f, "?"); err != nil || got != "D?" { // flows that exist go on
		t.Errorf("answer %q: %v", got, err)
	}
	// Destroyed: as if it had never been.
	n.must("h3", ipc.OpNameDestroy, ipc.NameArgs{Name: "svc2"})
	n.refused(c, "svc2", 2*time.Second, o7serr.EIPCP, o7serr.ENAME)
	n.must("h1", ipc.OpNameDestroy, ipc.NameArgs{Name: "svc2"})
	n.refused(c, "svc2", 500*time.Millisecond, o7serr.ENAME)
}

// TestAutoStart has programs started by the flows that arrive.
func TestAutoStart(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	n.must("h3", ipc.OpBind, ipc.BindArgs{Name: "auto", Prog: peerPath(), Auto: true, Args: []string{"echo", "auto"}})
	n.must("h3", ipc.OpNameRegister, ipc.RegisterArgs{Name: "auto", Layers: []string{"uni"}})
	n.create("auto", "h1")
	c := n.client("h1", "client")
	began := time.Now()
	if who := n.who(c, "auto"); who != "auto" {
		t.Errorf("%q answers", who)
	}
	if took := time.Since(began); took > slack*2*time.Second {
		t.Errorf("the first flow took %v", took)
	}
	for range 3 { // and stays
		if who := n.who(c, "auto"); who != "auto" {
			t.Errorf("%q answers", who)
		}
	}
	// A program that ends at once is an error, not a wait for ever.
	script := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	n.must("h3", ipc.OpBind, ipc.BindArgs{Name: "broken", Prog: script, Auto: true})
	n.must("h3", ipc.OpNameRegister, ipc.RegisterArgs{Name: "broken", Layers: []string{"uni"}})
	n.create("broken", "h1")
	n.refused(c, "broken", 3*time.Second, o7serr.ENAME)
}

// TestRefusals asks for what there is not.
func TestRefusals(t *testing.T) {
	t.Parallel()
	n := up(t, topology(t, "line3", false))
	n.serve("h3", "echo", "uni")
	n.create("echo", "h1")
	c := n.client("h1", "client")
	n.refused(c, "nobody.created.this", 500*time.Millisecond, o7serr.ENAME)
	n.create("nowhere", "h1")
	// In a layer that was made a moment ago, names may still be on their way.
	n.refused(c, "nowhere", 1500*time.Millisecond, o7serr.EIPCP)
	fastest := time.Minute // the machine may be busy
	for range 3 {
		fastest = min(fastest, n.refused(c, "nowhere", time.Second, o7serr.EIPCP))
	}
	if fastest > slack*300*time.Millisecond {
		t.Errorf("an unknown name was refused after %v at best", fastest)
	}
	// Registered, but nobody accepts.
	n.must("h3", ipc.OpNameRegister, ipc.RegisterArgs{Name: "idle", Layers: []string{"uni"}})
	n.create("idle", "h1")
	n.refused(c, "idle", 3*time.Second, o7serr.ENAME)

	for _, q := range []qos.Spec{qos.BestEffort, qos.Data, qos.Voice, qos.Video} {
		f, err := c.Alloc(t.Context(), "echo", &q)
		if err != nil {
			t.Errorf("qos %+v: %v", q, err)
			continue
		}
		_ = f.SetReadDeadline(time.Now().Add(slack * 5 * time.Second))
		buf := make([]byte, 64)
		_, werr := f.Write([]byte("ordered"))
		if k, err := f.Read(buf); err != nil || werr != nil || string(buf[:k]) != "ordered" {
			t.Errorf("qos %+v: echo of %q: %v, %v", q, buf[:k], werr, err)
		}
		_ = f.Close()
	}
	if f, err := c.Join(t.Context(), "uni"); err == nil || !strings.Contains(err.Error(), "broadcast") {
		t.Errorf("join: flow %v: %v", f, err)
	}
	for want, a := range map[int32]ipc.AllocArgs{
		-1008: {Name: "echo", QoS: qos.Raw, Encrypt: true},
		-1009: {Name: "echo", QoS: qos.Raw, Auth: true},
	} {
		if err := n.call("h1", ipc.OpAlloc, a, nil); o7serr.Code(err) != want {
			t.Errorf("%+v: %v, want %d", a, err, want)
		}
	}
	// An explicit time-out.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if f, err := c.Accept(ctx); o7serr.Code(err) != o7serr.ETIMEDOUT.Code() {
		t.Errorf("accept without a name: flow %v: %v", f, err)
	}
	pingPong(t, n.alloc(c, "echo"), 10)
}
