// Package ipc is the protocol between programs, the command line and the
// daemon: one UNIX SEQPACKET connection per process, one JSON message per
// packet, descriptors beside it (SCM_RIGHTS). It never leaves the machine.
//
// A connection carries many requests at once; each has an ID that its reply
// repeats. The daemon sends events (ID 0) unasked. Who the peer is comes from
// the socket's credentials, never from a message.
package ipc

import (
	"encoding/json"

	"github.com/o7s/o7s-router/lib/qos"
	"github.com/o7s/o7s-router/lib/ring"
)

// MaxMessage is the largest message in bytes; a longer one is an error for
// that client alone. Replies with longer results come in parts.
const MaxMessage = 1 << 17

// partSize is how much of a long result one message carries: it grows by a
// third in JSON.
const partSize = MaxMessage / 2

// SocketName is the name of the daemon's socket in its run directory.
const SocketName = "irm.sock"

// DefaultRunDir is used when neither --run-dir nor O7S_RUN_DIR is given.
const DefaultRunDir = "/run/o7s"

// Request is what a client sends.
type Request struct {
	ID   uint64          `json:"id"`
	Op   Op              `json:"op"`
	Args json.RawMessage `json:"args,omitempty"`
}

// Reply answers the request with the same ID. Code is 0 or a negative O7s error
// number. A result that is too long for one message (`show routes` of a large
// layer) comes as the Parts of several replies, all but the last with More.
type Reply struct {
	ID     uint64          `json:"id"`
	Code   int32           `json:"code,omitempty"`
	Error  string          `json:"error,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
	Part   []byte          `json:"part,omitempty"`
	More   bool            `json:"more,omitempty"`
	Event  *FlowEvent      `json:"event,omitempty"` // with ID 0
}

// FlowEvent tells a program what happened to one of its flows, or that the
// process with which it shares a slab has left.
type FlowEvent struct {
	Flow uint32 `json:"flow,omitempty"`
	Type string `json:"type"` // down, up, dealloc, peer; slab
	Slab uint32 `json:"slab,omitempty"`
}

// Op names an operation.
type Op string

// Operations. Those from OpIPCPCreate on manage the node and need root or the
// configured group; OpShow and the lists need nothing.
const (
	OpHello   Op = "hello"   // HelloArgs -> HelloResult
	OpAlloc   Op = "alloc"   // AllocArgs -> FlowResult + descriptors
	OpAccept  Op = "accept"  // AcceptArgs -> FlowResult + descriptors
	OpJoin    Op = "join"    // JoinArgs -> FlowResult
	OpDealloc Op = "dealloc" // DeallocArgs -> {}
	OpCancel  Op = "cancel"  // CancelArgs -> {}: gives up a pending alloc or accept

	OpList Op = "list" // ListArgs -> ListResult: ipcps and names
	OpShow Op = "show" // ShowArgs -> a show result (see show.go of the daemon)

	OpIPCPCreate     Op = "ipcp-create"     // IPCPArgs
	OpIPCPDestroy    Op = "ipcp-destroy"    // IPCPArgs
	OpIPCPBootstrap  Op = "ipcp-bootstrap"  // BootstrapArgs
	OpIPCPEnroll     Op = "ipcp-enroll"     // EnrollArgs
	OpIPCPConnect    Op = "ipcp-connect"    // ConnectArgs
	OpIPCPDisconnect Op = "ipcp-disconnect" // ConnectArgs
	OpNameCreate     Op = "name-create"     // NameArgs
	OpNameDestroy    Op = "name-destroy"    // NameArgs
	OpNameRegister   Op = "name-register"   // RegisterArgs
	OpNameUnregister Op = "name-unregister" // RegisterArgs
	OpBind           Op = "bind"            // BindArgs
	OpUnbind         Op = "unbind"          // BindArgs
)

// HelloArgs announce a process: the base name of its program (for an
// interpreter the script's) and its arguments.
type HelloArgs struct {
	Prog string   `json:"prog"`
	Args []string `json:"args,omitempty"`
}

// HelloResult is the daemon's answer.
type HelloResult struct {
	Version string `json:"version"`
	PID     int32  `json:"pid"`
}

// AllocArgs ask for a flow. TimeoutMS 0 means the default of 20 s, whose
// expiry gives -EPERM where an explicit one gives -ETIMEDOUT (spec 33 §3).
type AllocArgs struct {
	Name      string   `json:"name"`
	QoS       qos.Spec `json:"qos"`
	TimeoutMS int64    `json:"timeout_ms,omitempty"`
	Encrypt   bool     `json:"encrypt,omitempty"` // refused with -ECRYPT
	Auth      bool     `json:"auth,omitempty"`    // refused with -EAUTH
}

// AcceptArgs wait for a flow to any name the process serves; TimeoutMS 0 waits
// for ever, negative does not wait.
type AcceptArgs struct {
	TimeoutMS int64 `json:"timeout_ms,omitempty"`
}

// JoinArgs ask for membership in a broadcast layer.
type JoinArgs struct {
	Layer     string `json:"layer"`
	TimeoutMS int64  `json:"timeout_ms,omitempty"`
}

// CancelArgs name the request to give up.
type CancelArgs struct {
	ID uint64 `json:"id"`
}

// DeallocArgs release a flow. LingerMS is how much longer the layer must not use
// the flow's endpoint again: packets that belong to it may still arrive (spec 30
// §9).
type DeallocArgs struct {
	Flow     uint32 `json:"flow"`
	LingerMS int64  `json:"linger_ms,omitempty"`
}

// FlowResult describes a flow and the descriptors sent with it: those of the
// grant of its rings and, with App set and its NewFD, the process's fast-path
// device.
type FlowResult struct {
	Flow   uint32     `json:"flow"`
	Name   string     `json:"name"`
	QoS    qos.Spec   `json:"qos"`
	MPL    uint32     `json:"mpl_ms"`
	MTU    int        `json:"mtu"`
	Layer  string     `json:"layer,omitempty"`
	Direct bool       `json:"direct,omitempty"` // both ends on this machine, daemon off the path
	Ring   ring.Grant `json:"ring"`
	App    *AppPort   `json:"app,omitempty"`
}

// FDs is the number of descriptors that come with the result.
func (r *FlowResult) FDs() int {
	n := r.Ring.FDs()
	if r.App != nil && r.App.NewFD {
		n++
	}
	return n
}

// AppPort says that the flow's packets go through the process's fast-path
// device instead of the rings: each frame starts with Headroom bytes whose
// first eight are the handle (see fastpath.App).
type AppPort struct {
	Device   string `json:"device"`
	Handle   uint32 `json:"handle"`
	Headroom int    `json:"headroom"`
	NewFD    bool   `json:"new_fd"` // its descriptor is the last of this message
}

// IPCPArgs name an IPC process; Type for creation.
type IPCPArgs struct {
	Name string `json:"name"`
	Type string `json:"type,omitempty"`
}

// BootstrapArgs carry the options of spec 47 §1 by their command-line keyword;
// absent ones get the default. The IPC process is created when it does not
// exist and Type is given.
type BootstrapArgs struct {
	Name     string            `json:"name"`
	Type     string            `json:"type,omitempty"`
	Layer    string            `json:"layer"`
	Autobind bool              `json:"autobind,omitempty"`
	Options  map[string]string `json:"options,omitempty"`
}

// EnrollArgs: at least one of Layer and Dst.
type EnrollArgs struct {
	Name     string `json:"name"`
	Type     string `json:"type,omitempty"` // default unicast
	Layer    string `json:"layer,omitempty"`
	Dst      string `json:"dst,omitempty"`
	Autobind bool   `json:"autobind,omitempty"`
}

// ConnectArgs connect or disconnect; Component is dt, mgmt or * (both).
type ConnectArgs struct {
	Name      string   `json:"name"`
	Dst       string   `json:"dst"`
	Component string   `json:"component,omitempty"`
	QoS       qos.Spec `json:"qos"`
}

// NameArgs name a name; LB is round-robin (default) or spillover. Security maps
// the path options of spec 45 §9 (sencpath, scrtpath, ...) to files.
type NameArgs struct {
	Name     string            `json:"name"`
	LB       string            `json:"lb,omitempty"`
	Security map[string]string `json:"security,omitempty"`
}

// RegisterArgs register a name with IPC processes and layers ('*' wildcards).
type RegisterArgs struct {
	Name   string   `json:"name"`
	IPCPs  []string `json:"ipcps,omitempty"`
	Layers []string `json:"layers,omitempty"`
}

// BindArgs bind one of Prog (absolute path), PID, IPCP to Name.
type BindArgs struct {
	Name string   `json:"name"`
	Prog string   `json:"prog,omitempty"`
	Auto bool     `json:"auto,omitempty"`
	Args []string `json:"args,omitempty"`
	PID  int32    `json:"pid,omitempty"`
	IPCP string   `json:"ipcp,omitempty"`
}

// ListArgs: What is ipcps or names; Prefix filters names.
type ListArgs struct {
	What   string `json:"what"`
	Prefix string `json:"prefix,omitempty"`
}

// ListResult of OpList.
type ListResult struct {
	IPCPs []IPCPInfo `json:"ipcps,omitempty"`
	Names []NameInfo `json:"names,omitempty"`
}

// IPCPInfo describes an IPC process. ID plays the part of the reference's pid.
type IPCPInfo struct {
	ID    int32  `json:"id"`
	Name  string `json:"name"`
	Type  string `json:"type"`
	Layer string `json:"layer"` // "" when not enrolled
	State string `json:"state"`
	Hash  string `json:"hash"`
}

// NameInfo describes a name.
type NameInfo struct {
	Name       string   `json:"name"`
	LB         string   `json:"lb"`
	Programs   []string `json:"programs"`
	Processes  []int32  `json:"processes"`
	IPCPs      []string `json:"ipcps"`
	Registered []string `json:"registered"` // IPC processes it is registered with
	Accepting  int      `json:"accepting"`
}

// ShowArgs: What is layers, flows, names, neighbors, lsdb, routes, directory,
// fastpath or drops.
type ShowArgs struct {
	What string `json:"what"`
}
