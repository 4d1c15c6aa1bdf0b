// Package proxy lets programs that know TCP only use the network: it forwards
// TCP ports to names and names to TCP ports, and serves SOCKS5, whose clients
// dial names as if they were hosts.
package proxy

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/names"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/relay"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/serving"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/qos"
)

const usage = `Usage: o7s-router proxy [OPTION]...
Lets programs that know TCP only talk over the network, unchanged. Each of the
first three options may be given any number of times, in one process.

  --forward ADDR:PORT=NAME  TCP connections to ADDR:PORT become flows to NAME
  --serve NAME=HOST:PORT    flows to NAME become TCP connections to HOST:PORT
  --socks ADDR:PORT         serve SOCKS5; its clients dial names as hosts

  --map HOST[:PORT]=NAME    for SOCKS: what HOST stands for (again for more)
  --qos QOS                 of flows to names: data (default), best
  --layer LAYER             register served names with LAYER, too (again for more)
  --bound                   served names are bound already: do not bind them
  --max N                   connections at the same time (default 1024)
  --idle TIME               end connections on which nothing moves that long (default: never)
  --connect-timeout TIME    for flows and TCP connections to be made (default 20s)
  --grace TIME              time for connections under way after Ctrl-C (default 5s)
  --run-dir DIR             run directory of the daemon (default: $O7S_RUN_DIR)
  --help                    print this text

A host of a SOCKS request stands for: what a --map says; else the name
HOST:PORT, if there is one; else the name HOST. ADDR may be left out: 127.0.0.1.
Serving a name takes the rights to bind it, and these programs have no
authentication: whoever reaches ADDR:PORT may use it.
`

// list collects an option that is given many times.
type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// pair is one --forward or --serve.
type pair struct{ from, to string }

type options struct {
	forward, serve []pair
	socks          list
	rule           names.Rule
	qos            qos.Spec
	layers         list
	bound          bool
	max            int
	idle           time.Duration
	connect        time.Duration
	grace          time.Duration
	runDir         string
}

// address completes [ADDR]:PORT.
func address(s string) (string, error) {
	if !strings.Contains(s, ":") {
		s = ":" + s
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return "", fmt.Errorf("%q: expected ADDR:PORT", s)
	}
	if _, err := net.LookupPort("tcp", port); err != nil { // a number, or a service's name
		return "", fmt.Errorf("%q: %q is no port (expected a number from 0 to 65535)", s, port)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port), nil
}

func parse(args []string) (options, error) {
	var o options
	var forward, serve list
	q := "data"
	fs := flag.NewFlagSet("proxy", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Var(&forward, "forward", "")
	fs.Var(&serve, "serve", "")
	fs.Var(&o.socks, "socks", "")
	fs.Var(&o.rule, "map", "")
	fs.StringVar(&q, "qos", q, "")
	fs.Var(&o.layers, "layer", "")
	fs.BoolVar(&o.bound, "bound", false, "")
	fs.IntVar(&o.max, "max", 1024, "")
	fs.DurationVar(&o.idle, "idle", 0, "")
	fs.DurationVar(&o.connect, "connect-timeout", 20*time.Second, "")
	fs.DurationVar(&o.grace, "grace", 5*time.Second, "")
	fs.StringVar(&o.runDir, "run-dir", "", "")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	for _, s := range forward {
		addr, name, ok := strings.Cut(s, "=")
		if !ok || addr == "" || name == "" {
			return o, fmt.Errorf("--forward %s: expected ADDR:PORT=NAME", s)
		}
		addr, err := address(addr)
		if err != nil {
			return o, fmt.Errorf("--forward %w", err)
		}
		o.forward = append(o.forward, pair{addr, name})
	}
	seen := map[string]bool{}
	for _, s := range serve {
		i := strings.LastIndexByte(s, '=')
		if i < 1 || i == len(s)-1 {
			return o, fmt.Errorf("--serve %s: expected NAME=HOST:PORT", s)
		}
		addr, err := address(s[i+1:])
		if err != nil {
			return o, fmt.Errorf("--serve %w", err)
		}
		if seen[s[:i]] {
			return o, fmt.Errorf("--serve %s: the name %s is served already", s, s[:i])
		}
		seen[s[:i]] = true
		o.serve = append(o.serve, pair{s[:i], addr})
	}
	for i, s := range o.socks {
		addr, err := address(s)
		if err != nil {
			return o, fmt.Errorf("--socks %w", err)
		}
		o.socks[i] = addr
	}
	if len(o.forward)+len(o.serve)+len(o.socks) == 0 {
		return o, errors.New("nothing to do: expected --forward, --serve or --socks")
	}
	var err error
	if o.qos, err = qos.ByName(q); err != nil || o.qos.InOrder == 0 {
		return o, fmt.Errorf("--qos %s: expected data or best, a byte stream needs order", q)
	}
	switch {
	case o.max < 1:
		return o, fmt.Errorf("--max %d: expected at least 1", o.max)
	case o.connect <= 0:
		return o, fmt.Errorf("--connect-timeout %v: expected more than 0", o.connect)
	case o.idle < 0 || o.grace < 0:
		return o, errors.New("--idle, --grace: expected no negative time")
	}
	return o, nil
}

// Main runs the tool with the arguments after its name and returns its exit
// status. SIGINT or SIGTERM end it: nothing new is let in, connections under way
// have the grace time, a second signal ends them at once.
func Main(args []string, stdout, stderr io.Writer) int {
	o, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stdout, usage)
		return 0
	}
	if err != nil {
		fmt.Fprintf(stderr, "proxy: %v (see o7s-router proxy --help)\n", err)
		return 1
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(signals)
	p := newProxy(o, slog.New(slog.NewTextHandler(stderr, nil)))
	if err := p.start(); err != nil {
		p.stop(nil)
		fmt.Fprintf(stderr, "proxy: %v\n", err)
		return 1
	}
	<-signals
	p.stop(signals)
	return 0
}

// proxy is the running tool.
type proxy struct {
	o      options
	log    *slog.Logger
	client *o7s.Client
	server *serving.Server
	ctx    context.Context // ends what is being connected
	cancel context.CancelFunc
	wg     sync.WaitGroup // everything that start started, and connections
	slots  chan struct{}  // one element for each connection

	mu     sync.Mutex // guards what follows
	closed bool
	listen []net.Listener
	relays map[*relay.Relay]struct{}
	raw    map[net.Conn]struct{} // TCP connections that have no relay yet
}

func newProxy(o options, log *slog.Logger) *proxy {
	p := &proxy{
		o: o, log: log, slots: make(chan struct{}, o.max),
		relays: map[*relay.Relay]struct{}{}, raw: map[net.Conn]struct{}{},
	}
	p.client = o7s.New(o7s.Options{RunDir: o.runDir, Prog: "o7s-proxy"})
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

// start listens and serves. After an error stop is still to be called.
func (p *proxy) start() error {
	for _, f := range p.o.forward {
		err := p.accept(f.from, func(c *net.TCPConn) { p.dialName(c, f.to) })
		if err != nil {
			return err
		}
		p.log.Info("forwarding", "tcp", f.from, "name", f.to)
	}
	for _, a := range p.o.socks {
		if err := p.accept(a, p.serveSOCKS); err != nil {
			return err
		}
		p.log.Info("serving SOCKS5", "tcp", a)
	}
	if len(p.o.serve) == 0 {
		return nil
	}
	to := map[string]string{}
	for _, s := range p.o.serve {
		to[s.from] = s.to
	}
	p.server = serving.New(serving.Options{
		Client: p.client, RunDir: p.o.runDir, Layers: p.o.layers, Bound: p.o.bound,
		Handle: func(f *o7s.Flow) { p.dialTCP(f, to[f.Name()]) },
		Failed: func(err error) { p.log.Warn("flow request failed", "err", err) },
	})
	for _, s := range p.o.serve {
		if err := p.server.Add(p.ctx, s.from); err != nil {
			return err
		}
		p.log.Info("serving", "name", s.from, "tcp", s.to)
	}
	return nil
}

// accept lets TCP connections in. At the limit it stops accepting, so the
// kernel's queue fills and clients wait.
func (p *proxy) accept(addr string, handle func(*net.TCPConn)) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.listen = append(p.listen, l)
	p.mu.Unlock()
	p.wg.Go(func() {
		for {
			select {
			case p.slots <- struct{}{}:
			case <-p.ctx.Done():
				return
			}
			c, err := l.Accept()
			if err != nil {
				<-p.slots
				if errors.Is(err, net.ErrClosed) {
					return
				}
				// Too many descriptors, most likely: others may be closed.
				p.log.Error("cannot accept", "tcp", addr, "err", err)
				select {
				case <-time.After(100 * time.Millisecond):
					continue
				case <-p.ctx.Done():
					return
				}
			}
			if !p.hold(c) {
				<-p.slots
				_ = c.Close()
				return
			}
			p.wg.Go(func() {
				defer func() { <-p.slots }()
				handle(c.(*net.TCPConn))
			})
		}
	})
	return nil
}

// hold notes a connection that stop has to close; false when it is too late.
func (p *proxy) hold(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.raw[c] = struct{}{}
	return true
}

func (p *proxy) drop(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.raw, c)
}

// reset closes a connection so that the other end does not read it as an end.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// dialName serves a connection of --forward.
func (p *proxy) dialName(c *net.TCPConn, name string) {
	ctx, cancel := context.WithTimeout(p.ctx, p.o.connect)
	f, err := p.client.Alloc(ctx, name, &p.o.qos)
	cancel()
	p.drop(c)
	if err != nil {
		p.failed(err, "name", name, "tcp", c.RemoteAddr().String())
		reset(c)
		return
	}
	p.relay(f, c, "name", name, "tcp", c.RemoteAddr().String())
}

// dialTCP serves a flow of --serve.
func (p *proxy) dialTCP(f *o7s.Flow, addr string) {
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	default:
		_ = f.Abort()
		p.log.Warn("flow refused: too many connections", "name", f.Name(), "limit", p.o.max)
		return
	}
	ctx, cancel := context.WithTimeout(p.ctx, p.o.connect)
	c, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	cancel()
	if err != nil {
		p.failed(err, "name", f.Name(), "tcp", addr)
		_ = f.Abort()
		return
	}
	p.relay(f, c.(*net.TCPConn), "name", f.Name(), "tcp", addr)
}

// relay carries a connection until it ends.
func (p *proxy) relay(f *o7s.Flow, c *net.TCPConn, about ...any) {
	t, err := relay.NewTCP(c)
	if err != nil {
		_, _ = c.Close(), f.Abort()
		p.failed(err, about...)
		return
	}
	r := relay.New(f, t, relay.Options{Idle: p.o.idle})
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		r.Abort()
		return
	}
	p.relays[r] = struct{}{}
	p.mu.Unlock()
	err = r.Run()
	p.mu.Lock()
	delete(p.relays, r)
	p.mu.Unlock()
	if err != nil {
		p.failed(err, about...)
	}
}

// failed writes the one line of a failure.
func (p *proxy) failed(err error, about ...any) {
	if p.ctx.Err() != nil {
		return // we are the cause
	}
	p.log.Warn("connection failed", append(about, "err", err)...)
}

// stop ends everything. Connections under way have the grace time, or until
// another signal comes.
func (p *proxy) stop(signals <-chan os.Signal) {
	p.mu.Lock()
	for _, l := range p.listen {
		_ = l.Close()
	}
	p.mu.Unlock()
	done := make(chan struct{})
	if p.server != nil {
		go p.server.Close()
	}
	if n := p.busy(); n > 0 && signals != nil && p.o.grace > 0 {
		p.log.Info("stopping", "connections", n, "grace", p.o.grace)
		end := time.NewTimer(p.o.grace)
		defer end.Stop()
		look := time.NewTicker(20 * time.Millisecond)
		defer look.Stop()
	wait:
		for p.busy() > 0 {
			select {
			case <-end.C:
				break wait
			case <-signals:
				break wait
			case <-look.C:
			}
		}
	}
	p.cancel()
	p.mu.Lock()
	p.closed = true
	for c := range p.raw {
		_ = c.Close()
	}
	all := make([]*relay.Relay, 0, len(p.relays))
	for r := range p.relays {
		all = append(all, r)
	}
	p.mu.Unlock()
	for _, r := range all {
		r.Abort()
	}
	go func() {
		p.wg.Wait()
		if p.server != nil {
			p.server.Close()
		}
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(stopWait):
		p.log.Warn("some connections do not end; leaving them to the daemon")
	}
	_ = p.client.Close()
}

// stopWait bounds what ends at once unless something hangs.
const stopWait = 5 * time.Second

func (p *proxy) busy() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.relays) + len(p.raw)
}
