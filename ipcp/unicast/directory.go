package unicast

import (
	"context"
	crand "crypto/rand"
	"math/rand/v2"
	"time"

	"github.com/o7s/o7s-router/control/dht"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/wire"
)

// newDirectory makes the member's part of the directory.
func (l *Layer) newDirectory(cfg ipcp.Config, addr uint64, now time.Time) (*dht.Node, error) {
	var seed [32]byte
	crand.Read(seed[:])
	u := cfg.Unicast
	return dht.New(dht.Config{
		Self: addr, Peer: u.Peer, AddrSize: int(u.AddrSize), KeyLen: wire.HashLen(uint8(cfg.Hash)),
		Alpha: int(u.DHTAlpha), K: int(u.DHTK),
		Expire:    time.Duration(u.DHTExpire) * time.Second,
		Refresh:   time.Duration(u.DHTRefresh) * time.Second,
		Replicate: time.Duration(u.DHTRep) * time.Second,
		Rand:      rand.New(rand.NewChaCha8(seed)),
		Reachable: func(a uint64) bool { _, ok := l.reach[a]; return ok },
	}, now)
}

// stepDirectory sends what the directory has to say and answers queries.
func (l *Layer) stepDirectory(now time.Time) time.Time {
	l.asked = false
	l.dir.Tick(now)
	for _, m := range l.dir.Messages() {
		l.dt.sendComponent(m.Dst, wire.DirectoryEID, m.Payload)
	}
	for _, r := range l.dir.Results() {
		if answer := l.queries[r.ID]; answer != nil {
			delete(l.queries, r.ID)
			answer(now, r.Addrs)
		}
	}
	return l.dir.NextDeadline()
}

// query asks the directory; answer is called in the loop. Called in the loop.
func (l *Layer) query(now time.Time, hash []byte, answer func(now time.Time, addrs []uint64)) {
	l.queries[l.dir.Query(now, hash)] = answer
	l.asked = true
}

// Register publishes a name at this member.
func (l *Layer) Register(hash []byte) error {
	return l.inLoop(func(now time.Time) error { return l.dir.Register(now, hash) })
}

// Unregister stops publishing a name.
func (l *Layer) Unregister(hash []byte) error {
	return l.inLoop(func(now time.Time) error { return l.dir.Unregister(now, hash) })
}

// inLoop runs f in the loop of an operational IPC process.
func (l *Layer) inLoop(f func(now time.Time) error) error {
	err := o7serr.Wrap(o7serr.EIPCPSTATE, "ipcp %q is not a member of a layer", l.name)
	if l.State() != ipcp.StateOperational {
		return err
	}
	l.loop.call(func(now time.Time) { err = f(now) })
	return err
}

// After routes have changed, members are still getting to know each other and
// publish their names to new neighbours: for so long an unknown name is asked
// for again, this often.
const (
	youngFor   = time.Second
	youngRetry = 40 * time.Millisecond
)

// Query reports whether another member serves the name.
func (l *Layer) Query(ctx context.Context, hash []byte) error {
	for {
		found, young, err := l.queryOnce(ctx, hash)
		switch {
		case err != nil:
			return err
		case found:
			return nil
		case !young:
			return o7serr.Wrap(o7serr.EIPCP, "name is not in the directory of layer %q", l.LayerName())
		}
		t := time.NewTimer(youngRetry)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		}
	}
}

func (l *Layer) queryOnce(ctx context.Context, hash []byte) (found, young bool, err error) {
	type answer struct{ found, young bool }
	res := make(chan answer, 1)
	if err := l.inLoop(func(now time.Time) error {
		l.query(now, hash, func(now time.Time, addrs []uint64) {
			res <- answer{len(addrs) > 0, now.Sub(l.changed) < youngFor}
		})
		return nil
	}); err != nil {
		return false, false, err
	}
	select {
	case a := <-res:
		return a.found, a.young, nil
	case <-ctx.Done():
		return false, false, ctx.Err()
	case <-l.ctx.Done():
		return false, false, o7serr.EIPCPSTATE
	}
}
