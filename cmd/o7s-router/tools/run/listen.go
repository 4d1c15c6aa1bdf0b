package run

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/relay"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
)

const (
	// sweepEvery is how often the agent looks which sockets the program has
	// closed. The kernel tells nobody.
	sweepEvery = time.Second
	// queueWait is how long a flow waits for a place in the queue of a program
	// that does not accept.
	queueWait = 20 * time.Second
)

// nameOf is the name that a port is served under.
func (a *agent) nameOf(port uint16) (string, bool) {
	if n, ok := a.o.listen[port]; ok {
		return n, true
	}
	if a.o.host == "" {
		return "", false
	}
	return a.o.host + ":" + strconv.Itoa(int(port)), true
}

// bind serves bind to a port, and listen of a socket that was not bound to one
// of ours.
func (a *agent) bind(q *request) (int32, int) {
	port := uint16(q.Port)
	name, ok := a.nameOf(port)
	if !ok {
		if a.o.only {
			return int32(unix.EADDRNOTAVAIL), -1
		}
		return notOurs, -1
	}
	a.sweep()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return int32(unix.ENETDOWN), -1
	}
	if port == 0 { // listens without being bound
		port = a.ephemeral()
		name, _ = a.nameOf(port)
	}
	b := &bound{
		name: name, family: q.Family, addr: q.Addr, port: port, reuse: q.Flags&reqReusePort != 0,
	}
	for _, x := range a.binds {
		// Addresses are only told apart where programs do it themselves: a server
		// binds one socket for each protocol.
		if x.port == b.port && x.family == b.family && x.addr == b.addr && !(x.reuse && b.reuse) {
			return int32(unix.EADDRINUSE), -1
		}
	}
	b.number = a.next()
	b.path = fmt.Sprintf("%s%08x-%s", a.listenPrefix(), b.number, endName(b.family, b.addr, b.port))
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		if err = unix.Bind(fd, &unix.SockaddrUnix{Name: b.path}); err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		a.o.log.Error("cannot make a socket for a port", "port", port, "err", err)
		return int32(unix.ENOBUFS), -1
	}
	a.binds[b.number] = b
	if !a.sweeping {
		a.sweeping = true
		a.wg.Go(a.sweepLoop)
	}
	return 0, fd
}

// listen serves listen: from now on flows to the name arrive.
func (a *agent) listen(q *request) int32 {
	a.mu.Lock()
	b := a.binds[q.number()]
	again := b != nil && b.serves
	a.mu.Unlock()
	switch {
	case b == nil:
		return int32(unix.EINVAL)
	case again:
		return 0 // changes the length of the queue
	}
	if err := a.server.Add(a.ctx, b.name); err != nil {
		a.o.log.Error("cannot serve a port", "port", b.port, "name", b.name, "err", err)
		switch {
		case errors.Is(err, o7serr.EPERM):
			return int32(unix.EACCES)
		case errors.Is(err, o7serr.EIRMD):
			return int32(unix.ENETDOWN)
		}
		return int32(unix.EADDRNOTAVAIL)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	b.serves = true
	a.byName[b.name] = append(a.byName[b.name], b)
	a.o.log.Debug("serving", "port", b.port, "name", b.name)
	return 0
}

// arrived gives a flow to the program: it connects to one of its sockets.
func (a *agent) arrived(f *o7s.Flow) {
	a.mu.Lock()
	a.active++
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.active--
	}()
	s, err := a.offer(f.Name())
	if err != nil {
		_ = f.Abort()
		if a.ctx.Err() == nil {
			a.o.log.Debug("flow refused", "name", f.Name(), "err", err)
		}
		return
	}
	a.relay(f, s, "name", f.Name())
}

// offer connects to a socket that listens for name, each in its turn.
func (a *agent) offer(name string) (*relay.Unix, error) {
	deadline := time.Now().Add(queueWait)
	for {
		b := a.pick(name)
		if b == nil {
			return nil, unix.ECONNREFUSED
		}
		fd, err := a.dial(b)
		switch {
		case err == nil:
			c, err := fileConn(fd)
			if err != nil {
				return nil, err
			}
			return relay.NewUnix(c, false)
		case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOENT):
			a.forget(b) // the program closed it
		case errors.Is(err, unix.EAGAIN) && time.Now().Before(deadline):
			select { // its queue is full
			case <-time.After(10 * time.Millisecond):
			case <-a.connects.Done():
				return nil, a.connects.Err()
			}
		default:
			return nil, err
		}
	}
}

// pick chooses a socket for the next flow: among those of the first one's
// address, which share the port, each in its turn.
func (a *agent) pick(name string) *bound {
	a.mu.Lock()
	defer a.mu.Unlock()
	var same []*bound
	for _, b := range a.byName[name] {
		if first := a.byName[name][0]; b.family == first.family && b.addr == first.addr && b.port == first.port {
			same = append(same, b)
		}
	}
	if len(same) == 0 {
		return nil
	}
	a.turn[name]++
	return same[a.turn[name]%len(same)]
}

// dial connects to a socket of the program from the address of a peer.
func (a *agent) dial(b *bound) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	a.mu.Lock()
	name := fmt.Sprintf("@%s%08x/%s", a.connPrefix(), a.next(), endName(b.family, wire(peerNumber, b.family), a.ephemeral()))
	a.mu.Unlock()
	if err = unix.Bind(fd, &unix.SockaddrUnix{Name: name}); err == nil {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: b.path})
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// forget drops a socket that the program closed.
func (a *agent) forget(b *bound) {
	a.mu.Lock()
	known := a.binds[b.number] == b
	delete(a.binds, b.number)
	serves := b.serves
	if serves && known {
		a.byName[b.name] = slices.DeleteFunc(a.byName[b.name], func(x *bound) bool { return x == b })
		if len(a.byName[b.name]) == 0 {
			delete(a.byName, b.name)
			delete(a.turn, b.name)
		}
	}
	a.mu.Unlock()
	if !known {
		return
	}
	_ = os.Remove(b.path)
	if serves {
		if err := a.server.Remove(a.ctx, b.name); err != nil && a.ctx.Err() == nil {
			a.o.log.Warn("cannot stop serving a name", "name", b.name, "err", err)
		}
	}
}

func (a *agent) sweepLoop() {
	t := time.NewTicker(sweepEvery)
	defer t.Stop()
	for {
		select {
		case <-a.ctx.Done():
			return
		case <-t.C:
			a.sweep()
		}
	}
}

// sweep forgets the sockets that nobody has open any more.
func (a *agent) sweep() {
	a.mu.Lock()
	list := make([]*bound, 0, len(a.binds))
	for _, b := range a.binds {
		list = append(list, b)
	}
	a.mu.Unlock()
	if len(list) == 0 {
		return
	}
	open, err := openSockets(a.listenPrefix())
	if err != nil {
		a.o.log.Error("cannot see which sockets are open", "err", err)
		return
	}
	for _, b := range list {
		if !open[b.path] {
			a.forget(b)
		}
	}
}

// openSockets lists the UNIX sockets with names under prefix that exist, from
// the kernel's table: files of sockets outlive the sockets.
func openSockets(prefix string) (map[string]bool, error) {
	f, err := os.Open("/proc/net/unix")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out := map[string]bool{}
	s := bufio.NewScanner(f)
	for s.Scan() {
		if i := strings.Index(s.Text(), " "+prefix); i >= 0 {
			out[s.Text()[i+1:]] = true
		}
	}
	return out, s.Err()
}
