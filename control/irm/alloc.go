package irm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/o7s/o7s-router/control/irm/registry"
	"github.com/o7s/o7s-router/control/oap"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/ipcp/local"
	"github.com/o7s/o7s-router/ipcp/ordered"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

const (
	// allocTimeout is the default limit of an allocation (spec 47 §4.1).
	allocTimeout = 20 * time.Second
	// queryTimeout is how long a layer may look for a name (spec 45 §5.1). In an
	// Ethernet layer that does not know the name it always takes that long.
	queryTimeout = 200 * time.Millisecond
	// lookupTimeout is the same for a layer with a directory. That says no as
	// soon as it is certain, so only a layer that is still forming, or that lost
	// a message, takes longer than a round trip.
	lookupTimeout = time.Second
	// directMPL is the packet lifetime of flows without a layer, ms (spec 45 §5.1).
	directMPL = 1
	// maxArriving bounds how many requests from layers wait at the same time.
	maxArriving = 1024
)

// otherError counts, in statistics, for every error number beyond those that are
// defined (spec 33 §2): a peer may refuse with any.
const otherError = -1010

// errNobody is what a seeker gets when nobody accepts.
var errNobody = fail(o7serr.ENAME, "nobody accepts flows for the name")

// errDefaultTimeout ends an allocation that did not name a time-out.
var errDefaultTimeout = fail(o7serr.EPERM, "no answer to the flow request within the default time-out")

// requester is who allocates a flow: a process, or an IPC process.
type requester struct {
	session *session
	member  *process
}

func (q requester) seeker() int32 {
	if q.member != nil {
		return q.member.id
	}
	return 0
}

func (q requester) String() string {
	if q.member != nil {
		return "ipcp " + q.member.name
	}
	return fmt.Sprintf("process %d", q.session.pid)
}

// end is one end of a flow that was just made.
type end struct {
	flow   ipcp.Flow
	slot   *slot   // shared by the processes at both ends; nil: packets go through flow
	share  *shared // that it is in
	side   int     // of share
	direct bool
}

// discard releases an end that nobody takes.
func (e end) discard() {
	_ = e.flow.Close()
	if e.slot != nil {
		e.slot.done()
	}
}

// between gives the ends of a flow between two processes their rings.
func (m *IRM) between(a, b *session, mine, theirs *end) error {
	if b == nil {
		return errNobody // it left
	}
	x, err := m.pairShare(a, b)
	if err != nil {
		return err
	}
	s, err := x.take(2)
	if err != nil {
		return err
	}
	mine.slot, theirs.slot = s, s
	mine.share, theirs.share = x, x
	if mine.side = 0; x.sides[0] != a {
		mine.side = 1
	}
	theirs.side = 1 - mine.side
	return nil
}

// acceptor is the process that is to get a flow, nil if it left.
func (m *IRM) acceptor(to registry.Acceptor) *session {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sessions[to.Client]
}

// memberFlow gives a flow of an IPC process the end-to-end functions of its
// QoS, which a program's flow has in the program. Flows within the machine
// need none. It owns f, also on error.
func memberFlow(f ipcp.Flow, direct bool) (ipcp.Flow, error) {
	if direct || !ordered.Needed(f.Info()) {
		return f, nil
	}
	return ordered.Wrap(f)
}

// alloc serves OpAlloc of a process.
func (m *IRM) alloc(ctx context.Context, s *session, a ipc.AllocArgs) (g *grant, err error) {
	begin := time.Now()
	defer func() {
		if err == nil {
			m.stats.latency.add(time.Since(begin))
			m.stats.allocOK.Add(1)
			return
		}
		m.stats.allocFailed.Add(1)
		n, _ := m.stats.allocErrors.LoadOrStore(max(o7serr.Code(err), otherError), new(counter))
		n.(*counter).Add(1)
	}()
	if err := registry.CheckName("name", a.Name); err != nil {
		return nil, err
	}
	if a.Encrypt {
		return nil, fail(o7serr.ECRYPT, "encryption is not available yet")
	}
	if a.Auth {
		return nil, fail(o7serr.EAUTH, "authentication is not available yet")
	}
	limit, cause := m.cfg.AllocTimeout, error(errDefaultTimeout)
	switch {
	case a.TimeoutMS < 0:
		return nil, fail(o7serr.EINVAL, "time-out %d ms is negative", a.TimeoutMS)
	case a.TimeoutMS > 0:
		limit = time.Duration(min(a.TimeoutMS, maxTimeoutMS)) * time.Millisecond
		cause = fail(o7serr.ETIMEDOUT, "no answer to the flow request within %v", limit)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, cause)
	defer cancel()

	id, err := m.newFlow(s, registry.FlowAllocPending, a.Name, a.QoS)
	if err != nil {
		return nil, err
	}
	e, err := m.connect(ctx, requester{session: s}, a.Name, a.QoS)
	if err == nil {
		g, err = m.attach(s, id, e, a.Name)
	}
	if err != nil {
		m.freeFlow(id)
		if ctx.Err() != nil && !errors.Is(err, errShutdown) {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	return g, nil
}

// maxTimeoutMS keeps time-outs representable: a month.
const maxTimeoutMS = 31 * 24 * 3600 * 1000

// AllocFlow allocates an N-1 flow for an IPC process.
func (m *IRM) AllocFlow(ctx context.Context, l ipcp.Layer, name string, q qos.Spec) (ipcp.Flow, error) {
	p, err := m.find(l.Name())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, m.cfg.AllocTimeout, errDefaultTimeout)
	defer cancel()
	e, err := m.connect(ctx, requester{member: p}, name, q)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	return memberFlow(e.flow, e.direct)
}

// connect makes a flow to name: to somebody on this machine, else over the
// first layer that knows the name.
func (m *IRM) connect(ctx context.Context, q requester, name string, spec qos.Spec) (end, error) {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return end{}, errShutdown
	}
	m.wg.Add(1)
	defer m.wg.Done()
	exists := m.reg.HasName(name)
	m.mu.Unlock()
	if !exists {
		return end{}, unknownName(name)
	}
	if !m.cfg.NoDirect {
		switch to, err := m.seek(ctx, registry.Request{Name: name, Seeker: q.seeker()}); {
		case err == nil:
			return m.direct(q, to, name, spec)
		case err != errNobody:
			return end{}, err
		}
	}
	p, err := m.reach(ctx, q, name)
	if err != nil {
		return end{}, err
	}
	return m.overLayer(ctx, q, p, name, spec)
}

// direct connects q with an acceptor on this machine. The exchange between
// client and server roles is run as if there was a layer (spec 32, oddity 10).
func (m *IRM) direct(q requester, to registry.Acceptor, name string, spec qos.Spec) (end, error) {
	client, err := oap.NewClient(time.Now(), rand.Reader, nil)
	if err != nil {
		m.giveBack(to)
		return end{}, err
	}
	response, err := m.serverOAP(client.Request())
	if err == nil {
		_, err = client.Complete(response)
	}
	if err != nil {
		m.stats.oapFailed.Add(1)
		m.giveBack(to)
		return end{}, err
	}
	a, b := local.NewPair(ipcp.FlowInfo{
		QoS: spec, MPL: directMPL, MTU: directMTU, Local: q.String(), Remote: m.describe(to),
	})
	mine, theirs := end{flow: a, direct: true}, end{flow: b, direct: true}
	if to.Member != 0 {
		if err := m.handOver(to.Member, b, name); err != nil {
			_ = a.Close()
			return end{}, err
		}
		return mine, nil
	}
	if q.session != nil {
		if err := m.between(q.session, m.acceptor(to), &mine, &theirs); err != nil {
			_ = a.Close()
			m.giveBack(to)
			return end{}, err
		}
	}
	if err := m.deliver(to, theirs, name); err != nil {
		mine.discard()
		return end{}, err
	}
	return mine, nil
}

func (m *IRM) serverOAP(request []byte) ([]byte, error) {
	m.oapMu.Lock()
	r, err := m.server.Receive(time.Now(), request)
	m.oapMu.Unlock()
	if err != nil {
		return nil, err
	}
	return r.Respond(time.Now(), nil)
}

func (m *IRM) describe(a registry.Acceptor) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if a.Member != 0 {
		for _, p := range m.ipcps {
			if p.id == a.Member {
				return "ipcp " + p.name
			}
		}
	} else if s := m.sessions[a.Client]; s != nil {
		return fmt.Sprintf("process %d", s.pid)
	}
	return ""
}

// handOver gives an N-1 flow to the IPC process that is bound to name.
func (m *IRM) handOver(id int32, f ipcp.Flow, name string) error {
	m.mu.Lock()
	var member ipcp.Member
	for _, p := range m.ipcps {
		if p.id == id {
			member, _ = p.layer.(ipcp.Member)
		}
	}
	m.mu.Unlock()
	if member == nil {
		_ = f.Close()
		return errNobody
	}
	member.AcceptFlow(f, name)
	return nil
}

// reach returns an IPC process whose layer knows name, of the most preferred
// type that has one. All are asked at the same time, so that a name that no
// layer knows fails as fast as the slowest directory is certain. Among layers
// of one type the first that answers wins: an Ethernet layer in which nobody
// knows the name can only stay silent.
func (m *IRM) reach(ctx context.Context, q requester, name string) (*process, error) {
	type answer struct {
		p   *process
		typ ipcp.Type
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var types []ipcp.Type // of those asked, in the order of preference
	pending := map[ipcp.Type]int{}
	known := map[ipcp.Type]*process{}
	list := m.processes()
	answers := make(chan answer, len(list))
	for _, p := range list {
		l := m.layerOf(p)
		if p == q.member || l.Type() == ipcp.Broadcast || l.State() != ipcp.StateOperational {
			continue
		}
		a := answer{p: p, typ: l.Type()}
		if pending[a.typ]++; pending[a.typ] == 1 {
			types = append(types, a.typ)
		}
		key := registry.Hash(l.HashAlg(), name)
		m.wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, queryLimit(a.typ))
			defer cancel()
			a.err = l.Query(ctx, key)
			answers <- a
		})
	}
	for {
		// Types without anybody left to answer have no say any more.
		for len(types) > 0 && known[types[0]] == nil && pending[types[0]] == 0 {
			types = types[1:]
		}
		if len(types) == 0 {
			return nil, fail(o7serr.EIPCP, "no layer can reach the name %q", name)
		}
		if p := known[types[0]]; p != nil {
			return p, nil
		}
		// Query ends with ctx, so this does.
		a := <-answers
		pending[a.typ]--
		if a.err == nil && known[a.typ] == nil {
			known[a.typ] = a.p
		}
	}
}

func queryLimit(t ipcp.Type) time.Duration {
	if t == ipcp.Unicast {
		return lookupTimeout
	}
	return queryTimeout
}

// origin is an allocation of a process over a local layer that waits for its
// answer. An acceptor that is a process, too, leaves its end of the rings here.
type origin struct {
	session *session
	end     end // without flow; guarded by IRM.originMu
}

// overLayer allocates a flow over the layer of p, with OAP.
func (m *IRM) overLayer(ctx context.Context, q requester, p *process, name string, spec qos.Spec) (end, error) {
	l := m.layerOf(p)
	client, err := oap.NewClient(time.Now(), rand.Reader, nil)
	if err != nil {
		return end{}, err
	}
	var o *origin
	if q.session != nil && l.Type() == ipcp.Local {
		id := oapID(client.Request())
		o = &origin{session: q.session}
		m.originMu.Lock()
		m.origins[id] = o
		m.originMu.Unlock()
		defer func() {
			m.originMu.Lock()
			delete(m.origins, id)
			m.originMu.Unlock()
		}()
	}
	var mu sync.Mutex // guards last
	last := client
	f, response, err := l.Alloc(ctx, ipcp.AllocRequest{
		Hash: registry.Hash(l.HashAlg(), name), QoS: spec, Data: client.Request(),
		Renew: func() []byte {
			c, err := oap.NewClient(time.Now(), rand.Reader, nil)
			if err != nil {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			last = c
			return c.Request()
		},
	})
	var e end
	if o != nil {
		m.originMu.Lock()
		e, o.end = o.end, end{}
		m.originMu.Unlock()
	}
	e.flow = f
	if err != nil {
		if e.slot != nil {
			e.slot.done()
		}
		return end{}, err
	}
	mu.Lock()
	client = last
	mu.Unlock()
	if _, err := client.Complete(response); err != nil {
		m.stats.oapFailed.Add(1)
		m.log.Warn("flow reply refused", "name", name, "layer", l.LayerName(), "err", err)
		e.discard()
		return end{}, err
	}
	return e, nil
}

// FlowArrived takes a request from a layer.
func (m *IRM) FlowArrived(l ipcp.Layer, in ipcp.Incoming) {
	m.mu.Lock()
	if m.closed { // the layer is left next, which answers
		m.mu.Unlock()
		return
	}
	ok := m.arriving < maxArriving
	if ok {
		m.arriving++
	}
	m.wg.Add(1)
	m.mu.Unlock()
	if !ok {
		go func() {
			defer m.wg.Done()
			in.Refuse(o7serr.EAGAIN.Code())
		}()
		return
	}
	go func() {
		defer m.wg.Done()
		m.arrived(l, in)
		m.mu.Lock()
		m.arriving--
		m.mu.Unlock()
	}()
}

func (m *IRM) arrived(l ipcp.Layer, in ipcp.Incoming) {
	refuse := func(name string, err error) {
		m.stats.refused.Add(1)
		m.log.Debug("flow request refused", "ipcp", l.Name(), "layer", l.LayerName(), "name", name, "err", err)
		in.Refuse(o7serr.Code(err))
	}
	m.mu.Lock()
	name, ok := m.reg.NameByHash(l.HashAlg(), in.Hash())
	m.mu.Unlock()
	if !ok {
		refuse("", fail(o7serr.ENAME, "no name here has the hash %x", in.Hash()))
		return
	}
	// The exchange comes first: a request that is stale or repeated must not
	// disturb a process that accepts.
	request := in.Data()
	response, err := m.serverOAP(request)
	if err != nil {
		m.stats.oapFailed.Add(1)
		refuse(name, err)
		return
	}
	var seeker int32
	if p, err := m.find(l.Name()); err == nil {
		seeker = p.id
	}
	to, err := m.seek(m.ctx, registry.Request{Name: name, Seeker: seeker, Remote: true})
	if err != nil {
		refuse(name, err)
		return
	}
	var e end
	var o *origin
	if to.Member == 0 && l.Type() == ipcp.Local {
		m.originMu.Lock()
		if o = m.origins[oapID(request)]; o != nil {
			err = m.between(o.session, m.acceptor(to), &o.end, &e)
		}
		m.originMu.Unlock()
	}
	if err != nil {
		m.giveBack(to)
		refuse(name, err)
		return
	}
	f, err := in.Accept(response)
	if err != nil {
		// The requester gave up; whoever accepts waits for the next one.
		m.log.Debug("flow request ended before it was accepted", "ipcp", l.Name(), "name", name, "err", err)
		if o != nil {
			m.originMu.Lock()
			if o.end.slot != nil { // the requester never takes it
				o.end.slot.done()
				o.end = end{}
			}
			m.originMu.Unlock()
			e.slot.done()
		}
		m.giveBack(to)
		return
	}
	e.flow = f
	if to.Member != 0 {
		if f, err = memberFlow(f, false); err == nil {
			err = m.handOver(to.Member, f, name)
		}
	} else {
		err = m.deliver(to, e, name)
	}
	if err != nil {
		m.log.Debug("accepted flow was lost", "ipcp", l.Name(), "name", name, "err", err)
	}
}

// pendingAccept is an accept of a process that waits for a flow.
type pendingAccept struct {
	key     uint64
	session *session
	flow    uint32
	result  chan accepted // has room for the one result
	expired bool          // nobody wants it back in the queue; guarded by IRM.mu
}

type accepted struct {
	grant *grant
	err   error
}

// accept serves OpAccept of a process.
func (m *IRM) accept(ctx context.Context, s *session, a ipc.AcceptArgs) (*grant, error) {
	var expire <-chan time.Time
	if a.TimeoutMS > 0 {
		t := time.NewTimer(time.Duration(min(a.TimeoutMS, maxTimeoutMS)) * time.Millisecond)
		defer t.Stop()
		expire = t.C
	} else if a.TimeoutMS < 0 {
		now := make(chan time.Time)
		close(now)
		expire = now
	}
	id, err := m.newFlow(s, registry.FlowAcceptPending, "", qos.Spec{})
	if err != nil {
		return nil, err
	}
	p := &pendingAccept{session: s, flow: id, result: make(chan accepted, 1)}
	m.mu.Lock()
	p.key = m.key()
	m.accepts[p.key] = p
	err = m.reg.Accept(s.key, p.key)
	m.unlock()
	var r accepted
	if err != nil {
		r.err = err
	} else {
		r = m.awaitAccept(ctx, p, expire)
	}
	m.mu.Lock()
	delete(m.accepts, p.key)
	m.mu.Unlock()
	if r.err != nil {
		m.stats.acceptFailed.Add(1)
		m.freeFlow(id)
		return nil, r.err
	}
	m.stats.acceptOK.Add(1)
	return r.grant, nil
}

func (m *IRM) awaitAccept(ctx context.Context, p *pendingAccept, expire <-chan time.Time) accepted {
	var err error
	select {
	case r := <-p.result:
		return r
	case <-expire:
		err = fail(o7serr.ETIMEDOUT, "no flow arrived in time")
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	m.mu.Lock()
	p.expired = true
	withdrawn := m.reg.CancelAccept(p.key)
	m.unlock()
	if withdrawn {
		return accepted{err: err}
	}
	// Somebody took it at this moment and delivers, or gives it back.
	r := <-p.result
	if errors.Is(r.err, errNobody) {
		r.err = err
	}
	return r
}

// deliver gives e to the accept that was taken, which always gets a result.
func (m *IRM) deliver(to registry.Acceptor, e end, name string) error {
	m.mu.Lock()
	p := m.accepts[to.Accept]
	m.mu.Unlock()
	if p == nil { // cannot be: who is taken waits for its result
		e.discard()
		return errNobody
	}
	g, err := m.attach(p.session, p.flow, e, name)
	p.result <- accepted{g, err}
	return err
}

// giveBack returns an acceptor that was taken in vain.
func (m *IRM) giveBack(to registry.Acceptor) {
	if to.Member != 0 {
		return
	}
	m.mu.Lock()
	defer m.unlock()
	p := m.accepts[to.Accept]
	if p == nil {
		return
	}
	if !p.expired && m.reg.Accept(to.Client, to.Accept) == nil {
		return
	}
	p.result <- accepted{err: errNobody}
}
