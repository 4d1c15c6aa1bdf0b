package irm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/o7s/o7s-router/control/irm/registry"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// Limits of management operations (spec 47 §4.1).
const (
	bootstrapTimeout = 5 * time.Second
	enrollTimeout    = 20 * time.Second
	connectTimeout   = 20 * time.Second
)

// process is an IPC process of this daemon.
type process struct {
	id   int32 // plays the part of the reference's pid
	name string
	op   sync.Mutex // one management operation at a time; comes before IRM.mu
	// ctx ends when the process is to be destroyed, and with it operations under
	// way.
	ctx    context.Context
	cancel context.CancelFunc

	layer ipcp.Layer // guarded by IRM.mu
}

// begin starts a management operation on p, which ends with p. end must be
// called.
func (p *process) begin(ctx context.Context, what string) (_ context.Context, end func(), err error) {
	p.op.Lock()
	if p.ctx.Err() != nil {
		p.op.Unlock()
		return nil, nil, fail(o7serr.EIPCP, "%s ipcp %q: it is being destroyed", what, p.name)
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(p.ctx, cancel)
	return ctx, func() {
		stop()
		cancel()
		p.op.Unlock()
	}, nil
}

func (m *IRM) layerOf(p *process) ipcp.Layer {
	m.mu.Lock()
	defer m.mu.Unlock()
	return p.layer
}

// find returns the IPC process called name.
func (m *IRM) find(name string) (*process, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p, ok := m.ipcps[name]; ok {
		return p, nil
	}
	if err := registry.CheckName("ipcp name", name); err != nil {
		return nil, err
	}
	return nil, fail(o7serr.EIPCP, "unknown ipcp %q (%s)", name, known("ipcps", m.ipcpNames()))
}

func known(what string, names []string) string {
	if len(names) == 0 {
		return "there are no " + what
	}
	return "known " + what + ": " + strings.Join(names, ", ")
}

// ipcpNames needs mu.
func (m *IRM) ipcpNames() []string {
	var out []string
	for n := range m.ipcps {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// processes returns all IPC processes in the order of preference (spec 45
// §5.1): by type, then by id.
func (m *IRM) processes() []*process {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*process, 0, len(m.ipcps))
	for _, p := range m.ipcps {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b *process) int {
		return cmp.Or(cmp.Compare(a.layer.Type(), b.layer.Type()), cmp.Compare(a.id, b.id))
	})
	return out
}

func (m *IRM) newLayer(t ipcp.Type, name string) (ipcp.Layer, error) {
	f, ok := m.cfg.Factories[t]
	if !ok {
		var have []string
		for t := range m.cfg.Factories {
			have = append(have, t.String())
		}
		slices.Sort(have)
		return nil, fail(o7serr.EIPCPTYPE, "ipcp type %s is not available yet (available: %s)", t, strings.Join(have, ", "))
	}
	return f(name, m, m.log)
}

// CreateIPCP creates an IPC process.
func (m *IRM) CreateIPCP(name, typ string) error {
	t, err := ParseType(typ)
	if err != nil {
		return err
	}
	_, err = m.createIPCP(name, t)
	return err
}

func (m *IRM) createIPCP(name string, t ipcp.Type) (*process, error) {
	if err := registry.CheckName("ipcp name", name); err != nil {
		return nil, err
	}
	m.mu.Lock()
	_, exists := m.ipcps[name]
	m.mu.Unlock()
	if exists {
		return nil, fail(o7serr.EINVAL, "ipcp %q exists already", name)
	}
	l, err := m.newLayer(t, name)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	if _, ok := m.ipcps[name]; ok || m.closed {
		closed := m.closed
		m.mu.Unlock()
		_ = l.Close()
		if closed {
			return nil, errShutdown
		}
		return nil, fail(o7serr.EINVAL, "ipcp %q exists already", name)
	}
	m.lastIPCP++
	p := &process{id: m.lastIPCP, name: name, layer: l}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	m.ipcps[name] = p
	m.reg.AddMember(p.id, name)
	m.mu.Unlock()
	if t != ipcp.Local {
		m.apps.refill() // programs may want a device soon
	}
	m.log.Info("created ipcp", "ipcp", name, "type", t.String(), "id", p.id)
	return p, nil
}

// findOrCreate returns the IPC process called name, which is created when it
// does not exist and typ is given. When it exists, its type must be typ. undo
// forgets a process that was created.
func (m *IRM) findOrCreate(name, typ string) (p *process, undo func(), err error) {
	undo = func() {}
	p, err = m.find(name)
	if typ == "" {
		if err != nil {
			return nil, undo, fmt.Errorf("%w; give its type to create it", err)
		}
		return p, undo, nil
	}
	t, terr := ParseType(typ)
	if terr != nil {
		return nil, undo, terr
	}
	if err != nil {
		if p, err = m.createIPCP(name, t); err != nil {
			return nil, undo, err
		}
		return p, func() {
			if now, err := m.find(name); err == nil && now == p {
				_ = m.DestroyIPCP(name)
			}
		}, nil
	}
	if have := m.layerOf(p).Type(); have != t {
		return nil, undo, fail(o7serr.EIPCPTYPE, "ipcp %q is of type %s, not %s", name, have, t)
	}
	return p, undo, nil
}

// DestroyIPCP leaves the layer and forgets the IPC process with its bindings
// and registrations. Operations on it that are under way end first.
func (m *IRM) DestroyIPCP(name string) error {
	p, err := m.find(name)
	if err != nil {
		return err
	}
	m.mu.Lock()
	if m.ipcps[name] != p {
		m.mu.Unlock()
		return fail(o7serr.EIPCP, "ipcp %q is being destroyed", name)
	}
	delete(m.ipcps, name)
	m.reg.RemoveMember(p.id)
	m.unlock()
	p.cancel()
	p.op.Lock()
	defer p.op.Unlock()
	l := m.layerOf(p)
	err = l.Close()
	m.log.Info("destroyed ipcp", "ipcp", name, "type", l.Type().String())
	return err
}

// Bootstrap makes the first member of a layer, after creating the IPC process
// if need be. What fails leaves nothing behind.
func (m *IRM) Bootstrap(ctx context.Context, a ipc.BootstrapArgs) (err error) {
	if a.Type != "" {
		t, err := ParseType(a.Type)
		if err != nil {
			return err
		}
		if _, err := ParseConfig(t, a, m.quiet); err != nil {
			return err
		}
	}
	p, forget, err := m.findOrCreate(a.Name, a.Type)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			forget()
		}
	}()
	ctx, end, err := p.begin(ctx, "bootstrap")
	if err != nil {
		return err
	}
	defer end()
	l := m.layerOf(p)
	if err := bootState(p, l, "bootstrap"); err != nil {
		return err
	}
	cfg, err := ParseConfig(l.Type(), a, m.log)
	if err != nil {
		return err
	}
	autobind := a.Autobind
	if autobind && l.Type() != ipcp.Unicast && l.Type() != ipcp.Broadcast {
		m.log.Info("autobind ignored: only members of unicast and broadcast layers are bound", "ipcp", p.name)
		autobind = false
	}
	undo := func() {}
	if autobind {
		if undo, err = m.autobind(p, a.Layer); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, bootstrapTimeout)
	defer cancel()
	if err := l.Bootstrap(ctx, cfg); err != nil {
		undo()
		return fmt.Errorf("bootstrap ipcp %q in layer %q: %w", p.name, a.Layer, err)
	}
	m.ready(p, l)
	m.log.Debug("bootstrapped ipcp", "ipcp", p.name, "layer", a.Layer, "type", l.Type().String())
	return nil
}

func bootState(p *process, l ipcp.Layer, what string) error {
	if l.State() == ipcp.StateBoot {
		return nil
	}
	return fail(o7serr.EIPCPSTATE, "%s ipcp %q: it is a member of layer %q already", what, p.name, l.LayerName())
}

// ready lets the IPC process take flows for the names it is bound to.
func (m *IRM) ready(p *process, l ipcp.Layer) {
	_, member := l.(ipcp.Member)
	m.mu.Lock()
	m.reg.SetReady(p.id, member)
	m.unlock()
}

// autobind binds p to its own name and to that of its layer (spec 41 §7). A
// binding that exists stays; undo removes only what this call added.
func (m *IRM) autobind(p *process, layer string) (undo func(), err error) {
	var added []string
	undo = func() {
		m.mu.Lock()
		for _, n := range added {
			_ = m.reg.UnbindMember(p.id, n)
		}
		m.unlock()
	}
	for _, n := range []string{p.name, layer} {
		m.mu.Lock()
		if !m.reg.MemberBound(p.id, n) {
			err = m.reg.BindMember(p.id, n)
			if err == nil {
				added = append(added, n)
			}
		}
		m.unlock()
		if err != nil {
			undo()
			return nil, err
		}
	}
	return undo, nil
}

// Enroll makes an IPC process a member of the layer that the peer bound to
// a.Dst belongs to, after creating it if need be. What fails leaves nothing
// behind.
func (m *IRM) Enroll(ctx context.Context, a ipc.EnrollArgs) (err error) {
	if a.Layer == "" && a.Dst == "" {
		return fail(o7serr.EINVAL, "enroll ipcp %q: expected a layer or a destination", a.Name)
	}
	dst := cmp.Or(a.Dst, a.Layer)
	typ := a.Type
	if typ == "" {
		if _, err := m.find(a.Name); err != nil {
			typ = ipcp.Unicast.String()
		}
	}
	m.mu.Lock()
	exists := m.reg.HasName(dst)
	m.mu.Unlock()
	if !exists {
		return unknownName(dst)
	}
	p, forget, err := m.findOrCreate(a.Name, typ)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			forget()
		}
	}()
	ctx, end, err := p.begin(ctx, "enroll")
	if err != nil {
		return err
	}
	defer end()
	l := m.layerOf(p)
	member, err := asMember(p, l, "enroll")
	if err != nil {
		return err
	}
	if err := bootState(p, l, "enroll"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, enrollTimeout)
	defer cancel()
	if err := member.Enroll(ctx, dst); err != nil {
		return fmt.Errorf("enroll ipcp %q with %q: %w", p.name, dst, timedOut(ctx, err, enrollTimeout))
	}
	if learned := l.LayerName(); a.Layer != "" && learned != a.Layer {
		// Unlike the reference we do not stay in a layer that was not asked for.
		m.reset(p)
		return fail(o7serr.EINVAL, "enroll ipcp %q: %q is a member of layer %q, not of %q", p.name, dst, learned, a.Layer)
	}
	m.ready(p, l)
	if a.Autobind {
		if _, err := m.autobind(p, l.LayerName()); err != nil {
			return err
		}
	}
	m.log.Debug("enrolled ipcp", "ipcp", p.name, "layer", l.LayerName(), "dst", dst)
	return nil
}

// reset takes p out of its layer and makes it as it was created.
func (m *IRM) reset(p *process) {
	old := m.layerOf(p)
	_ = old.Close()
	l, err := m.newLayer(old.Type(), p.name)
	if err != nil {
		m.log.Error("ipcp lost", "ipcp", p.name, "err", err)
		return
	}
	m.mu.Lock()
	p.layer = l
	m.reg.SetReady(p.id, false)
	m.unlock()
}

func asMember(p *process, l ipcp.Layer, what string) (ipcp.Member, error) {
	member, ok := l.(ipcp.Member)
	if !ok {
		return nil, fail(o7serr.ENOTSUP, "%s ipcp %q: type %s has no members to meet, expected unicast", what, p.name, l.Type())
	}
	return member, nil
}

// timedOut says so when err comes from the end of ctx.
func timedOut(ctx context.Context, err error, limit time.Duration) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) && errors.Is(err, context.DeadlineExceeded) {
		return fail(o7serr.ETIMEDOUT, "no answer within %v", limit)
	}
	return err
}

// components reads the word for a component; order is for "*".
func components(word string, order ...ipcp.Component) ([]ipcp.Component, error) {
	switch word {
	case "", "*":
		return order, nil
	case "mgmt", string(ipcp.Management):
		return []ipcp.Component{ipcp.Management}, nil
	case "dt", string(ipcp.DataTransfer):
		return []ipcp.Component{ipcp.DataTransfer}, nil
	}
	return nil, fail(o7serr.EINVAL, "unknown component %q (expected dt, mgmt or *)", word)
}

// Connect makes adjacencies: management, then data transfer. When the second
// fails, the first is undone.
func (m *IRM) Connect(ctx context.Context, a ipc.ConnectArgs) error {
	list, err := components(a.Component, ipcp.Management, ipcp.DataTransfer)
	if err != nil {
		return err
	}
	p, member, err := m.member(a.Name, "connect")
	if err != nil {
		return err
	}
	m.mu.Lock()
	exists := m.reg.HasName(a.Dst)
	m.mu.Unlock()
	if !exists {
		return unknownName(a.Dst)
	}
	ctx, end, err := p.begin(ctx, "connect")
	if err != nil {
		return err
	}
	defer end()
	var done []ipcp.Component
	for _, c := range list {
		q := qos.Raw
		if c == ipcp.DataTransfer && a.QoS != (qos.Spec{}) {
			q = a.QoS
		}
		ctx, cancel := context.WithTimeout(ctx, connectTimeout)
		err := member.Connect(ctx, a.Dst, c, q)
		if err != nil {
			err = fmt.Errorf("connect ipcp %q to %q (%s): %w", p.name, a.Dst, c, timedOut(ctx, err, connectTimeout))
		}
		cancel()
		if err != nil {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			for _, c := range done {
				_ = member.Disconnect(undo, a.Dst, c)
			}
			return err
		}
		done = append(done, c)
		m.log.Debug("connected ipcp", "ipcp", p.name, "dst", a.Dst, "component", string(c))
	}
	return nil
}

// Disconnect takes adjacencies down: data transfer, then management. It tries
// both and reports the first error.
func (m *IRM) Disconnect(ctx context.Context, a ipc.ConnectArgs) error {
	list, err := components(a.Component, ipcp.DataTransfer, ipcp.Management)
	if err != nil {
		return err
	}
	p, member, err := m.member(a.Name, "disconnect")
	if err != nil {
		return err
	}
	ctx, end, err := p.begin(ctx, "disconnect")
	if err != nil {
		return err
	}
	defer end()
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	var first error
	for _, c := range list {
		if err := member.Disconnect(ctx, a.Dst, c); err != nil {
			first = cmp.Or[error](first, fmt.Errorf("disconnect ipcp %q from %q (%s): %w", p.name, a.Dst, c, err))
			continue
		}
		m.log.Info("disconnected ipcp", "ipcp", p.name, "dst", a.Dst, "component", string(c))
	}
	return first
}

func (m *IRM) member(name, what string) (*process, ipcp.Member, error) {
	p, err := m.find(name)
	if err != nil {
		return nil, nil, err
	}
	member, err := asMember(p, m.layerOf(p), what)
	return p, member, err
}

// CreateName creates a name.
func (m *IRM) CreateName(a ipc.NameArgs) error {
	lb, err := registry.ParseLB(a.LB)
	if err != nil {
		return fail(o7serr.EINVAL, "%v", err)
	}
	for key := range a.Security {
		if !slices.Contains(securityKeys, key) {
			return fail(o7serr.EINVAL, "unknown security option %q (expected %s)", key, strings.Join(securityKeys, ", "))
		}
	}
	m.mu.Lock()
	defer m.unlock()
	if err := m.reg.CreateName(a.Name, lb); err != nil {
		return err
	}
	if len(a.Security) > 0 {
		m.log.Warn("flows are neither encrypted nor authenticated yet; the credentials are not used", "name", a.Name)
	}
	m.log.Info("created name", "name", a.Name, "lb", lb.String())
	return nil
}

var securityKeys = []string{"ckeypath", "cencpath", "ccrtpath", "skeypath", "sencpath", "scrtpath"}

// DestroyName forgets a name and takes it out of all directories.
func (m *IRM) DestroyName(n string) error {
	m.mu.Lock()
	ids, err := m.reg.DestroyName(n)
	m.unlock()
	if err != nil {
		return err
	}
	for _, p := range m.processes() {
		if slices.Contains(ids, p.id) {
			l := m.layerOf(p)
			if err := l.Unregister(registry.Hash(l.HashAlg(), n)); err != nil {
				m.log.Warn("cannot unregister a destroyed name", "name", n, "ipcp", p.name, "err", err)
			}
		}
	}
	m.log.Info("destroyed name", "name", n)
	return nil
}

// targets are the operational IPC processes that the patterns of a select.
// A pattern that selects nothing is an error.
func (m *IRM) targets(a ipc.RegisterArgs) ([]*process, error) {
	if len(a.IPCPs)+len(a.Layers) == 0 {
		return nil, fail(o7serr.EINVAL, "name %q: expected at least one ipcp or layer", a.Name)
	}
	all := m.processes()
	chosen := map[*process]bool{}
	pick := func(what string, patterns []string, value func(*process) string) error {
		for _, pat := range patterns {
			hit := false
			var have []string
			for _, p := range all {
				l := m.layerOf(p)
				v := value(p)
				if v != "" && !slices.Contains(have, v) {
					have = append(have, v)
				}
				if v == "" || !match(pat, v) {
					continue
				}
				if l.State() != ipcp.StateOperational {
					if pat == v {
						return fail(o7serr.EIPCPSTATE, "ipcp %q is not a member of a layer yet", p.name)
					}
					continue
				}
				hit, chosen[p] = true, true
			}
			if !hit {
				slices.Sort(have)
				return fail(o7serr.EIPCP, "no %s matches %q (%s)", what, pat, known(what+"s", have))
			}
		}
		return nil
	}
	if err := pick("ipcp", a.IPCPs, func(p *process) string { return p.name }); err != nil {
		return nil, err
	}
	if err := pick("layer", a.Layers, func(p *process) string { return m.layerOf(p).LayerName() }); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(p *process) bool { return !chosen[p] }), nil
}

// Register makes a name known in layers, and creates it when it is missing. It
// tries all targets and reports the first error.
func (m *IRM) Register(a ipc.RegisterArgs) error {
	if err := registry.CheckName("name", a.Name); err != nil {
		return err
	}
	list, err := m.targets(a)
	if err != nil {
		return err
	}
	m.mu.Lock()
	err = m.reg.EnsureName(a.Name)
	m.unlock()
	if err != nil {
		return err
	}
	var first error
	for _, p := range list {
		l := m.layerOf(p)
		if err := l.Register(registry.Hash(l.HashAlg(), a.Name)); err != nil {
			first = cmp.Or[error](first, fmt.Errorf("register name %q with ipcp %q: %w", a.Name, p.name, err))
			continue
		}
		m.mu.Lock()
		m.reg.Registered(a.Name, p.id, true)
		m.mu.Unlock()
		m.log.Info("registered name", "name", a.Name, "ipcp", p.name, "layer", l.LayerName())
	}
	return first
}

// Unregister is the inverse. The name stays.
func (m *IRM) Unregister(a ipc.RegisterArgs) error {
	m.mu.Lock()
	exists := m.reg.HasName(a.Name)
	m.mu.Unlock()
	if !exists {
		return unknownName(a.Name)
	}
	list, err := m.targets(a)
	if err != nil {
		return err
	}
	var first error
	done := 0
	for _, p := range list {
		m.mu.Lock()
		registered := slices.Contains(m.reg.RegisteredWith(p.id), a.Name)
		m.mu.Unlock()
		if !registered {
			continue
		}
		l := m.layerOf(p)
		if err := l.Unregister(registry.Hash(l.HashAlg(), a.Name)); err != nil {
			first = cmp.Or[error](first, fmt.Errorf("unregister name %q from ipcp %q: %w", a.Name, p.name, err))
			continue
		}
		done++
		m.mu.Lock()
		m.reg.Registered(a.Name, p.id, false)
		m.mu.Unlock()
		m.log.Info("unregistered name", "name", a.Name, "ipcp", p.name, "layer", l.LayerName())
	}
	if first == nil && done == 0 {
		return fail(o7serr.ENAME, "name %q is not registered there", a.Name)
	}
	return first
}

// bindWait is how long binding a process waits for its announcement (spec 47 §4.1).
const bindWait = 10 * time.Millisecond

// Bind says who serves a name.
func (m *IRM) Bind(ctx context.Context, a ipc.BindArgs) error {
	what, err := bindTarget(a)
	if err != nil {
		return err
	}
	if what == "process" {
		m.awaitProcess(ctx, a.PID)
	}
	m.mu.Lock()
	defer m.unlock()
	switch what {
	case "program":
		err = m.reg.BindProgram(a.Prog, a.Args, a.Auto, a.Name)
	case "process":
		err = m.reg.BindProcess(a.PID, a.Name)
	default:
		var p *process
		if p, err = m.findLocked(a.IPCP); err == nil {
			err = m.reg.BindMember(p.id, a.Name)
		}
	}
	if err == nil {
		m.log.Info("bound "+what, "name", a.Name, "prog", a.Prog, "pid", a.PID, "ipcp", a.IPCP, "auto", a.Auto)
	}
	return err
}

// Unbind is the inverse. Nothing that runs is stopped.
func (m *IRM) Unbind(a ipc.BindArgs) error {
	what, err := bindTarget(a)
	if err != nil {
		return err
	}
	if a.Name == "" {
		return fail(o7serr.EINVAL, "unbind %s: expected a name", what)
	}
	m.mu.Lock()
	defer m.unlock()
	switch what {
	case "program":
		err = m.reg.UnbindProgram(a.Prog, a.Name)
	case "process":
		err = m.reg.UnbindProcess(a.PID, a.Name)
	default:
		var p *process
		if p, err = m.findLocked(a.IPCP); err == nil {
			err = m.reg.UnbindMember(p.id, a.Name)
		}
	}
	if err == nil {
		m.log.Info("unbound "+what, "name", a.Name, "prog", a.Prog, "pid", a.PID, "ipcp", a.IPCP)
	}
	return err
}

func (m *IRM) findLocked(name string) (*process, error) {
	if p, ok := m.ipcps[name]; ok {
		return p, nil
	}
	return nil, fail(o7serr.EIPCP, "unknown ipcp %q (%s)", name, known("ipcps", m.ipcpNames()))
}

func bindTarget(a ipc.BindArgs) (string, error) {
	var what []string
	if a.Prog != "" {
		what = append(what, "program")
	}
	if a.PID != 0 {
		what = append(what, "process")
	}
	if a.IPCP != "" {
		what = append(what, "ipcp")
	}
	if len(what) != 1 {
		return "", fail(o7serr.EINVAL, "expected one of program, process and ipcp, got %d", len(what))
	}
	return what[0], nil
}

// awaitProcess gives a process that was started a moment ago the time to
// announce itself.
func (m *IRM) awaitProcess(ctx context.Context, pid int32) {
	deadline := time.NewTimer(bindWait)
	defer deadline.Stop()
	for {
		m.mu.Lock()
		ok, changed := m.reg.Announced(pid), m.announced
		m.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-deadline.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// List answers the lists of the command line.
func (m *IRM) List(a ipc.ListArgs) (ipc.ListResult, error) {
	switch a.What {
	case "ipcps":
		return ipc.ListResult{IPCPs: m.ipcpInfos()}, nil
	case "names":
		m.mu.Lock()
		defer m.mu.Unlock()
		return ipc.ListResult{Names: m.reg.Names(a.Prefix)}, nil
	}
	return ipc.ListResult{}, fail(o7serr.EINVAL, "unknown list %q (expected ipcps or names)", a.What)
}

func (m *IRM) ipcpInfos() []ipc.IPCPInfo {
	var out []ipc.IPCPInfo
	for _, p := range m.processes() {
		l := m.layerOf(p)
		info := ipc.IPCPInfo{
			ID: p.id, Name: p.name, Type: l.Type().String(), Layer: l.LayerName(), State: string(l.State()),
		}
		if info.Layer != "" {
			info.Hash = registry.HashName(l.HashAlg())
		}
		out = append(out, info)
	}
	slices.SortFunc(out, func(a, b ipc.IPCPInfo) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// fail returns an error with number e that reads as formatted.
func fail(e o7serr.Errno, format string, a ...any) error {
	return o7serr.FromCode(e.Code(), fmt.Sprintf(format, a...))
}

func unknownName(n string) error {
	return fail(o7serr.ENAME, "unknown name %q (create, bind or register it here first)", n)
}

var errShutdown = fail(o7serr.EIRMD, "the daemon is shutting down")
