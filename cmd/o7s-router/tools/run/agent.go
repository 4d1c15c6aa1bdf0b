package run

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/names"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/relay"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/serving"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// What the shim asks; shim.c has the same numbers and layouts.
const (
	opConnect = 1 + iota
	opBind
	opListen
	opResolve
	opReverse
	opStatus
)

const (
	reqNonblock = 1 << iota
	reqReusePort
	reqV6
)

const (
	envListen    = 1 << iota // some ports are served under names
	envOnly                  // nothing but the network of names
	envAddresses             // maps are about addresses: ask about each
)

// notOurs is the result of a request that the real network serves.
const notOurs = -1

type request struct {
	Token  [16]byte
	Op     uint32
	Flags  uint32
	Family uint32 // 4 or 6
	Port   uint32
	Addr   [16]byte // IPv4 in the first four
	Text   [256]byte
}

type reply struct {
	Result int32 // 0, a positive errno, or notOurs
	Text   [256]byte
}

const (
	requestSize = int(unsafe.Sizeof(request{}))
	replySize   = int(unsafe.Sizeof(reply{}))
)

// requestTimeout bounds how long a client may take to say what it wants.
const requestTimeout = 5 * time.Second

// agentOptions configure an agent.
type agentOptions struct {
	dir    string // private directory, made by the caller; listening sockets go to l/ in it
	runDir string // of the daemon
	prog   string
	args   []string
	rule   names.Rule
	listen map[uint16]string // names of ports
	host   string            // other ports are served under host:port; "": they are not
	only   bool
	layers []string
	bound  bool
	qos    qos.Spec
	log    *slog.Logger
}

// agent serves the shims of one program and its descendants: it makes flows
// and relays between them and the UNIX sockets that it hands over.
type agent struct {
	o        agentOptions
	token    [16]byte
	id       string // in names of sockets
	listener *net.UnixListener
	client   *o7s.Client
	server   *serving.Server
	ctx      context.Context // ends with the agent
	cancel   context.CancelFunc
	connects context.Context // ends with the program: of what is not connected yet
	leave    context.CancelFunc
	wg       sync.WaitGroup
	hosts    hosts

	mu       sync.Mutex // guards what follows
	closed   bool
	seq      uint32
	port     uint16                // last ephemeral port given
	binds    map[uint32]*bound     // sockets bound to a port, by number
	byName   map[string][]*bound   // those of them that listen
	turn     map[string]int        // of byName
	status   map[uint32]unix.Errno // connections under way (EINPROGRESS) and failed ones
	failed   []uint32              // those of status, oldest first
	relays   map[*relay.Relay]struct{}
	active   int // connections under way and relays
	sweeping bool
}

// bound is a socket that the agent bound to a port and handed over.
type bound struct {
	number uint32
	path   string
	name   string
	family uint32
	addr   [16]byte
	port   uint16
	reuse  bool
	serves bool // listening, and known to serving
}

// maxFailed bounds how many failed connections are remembered for programs
// that did not look yet.
const maxFailed = 4096

func newAgent(o agentOptions) (*agent, error) {
	a := &agent{
		o: o, binds: map[uint32]*bound{}, byName: map[string][]*bound{}, turn: map[string]int{},
		status: map[uint32]unix.Errno{}, relays: map[*relay.Relay]struct{}{}, port: firstEphemeral,
	}
	var id [8]byte
	_, _ = rand.Read(a.token[:]) // never fails
	_, _ = rand.Read(id[:])
	a.id = hex.EncodeToString(id[:])
	if err := os.MkdirAll(filepath.Join(o.dir, "l"), 0o700); err != nil {
		return nil, err
	}
	if n := len(a.listenPrefix()) + 8 + 1 + nameEnd; n > maxPath {
		return nil, fmt.Errorf("the directory %s is too long for names of sockets by %d characters (TMPDIR)", o.dir, n-maxPath)
	}
	// Abstract: it is reached from a changed root, and leaves no file.
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket", Name: "@" + a.address()})
	if err != nil {
		return nil, err
	}
	a.listener = l
	a.client = o7s.New(o7s.Options{RunDir: o.runDir, Prog: o.prog, Args: o.args})
	a.server = serving.New(serving.Options{
		Client: a.client, RunDir: o.runDir, Layers: o.layers, Bound: o.bound, Handle: a.arrived,
		Failed: func(err error) { o.log.Warn("flow request failed", "err", err) },
	})
	a.ctx, a.cancel = context.WithCancel(context.Background())
	a.connects, a.leave = context.WithCancel(a.ctx)
	a.wg.Go(a.serve)
	return a, nil
}

const (
	maxPath = 107 // sun_path less its NUL
	nameEnd = 38  // see shim.c
)

func (a *agent) address() string      { return "o7s/" + a.id + "/agent" }
func (a *agent) connPrefix() string   { return "o7s/" + a.id + "/" }
func (a *agent) listenPrefix() string { return filepath.Join(a.o.dir, "l") + "/" }

// environment is the value of O7S_RUN for the shim.
func (a *agent) environment() string {
	flags := 0
	if len(a.o.listen) > 0 || a.o.host != "" {
		flags |= envListen
	}
	if a.o.only {
		flags |= envOnly
	}
	if a.o.rule.HasAddresses() {
		flags |= envAddresses
	}
	return fmt.Sprintf("1 %s %s %d %s %s", a.address(), hex.EncodeToString(a.token[:]), flags, a.connPrefix(), a.listenPrefix())
}

// serve takes requests until the agent closes.
func (a *agent) serve() {
	for {
		c, err := a.listener.AcceptUnix()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			a.o.log.Error("cannot accept a request of the program", "err", err)
			select {
			case <-a.ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		a.wg.Go(func() {
			defer c.Close()
			a.handle(c)
		})
	}
}

// handle answers one request.
func (a *agent) handle(c *net.UnixConn) {
	var q request
	b := unsafe.Slice((*byte)(unsafe.Pointer(&q)), requestSize)
	_ = c.SetReadDeadline(time.Now().Add(requestTimeout))
	n, err := c.Read(b)
	if err != nil || n != requestSize || subtle.ConstantTimeCompare(q.Token[:], a.token[:]) != 1 {
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	var r reply
	fd := -1
	switch q.Op {
	case opConnect:
		r.Result, fd = a.connect(c, &q)
	case opBind:
		r.Result, fd = a.bind(&q)
	case opListen:
		r.Result = a.listen(&q)
	case opResolve:
		r.Result = a.resolve(&q, r.Text[:])
	case opReverse:
		r.Result = a.reverse(&q, r.Text[:])
	case opStatus:
		r.Result = a.state(&q)
	default:
		r.Result = int32(unix.EINVAL)
	}
	var oob []byte
	if fd >= 0 {
		defer unix.Close(fd)
		oob = unix.UnixRights(fd)
	}
	// A failure leaves the descriptor to nobody: its connection ends by itself.
	_, _, _ = c.WriteMsgUnix(unsafe.Slice((*byte)(unsafe.Pointer(&r)), replySize), oob, nil)
}

func (q *request) text() string { return unix.ByteSliceToString(q.Text[:]) }

func (q *request) address() netip.Addr {
	if q.Family == 4 {
		return netip.AddrFrom4([4]byte(q.Addr[:4]))
	}
	return netip.AddrFrom16(q.Addr).Unmap()
}

// number parses the eight digits that tell sockets apart.
func (q *request) number() uint32 {
	var b [4]byte
	s := q.text()
	if len(s) != 8 {
		return 0
	}
	if _, err := hex.Decode(b[:], []byte(s)); err != nil {
		return 0
	}
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

// endName is the end of a socket's name: an address.
func endName(family uint32, addr [16]byte, port uint16) string {
	return fmt.Sprintf("%d%x-%04x", family, addr[:], port)
}

// next gives a number. a.mu is held.
func (a *agent) next() uint32 {
	a.seq++
	return a.seq
}

const (
	firstEphemeral = 32768 // as Linux
	lastEphemeral  = 60999
)

// ephemeral gives a port for the end of a connection. a.mu is held.
func (a *agent) ephemeral() uint16 {
	if a.port++; a.port > lastEphemeral {
		a.port = firstEphemeral
	}
	return a.port
}

// errno is what a program gets for a flow that failed.
func errno(err error) unix.Errno {
	switch {
	case errors.Is(err, o7serr.ENAME):
		return unix.EHOSTUNREACH
	case errors.Is(err, o7serr.EIRMD):
		return unix.ENETDOWN
	case errors.Is(err, o7serr.ETIMEDOUT), errors.Is(err, context.DeadlineExceeded):
		return unix.ETIMEDOUT
	case errors.Is(err, context.Canceled):
		return unix.EINTR
	}
	return unix.ECONNREFUSED
}

// connectTimeout is how long a flow may take to be made: the daemon's own
// limit, as an explicit one, whose expiry is told apart.
const connectTimeout = 20 * time.Second

// connect serves connect.
func (a *agent) connect(c *net.UnixConn, q *request) (int32, int) {
	host, port := "", uint16(q.Port)
	addr := q.address()
	switch known, ok := a.hosts.name(addr); {
	case ok:
		host = known
	case synthetic(addr):
		return int32(unix.EHOSTUNREACH), -1
	default:
		host = addr.String()
		if _, ok := a.o.rule.Mapped(host, port); !ok {
			if a.o.only {
				return int32(unix.ENETUNREACH), -1
			}
			return notOurs, -1
		}
	}
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return int32(unix.ENETDOWN), -1
	}
	number := a.next()
	local := a.ephemeral()
	a.active++
	nonblock := q.Flags&reqNonblock != 0
	if nonblock {
		a.status[number] = unix.EINPROGRESS
	}
	a.mu.Unlock()
	done := func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.active--
	}

	p, err := a.newPair(q, number, local, nonblock)
	if err != nil {
		done()
		a.o.log.Error("cannot make a socket for a connection", "err", err)
		return int32(unix.ENOBUFS), -1
	}
	ctx, cancel := context.WithTimeout(a.connects, connectTimeout)
	if !nonblock {
		// The program gave up (a signal, its end): so does the flow.
		go func() {
			var b [1]byte
			_, _ = c.Read(b[:])
			cancel()
		}()
		f, err := a.o.rule.Dial(ctx, a.client, host, port, &a.o.qos)
		cancel()
		if err == nil {
			err = p.establish()
			if err != nil {
				_ = f.Abort()
			}
		}
		if err != nil {
			done()
			p.abort()
			unix.Close(p.fd)
			a.report(err, host, port)
			return int32(errno(err)), -1
		}
		a.wg.Go(func() {
			defer done()
			a.relay(f, p.stream, "host", host, "port", port)
		})
		return 0, p.fd
	}
	a.wg.Go(func() {
		defer done()
		f, err := a.o.rule.Dial(ctx, a.client, host, port, &a.o.qos)
		cancel()
		if err == nil {
			a.settle(number, 0) // before it becomes writable
			if err = p.establish(); err != nil {
				_ = f.Abort()
			}
		}
		if err != nil {
			a.settle(number, errno(err))
			p.abort()
			a.report(err, host, port)
			return
		}
		a.relay(f, p.stream, "host", host, "port", port)
	})
	return int32(unix.EINPROGRESS), p.fd
}

// report writes the line of a connection that failed. A program asks for names
// that are not there as a matter of course, and says so itself.
func (a *agent) report(err error, host string, port uint16) {
	if a.connects.Err() == nil {
		a.o.log.Debug("connection failed", "host", host, "port", port, "err", err)
	}
}

// settle notes how a non-blocking connect ended.
func (a *agent) settle(number uint32, e unix.Errno) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if e == 0 {
		delete(a.status, number)
		return
	}
	a.status[number] = e
	a.failed = append(a.failed, number)
	if len(a.failed) > maxFailed {
		delete(a.status, a.failed[0])
		a.failed = a.failed[1:]
	}
}

// state serves connect called again, and SO_ERROR.
func (a *agent) state(q *request) int32 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return int32(a.status[q.number()])
}

// pair is a connection of UNIX sockets: stream is the agent's end, fd the
// program's.
type pair struct {
	stream *relay.Unix
	fd     int
	peer   string // name that stream gets when the connection is established
	junk   int    // bytes to be taken out for it
}

// sendBuffer is the least send buffer of a program's socket; shim.c has it, too.
// The byte that relay.Unix leaves in the queue keeps the whole piece of memory
// it came in charged to its sender (64 KB from sendfile), and the kernel lets a
// sender go on, and wakes it, only while no more than a quarter of its buffer is
// charged. The kernel doubles this; net.core.wmem_max allows it everywhere.
const sendBuffer = 212992

// newPair makes the sockets of a connection. The program's end is not writable
// until it is established, if it does not block: its buffer is filled, with
// bytes that are never passed on. The last of them, in any case one, stays
// there, see relay.Unix.
func (a *agent) newPair(q *request, number uint32, port uint16, nonblock bool) (*pair, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	p := &pair{fd: fds[1], peer: fmt.Sprintf("@%s%08x/%s", a.connPrefix(), a.peerNumber(), endName(q.Family, q.Addr, uint16(q.Port)))}
	fail := func(err error) (*pair, error) {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, err
	}
	local := fmt.Sprintf("@%s%08x/%s", a.connPrefix(), number, endName(q.Family, selfAddr(q.Family), port))
	if err := unix.Bind(p.fd, &unix.SockaddrUnix{Name: local}); err != nil {
		return fail(err)
	}
	if err := unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer); err != nil {
		return fail(err)
	}
	if p.junk, err = fill(p.fd, nonblock); err != nil {
		return fail(err)
	}
	c, err := fileConn(fds[0])
	if err != nil {
		unix.Close(fds[1])
		return nil, err
	}
	if p.stream, err = relay.NewUnix(c, true); err != nil {
		_ = c.Close()
		unix.Close(fds[1])
		return nil, err
	}
	return p, nil
}

func (a *agent) peerNumber() uint32 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.next()
}

// fill writes into a socket until it is not writable any more, or one byte.
func fill(fd int, full bool) (int, error) {
	total := 0
	var b [4096]byte
	n := 1
	if full {
		n = len(b)
	}
	for {
		k, err := unix.SendmsgN(fd, b[:n], nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			return 0, err
		}
		total += max(k, 0)
		if !full {
			return total, nil
		}
		p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if r, err := unix.Poll(p[:], 0); err != nil || r == 0 {
			return total, err
		}
	}
}

// fileConn makes a connection of a descriptor, which it takes.
func fileConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

// establish makes the program's end writable, and gives it a peer.
func (p *pair) establish() error {
	rc, err := p.stream.SyscallConn()
	if err != nil {
		return err
	}
	var e error
	err = rc.Control(func(fd uintptr) {
		if e = unix.Bind(int(fd), &unix.SockaddrUnix{Name: p.peer}); e != nil {
			return
		}
		var b [4096]byte
		for left := p.junk - 1; left > 0 && e == nil; {
			var n int
			if n, e = unix.Read(int(fd), b[:min(left, len(b))]); n == 0 && e == nil {
				e = unix.ECONNRESET
			}
			left -= max(n, 0)
		}
	})
	return errors.Join(err, e)
}

// abort ends a connection that was not established. The program's end is its own.
func (p *pair) abort() { p.stream.Abort() }

// relay carries a connection until it ends.
func (a *agent) relay(f *o7s.Flow, s *relay.Unix, about ...any) {
	r := relay.New(f, s, relay.Options{})
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		r.Abort()
		return
	}
	a.relays[r] = struct{}{}
	a.mu.Unlock()
	err := r.Run()
	a.mu.Lock()
	delete(a.relays, r)
	a.mu.Unlock()
	if err != nil && a.ctx.Err() == nil {
		a.o.log.Debug("connection failed", append(about, "err", err)...)
	}
}

// resolve serves getaddrinfo: whether the host stands for a name, and the
// address that stands for it.
func (a *agent) resolve(q *request, text []byte) int32 {
	host := q.text()
	if !a.known(host, uint16(q.Port)) {
		if a.o.only {
			return int32(unix.ENOENT)
		}
		return notOurs
	}
	n, ok := a.hosts.number(host)
	if !ok {
		a.o.log.Error("too many hosts", "host", host, "limit", maxHosts)
		return int32(unix.ENOENT)
	}
	copy(text[:len(text)-1], address(n, q.Flags&reqV6 != 0).String())
	return 0
}

// known reports whether a map or a name is about host.
func (a *agent) known(host string, port uint16) bool {
	if a.o.rule.HasHost(host) {
		return true
	}
	ctx, cancel := context.WithTimeout(a.ctx, requestTimeout)
	defer cancel()
	c, err := ipc.Dial(ctx, a.o.runDir)
	if err != nil {
		return false
	}
	defer c.Close()
	list := a.o.rule.Names(host, port)
	if len(list) == 0 {
		return false
	}
	bare := list[len(list)-1]
	var res ipc.ListResult
	if _, err := c.Call(ctx, ipc.OpList, ipc.ListArgs{What: "names", Prefix: bare}, &res); err != nil {
		return false
	}
	for _, n := range res.Names {
		if rest := n.Name[len(bare):]; rest == "" || rest[0] == ':' && isPort(rest[1:], port) {
			return true
		}
	}
	return false
}

// isPort reports whether s is the port, or any if that is 0.
func isPort(s string, port uint16) bool {
	n, err := names.Port(s)
	return err == nil && (port == 0 || n == port)
}

// reverse serves getnameinfo.
func (a *agent) reverse(q *request, text []byte) int32 {
	host, ok := a.hosts.name(q.address())
	if !ok {
		return int32(unix.ENOENT)
	}
	copy(text[:len(text)-1], host)
	return 0
}

// drain lets what the program sent before it ended arrive, until stop is closed
// or for lingerTime.
func (a *agent) drain(stop <-chan struct{}) {
	a.leave()
	told := map[*relay.Relay]bool{}
	end := time.NewTimer(lingerTime)
	defer end.Stop()
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for {
		a.mu.Lock()
		n := a.active
		var list []*relay.Relay
		for r := range a.relays {
			if !told[r] {
				told[r] = true
				list = append(list, r)
			}
		}
		a.mu.Unlock()
		if n == 0 {
			return
		}
		for _, r := range list {
			go r.Drain() // waits for the peer
		}
		select {
		case <-look.C:
		case <-stop:
			return
		case <-end.C:
			a.o.log.Warn("some of what the program sent may not have arrived", "connections", n)
			return
		}
	}
}

// lingerTime is how long run waits for peers after the program has ended.
const lingerTime = 30 * time.Second

// close ends everything. Connections under way are reset.
func (a *agent) close() {
	a.mu.Lock()
	a.closed = true
	all := make([]*relay.Relay, 0, len(a.relays))
	for r := range a.relays {
		all = append(all, r)
	}
	a.mu.Unlock()
	a.cancel()
	_ = a.listener.Close()
	for _, r := range all {
		r.Abort()
	}
	done := make(chan struct{})
	go func() {
		a.server.Close()
		a.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(stopWait):
	}
	_ = a.client.Close()
}

// stopWait bounds what ends at once unless something hangs.
const stopWait = 5 * time.Second
