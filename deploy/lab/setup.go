package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

const daemonLog = "daemon.log"

// startDaemon starts the daemon of a host and waits until it answers.
func (l *Lab) startDaemon(ctx context.Context, host string) error {
	argv := append([]string{"o7s-router", "daemon", "--run-dir", l.RunDir(host)}, l.topo.Defaults.Daemon...)
	cmd, err := l.command(context.WithoutCancel(ctx), host, argv)
	if err != nil {
		return err
	}
	end, err := l.background(host, daemonLog, cmd)
	if err != nil {
		return err
	}
	boot, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	for {
		c, err := ipc.Dial(boot, l.RunDir(host))
		if err == nil {
			l.mu.Lock()
			l.clients[host] = c
			l.mu.Unlock()
			return nil
		}
		select {
		case werr := <-end:
			return l.explain(fmt.Errorf("host %s: the daemon ended: %w", host, errOr(werr, "exit status 0")))
		case <-time.After(2 * time.Millisecond):
		case <-boot.Done():
			if ctx.Err() != nil { // somebody else failed, or the user has seen enough
				return ctx.Err()
			}
			return l.explain(fmt.Errorf("host %s: the daemon does not answer: %w", host, err))
		}
	}
}

func errOr(err error, text string) error {
	if err != nil {
		return err
	}
	return errors.New(text)
}

// Client returns a connection to a host's daemon; the lab closes it.
func (l *Lab) Client(ctx context.Context, host string) (*ipc.Client, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.clients[host]; c != nil && c.Err() == nil {
		return c, nil
	}
	c, err := ipc.Dial(ctx, l.RunDir(host))
	if err != nil {
		return nil, fmt.Errorf("host %s: %w", host, err)
	}
	l.clients[host] = c
	return c, nil
}

// call asks a host's daemon for one operation.
func (l *Lab) call(ctx context.Context, host string, op ipc.Op, args, result any) error {
	c, err := l.Client(ctx, host)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	fds, err := c.Call(ctx, op, args, result)
	ipc.CloseFDs(fds)
	if err != nil {
		return fmt.Errorf("host %s: %s: %w", host, op, err)
	}
	return nil
}

// retry calls again after a failure that a frame lost on a fresh link explains.
func (l *Lab) retry(ctx context.Context, host string, op ipc.Op, args any) error {
	var err error
	for n := range 3 {
		if err = l.call(ctx, host, op, args, nil); err == nil || ctx.Err() != nil || !transient(err) {
			return err
		}
		l.log.Warn("lab_step_retried", "host", host, "op", string(op), "err", err)
		select {
		case <-time.After(time.Duration(20<<n) * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return err
}

func transient(err error) bool {
	return errors.Is(err, o7serr.ETIMEDOUT) || errors.Is(err, o7serr.EIPCP) || errors.Is(err, o7serr.EPERM) || errors.Is(err, o7serr.ENAME)
}

// latches let the steps of different hosts wait for each other.
type latches map[string]chan struct{}

func (s latches) done(key string) { close(s[key]) }

func (s latches) wait(ctx context.Context, key string) error {
	select {
	case <-s[key]:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Stages of a member of a layer: it can be enrolled with, and it has its
// adjacencies.
func joined(layer, host string) string    { return layer + " " + host }
func connected(layer, host string) string { return layer + " " + host + " connected" }

// setup makes layers and names. Everything that does not depend on something
// else happens at once.
func (l *Lab) setup(ctx context.Context) error {
	s := latches{}
	for i := range l.topo.Links {
		k := &l.topo.Links[i]
		for _, h := range k.Ends {
			if k.Layer == "" {
				continue
			}
			s[joined(k.Layer, h)], s[connected(k.Layer, h)] = make(chan struct{}), make(chan struct{})
		}
	}
	for i := range l.topo.Layers {
		y := &l.topo.Layers[i]
		for j := range y.Members {
			h := y.Members[j].Host
			s[joined(y.Name, h)], s[connected(y.Name, h)] = make(chan struct{}), make(chan struct{})
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	for i := range l.topo.Links {
		k := &l.topo.Links[i]
		if k.Layer == "" {
			continue
		}
		for e := range k.Ends {
			g.Go(func() error { return l.linkLayer(ctx, s, k, e) })
		}
	}
	for i := range l.topo.Layers {
		y := &l.topo.Layers[i]
		for j := range y.Members {
			g.Go(func() error { return l.member(ctx, s, y, &y.Members[j]) })
		}
	}
	for i := range l.topo.Services {
		g.Go(func() error { return l.service(ctx, s, &l.topo.Services[i]) })
	}
	return g.Wait()
}

// linkLayer makes the eth-dix layer of one end of a link.
func (l *Lab) linkLayer(ctx context.Context, s latches, k *Link, end int) error {
	host := k.Ends[end]
	opt := map[string]string{"dev": k.Devices[end]}
	if k.EtherType != "" {
		opt["ethertype"] = k.EtherType
	}
	err := l.call(ctx, host, ipc.OpIPCPBootstrap, ipc.BootstrapArgs{
		Name: k.Layer, Type: "eth-dix", Layer: k.Layer, Options: opt,
	}, nil)
	if err != nil {
		return fmt.Errorf("layer %s: %w", k.Layer, err)
	}
	s.done(joined(k.Layer, host))
	s.done(connected(k.Layer, host))
	return nil
}

// IPCP is the name of the IPC process of a layer's member on a host.
func IPCP(layer, host string) string { return layer + "." + host }

// member makes one member of a layer: it joins, can be found in the layers
// below, and connects.
func (l *Lab) member(ctx context.Context, s latches, y *Layer, m *Member) error {
	lower := l.topo.lowerAt(y, m.Host)
	for _, o := range lower {
		if err := l.ground(ctx, s, o, m.Host); err != nil {
			return err
		}
	}
	if err := l.join(ctx, s, y, m); err != nil {
		return fmt.Errorf("layer %s: %w", y.Name, err)
	}
	if len(lower) > 0 {
		for _, n := range []string{IPCP(y.Name, m.Host), y.Name} {
			if err := l.call(ctx, m.Host, ipc.OpNameRegister, ipc.RegisterArgs{Name: n, Layers: lower}, nil); err != nil {
				return fmt.Errorf("layer %s: register %s: %w", y.Name, n, err)
			}
		}
	}
	s.done(joined(y.Name, m.Host))
	peers := m.Connect
	if m.Enroll != "" {
		peers = append([]string{m.Enroll}, peers...)
	}
	for _, p := range peers {
		if err := l.connect(ctx, s, y, m, p); err != nil {
			return fmt.Errorf("layer %s: %w", y.Name, err)
		}
	}
	s.done(connected(y.Name, m.Host))
	return nil
}

// ground waits until a host can reach all members of a layer that others are
// to be built on.
func (l *Lab) ground(ctx context.Context, s latches, layer, host string) error {
	if err := s.wait(ctx, connected(layer, host)); err != nil {
		return err
	}
	for i := range l.topo.Layers {
		y := &l.topo.Layers[i]
		if y.Name != layer || y.Type != "unicast" || l.opt.Converge < 0 {
			continue
		}
		for j := range y.Members {
			if err := s.wait(ctx, connected(layer, y.Members[j].Host)); err != nil {
				return err
			}
		}
		return l.awaitRoutes(ctx, host, layer)
	}
	return nil
}

func (l *Lab) join(ctx context.Context, s latches, y *Layer, m *Member) error {
	name := IPCP(y.Name, m.Host)
	if m.Enroll == "" {
		opt := map[string]string{}
		for k, v := range y.Options {
			opt[k] = fmt.Sprint(v)
		}
		if y.Routing != "" {
			opt["routing"] = strings.ReplaceAll(y.Routing, "-", "_")
		}
		return l.call(ctx, m.Host, ipc.OpIPCPBootstrap, ipc.BootstrapArgs{
			Name: name, Type: y.Type, Layer: y.Name, Autobind: y.Type == "unicast", Options: opt,
		}, nil)
	}
	if err := s.wait(ctx, joined(y.Name, m.Enroll)); err != nil {
		return err
	}
	dst := IPCP(y.Name, m.Enroll)
	if err := l.ensureName(ctx, m.Host, dst, ""); err != nil {
		return err
	}
	return l.retry(ctx, m.Host, ipc.OpIPCPEnroll, ipc.EnrollArgs{
		Name: name, Type: y.Type, Layer: y.Name, Dst: dst, Autobind: true,
	})
}

func (l *Lab) connect(ctx context.Context, s latches, y *Layer, m *Member, peer string) error {
	if err := s.wait(ctx, joined(y.Name, peer)); err != nil {
		return err
	}
	spec, err := qos.ByName(m.QoS)
	if err != nil {
		return err
	}
	dst := IPCP(y.Name, peer)
	if err := l.ensureName(ctx, m.Host, dst, ""); err != nil {
		return err
	}
	return l.retry(ctx, m.Host, ipc.OpIPCPConnect, ipc.ConnectArgs{
		Name: IPCP(y.Name, m.Host), Dst: dst, Component: "*", QoS: spec,
	})
}

// ensureName creates a name that is not there: a daemon reaches only names that
// it knows.
func (l *Lab) ensureName(ctx context.Context, host, name, lb string) error {
	var have ipc.ListResult
	if err := l.call(ctx, host, ipc.OpList, ipc.ListArgs{What: "names", Prefix: name}, &have); err != nil {
		return err
	}
	for _, n := range have.Names {
		if n.Name == name {
			return nil
		}
	}
	return l.call(ctx, host, ipc.OpNameCreate, ipc.NameArgs{Name: name, LB: lb}, nil)
}

// service makes a name, binds its program and registers it.
func (l *Lab) service(ctx context.Context, s latches, n *Service) error {
	if err := l.ensureName(ctx, n.Host, n.Name, n.LB); err != nil {
		return err
	}
	if n.Program != "" {
		prog, err := l.lookPath(n.Program)
		if err != nil {
			return fmt.Errorf("name %s: %w", n.Name, err)
		}
		err = l.call(ctx, n.Host, ipc.OpBind, ipc.BindArgs{Name: n.Name, Prog: prog, Auto: n.Auto, Args: n.Args}, nil)
		if err != nil {
			return err
		}
	}
	for _, y := range n.Layers {
		if err := s.wait(ctx, connected(y, n.Host)); err != nil {
			return err
		}
	}
	if len(n.Layers) == 0 {
		return nil
	}
	return l.call(ctx, n.Host, ipc.OpNameRegister, ipc.RegisterArgs{Name: n.Name, Layers: n.Layers}, nil)
}

// converge waits until every member of every unicast layer has a route to all
// others.
func (l *Lab) converge(ctx context.Context) error {
	return each(ctx, l.topo.Hosts, func(ctx context.Context, host string) error {
		return l.awaitRoutes(ctx, host, "")
	})
}

// awaitRoutes waits until a host has all routes of a layer, or of all layers.
func (l *Lab) awaitRoutes(ctx context.Context, host, layer string) error {
	limit, cancel := context.WithTimeout(ctx, l.opt.Converge)
	defer cancel()
	for {
		missing, err := l.missing(limit, host, layer)
		if err == nil && missing == "" {
			return nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-limit.Done():
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err == nil {
				err = fmt.Errorf("host %s: %s", host, missing)
			}
			return fmt.Errorf("no routes after %v: %w", l.opt.Converge, err)
		}
	}
}

// missing says what routes of a layer, or of all layers, a host has not got, ""
// when it has all.
func (l *Lab) missing(ctx context.Context, host, layer string) (string, error) {
	want := map[string]int{}
	for i := range l.topo.Layers {
		y := &l.topo.Layers[i]
		if layer != "" && y.Name != layer {
			continue
		}
		if y.Type == "unicast" && y.member(host) != nil && len(y.Members) > 1 {
			want[y.Name] = len(y.Members) - 1
		}
	}
	if len(want) == 0 {
		return "", nil
	}
	var routes []struct {
		Layer string `json:"layer"`
	}
	if err := l.show(ctx, host, "routes", &routes); err != nil {
		return "", err
	}
	have := map[string]int{}
	for _, r := range routes {
		have[r.Layer]++
	}
	for y, n := range want {
		if have[y] < n {
			return fmt.Sprintf("%d of %d routes in layer %s", have[y], n, y), nil
		}
	}
	return "", nil
}

// show asks a daemon for one of its tables, an array of rows.
func (l *Lab) show(ctx context.Context, host, what string, rows any) error {
	var raw json.RawMessage
	if err := l.call(ctx, host, ipc.OpShow, ipc.ShowArgs{What: what}, &raw); err != nil {
		return err
	}
	if err := json.Unmarshal(raw, rows); err != nil {
		return fmt.Errorf("host %s: show %s: %w", host, what, err)
	}
	return nil
}
