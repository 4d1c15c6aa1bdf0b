package dht

import (
	"slices"
	"testing"
	"time"
)

func TestLayerOfHundreds(t *testing.T) {
	const size = 200
	n := layer(t, 1, size, ours)
	before := n.sent
	for i := range size {
		n.do(address(i), func(p peer) { p.Register(n.now, nameKey(name(i))) })
	}
	n.run(3 * time.Second)
	t.Logf("%d members: %d messages to join, %d to register one name each", size, before, n.sent-before)
	before = n.sent
	var slowest time.Duration
	const queries = 500
	for range queries {
		who, what := n.rnd.IntN(size), n.rnd.IntN(size)
		if who == what {
			continue
		}
		got, took := n.query(address(who), nameKey(name(what)))
		if !slices.Contains(got, address(what)) {
			t.Fatalf("%d asked for name %d: %x", who, what, got)
		}
		slowest = max(slowest, took)
	}
	t.Logf("%.1f messages per query, slowest %v", float64(n.sent-before)/queries, slowest)
	if slowest > 50*time.Millisecond {
		t.Errorf("slowest query took %v at up to 2.2 ms one way", slowest)
	}
	before = n.sent
	got, took := n.query(address(7), nameKey("nosuch"))
	if len(got) != 0 || took > 100*time.Millisecond {
		t.Errorf("unknown name: %x after %v", got, took)
	}
	t.Logf("unknown name: %v, %d messages", took, n.sent-before)
	before = n.sent
	n.run(time.Hour)
	t.Logf("idle: %.2f messages per member and minute", float64(n.sent-before)/size/60)
	if per := float64(n.sent-before) / size / 60; per > 30 {
		t.Errorf("an idle member sends %.1f messages per minute", per)
	}
	for _, a := range n.order {
		d := n.node(a)
		if len(d.lookups)+len(d.storeq) > 40 || len(d.pending) > 200 {
			t.Fatalf("member %x holds %d lookups, %d requests, %d stores", a, len(d.lookups), len(d.pending), len(d.storeq))
		}
	}
}

func TestLossyLayer(t *testing.T) {
	const size = 60
	n := newNetwork(t, 2)
	n.loss = 0.1
	for i := range size {
		via := uint64(0)
		if i > 0 {
			via = address(n.rnd.IntN(i))
		}
		n.join(address(i), via)
		n.run(50 * time.Millisecond)
	}
	n.run(20 * time.Second)
	for i := range size {
		n.do(address(i), func(p peer) { p.Register(n.now, nameKey(name(i))) })
	}
	n.run(10 * time.Second)
	const queries = 400
	missed := 0
	for range queries {
		who, what := n.rnd.IntN(size), n.rnd.IntN(size)
		if who == what {
			continue
		}
		if got, _ := n.query(address(who), nameKey(name(what))); !slices.Contains(got, address(what)) {
			missed++
		}
	}
	if missed > queries/100 {
		t.Errorf("%d of %d queries missed at 10%% loss", missed, queries)
	}
}

// Members leave without a word and new ones come; names of those that stay
// remain known, and memory of the dead fades.
func TestChurn(t *testing.T) {
	const size = 100
	n := layer(t, 3, size, ours)
	for i := range 20 {
		n.do(address(i), func(p peer) { p.Register(n.now, nameKey(name(i))) })
	}
	n.run(time.Second)
	alive := make([]int, size)
	for i := range alive {
		alive[i] = i
	}
	next := size
	for range 40 {
		// The 20 registrants stay.
		v := 20 + n.rnd.IntN(len(alive)-20)
		n.crash(address(alive[v]))
		alive[v] = next
		n.join(address(next), address(alive[n.rnd.IntN(20)]))
		next++
		n.run(4 * time.Minute)
		who, what := alive[n.rnd.IntN(len(alive))], n.rnd.IntN(20)
		if who == what {
			continue
		}
		got, took := n.query(address(who), nameKey(name(what)))
		if !slices.Contains(got, address(what)) {
			t.Errorf("after %v: %d asked for %d: %x", n.now.Sub(epoch), who, what, got)
		}
		if took > time.Second {
			t.Errorf("query took %v", took)
		}
	}
	n.run(2 * time.Hour)
	for _, i := range alive {
		d := n.node(address(i))
		d.table.each(func(c *contact) {
			if n.peers[c.addr] == nil {
				t.Errorf("%d still knows %x, dead for two hours", i, c.addr)
			}
		})
	}
}

// With a routing table the dead are not asked at all.
func TestDeadRegistrantIsNoAnswer(t *testing.T) {
	n := newNetwork(t, 4)
	n.routed = func(from, to uint64) bool { return n.peers[to] != nil }
	n.join(address(0), 0)
	for i := 1; i < 6; i++ {
		n.join(address(i), address(0))
		n.run(100 * time.Millisecond)
	}
	for _, i := range []int{2, 3} {
		n.do(address(i), func(p peer) { p.Register(n.now, nameKey("both")) })
		n.run(100 * time.Millisecond)
	}
	n.crash(address(2))
	got, took := n.query(address(5), nameKey("both"))
	if !slices.Equal(got, []uint64{address(3)}) || took > 20*time.Millisecond {
		t.Errorf("got %x after %v", got, took)
	}
	n.crash(address(3))
	n.run(cacheTime)
	if got, took = n.query(address(5), nameKey("both")); len(got) != 0 || took > 20*time.Millisecond {
		t.Errorf("got %x after %v", got, took)
	}
}

func TestRegisterBeforeAnyRoute(t *testing.T) {
	n := newNetwork(t, 5)
	up := false
	n.routed = func(from, to uint64) bool { return up }
	a, b := address(0), address(1)
	n.join(a, 0)
	n.join(b, a)
	n.do(b, func(p peer) { p.Register(n.now, nameKey("early")) })
	if got, took := n.query(a, nameKey("early")); len(got) != 0 || took != 0 {
		t.Errorf("without contacts: %x after %v", got, took)
	}
	n.run(10 * time.Second)
	if n.sent != 0 {
		t.Errorf("%d messages without a route", n.sent)
	}
	up = true
	n.do(b, func(p peer) { p.(*Node).RouteUp(n.now, a) })
	n.run(20 * time.Millisecond)
	if e := n.node(a).Entries(n.now); len(e) != 1 || e[0].Addr != b || e[0].Kind != "stored" {
		t.Errorf("first contact was not told at once: %+v", e)
	}
	if got, took := n.query(a, nameKey("early")); !slices.Equal(got, []uint64{b}) || took != 0 {
		t.Errorf("got %x after %v", got, took)
	}
}

// Without hints about routes the request is repeated until somebody answers.
func TestBootstrapRetries(t *testing.T) {
	n := newNetwork(t, 6)
	b := address(1)
	n.join(b, address(0))
	n.run(40 * time.Second)
	if n.sent < 5 || n.sent > 12 {
		t.Errorf("%d requests in 40 s to a silent peer", n.sent)
	}
	n.join(address(0), 0)
	n.run(16 * time.Second)
	if n.node(b).Contacts() != 1 || n.node(address(0)).Contacts() != 1 {
		t.Error("not joined")
	}
}

// Two halves that lost each other long enough to forget find together again
// through routing, whoever enrolled whom.
func TestPartitionHeals(t *testing.T) {
	n := newNetwork(t, 7)
	split := false
	n.routed = func(from, to uint64) bool { return !split || from&1 == to&1 }
	var all []uint64
	for i := range 8 {
		via := uint64(0)
		if i > 0 {
			via = all[i-1]
		}
		all = append(all, uint64(100+i))
		n.join(all[i], via)
		n.run(100 * time.Millisecond)
	}
	n.do(all[0], func(p peer) { p.Register(n.now, nameKey("even")) })
	split = true
	n.run(3 * time.Hour)
	n.do(all[1], func(p peer) { p.Register(n.now, nameKey("odd")) })
	n.run(time.Minute)
	split = false
	for _, a := range all {
		n.do(a, func(p peer) { p.(*Node).RouteUp(n.now, all...) })
	}
	n.run(100 * time.Millisecond)
	for _, a := range all {
		if a != all[1] {
			if got, _ := n.query(a, nameKey("odd")); !slices.Contains(got, all[1]) {
				t.Errorf("%d does not find odd: %v", a, got)
			}
		}
		if a != all[0] {
			if got, _ := n.query(a, nameKey("even")); !slices.Contains(got, all[0]) {
				t.Errorf("%d does not find even: %v", a, got)
			}
		}
	}
}

func TestAddressChange(t *testing.T) {
	n := layer(t, 8, 12, ours)
	old, fresh := address(3), uint64(0x77777777)
	n.do(old, func(p peer) { p.Register(n.now, nameKey("mover")) })
	n.run(time.Second)
	d := n.node(old)
	n.crash(old)
	d.SetSelf(n.now, fresh)
	n.add(fresh, d)
	n.run(time.Second)
	for _, i := range []int{0, 5, 11} {
		got, _ := n.query(address(i), nameKey("mover"))
		if !slices.Contains(got, fresh) {
			t.Errorf("%d got %x", i, got)
		}
		// The old address is still known, and a caller that got no answer there says so.
		n.node(address(i)).Forget(n.now, nameKey("mover"), old)
		if got, _ = n.query(address(i), nameKey("mover")); len(got) == 0 || got[0] != fresh {
			t.Errorf("%d got %x after Forget", i, got)
		}
	}
	for _, a := range n.order {
		if p, ok := n.peers[a].(*Node); ok && a != fresh {
			if c := p.table.byAddr[old]; c != nil && !c.seen.IsZero() && p.table.byAddr[fresh] == nil {
				t.Errorf("%x does not know the new address", a)
			}
		}
	}
}

// Values move to members that join nearer to the key, so they survive when
// everybody who was there at registration is gone.
func TestValuesOutliveHolders(t *testing.T) {
	n := layer(t, 9, 20, ours)
	n.do(address(0), func(p peer) { p.Register(n.now, nameKey("keep")) })
	n.run(time.Second)
	for i := 20; i < 60; i++ {
		n.join(address(i), address(0))
		n.run(time.Second)
	}
	n.run(20 * time.Minute)
	for i := 0; i < 20; i++ {
		n.crash(address(i)) // the registrant too
	}
	found := 0
	for i := 20; i < 60; i++ {
		if got, _ := n.query(address(i), nameKey("keep")); slices.Contains(got, address(0)) {
			found++
		}
	}
	if found < 38 {
		t.Errorf("found by %d of 40", found)
	}
	n.run(25 * time.Hour)
	for i := 20; i < 60; i++ {
		if e := n.node(address(i)).Entries(n.now); len(e) != 0 {
			t.Fatalf("not expired at %d: %+v", i, e)
		}
	}
}

func TestSameInputSameOutput(t *testing.T) {
	run := func() (int, []byte) {
		var log []byte
		n := newNetwork(t, 10)
		n.loss = 0.05
		n.trace = func(from, to uint64, p []byte) { log = append(log, p...) }
		for i := range 30 {
			n.join(address(i), address(i/2)*uint64(min(i, 1)))
			n.do(address(i), func(p peer) { p.Register(n.now, nameKey(name(i))) })
			n.run(20 * time.Millisecond)
		}
		n.run(time.Hour)
		return n.sent, log
	}
	s1, l1 := run()
	s2, l2 := run()
	if s1 != s2 || !slices.Equal(l1, l2) {
		t.Errorf("%d and %d messages from the same seed", s1, s2)
	}
}
