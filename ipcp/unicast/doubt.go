package unicast

import (
	"context"
	"time"

	"github.com/o7s/o7s-router/ipcp"
)

// A neighbour that was killed, or whose machine was, says nothing, and if it is
// of the reference it does not say so either when it is back: the peer time-out
// of two minutes is all that specification 30 has. But whoever made an adjacency
// can make it again at any time. So when packets go out on a data-transfer
// adjacency and nothing comes back, its initiator tries that beside the old one:
// an answer from another address proves that the neighbour started anew. The same
// when its link-state updates stay out.

const (
	// doubtAfter is the silence that begins it. Traffic through a neighbour has
	// answers, be they acknowledgements, well before.
	doubtAfter = 3 * time.Second
	// doubtPackets must have been sent in the meantime: two idle ends hear from
	// each other once in 30 s only.
	doubtPackets = 4
	// doubtMax bounds the growth of the time between tries without an answer, as
	// powers of two.
	doubtMax = 1
	// doubtTry bounds one try.
	doubtTry = 3 * time.Second
)

// doubt is what an adjacency's initiator knows of its neighbour's silence.
type doubt struct {
	sentAtRx uint64    // packets sent when the neighbour was heard last
	look     time.Time // the next look at it
	tries    int       // since then
	trying   bool
}

// doubts looks whether the neighbour of c still answers, and returns when to
// look again; zero: not needed. Called in the loop, after lastRx was brought
// up to date.
func (l *Layer) doubts(now time.Time, c *conn, heard bool, sent uint64) time.Time {
	d := &c.doubt
	if c.dst == "" || c.comp != ipcp.DataTransfer || !c.up {
		d.sentAtRx = sent
		return time.Time{}
	}
	if heard {
		d.sentAtRx, d.tries, d.look = sent, 0, now.Add(doubtAfter)
	}
	if d.look.After(now) {
		return d.look
	}
	wait := doubtAfter << min(d.tries, doubtMax)
	d.look = now.Add(wait)
	if !d.trying && now.Sub(c.lastRx) >= doubtAfter && (sent-d.sentAtRx >= doubtPackets || l.silent(now, c.peer)) {
		d.trying = true
		d.tries++
		l.tryAgain(c)
	}
	return d.look
}

// silent reports that a neighbour has not announced its adjacencies when it
// should have (spec 42): who only receives from it notices it by that.
func (l *Layer) silent(now time.Time, peer uint64) bool {
	any := false
	for _, c := range l.conns {
		if c.comp == ipcp.Management && c.peer == peer {
			if now.Sub(c.lastRx) < l.updates+doubtAfter {
				return false
			}
			any = true
		}
	}
	return any
}

// tryAgain makes the adjacency c a second time.
func (l *Layer) tryAgain(c *conn) {
	key := intent{c.dst, c.comp}
	q := c.info.QoS
	l.wg.Add(1)
	go func() {
		defer l.wg.Done()
		ctx, cancel := context.WithTimeout(l.ctx, doubtTry)
		defer cancel()
		second, err := l.connect(ctx, key.dst, key.comp, q)
		l.loop.post(func(now time.Time) {
			c.doubt.trying = false
			if err == nil {
				l.settleDoubt(now, key, c, second)
			}
		})
	}()
}

// settleDoubt keeps one of two adjacencies.
func (l *Layer) settleDoubt(now time.Time, key intent, old, second *conn) {
	if second.gone {
		return
	}
	if _, want := l.wanted[key]; !want {
		l.remove(now, second)
		return
	}
	if old.gone {
		return
	}
	rx, _ := old.activity()
	// An end that lives sends a keep-alive each quarter of the time-out.
	limit := old.lastRx.Add(time.Duration(old.info.QoS.Timeout/4)*time.Millisecond + doubtAfter)
	switch {
	case second.peer != old.peer:
		l.log.Warn("neighbour started anew", "dst", key.dst, "old", addrText(old.peer), "new", addrText(second.peer))
		// What else there was with the former one is as dead.
		for _, c := range l.conns {
			if c != old && c.dst == key.dst && c.peer == old.peer {
				l.loop.post(func(now time.Time) { l.lost(now, c, "the neighbour started anew") })
			}
		}
		l.remove(now, old)
	case rx != old.lastRxCnt || now.Before(limit):
		// It lives, and may have nothing to say for now.
		old.doubt.look = limit
		l.remove(now, second)
	default:
		l.log.Warn("adjacency is silent; a new one takes its place", "dst", key.dst, "peer", addrText(old.peer))
		l.remove(now, old)
	}
}
