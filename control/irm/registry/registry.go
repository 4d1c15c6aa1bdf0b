// Package registry is the state of the resource manager: names, who serves
// them, who is accepting, and the table of flows (spec 45 §1-§5).
//
// It is deterministic: it has no goroutine, clock or socket. Callers pass in
// the time, carry out what Take returns, and call Expire at Deadline. It is not
// safe for concurrent use; the resource manager guards it with one mutex.
package registry

import (
	"cmp"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// MaxName is the longest name of anything, in bytes (spec 47 §4.5).
const MaxName = 255

// AcceptWait is how long a request waits for a bound process to accept, and
// how much longer when a program was started for it (spec 47 §4.1,
// IRMD_REQ_ARR_TIMEOUT).
const AcceptWait = 1000 * time.Millisecond

// LB is the load-balancing policy of a name (spec 45 §4).
type LB uint8

// Policies.
const (
	RoundRobin LB = 0 // the process that waits longest is served first
	Spillover  LB = 1 // the most recent acceptor is served first
)

func (l LB) String() string {
	if l == Spillover {
		return "spillover"
	}
	return "round-robin"
}

// ParseLB reads the words of command line and configuration file; "" is
// round-robin.
func ParseLB(s string) (LB, error) {
	switch s {
	case "", "round-robin":
		return RoundRobin, nil
	case "spillover", "spill":
		return Spillover, nil
	}
	return 0, fmt.Errorf("unknown load balancing %q (expected round-robin or spillover)", s)
}

// Registry holds everything. Make one with New.
type Registry struct {
	Flows

	names    map[string]*name
	index    [len(Algorithms)]map[string]*name // by hash of the name
	programs map[string]*program               // by base name
	clients  map[uint64]*client
	bound    map[int32]map[*name]struct{} // names bound to a pid
	members  map[int32]*member            // IPC processes by id
	accepts  map[uint64]*accept
	tickets  map[uint64]*ticket
	serial   uint64 // last ticket
	out      []Answer
}

type name struct {
	name     string
	lb       LB
	hashes   [len(Algorithms)]string
	programs []*binding // oldest first
	pids     map[int32]struct{}
	members  map[int32]struct{}
	layers   map[int32]struct{} // IPC processes it is registered with
	queue    []entry            // acceptors, the next one first
	waiting  []*ticket          // requests, the oldest first
	starting time.Time          // a started program has until then to accept
}

type binding struct {
	prog *program
	auto bool
	args []string // without argv[0]
}

type program struct {
	base, path string
	names      map[*name]struct{}
}

// client is a process as its connection to the local socket.
type client struct {
	key      uint64
	pid      int32
	uid, gid uint32
	prog     string // base name
	args     []string
	accepts  map[*accept]struct{}
}

type member struct {
	id    int32
	name  string
	ready bool
	names map[*name]struct{}
}

type accept struct {
	key    uint64
	client *client
}

// entry is an acceptor in the queue of a name: one pending accept of a
// process, or an IPC process, which always accepts.
type entry struct {
	accept *accept
	member *member
}

// New returns an empty registry.
func New() *Registry {
	r := &Registry{
		names: map[string]*name{}, programs: map[string]*program{},
		clients: map[uint64]*client{}, bound: map[int32]map[*name]struct{}{},
		members: map[int32]*member{}, accepts: map[uint64]*accept{}, tickets: map[uint64]*ticket{},
	}
	for i := range r.index {
		r.index[i] = map[string]*name{}
	}
	r.init()
	return r
}

// CheckName reports what is wrong with s as the name of what.
func CheckName(what, s string) error {
	switch {
	case s == "":
		return fail(o7serr.EINVAL, "%s is missing", what)
	case len(s) > MaxName:
		return fail(o7serr.EINVAL, "%s has %d bytes, at most %d are allowed", what, len(s), MaxName)
	case strings.IndexByte(s, 0) >= 0:
		return fail(o7serr.EINVAL, "%s contains a zero byte", what)
	}
	return nil
}

// fail returns an error with number e that reads as formatted, without the
// general text of the number behind it.
func fail(e o7serr.Errno, format string, a ...any) error {
	return o7serr.FromCode(e.Code(), fmt.Sprintf(format, a...))
}

func unknownName(n string) error {
	return fail(o7serr.ENAME, "unknown name %q (create, bind or register it here first)", n)
}

// CreateName creates a name. It fails with ENAME when it exists.
func (r *Registry) CreateName(n string, lb LB) error {
	if err := CheckName("name", n); err != nil {
		return err
	}
	if _, ok := r.names[n]; ok {
		return fail(o7serr.EEXIST, "name %q exists already", n)
	}
	r.ensure(n, lb)
	return nil
}

// EnsureName creates a missing name with policy spillover (spec 45 §4).
func (r *Registry) EnsureName(n string) error {
	if err := CheckName("name", n); err != nil {
		return err
	}
	r.ensure(n, Spillover)
	return nil
}

func (r *Registry) ensure(n string, lb LB) *name {
	if x, ok := r.names[n]; ok {
		return x
	}
	x := &name{
		name: n, lb: lb, pids: map[int32]struct{}{},
		members: map[int32]struct{}{}, layers: map[int32]struct{}{},
	}
	r.names[n] = x
	for i, alg := range Algorithms {
		x.hashes[i] = string(Hash(alg, n))
		r.index[i][x.hashes[i]] = x
	}
	return x
}

// DestroyName removes a name with its bindings. Requests that wait for it are
// answered with nobody; flows stay. It returns the IPC processes that the name
// was registered with.
func (r *Registry) DestroyName(n string) (registered []int32, err error) {
	x, ok := r.names[n]
	if !ok {
		return nil, unknownName(n)
	}
	registered = slices.Sorted(maps.Keys(x.layers))
	for _, b := range x.programs {
		delete(b.prog.names, x)
		r.dropProgram(b.prog)
	}
	for pid := range x.pids {
		r.unlink(pid, x)
	}
	for id := range x.members {
		delete(r.members[id].names, x)
	}
	for i := range r.index {
		delete(r.index[i], x.hashes[i])
	}
	delete(r.names, n)
	for _, t := range slices.Clone(x.waiting) {
		r.settle(t, Answer{Verdict: Nobody})
	}
	return registered, nil
}

// HasName reports whether n was created.
func (r *Registry) HasName(n string) bool { _, ok := r.names[n]; return ok }

// NameByHash finds the created name with that key in a layer that uses alg.
func (r *Registry) NameByHash(alg ipcp.HashAlg, hash []byte) (string, bool) {
	if int(alg) >= len(r.index) {
		return "", false
	}
	x, ok := r.index[alg][string(hash)]
	if !ok {
		return "", false
	}
	return x.name, true
}

// Registered records that name n is registered with IPC process id, or, with
// on false, that it is not any more.
func (r *Registry) Registered(n string, id int32, on bool) {
	x, ok := r.names[n]
	if !ok {
		return
	}
	if on {
		x.layers[id] = struct{}{}
	} else {
		delete(x.layers, id)
	}
}

// RegisteredWith lists the names registered with IPC process id.
func (r *Registry) RegisteredWith(id int32) []string {
	var out []string
	for n, x := range r.names {
		if _, ok := x.layers[id]; ok {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}

// BindProgram says that the program at path serves n. With auto it is started
// with args when a flow arrives and nobody accepts. Processes that run already
// are not affected (spec 45 §3). It fails with EINVAL when it is bound already.
func (r *Registry) BindProgram(path string, args []string, auto bool, n string) error {
	base := filepath.Base(path)
	if err := CheckName("program", path); err != nil {
		return err
	}
	if !filepath.IsAbs(path) {
		return fail(o7serr.EINVAL, "program %q: expected an absolute path", path)
	}
	if err := CheckName("name", n); err != nil {
		return err
	}
	x := r.ensure(n, Spillover)
	for _, b := range x.programs {
		if b.prog.base == base {
			return fail(o7serr.EINVAL, "program %q is bound to name %q already", base, n)
		}
	}
	p, ok := r.programs[base]
	if !ok {
		p = &program{base: base, names: map[*name]struct{}{}}
		r.programs[base] = p
	}
	p.path = path
	p.names[x] = struct{}{}
	x.programs = append(x.programs, &binding{prog: p, auto: auto, args: slices.Clone(args)})
	return nil
}

// UnbindProgram is the inverse; prog is a path or a base name. Running
// processes stay bound.
func (r *Registry) UnbindProgram(prog, n string) error {
	x, ok := r.names[n]
	if !ok {
		return unknownName(n)
	}
	base := filepath.Base(prog)
	for i, b := range x.programs {
		if b.prog.base == base {
			x.programs = slices.Delete(x.programs, i, i+1)
			delete(b.prog.names, x)
			r.dropProgram(b.prog)
			r.recheck(x)
			return nil
		}
	}
	return fail(o7serr.EINVAL, "program %q is not bound to name %q", base, n)
}

func (r *Registry) dropProgram(p *program) {
	if len(p.names) == 0 {
		delete(r.programs, p.base)
	}
}

// Announce adds a process. key identifies its connection; several may have the
// same pid. Every name bound to its program is bound to it (spec 45 §3).
func (r *Registry) Announce(key uint64, pid int32, uid, gid uint32, prog string, args []string) error {
	if err := CheckName("program", prog); err != nil {
		return err
	}
	if _, ok := r.clients[key]; ok {
		return fail(o7serr.EINVAL, "process %d announced itself already", pid)
	}
	r.clients[key] = &client{
		key: key, pid: pid, uid: uid, gid: gid, prog: filepath.Base(prog), args: args,
		accepts: map[*accept]struct{}{},
	}
	if p, ok := r.programs[filepath.Base(prog)]; ok {
		for x := range p.names {
			r.link(pid, x)
		}
	}
	return nil
}

// Announced reports whether a process with that pid is known.
func (r *Registry) Announced(pid int32) bool {
	for _, c := range r.clients {
		if c.pid == pid {
			return true
		}
	}
	return false
}

// Leave removes a process: its accepts are withdrawn, and with the last
// connection of its pid the bindings of the pid.
func (r *Registry) Leave(key uint64) {
	c, ok := r.clients[key]
	if !ok {
		return
	}
	for a := range c.accepts {
		r.CancelAccept(a.key)
	}
	delete(r.clients, key)
	if !r.Announced(c.pid) {
		for x := range r.bound[c.pid] {
			r.unlink(c.pid, x)
			r.recheck(x)
		}
	}
}

func (r *Registry) link(pid int32, x *name) {
	x.pids[pid] = struct{}{}
	if r.bound[pid] == nil {
		r.bound[pid] = map[*name]struct{}{}
	}
	r.bound[pid][x] = struct{}{}
}

func (r *Registry) unlink(pid int32, x *name) {
	delete(x.pids, pid)
	delete(r.bound[pid], x)
	if len(r.bound[pid]) == 0 {
		delete(r.bound, pid)
	}
	x.queue = slices.DeleteFunc(x.queue, func(e entry) bool { return e.accept != nil && e.accept.client.pid == pid })
}

// BindProcess says that the process pid, which must have announced itself,
// serves n. What it accepts at this moment becomes eligible at once.
func (r *Registry) BindProcess(pid int32, n string) error {
	if !r.Announced(pid) {
		return fail(o7serr.EINVAL, "no process %d has announced itself", pid)
	}
	if err := CheckName("name", n); err != nil {
		return err
	}
	x := r.ensure(n, Spillover)
	if _, ok := x.pids[pid]; ok {
		return fail(o7serr.EINVAL, "process %d is bound to name %q already", pid, n)
	}
	r.link(pid, x)
	var pending []*accept
	for _, a := range r.accepts {
		if a.client.pid == pid {
			pending = append(pending, a)
		}
	}
	slices.SortFunc(pending, func(a, b *accept) int { return cmp.Compare(a.key, b.key) })
	for _, a := range pending {
		if r.accepts[a.key] != nil { // a request may have taken it just now
			r.enqueue(x, entry{accept: a})
		}
	}
	return nil
}

// UnbindProcess is the inverse.
func (r *Registry) UnbindProcess(pid int32, n string) error {
	x, ok := r.names[n]
	if !ok {
		return unknownName(n)
	}
	if _, ok := x.pids[pid]; !ok {
		return fail(o7serr.EINVAL, "process %d is not bound to name %q", pid, n)
	}
	r.unlink(pid, x)
	r.recheck(x)
	return nil
}

// AddMember makes IPC process id known. It accepts flows while it is ready.
func (r *Registry) AddMember(id int32, ipcpName string) {
	r.members[id] = &member{id: id, name: ipcpName, names: map[*name]struct{}{}}
}

// SetReady says whether IPC process id can take flows.
func (r *Registry) SetReady(id int32, ready bool) {
	m, ok := r.members[id]
	if !ok || m.ready == ready {
		return
	}
	m.ready = ready
	if ready {
		for x := range m.names {
			r.serve(x)
		}
	}
}

// RemoveMember forgets IPC process id, its bindings and registrations.
func (r *Registry) RemoveMember(id int32) {
	m, ok := r.members[id]
	if !ok {
		return
	}
	delete(r.members, id)
	for x := range m.names {
		r.unlinkMember(m, x)
		r.recheck(x)
	}
	for _, x := range r.names {
		delete(x.layers, id)
	}
}

// BindMember says that IPC process id serves n.
func (r *Registry) BindMember(id int32, n string) error {
	m, ok := r.members[id]
	if !ok {
		return fail(o7serr.EINVAL, "no ipcp with id %d", id)
	}
	if err := CheckName("name", n); err != nil {
		return err
	}
	x := r.ensure(n, Spillover)
	if _, ok := m.names[x]; ok {
		return fail(o7serr.EINVAL, "ipcp %q is bound to name %q already", m.name, n)
	}
	m.names[x] = struct{}{}
	x.members[id] = struct{}{}
	r.enqueue(x, entry{member: m})
	return nil
}

// UnbindMember is the inverse.
func (r *Registry) UnbindMember(id int32, n string) error {
	x, ok := r.names[n]
	if !ok {
		return unknownName(n)
	}
	m := r.members[id]
	if m == nil {
		return fail(o7serr.EINVAL, "no ipcp with id %d", id)
	}
	if _, ok := m.names[x]; !ok {
		return fail(o7serr.EINVAL, "ipcp %q is not bound to name %q", m.name, n)
	}
	r.unlinkMember(m, x)
	r.recheck(x)
	return nil
}

func (r *Registry) unlinkMember(m *member, x *name) {
	delete(m.names, x)
	delete(x.members, m.id)
	x.queue = slices.DeleteFunc(x.queue, func(e entry) bool { return e.member == m })
}

// Names describes the names that start with prefix, sorted.
func (r *Registry) Names(prefix string) []ipc.NameInfo {
	var out []ipc.NameInfo
	for n, x := range r.names {
		if !strings.HasPrefix(n, prefix) {
			continue
		}
		info := ipc.NameInfo{
			Name: n, LB: x.lb.String(), Programs: []string{}, IPCPs: []string{}, Registered: []string{},
			Processes: slices.Sorted(maps.Keys(x.pids)), Accepting: len(x.queue),
		}
		if info.Processes == nil {
			info.Processes = []int32{}
		}
		for _, b := range x.programs {
			info.Programs = append(info.Programs, b.prog.base)
		}
		for id := range x.members {
			info.IPCPs = append(info.IPCPs, r.members[id].name)
		}
		for id := range x.layers {
			if m := r.members[id]; m != nil {
				info.Registered = append(info.Registered, m.name)
			}
		}
		slices.Sort(info.Programs)
		slices.Sort(info.IPCPs)
		slices.Sort(info.Registered)
		out = append(out, info)
	}
	slices.SortFunc(out, func(a, b ipc.NameInfo) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// Counts are the sizes of the tables.
type Counts struct{ Names, Programs, Processes, Accepting, Waiting int }

// Counts returns the sizes of the tables.
func (r *Registry) Counts() Counts {
	pids := map[int32]struct{}{}
	for _, c := range r.clients {
		pids[c.pid] = struct{}{}
	}
	return Counts{
		Names: len(r.names), Programs: len(r.programs), Processes: len(pids),
		Accepting: len(r.accepts), Waiting: len(r.tickets),
	}
}

// MemberBound reports whether IPC process id is bound to n.
func (r *Registry) MemberBound(id int32, n string) bool {
	x, ok := r.names[n]
	if !ok {
		return false
	}
	_, ok = x.members[id]
	return ok
}
