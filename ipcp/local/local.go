// Package local is the layer of one machine (spec 12): it connects programs
// and IPC processes of this daemon, and has no wire format. It improves on the
// reference where the specification suggests so: a refusal reaches the
// requester, and the release of one end the other end, at once.
package local

import (
	"context"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// MPL is the maximum packet lifetime that flows of the layer announce, in ms
// (spec 12 §1).
const MPL = 100

// MaxFlows is the number of flows of one layer, with two endpoints each
// (spec 12 §6).
const MaxFlows = 2016

// IPCP is the only member of its layer.
type IPCP struct {
	name string
	host ipcp.Host
	log  *slog.Logger

	mu      sync.Mutex // guards what follows; never held during upcalls
	state   ipcp.State
	layer   string
	alg     ipcp.HashAlg
	hashes  map[string]struct{}
	pending map[*incoming]struct{}
	flows   map[*pair]struct{}
	count   counters
}

type counters struct{ requests, accepted, refused, abandoned, unknown, limit uint64 }

var (
	_ ipcp.Layer   = (*IPCP)(nil)
	_ ipcp.Counter = (*IPCP)(nil)
)

// New returns an IPC process that waits for Bootstrap.
func New(name string, host ipcp.Host, log *slog.Logger) *IPCP {
	return &IPCP{
		name: name, host: host, log: log.With("ipcp", name),
		state:   ipcp.StateBoot,
		hashes:  map[string]struct{}{},
		pending: map[*incoming]struct{}{},
		flows:   map[*pair]struct{}{},
	}
}

// Type returns ipcp.Local.
func (l *IPCP) Type() ipcp.Type { return ipcp.Local }

// Name is the name of the IPC process.
func (l *IPCP) Name() string { return l.name }

// LayerName is the name of the layer, "" before Bootstrap.
func (l *IPCP) LayerName() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.layer
}

// State is where the IPC process is in its life.
func (l *IPCP) State() ipcp.State {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state
}

// HashAlg is the directory hash of the layer.
func (l *IPCP) HashAlg() ipcp.HashAlg {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.alg
}

// Bootstrap makes the layer; only its name and hash are configured.
func (l *IPCP) Bootstrap(_ context.Context, cfg ipcp.Config) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state != ipcp.StateBoot {
		return o7serr.Wrap(o7serr.EIPCPSTATE, "bootstrap %s: state is %s", l.name, l.state)
	}
	if cfg.Type != ipcp.Local {
		return o7serr.Wrap(o7serr.EIPCPTYPE, "bootstrap %s: configuration is for %s, expected local", l.name, cfg.Type)
	}
	l.layer, l.alg, l.state = cfg.LayerName, cfg.Hash, ipcp.StateOperational
	return nil
}

func (l *IPCP) operational(what string) error {
	if l.state != ipcp.StateOperational {
		return o7serr.Wrap(o7serr.EIPCPSTATE, "%s: %s is in state %s", what, l.name, l.state)
	}
	return nil
}

// Register adds a service; a second time changes nothing.
func (l *IPCP) Register(hash []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.operational("register"); err != nil {
		return err
	}
	l.hashes[string(hash)] = struct{}{}
	return nil
}

// Unregister removes a service; established flows stay.
func (l *IPCP) Unregister(hash []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.operational("unregister"); err != nil {
		return err
	}
	delete(l.hashes, string(hash))
	return nil
}

// Query tells at once whether the service is registered.
func (l *IPCP) Query(_ context.Context, hash []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.operational("query"); err != nil {
		return err
	}
	return l.known(hash)
}

func (l *IPCP) known(hash []byte) error {
	if _, ok := l.hashes[string(hash)]; !ok {
		return o7serr.Wrap(o7serr.ENAME, "hash %.4x is not registered in layer %s", hash, l.layer)
	}
	return nil
}

// Alloc announces the request to the resource manager and waits for its answer.
func (l *IPCP) Alloc(ctx context.Context, req ipcp.AllocRequest) (ipcp.Flow, []byte, error) {
	in, err := l.announce(req)
	if err != nil {
		return nil, nil, err
	}
	l.host.FlowArrived(l, in)
	select {
	case <-in.done:
	case <-ctx.Done():
		err := context.Cause(ctx)
		if ctx.Err() == context.DeadlineExceeded {
			err = o7serr.Wrap(o7serr.ETIMEDOUT, "nobody accepted in layer %s", l.LayerName())
		}
		in.settle(answer{err: err}, func() { l.count.abandoned++ })
		<-in.done // an answer that came first counts
	}
	if in.ans.flow == nil {
		return nil, nil, in.ans.err
	}
	return in.ans.flow, in.ans.data, nil
}

func (l *IPCP) announce(req ipcp.AllocRequest) (*incoming, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.operational("flow allocation"); err != nil {
		return nil, err
	}
	l.count.requests++
	if err := l.known(req.Hash); err != nil {
		l.count.unknown++
		return nil, err
	}
	if len(l.flows)+len(l.pending) >= MaxFlows {
		l.count.limit++
		return nil, o7serr.Wrap(o7serr.EAGAIN, "layer %s has %d flows", l.layer, MaxFlows)
	}
	in := &incoming{layer: l, req: req, done: make(chan struct{})}
	l.pending[in] = struct{}{}
	return in, nil
}

// Close ends all flows of the layer; their users get EventDealloc.
func (l *IPCP) Close() error {
	l.mu.Lock()
	l.state = ipcp.StateShutdown
	pending := slices.Collect(maps.Keys(l.pending))
	clear(l.hashes)
	l.mu.Unlock()
	for _, in := range pending {
		in.settle(answer{err: o7serr.Wrap(o7serr.EIPCPSTATE, "layer %s was left", l.layer)}, func() {})
	}
	// Only now: a request that was answered meanwhile became a flow.
	l.mu.Lock()
	flows := slices.Collect(maps.Keys(l.flows))
	clear(l.flows)
	l.mu.Unlock()
	for _, p := range flows {
		for _, f := range p.ends {
			f.dealloc()
		}
	}
	return nil
}

// Counters tells what happened to flow requests.
func (l *IPCP) Counters() iter.Seq2[string, uint64] {
	l.mu.Lock()
	c, open := l.count, len(l.flows)
	l.mu.Unlock()
	return func(yield func(string, uint64) bool) {
		_ = yield("flows", uint64(open)) &&
			yield("flow_requests", c.requests) &&
			yield("flow_requests_accepted", c.accepted) &&
			yield("flow_requests_refused", c.refused) &&
			yield("flow_requests_abandoned", c.abandoned) &&
			yield("unknown_hash_dropped", c.unknown) &&
			yield("flow_limit_dropped", c.limit)
	}
}

// incoming is a request between its announcement and its answer.
type incoming struct {
	layer *IPCP
	req   ipcp.AllocRequest
	done  chan struct{} // closed with the answer
	ans   answer        // written before done is closed
	taken bool          // answered; guarded by layer.mu
}

type answer struct {
	flow *Flow // the requester's end
	data []byte
	err  error
}

func (in *incoming) QoS() qos.Spec { return in.req.QoS }
func (in *incoming) Hash() []byte  { return in.req.Hash }
func (in *incoming) Data() []byte  { return in.req.Data }

// settle gives the request its answer, unless it has one. locked runs with the
// layer's lock held.
func (in *incoming) settle(a answer, locked func()) bool {
	l := in.layer
	l.mu.Lock()
	if in.taken {
		l.mu.Unlock()
		return false
	}
	in.taken = true
	delete(l.pending, in)
	locked()
	l.mu.Unlock()
	in.ans = a
	close(in.done)
	return true
}

// Accept pairs the two ends and wakes the requester.
func (in *incoming) Accept(data []byte) (ipcp.Flow, error) {
	l := in.layer
	var p *pair
	theirs, mine := newPair(ipcp.FlowInfo{
		Layer: l.LayerName(), IPCP: l.name, Type: ipcp.Local, QoS: in.req.QoS, MPL: MPL,
		Local: "requester", Remote: "acceptor",
	}, func() {
		l.mu.Lock()
		delete(l.flows, p)
		l.mu.Unlock()
	})
	p = mine.pair
	if !in.settle(answer{flow: theirs, data: data}, func() {
		l.count.accepted++
		l.flows[p] = struct{}{}
	}) {
		return nil, o7serr.Wrap(o7serr.ETIMEDOUT, "the requester gave up")
	}
	return mine, nil
}

// Refuse fails the request with code.
func (in *incoming) Refuse(code int32) {
	if code >= 0 {
		code = o7serr.EIPCP.Code()
	}
	err := o7serr.Wrap(o7serr.Errno(-code), "refused in layer %s", in.layer.LayerName())
	in.settle(answer{err: err}, func() { in.layer.count.refused++ })
}
