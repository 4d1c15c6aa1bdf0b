package irm

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
)

func TestParseConfig(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	opts := func(kv ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	all := ipcp.DefaultUnicast()
	all.MaxTTL, all.Routing, all.TRecalc, all.TUpdate, all.TTimeo = 16, ipcp.ECMP, 1, 2, 3
	all.DHTAlpha, all.DHTK, all.DHTExpire, all.DHTRefresh, all.DHTRep, all.Congestion = 4, 5, 60, 6, 7, 0
	lfa := ipcp.DefaultUnicast()
	lfa.Routing = ipcp.LFA
	for _, tc := range []struct {
		typ  ipcp.Type
		opts map[string]string
		want ipcp.Config
		err  string
	}{
		{ipcp.Local, nil, ipcp.Config{Type: ipcp.Local, Hash: ipcp.SHA3_256}, ""},
		{ipcp.Local, opts("hash", "SHA3_512"), ipcp.Config{Type: ipcp.Local, Hash: ipcp.SHA3_512}, ""},
		{ipcp.Local, opts("hash", "MD5"), ipcp.Config{}, `option hash "MD5": unknown hash "MD5" (expected SHA3_224, SHA3_256, SHA3_384, SHA3_512)`},
		{ipcp.Local, opts("ttl", "3"), ipcp.Config{}, "option ttl does not apply to type local (it knows hash)"},
		{ipcp.Local, opts("colour", "red"), ipcp.Config{}, `unknown option "colour" (type local knows hash)`},
		{ipcp.EthDIX, opts("dev", "eth0"), ipcp.Config{Type: ipcp.EthDIX, Hash: ipcp.SHA3_256, Eth: ipcp.EthConfig{Device: "eth0", EtherType: 0xa000}}, ""},
		{ipcp.EthDIX, opts("dev", "eth0", "ethertype", "0xB001"), ipcp.Config{Type: ipcp.EthDIX, Hash: ipcp.SHA3_256, Eth: ipcp.EthConfig{Device: "eth0", EtherType: 0xb001}}, ""},
		{ipcp.EthDIX, opts("dev", "eth0", "ethertype", "05ff"), ipcp.Config{}, `option ethertype "05ff": expected a hexadecimal number from 0x0600 to 0xFFFE`},
		{ipcp.EthDIX, opts("dev", "eth0", "ethertype", "ffff"), ipcp.Config{}, `option ethertype "ffff": expected a hexadecimal number from 0x0600 to 0xFFFE`},
		{ipcp.EthDIX, nil, ipcp.Config{}, "option dev is missing: type eth-dix needs a network interface"},
		{ipcp.Unicast, nil, ipcp.Config{Type: ipcp.Unicast, Hash: ipcp.SHA3_256, Unicast: ipcp.DefaultUnicast()}, ""},
		{ipcp.Unicast, opts("ttl", "16", "routing", "ecmp", "ls_t_recalc", "1", "ls_t_update", "2", "ls_t_timeo", "3", "dht_alpha", "4",
			"dht_k", "5", "dht_t_expire", "60", "dht_t_refresh", "6", "dht_t_replicate", "7", "congestion", "none", "addr_size", "4",
			"eid_size", "4", "addr_auth", "flat", "directory", "DHT"),
			ipcp.Config{Type: ipcp.Unicast, Hash: ipcp.SHA3_256, Unicast: all}, ""},
		{ipcp.Unicast, opts("routing", "lfa"), ipcp.Config{Type: ipcp.Unicast, Hash: ipcp.SHA3_256, Unicast: lfa}, ""},
		{ipcp.Unicast, opts("routing", "link-state"), ipcp.Config{Type: ipcp.Unicast, Hash: ipcp.SHA3_256, Unicast: ipcp.DefaultUnicast()}, ""},
		{ipcp.Unicast, opts("addr_size", "8"), ipcp.Config{}, `option addr_size "8": only 4 works with address authority flat`},
		{ipcp.Unicast, opts("ttl", "0"), ipcp.Config{}, `option ttl "0": expected a number from 1 to 255`},
		{ipcp.Unicast, opts("dht_t_refresh", "-3"), ipcp.Config{}, `option dht_t_refresh "-3": expected a number from 3 to 3600`},
		{ipcp.Unicast, opts("routing", "ospf"), ipcp.Config{}, `option routing "ospf": expected link_state, lfa or ecmp`},
	} {
		got, err := ParseConfig(tc.typ, ipc.BootstrapArgs{Layer: "l", Options: tc.opts}, log)
		if tc.err != "" {
			if err == nil || err.Error() != tc.err {
				t.Errorf("%v %v: error %v, want %s", tc.typ, tc.opts, err, tc.err)
			}
			code(t, err, o7serr.EINVAL)
			continue
		}
		tc.want.LayerName = "l"
		if err != nil || got != tc.want {
			t.Errorf("%v %v: %v\n%s", tc.typ, tc.opts, err, cmp.Diff(tc.want, got))
		}
	}
}

func TestMatch(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pattern := rapid.StringMatching(`[ab*.]{0,6}`).Draw(t, "pattern")
		s := rapid.StringMatching(`[ab.]{0,8}`).Draw(t, "s")
		oracle := regexp.MustCompile("^" + strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, ".*") + "$")
		if got, want := match(pattern, s), oracle.MatchString(s); got != want {
			t.Fatalf("match(%q, %q) = %v", pattern, s, got)
		}
	})
}

// Every mistake gets one line that says what was expected or is known.
func TestManagementErrors(t *testing.T) {
	n, _ := wired(t)
	p := n.prog("")
	n.name("known")
	for _, tc := range []struct {
		op   ipc.Op
		args any
		code o7serr.Errno
		text string
	}{
		{ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "x", Type: "foo"}, o7serr.EIPCPTYPE, `unknown ipcp type "foo" (expected local, unicast, broadcast, eth-llc, eth-dix, udp4, udp6)`},
		{ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "x", Type: "udp4"}, o7serr.EIPCPTYPE, "ipcp type udp4 is not available yet (available: eth-dix, local, unicast)"},
		{ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "eth0", Type: "local"}, o7serr.EINVAL, `ipcp "eth0" exists already`},
		{ipc.OpIPCPCreate, ipc.IPCPArgs{Type: "local"}, o7serr.EINVAL, "ipcp name is missing"},
		{ipc.OpIPCPCreate, ipc.IPCPArgs{Name: strings.Repeat("n", 256), Type: "local"}, o7serr.EINVAL, "ipcp name has 256 bytes, at most 255 are allowed"},
		{ipc.OpIPCPDestroy, ipc.IPCPArgs{Name: "x"}, o7serr.EIPCP, `unknown ipcp "x" (known ipcps: eth0)`},
		{ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "x", Layer: "l"}, o7serr.EIPCP, `unknown ipcp "x" (known ipcps: eth0); give its type to create it`},
		{ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "eth0", Layer: "l", Options: map[string]string{"dev": "lo"}}, o7serr.EIPCPSTATE, `bootstrap ipcp "eth0": it is a member of layer "wire" already`},
		{ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "eth0", Type: "local", Layer: "l"}, o7serr.EIPCPTYPE, `ipcp "eth0" is of type eth-dix, not local`},
		{ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "y", Type: "local", Layer: "l", Options: map[string]string{"ttl": "1"}}, o7serr.EINVAL, "option ttl does not apply to type local (it knows hash)"},
		{ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: "x"}, o7serr.EINVAL, `enroll ipcp "x": expected a layer or a destination`},
		{ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: "x", Layer: "nowhere"}, o7serr.ENAME, `unknown name "nowhere" (create, bind or register it here first)`},
		{ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: "eth0", Dst: "known"}, o7serr.ENOTSUP, `enroll ipcp "eth0": type eth-dix has no members to meet, expected unicast`},
		{ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "eth0", Dst: "known", Component: "foo"}, o7serr.EINVAL, `unknown component "foo" (expected dt, mgmt or *)`},
		{ipc.OpIPCPDisconnect, ipc.ConnectArgs{Name: "eth0", Dst: "known"}, o7serr.ENOTSUP, `disconnect ipcp "eth0": type eth-dix has no members to meet, expected unicast`},
		{ipc.OpNameCreate, ipc.NameArgs{Name: "known"}, o7serr.EEXIST, `name "known" exists already`},
		{ipc.OpNameCreate, ipc.NameArgs{Name: "x", LB: "random"}, o7serr.EINVAL, `unknown load balancing "random" (expected round-robin or spillover)`},
		{ipc.OpNameDestroy, ipc.NameArgs{Name: "x"}, o7serr.ENAME, `unknown name "x" (create, bind or register it here first)`},
		{ipc.OpNameRegister, ipc.RegisterArgs{Name: "known", Layers: []string{"foo"}}, o7serr.EIPCP, `no layer matches "foo" (known layers: wire)`},
		{ipc.OpNameRegister, ipc.RegisterArgs{Name: "known"}, o7serr.EINVAL, `name "known": expected at least one ipcp or layer`},
		{ipc.OpNameUnregister, ipc.RegisterArgs{Name: "known", IPCPs: []string{"eth*"}}, o7serr.ENAME, `name "known" is not registered there`},
		{ipc.OpBind, ipc.BindArgs{Name: "known"}, o7serr.EINVAL, "expected one of program, process and ipcp, got 0"},
		{ipc.OpBind, ipc.BindArgs{Name: "known", Prog: "relative"}, o7serr.EINVAL, `program "relative": expected an absolute path`},
		{ipc.OpBind, ipc.BindArgs{Name: "known", PID: 1 << 30}, o7serr.EINVAL, "no process 1073741824 has announced itself"},
		{ipc.OpBind, ipc.BindArgs{Name: "known", IPCP: "x"}, o7serr.EIPCP, `unknown ipcp "x" (known ipcps: eth0)`},
		{ipc.OpUnbind, ipc.BindArgs{Prog: "/bin/x"}, o7serr.EINVAL, "unbind program: expected a name"},
		{ipc.OpUnbind, ipc.BindArgs{Name: "known", Prog: "/bin/x"}, o7serr.EINVAL, `program "x" is not bound to name "known"`},
		{ipc.OpList, ipc.ListArgs{What: "x"}, o7serr.EINVAL, `unknown list "x" (expected ipcps or names)`},
		{ipc.OpShow, ipc.ShowArgs{What: "x"}, o7serr.EINVAL, `unknown show "x" (expected layers, flows, names, neighbors, lsdb, routes, directory, fastpath, drops)`},
		{"frobnicate", struct{}{}, o7serr.ENOTSUP, `unknown operation "frobnicate"`},
	} {
		_, err := p.Call(t.Context(), tc.op, tc.args, nil)
		code(t, err, tc.code)
		if err != nil && err.Error() != tc.text {
			t.Errorf("%s: %q\nwant %q", tc.op, err.Error(), tc.text)
		}
	}
	if ipcps := call[ipc.ListResult](t, p, ipc.OpList, ipc.ListArgs{What: "ipcps"}).IPCPs; len(ipcps) != 1 {
		t.Errorf("a failed command left an ipcp: %+v", ipcps)
	}
}

func TestManagement(t *testing.T) {
	n, l := wired(t)
	p := n.prog("server")
	do := func(op ipc.Op, args any) {
		t.Helper()
		if _, err := p.Call(t.Context(), op, args, nil); err != nil {
			t.Fatal(err)
		}
	}
	do(ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "loc", Type: "local", Layer: "here", Autobind: true, Options: map[string]string{"hash": "SHA3_384"}})
	do(ipc.OpNameRegister, ipc.RegisterArgs{Name: "srv", Layers: []string{"*e*"}, IPCPs: []string{"loc"}})
	do(ipc.OpBind, ipc.BindArgs{Name: "srv", PID: int32(os.Getpid())})
	do(ipc.OpBind, ipc.BindArgs{Name: "srv", Prog: "/usr/bin/server", Auto: true, Args: []string{"-l"}})
	do(ipc.OpNameCreate, ipc.NameArgs{Name: "rr", LB: "round-robin"})
	got := call[ipc.ListResult](t, p, ipc.OpList, ipc.ListArgs{What: "names"}).Names
	want := []ipc.NameInfo{
		{Name: "rr", LB: "round-robin", Programs: []string{}, Processes: []int32{}, IPCPs: []string{}, Registered: []string{}},
		{Name: "srv", LB: "spillover", Programs: []string{"server"}, Processes: []int32{int32(os.Getpid())}, IPCPs: []string{}, Registered: []string{"eth0", "loc"}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	ipcps := call[ipc.ListResult](t, p, ipc.OpList, ipc.ListArgs{What: "ipcps"}).IPCPs
	if d := cmp.Diff([]ipc.IPCPInfo{
		{ID: 1, Name: "eth0", Type: "eth-dix", Layer: "wire", State: "operational", Hash: "SHA3_256"},
		{ID: 2, Name: "loc", Type: "local", Layer: "here", State: "operational", Hash: "SHA3_384"},
	}, ipcps); d != "" {
		t.Error(d)
	}
	layers := call[[]LayerInfo](t, p, ipc.OpShow, ipc.ShowArgs{What: "layers"})
	if len(layers) != 2 || !cmp.Equal(layers[1].Names, []string{"srv"}) || layers[1].Counters["flows"] != 0 {
		t.Errorf("layers %+v", layers)
	}
	do(ipc.OpNameUnregister, ipc.RegisterArgs{Name: "srv", IPCPs: []string{"*"}})
	if l.known() != 0 {
		t.Error("still registered")
	}
	do(ipc.OpNameRegister, ipc.RegisterArgs{Name: "srv", IPCPs: []string{"eth0"}})
	do(ipc.OpNameDestroy, ipc.NameArgs{Name: "srv"})
	if l.known() != 0 {
		t.Error("a destroyed name is still registered")
	}
	do(ipc.OpIPCPDestroy, ipc.IPCPArgs{Name: "loc"})
	for _, what := range showWords {
		res, err := n.Show(what)
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(res)
		if err != nil || string(b) == "null" {
			t.Errorf("show %s: %s, %v", what, b, err)
		}
	}
	// The names of fields are an interface.
	b, err := json.Marshal(FlowInfo{})
	if err != nil {
		t.Fatal(err)
	}
	const fields = `{"id":0,"state":"","pid":0,"prog":"","uid":0,"name":"","layer":"","ipcp":"","direct":false,"local":"","remote":"",` +
		`"qos":{"delay_ms":0,"bandwidth_bps":0,"availability":0,"loss":0,"ber":0,"in_order":0,"max_gap_ms":0,"timeout_ms":0},` +
		`"mpl_ms":0,"mtu":0,"path":"","down":false,"rx_packets":0,"rx_bytes":0,"tx_packets":0,"tx_bytes":0,"rx_dropped":0}`
	if string(b) != fields {
		t.Errorf("fields of a flow changed:\n%s", b)
	}
}

// Users may use flows, and look, but not manage; a group may.
func TestPermissions(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it connects as other users")
	}
	const group = 4242
	n := newNode(t, func(c *Config) { c.Groups = []uint32{group} })
	as := func(uid, gid int, groups []int) error {
		return asUser(uid, gid, groups, func() error {
			p, err := join(n.dir, "user")
			if err != nil {
				return err
			}
			defer p.Close()
			if _, err := p.Call(t.Context(), ipc.OpShow, ipc.ShowArgs{What: "names"}, nil); err != nil {
				return err
			}
			_, err = p.Call(t.Context(), ipc.OpNameCreate, ipc.NameArgs{Name: time.Now().String()}, nil)
			return err
		})
	}
	code(t, as(65534, 65534, nil), o7serr.EPERM)
	if err := as(65534, group, nil); err != nil {
		t.Errorf("primary group: %v", err)
	}
	if err := as(65534, 65534, []int{7, group}); err != nil {
		t.Errorf("supplementary group: %v", err)
	}
	if n := n.Stats().Denied; n != 1 {
		t.Errorf("%d denied", n)
	}
}

// One user cannot take all connections, and cannot keep root out.
func TestManyConnections(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it connects as another user")
	}
	n := newNode(t, func(c *Config) { c.MaxSessions = 3 })
	err := asUser(65534, 65534, nil, func() error {
		for i := range 4 {
			p, err := join(n.dir, "user")
			if (i < 3) != (err == nil) {
				return fmt.Errorf("connection %d: %w", i, err)
			}
			t.Cleanup(func() { _ = p.Close() })
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	n.prog("root")
}

// asUser runs f with another identity.
func asUser(uid, gid int, groups []int, f func() error) error {
	res := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its identity
		raw := func(nr uintptr, a, b, c int) {
			if _, _, e := unix.RawSyscall(nr, uintptr(a), uintptr(b), uintptr(c)); e != 0 {
				panic(e)
			}
		}
		if err := setgroups(groups); err != nil {
			panic(err)
		}
		raw(unix.SYS_SETRESGID, gid, gid, gid)
		raw(unix.SYS_SETRESUID, uid, uid, uid)
		res <- f()
	}()
	return <-res
}

// A malformed request is an error for that client alone.
func TestMalformed(t *testing.T) {
	n := newNode(t, nil)
	good := n.prog("good")
	raw, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: ipc.SocketPath(n.dir), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if err := raw.SetWriteBuffer(4 * ipc.MaxMessage); err != nil {
		t.Fatal(err)
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	eventually(t, "connection", func() bool { return n.Stats().Sessions == 2 })
	before := descriptors(t) + 1 // the descriptor of the process may be on its way
	for _, msg := range []string{
		"x", "{}", "[]", `{"id":1}`, `{"id":1,"op":7}`, `{"id":1,"op":"alloc","args":[1]}`, `{"id":1,"op":"alloc"}`,
		`{"id":2,"op":"accept","args":{"timeout_ms":"soon"}}`, `{"id":3,"op":"bind","args":"\ud800"}`,
		`{"id":4,"op":"hello","args":{"prog":"` + strings.Repeat("p", 300) + `"}}`, strings.Repeat("{", 5000),
		strings.Repeat("y", ipc.MaxMessage+10), `{"id":5,"op":"dealloc","args":{"flow":99}}`, `{"id":6,"op":"alloc","args":{"name":"a\u0000b"}}`,
	} {
		var oob []byte
		if len(msg) < 100 {
			rc, err := null.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			_ = rc.Control(func(fd uintptr) { oob = unix.UnixRights(int(fd), int(fd)) })
		}
		if _, _, err := raw.WriteMsgUnix([]byte(msg), oob, nil); err != nil {
			t.Fatalf("%.20q: %v", msg, err)
		}
		var buf [4096]byte
		_ = raw.SetReadDeadline(time.Now().Add(5 * time.Second))
		k, err := raw.Read(buf[:])
		if err != nil {
			t.Fatalf("%.20q: %v", msg, err)
		}
		var r ipc.Reply
		if err := json.Unmarshal(buf[:k], &r); err != nil || r.Code >= 0 || r.Error == "" {
			t.Errorf("%.20q: reply %s, %v", msg, buf[:k], err)
		}
	}
	if got := descriptors(t); got > before {
		t.Errorf("%d descriptors more", got-before)
	}
	if _, err := good.Call(t.Context(), ipc.OpList, ipc.ListArgs{What: "names"}, nil); err != nil {
		t.Errorf("another client: %v", err)
	}
	if n.Stats().Malformed == 0 {
		t.Error("nothing was counted")
	}
}

func setgroups(groups []int) error {
	list := make([]uint32, len(groups)+1)
	for i, g := range groups {
		list[i] = uint32(g)
	}
	_, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(pointer(list)), 0)
	if e != 0 {
		return e
	}
	return nil
}
