package irmcmd

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/qos"
)

// machine is an Env with two programs and one file.
type machine struct{}

func (machine) Program(p string) (string, error) {
	switch p {
	case "oping", "/usr/bin/oping":
		return "/usr/bin/oping", nil
	case "./server":
		return "/home/u/server", nil
	}
	return "", fmt.Errorf("program %q: not found", p)
}

func (machine) Readable(p string) error {
	if p == "/etc/o7s/crt.pem" {
		return nil
	}
	return fmt.Errorf("%s: %w", p, os.ErrNotExist)
}

type opts = map[string]string

func boot(name, typ, layer string, autobind bool, o opts) Call {
	return Call{ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: name, Type: typ, Layer: layer, Autobind: autobind, Options: o}}
}

func connect(op ipc.Op, name, dst, comp string, q qos.Spec) Call {
	return Call{op, ipc.ConnectArgs{Name: name, Dst: dst, Component: comp, QoS: q}}
}

func register(n string, ipcps, layers []string) Call {
	return Call{ipc.OpNameRegister, ipc.RegisterArgs{Name: n, IPCPs: ipcps, Layers: layers}}
}

func unregister(n string, ipcps, layers []string) Call {
	return Call{ipc.OpNameUnregister, ipc.RegisterArgs{Name: n, IPCPs: ipcps, Layers: layers}}
}

var (
	list  = Call{ipc.OpList, ipc.ListArgs{What: "ipcps"}}
	names = Call{ipc.OpList, ipc.ListArgs{What: "names"}}
)

func TestGrammar(t *testing.T) {
	for _, c := range []struct {
		line string
		want Call
	}{
		// Spec 45 §9, line by line.
		{"ipcp create name a type unicast", Call{ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "a", Type: "unicast"}}},
		{"ipcp create type eth-dix name a", Call{ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "a", Type: "eth-dix"}}},
		{"i cr n a t broadcast", Call{ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "a", Type: "broadcast"}}},
		{"i c n a t local", Call{ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "a", Type: "local"}}},
		{"ipcp destroy name a", Call{ipc.OpIPCPDestroy, ipc.IPCPArgs{Name: "a"}}},
		{"i d n a", Call{ipc.OpIPCPDestroy, ipc.IPCPArgs{Name: "a"}}},
		{"ipcp bootstrap name a layer L", boot("a", "", "L", false, nil)},
		{"i b n X l L t unicast au", boot("X", "unicast", "L", true, nil)},
		{"i b l L autobind n X t u", boot("X", "unicast", "L", true, nil)},
		{"i b n X l L t b", boot("X", "broadcast", "L", false, nil)},
		{"i b n X l L t e dev eth0", boot("X", "eth-dix", "L", false, opts{"dev": "eth0"})},
		{"i b n X l L t eth-l device eth0", boot("X", "eth-llc", "L", false, opts{"dev": "eth0"})},
		{"i b n X l L t lo hash SHA3_512", boot("X", "local", "L", false, opts{"hash": "SHA3_512"})},
		{"i b n X l L t udp4 ip 10.0.0.1 port 3436 dns 10.0.0.2", boot("X", "udp4", "L", false, opts{"ip": "10.0.0.1", "port": "3436", "dns": "10.0.0.2"})},
		{"i b n X l L t udp6 i ::1 p 1 d ::2", boot("X", "udp6", "L", false, opts{"ip": "::1", "port": "1", "dns": "::2"})},
		{"i b n X l L t eth-dix dev e12 ethertype 0xA001", boot("X", "eth-dix", "L", false, opts{"dev": "e12", "ethertype": "0xA001"})},
		{"i b n X l L t eth-dix dev e12 e A001", boot("X", "eth-dix", "L", false, opts{"dev": "e12", "ethertype": "A001"})},
		{
			"ipcp bootstrap type unicast name u layer L hash SHA3_384 addr 4 eid 8 ttl 30 autobind addr_auth flat directory DHT dht_alpha 4 dht_k 9 " +
				"dht_t_expire 120 dht_t_refresh 30 dht_t_replicate 15 routing lfa ls_t_timeo 20 ls_t_update 5 ls_t_recalc 1 congestion none",
			boot("u", "unicast", "L", true, opts{
				"hash": "SHA3_384", "addr_size": "4", "eid_size": "8", "ttl": "30", "addr_auth": "flat", "directory": "DHT",
				"dht_alpha": "4", "dht_k": "9", "dht_t_expire": "120", "dht_t_refresh": "30", "dht_t_replicate": "15",
				"routing": "lfa", "ls_t_timeo": "20", "ls_t_update": "5", "ls_t_recalc": "1", "congestion": "none",
			}),
		},
		{
			// Abbreviations: the first keyword of spec 47's order wins.
			"i b n u l L t u h A a 4 ei 8 tt 30 addr_ flat di DHT dht_a 4 dht_k 9 dht_t_e 120 dht_t_ref 30 dht_t_rep 15 r ecmp ls 20 ls_t_u 5 ls_t_r 1 c none",
			boot("u", "unicast", "L", false, opts{
				"hash": "A", "addr_size": "4", "eid_size": "8", "ttl": "30", "addr_auth": "flat", "directory": "DHT",
				"dht_alpha": "4", "dht_k": "9", "dht_t_expire": "120", "dht_t_refresh": "30", "dht_t_replicate": "15",
				"routing": "ecmp", "ls_t_timeo": "20", "ls_t_update": "5", "ls_t_recalc": "1", "congestion": "none",
			}),
		},
		{"ipcp enroll name a layer L", Call{ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: "a", Type: "unicast", Layer: "L"}}},
		{"ipcp enroll name uni.h2 layer uni autobind", Call{ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: "uni.h2", Type: "unicast", Layer: "uni", Autobind: true}}},
		{"i e n a t broadcast d D", Call{ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: "a", Type: "broadcast", Dst: "D"}}},
		{"i e n a l L dst D a", Call{ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: "a", Type: "unicast", Layer: "L", Dst: "D", Autobind: true}}},
		{"ipcp connect name a dst b", connect(ipc.OpIPCPConnect, "a", "b", "*", qos.Raw)},
		{"i con n a d b", connect(ipc.OpIPCPConnect, "a", "b", "*", qos.Raw)},
		{"i co n a d b", connect(ipc.OpIPCPConnect, "a", "b", "*", qos.Raw)},
		{"ipcp connect component dt qos voice dst b name a", connect(ipc.OpIPCPConnect, "a", "b", "dt", qos.Voice)},
		{"i con n a d b c mgmt q data", connect(ipc.OpIPCPConnect, "a", "b", "mgmt", qos.Data)},
		{"i con n a d b c * q best", connect(ipc.OpIPCPConnect, "a", "b", "*", qos.BestEffort)},
		{"ipcp disconnect name a dst b", connect(ipc.OpIPCPDisconnect, "a", "b", "*", qos.Spec{})},
		{"i di n a d b c dt", connect(ipc.OpIPCPDisconnect, "a", "b", "dt", qos.Spec{})},
		{"ipcp list", list},
		{"i l", list},
		{"i l type unicast name x", list},

		{"bind program oping name n", Call{ipc.OpBind, ipc.BindArgs{Name: "n", Prog: "/usr/bin/oping"}}},
		{"b prog ./server n x auto -- -l --name y", Call{ipc.OpBind, ipc.BindArgs{Name: "x", Prog: "/home/u/server", Auto: true, Args: []string{"-l", "--name", "y"}}}},
		{"bind program oping auto name n", Call{ipc.OpBind, ipc.BindArgs{Name: "n", Prog: "/usr/bin/oping", Auto: true}}},
		{"bind program oping name n auto --", Call{ipc.OpBind, ipc.BindArgs{Name: "n", Prog: "/usr/bin/oping", Auto: true, Args: []string{}}}},
		{"b p oping n n", Call{ipc.OpBind, ipc.BindArgs{Name: "n", Prog: "/usr/bin/oping"}}},
		{"bind process 4711 name n", Call{ipc.OpBind, ipc.BindArgs{Name: "n", PID: 4711}}},
		{"b proc 4711 n n", Call{ipc.OpBind, ipc.BindArgs{Name: "n", PID: 4711}}},
		{"bind ipcp u name n", Call{ipc.OpBind, ipc.BindArgs{Name: "n", IPCP: "u"}}},
		{"b i u n n", Call{ipc.OpBind, ipc.BindArgs{Name: "n", IPCP: "u"}}},
		{"unbind program oping name n", Call{ipc.OpUnbind, ipc.BindArgs{Name: "n", Prog: "/usr/bin/oping"}}},
		{"u p gone n n", Call{ipc.OpUnbind, ipc.BindArgs{Name: "n", Prog: "gone"}}},
		{"unbind process 4711 name n", Call{ipc.OpUnbind, ipc.BindArgs{Name: "n", PID: 4711}}},
		{"un i u n n", Call{ipc.OpUnbind, ipc.BindArgs{Name: "n", IPCP: "u"}}},

		{"name create n", Call{ipc.OpNameCreate, ipc.NameArgs{Name: "n", LB: "round-robin"}}},
		{"n c n lb spillover", Call{ipc.OpNameCreate, ipc.NameArgs{Name: "n", LB: "spillover"}}},
		{"n c name l round-robin", Call{ipc.OpNameCreate, ipc.NameArgs{Name: "name", LB: "round-robin"}}},
		{"n c n scrtpath /etc/o7s/crt.pem", Call{ipc.OpNameCreate, ipc.NameArgs{Name: "n", LB: "round-robin", Security: map[string]string{"scrtpath": "/etc/o7s/crt.pem"}}}},
		{"name destroy n", Call{ipc.OpNameDestroy, ipc.NameArgs{Name: "n"}}},
		{"n d n", Call{ipc.OpNameDestroy, ipc.NameArgs{Name: "n"}}},
		{"name register n layer L", register("n", nil, []string{"L"})},
		{"n r n l L", register("n", nil, []string{"L"})},
		{"n reg n ipcp a layer L* ipcp b layer *", register("n", []string{"a", "b"}, []string{"L*", "*"})},
		{"name unregister n layer L", unregister("n", nil, []string{"L"})},
		{"n u n i a", unregister("n", []string{"a"}, nil)},
		{"name list", names},
		{"n l", names},
		{"n l list op", Call{ipc.OpList, ipc.ListArgs{What: "names", Prefix: "op"}}},
		{"n l op", Call{ipc.OpList, ipc.ListArgs{What: "names", Prefix: "op"}}},

		// Spec 45 §9.1.
		{"register name N layer L", register("N", nil, []string{"L"})},
		{"register name N layer L M", register("N", nil, []string{"L", "M"})},
		{"register name N layer L layer M", register("N", nil, []string{"L", "M"})},
		{"reg n N l L", register("N", nil, []string{"L"})},
		{"reg layer L name N", register("N", nil, []string{"L"})},
		{"register N layer L", register("N", nil, []string{"L"})},
		{"unregister N l L l M", unregister("N", nil, []string{"L", "M"})},
		{"r n N ipcp a", register("N", []string{"a"}, nil)},
		{"unregister name N layer L", unregister("N", nil, []string{"L"})},
		{"unreg n N l L", unregister("N", nil, []string{"L"})},
		{"ipcp bootstrap type normal name n layer N", boot("n", "unicast", "N", false, nil)},
		{"ipcp bootstrap type shim-eth-llc name n layer N if eth0", boot("n", "eth-llc", "N", false, opts{"dev": "eth0"})},
		{"ipcp bootstrap type shim-eth-dix name n layer N if eth0", boot("n", "eth-dix", "N", false, opts{"dev": "eth0"})},
		{"ipcp bootstrap type shim-udp name n layer N ip 10.0.0.1", boot("n", "udp4", "N", false, opts{"ip": "10.0.0.1"})},
		{"ipcp bootstrap type udp name n layer N ip 10.0.0.1", boot("n", "udp4", "N", false, opts{"ip": "10.0.0.1"})},
		{"ipcp bootstrap type shim-local name n layer N", boot("n", "local", "N", false, nil)},
		{"ipcp create type normal name n", Call{ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "n", Type: "unicast"}}},
		{"ipcp create type shim-local name n", Call{ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "n", Type: "local"}}},
		{"ipcp enroll name n type normal layer N", Call{ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: "n", Type: "unicast", Layer: "N"}}},
		{
			"ipcp bootstrap type normal name n layer N addr 4 fd 2 ttl 60 addr_auth flat routing link_state pff simple",
			boot("n", "unicast", "N", false, opts{"addr_size": "4", "eid_size": "2", "ttl": "60", "addr_auth": "flat", "routing": "link_state"}),
		},
		{"ipcp bootstrap type normal name n layer N pff simple", boot("n", "unicast", "N", false, opts{"routing": "link_state"})},
		{"ipcp bootstrap type normal name n layer N pff alternate routing link_state", boot("n", "unicast", "N", false, opts{"routing": "lfa"})},
		{"ipcp connect name A component dt dst B", connect(ipc.OpIPCPConnect, "A", "B", "dt", qos.Raw)},
		{"ipcp connect name A component mgmt dst B", connect(ipc.OpIPCPConnect, "A", "B", "mgmt", qos.Raw)},

		// What the captures typed.
		{"ipcp bootstrap type eth-dix name dix12 layer dix12 dev e12", boot("dix12", "eth-dix", "dix12", false, opts{"dev": "e12"})},
		{
			"ipcp bootstrap type unicast name uni.h1 layer uni autobind ls_t_update 5 ls_t_recalc 1 ls_t_timeo 20 dht_t_expire 120 dht_t_refresh 30 dht_t_replicate 15",
			boot("uni.h1", "unicast", "uni", true, opts{"ls_t_update": "5", "ls_t_recalc": "1", "ls_t_timeo": "20", "dht_t_expire": "120", "dht_t_refresh": "30", "dht_t_replicate": "15"}),
		},
		{"name register uni.h1 layer dix12", register("uni.h1", nil, []string{"dix12"})},
		{"bind program oping name oping.h1", Call{ipc.OpBind, ipc.BindArgs{Name: "oping.h1", Prog: "/usr/bin/oping"}}},
	} {
		got, err := Parse(strings.Fields(c.line), machine{})
		if err != nil {
			t.Errorf("irm %s: %v", c.line, err)
			continue
		}
		if d := cmp.Diff(Command{Calls: []Call{c.want}}, got); d != "" {
			t.Errorf("irm %s (-want +got):\n%s", c.line, d)
		}
	}
}

func TestErrors(t *testing.T) {
	for _, c := range []struct{ line, want string }{
		{"", "usage: irm {ipcp|bind|unbind|name|help"},
		{"foo", `unknown operation "foo" (expected irm {ipcp|bind|unbind|name|help`},
		{"ipcps", `unknown operation "ipcps"`},
		{"ipcp", "usage: irm ipcp {create|destroy|bootstrap|enroll|connect|disconnect|list|help}"},
		{"ipcp x", `unknown operation "x" (expected irm ipcp {create|`},
		{"ipcp create name a", "usage: irm ipcp create name <ipcp> type {unicast|"},
		{"ipcp create type unicast", "usage: irm ipcp create"},
		{"ipcp create name a type uni", `ipcp create: unknown type "uni" (expected unicast, broadcast, udp4, udp6, eth-dix, eth-llc, local)`},
		{"ipcp create name a color red", `ipcp create: unknown option "color" (expected name, type)`},
		{"ipcp create name", "ipcp create: option name needs a value"},
		{"ipcp destroy", "usage: irm ipcp destroy name <ipcp>"},
		{"ipcp destroy a", `ipcp destroy: unknown option "a" (expected name)`},
		{"ipcp bootstrap name a", "usage: irm ipcp bootstrap name <ipcp> layer <layer>"},
		{"ipcp bootstrap name a layer L type x", `unknown type "x"`},
		{"ipcp bootstrap name a layer L speed 3", `ipcp bootstrap: unknown option "speed" (expected type, layer, name, hash, ip, dns, device,`},
		{"ipcp bootstrap name a layer L ttl", "option ttl needs a value"},
		{"ipcp bootstrap name a layer L pff x", `option pff "x" (expected simple or alternate)`},
		{"ipcp enroll name a", "at least one of layer and dst"},
		{"ipcp enroll layer L", "usage: irm ipcp enroll"},
		{"ipcp enroll name a layer L type eth-dix", `ipcp enroll: unknown type "eth-dix" (expected unicast, broadcast)`},
		{"ipcp connect name a", "usage: irm ipcp connect name <ipcp> dst <name>"},
		{"ipcp connect name a dst b component flow", `unknown component "flow" (expected dt, mgmt or *)`},
		{"ipcp disconnect dst b", "usage: irm ipcp disconnect"},
		{"ipcp disconnect name a dst b qos raw", `unknown option "qos" (expected name, dst, component)`},
		{"ipcp list color x", `ipcp list: unknown option "color" (expected type, name)`},
		{"bind", "usage: irm bind {program|process|ipcp|help}"},
		{"bind x", `unknown operation "x" (expected irm bind {program|process|ipcp|help})`},
		{"bind program", "usage: irm bind program <program> name <name> [auto] [-- <arguments>]"},
		{"bind program oping", "usage: irm bind program"},
		{"bind program oping name", "usage: irm bind program"},
		{"bind program oping name n aut", `bind program: unknown option "aut"`},
		{"bind program nosuch name n", `bind program: program "nosuch": not found`},
		{"bind process x name n", `bind process: "x" is not a process id`},
		{"bind process -1 name n", `bind process: "-1" is not a process id`},
		{"bind process 12", "usage: irm bind process <pid> name <name>"},
		{"bind ipcp", "usage: irm bind ipcp <ipcp> name <name>"},
		{"unbind program oping", "usage: irm unbind program <program> name <name>"},
		{"unbind program oping name n auto", `unbind program: unknown option "auto"`},
		{"unbind process 4", "usage: irm unbind process"},
		{"unbind ipcp a", "usage: irm unbind ipcp"},
		{"name", "usage: irm name {create|destroy|register|unregister|list|help}"},
		{"name create", "usage: irm name create <name>"},
		{"name create n lb random", `unknown load-balancing policy "random" (expected round-robin or spillover)`},
		{"name create n scrtpath /nope", "name create: scrtpath: /nope: file does not exist"},
		{"name create n colour x", `name create: unknown option "colour" (expected lb, sencpath,`},
		{"name destroy", "usage: irm name destroy <name>"},
		{"name destroy a b", "usage: irm name destroy <name>"},
		{"name register n", "usage: irm name register <name> {ipcp <ipcp>|layer <layer>}..."},
		{"name register", "usage: irm name register"},
		{"name register n dif L", `name register: unknown option "dif" (expected ipcp, layer)`},
		{"name unregister n", "usage: irm name unregister"},
		{"name list list", "name list: option list needs a value"},
		{"name register n" + strings.Repeat(" layer L", 129), "at most 128"},
		{"register name N", "usage: irm register name <name> layer <layer>..."},
		{"register N M layer L", `register: unknown option "M" (expected name, layer or ipcp)`},
		{"unreg layer L", "usage: irm unregister"},
	} {
		got, err := Parse(strings.Fields(c.line), machine{})
		switch {
		case err == nil:
			t.Errorf("irm %s: no error, got %+v", c.line, got)
		case !strings.Contains(err.Error(), c.want):
			t.Errorf("irm %s: %q does not contain %q", c.line, err, c.want)
		case strings.Contains(err.Error(), "\n"):
			t.Errorf("irm %s: more than one line: %q", c.line, err)
		}
	}
}

func TestNotices(t *testing.T) {
	for _, c := range []struct{ line, notice string }{
		{"ipcp connect name a dst b qos gold", `Unknown QoS "gold", using raw (expected raw, best, voice, video or data).`},
		{"i b n a l L t eth-dix dev e autobind", "Option autobind does not apply to type eth-dix, ignored."},
		{"i b n a l L t udp4 ip 10.0.0.1 hash SHA3_256", "Option hash does not apply to type udp4, ignored."},
		{"i b n a l L t eth-llc if e0 ethertype A000", "Option ethertype does not apply to type eth-llc, ignored."},
	} {
		got, err := Parse(strings.Fields(c.line), machine{})
		if err != nil || len(got.Notices) != 1 || got.Notices[0] != c.notice {
			t.Errorf("irm %s: %+v, %v", c.line, got, err)
			continue
		}
		switch a := got.Calls[0].Args.(type) {
		case ipc.ConnectArgs:
			if a.QoS != qos.Raw {
				t.Errorf("irm %s: %+v", c.line, a)
			}
		case ipc.BootstrapArgs:
			if a.Autobind || a.Options["hash"]+a.Options["ethertype"] != "" || len(a.Options) != 1 {
				t.Errorf("irm %s: %+v", c.line, a)
			}
		}
	}
}

func TestHelp(t *testing.T) {
	for line, want := range map[string]string{
		"help": helpTop, "h": helpTop, "ipcp help": helpIPCP, "bind h": helpBind, "unbind help": helpUnbind, "name help": helpName,
	} {
		got, err := Parse(strings.Fields(line), machine{})
		if err != nil || got.Help != want || got.Calls != nil {
			t.Errorf("irm %s: %+v, %v", line, got, err)
		}
	}
}

func TestTables(t *testing.T) {
	ipcps := []ipc.IPCPInfo{
		{ID: 53, Name: "dix12", Type: "eth-dix", Layer: "dix12"},
		{ID: 86, Name: "eid4", Type: "unicast", Layer: "leid4"},
		{ID: 71, Name: "bad8", Type: "unicast"},
	}
	// As captured from the reference.
	want := `+---------+----------------------+------------+----------------------+
|     pid |                 name |       type |                layer |
+---------+----------------------+------------+----------------------+
|      71 |                 bad8 |    unicast |        Not enrolled. |
|      86 |                 eid4 |    unicast |                leid4 |
|      53 |                dix12 |    eth-dix |                dix12 |
+---------+----------------------+------------+----------------------+

`
	if d := cmp.Diff(want, Table(list, ipc.ListResult{IPCPs: ipcps})); d != "" {
		t.Error(d)
	}
	want = `+----------------------------------------------------+----------------------+
|                                               name |  load-balance policy |
+----------------------------------------------------+----------------------+
|                                             oecho1 |            spillover |
|                                              oping |          round-robin |
+----------------------------------------------------+----------------------+
`
	l := []ipc.NameInfo{{Name: "oping", LB: "round-robin"}, {Name: "oecho1", LB: "spillover"}}
	if d := cmp.Diff(want, Table(names, ipc.ListResult{Names: l})); d != "" {
		t.Error(d)
	}
	if got := Table(list, ipc.ListResult{}) + Table(names, ipc.ListResult{}); got != "No IPCPs in system.\n\nNo names in system.\n\n" {
		t.Errorf("%q", got)
	}
	if got := Table(Call{ipc.OpBind, ipc.BindArgs{}}, ipc.ListResult{}); got != "" {
		t.Errorf("bind prints %q", got)
	}
}

// Any words: an error of one line, help, or calls; never a panic.
func TestAnyWords(t *testing.T) {
	words := strings.Fields("ipcp i name n bind b unbind u create c destroy d bootstrap list l enroll e connect register reg unregister " +
		"layer type unicast normal dst component dt mgmt * qos raw lb auto autobind program process 12 -- oping hash if pff simple help x")
	words = append(words, "")
	rapid.Check(t, func(t *rapid.T) {
		args := rapid.SliceOfN(rapid.SampledFrom(words), 0, 9).Draw(t, "args")
		c, err := Parse(args, machine{})
		switch {
		case err != nil && strings.Contains(err.Error(), "\n"):
			t.Fatalf("%q: %q", args, err)
		case err == nil && (len(c.Calls) == 0) == (c.Help == ""):
			t.Fatalf("%q: %+v", args, c)
		}
	})
}

func FuzzParse(f *testing.F) {
	f.Add("ipcp bootstrap type unicast name u layer L autobind")
	f.Add("register name N layer L M")
	f.Add("bind program oping name n auto -- -l")
	f.Fuzz(func(t *testing.T, line string) {
		if _, err := Parse(strings.Split(line, " "), machine{}); err != nil && errors.Unwrap(err) == err {
			t.Fatal(err)
		}
	})
}
