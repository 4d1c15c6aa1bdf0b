package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"

	"github.com/o7s/o7s-router/cmd/o7s-router/daemon"
	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

var update = flag.Bool("update", false, "write the golden files")

// call is a request that a fake daemon got, and from which run directory's socket.
type call struct {
	Op   ipc.Op
	Args any
	dir  string
}

// fake is a daemon that answers with prepared results.
type fake struct {
	calls   []call
	results map[string]any // by operation, or what is shown or listed
	err     error
	down    bool
}

func (f *fake) dial(_ context.Context, dir string) (Caller, error) {
	if f.down {
		return nil, o7serr.Wrap(o7serr.EIRMD, "%s", dir)
	}
	return &conn{f, dir}, nil
}

type conn struct {
	*fake
	dir string
}

func (c *conn) Call(_ context.Context, op ipc.Op, args, result any) ([]int, error) {
	c.calls = append(c.calls, call{op, args, c.dir})
	if c.err != nil {
		return nil, c.err
	}
	key := string(op)
	switch a := args.(type) {
	case ipc.ShowArgs:
		key = a.What
	case ipc.ListArgs:
		key = "list " + a.What
	}
	if r, ok := c.results[key]; ok && result != nil {
		b, err := json.Marshal(r)
		if err != nil {
			return nil, err
		}
		return nil, json.Unmarshal(b, result)
	}
	return nil, nil
}

func (c *conn) Close() error { return nil }

// run runs a command line and returns its output and exit status.
func run(t *testing.T, f *fake, line ...string) (stdout, stderr string, status int) {
	t.Helper()
	var out, errs bytes.Buffer
	app := App{
		Stdout: &out, Stderr: &errs, Dial: f.dial,
		Daemon: func(context.Context, daemon.Options) error { return nil },
		Tools:  map[string]func([]string) int{"oping": func(a []string) int { return 40 + len(a) }},
	}
	status = app.Main(line)
	return out.String(), errs.String(), status
}

func self(t *testing.T) string {
	t.Helper()
	p, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestRequests(t *testing.T) {
	t.Setenv("O7S_RUN_DIR", "")
	prog := self(t)
	for _, c := range []struct {
		line string
		op   ipc.Op
		args any
	}{
		{"ipcp create uni --type unicast", ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "uni", Type: "unicast"}},
		{"ipcp create -t local l", ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "l", Type: "local"}},
		{"ipcp create --type=local -- -odd", ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "-odd", Type: "local"}},
		{
			"ipcp bootstrap dix --type eth-dix --layer dix12 --dev e12 --ethertype A001", ipc.OpIPCPBootstrap,
			ipc.BootstrapArgs{Name: "dix", Type: "eth-dix", Layer: "dix12", Options: map[string]string{"dev": "e12", "ethertype": "A001"}},
		},
		{
			"ipcp bootstrap uni --layer L --autobind --ls-t-update 5 --ls_t_timeo 20 --routing lfa", ipc.OpIPCPBootstrap,
			ipc.BootstrapArgs{Name: "uni", Layer: "L", Autobind: true, Options: map[string]string{"ls_t_update": "5", "ls_t_timeo": "20", "routing": "lfa"}},
		},
		{"ipcp bootstrap uni -l L -t unicast", ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "uni", Type: "unicast", Layer: "L"}},
		{"ipcp enroll uni --layer L --autobind", ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: "uni", Type: "unicast", Layer: "L", Autobind: true}},
		{"ipcp enroll uni --dst uni.h1 -t broadcast", ipc.OpIPCPEnroll, ipc.EnrollArgs{Name: "uni", Type: "broadcast", Dst: "uni.h1"}},
		{"ipcp connect a b", ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "a", Dst: "b", Component: "*", QoS: qos.Raw}},
		{"ipcp connect a b --component dt --qos voice", ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "a", Dst: "b", Component: "dt", QoS: qos.Voice}},
		{"ipcp disconnect a -c mgmt b", ipc.OpIPCPDisconnect, ipc.ConnectArgs{Name: "a", Dst: "b", Component: "mgmt"}},
		{"ipcp destroy a", ipc.OpIPCPDestroy, ipc.IPCPArgs{Name: "a"}},
		{"ipcp list", ipc.OpList, ipc.ListArgs{What: "ipcps"}},
		{"name create n", ipc.OpNameCreate, ipc.NameArgs{Name: "n", LB: "round-robin"}},
		{"name create n --lb spillover --scrtpath " + prog, ipc.OpNameCreate, ipc.NameArgs{Name: "n", LB: "spillover", Security: map[string]string{"scrtpath": prog}}},
		{"name destroy n", ipc.OpNameDestroy, ipc.NameArgs{Name: "n"}},
		{"name register n --layer L --layer M* --ipcp u", ipc.OpNameRegister, ipc.RegisterArgs{Name: "n", IPCPs: []string{"u"}, Layers: []string{"L", "M*"}}},
		{"name unregister n -l L", ipc.OpNameUnregister, ipc.RegisterArgs{Name: "n", Layers: []string{"L"}}},
		{"name list op", ipc.OpList, ipc.ListArgs{What: "names", Prefix: "op"}},
		{"bind program " + prog + " n", ipc.OpBind, ipc.BindArgs{Prog: prog, Name: "n"}},
		{"bind program " + prog + " n --auto -- -l --auto", ipc.OpBind, ipc.BindArgs{Prog: prog, Name: "n", Auto: true, Args: []string{"-l", "--auto"}}},
		{"bind process 42 n", ipc.OpBind, ipc.BindArgs{PID: 42, Name: "n"}},
		{"bind ipcp u n", ipc.OpBind, ipc.BindArgs{IPCP: "u", Name: "n"}},
		{"unbind program /gone/away n", ipc.OpUnbind, ipc.BindArgs{Prog: "/gone/away", Name: "n"}},
		{"unbind process 42 n", ipc.OpUnbind, ipc.BindArgs{PID: 42, Name: "n"}},
		{"unbind ipcp u n", ipc.OpUnbind, ipc.BindArgs{IPCP: "u", Name: "n"}},
		{"show routes", ipc.OpShow, ipc.ShowArgs{What: "routes"}},
		{"irm n r oping l uni", ipc.OpNameRegister, ipc.RegisterArgs{Name: "oping", Layers: []string{"uni"}}},
	} {
		f := &fake{}
		out, errs, status := run(t, f, append([]string{"/usr/bin/o7s-router"}, strings.Fields(c.line)...)...)
		if status != 0 || errs != "" {
			t.Errorf("%s: status %d, %q", c.line, status, errs)
			continue
		}
		if len(f.calls) != 1 || f.calls[0].dir != ipc.DefaultRunDir {
			t.Errorf("%s: %+v", c.line, f.calls)
			continue
		}
		if d := cmp.Diff(call{Op: c.op, Args: c.args}, f.calls[0], cmp.FilterPath(func(p cmp.Path) bool { return p.String() == "dir" }, cmp.Ignore())); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.line, d)
		}
		if c.op != ipc.OpList && c.op != ipc.OpShow && out != "" {
			t.Errorf("%s prints %q", c.line, out)
		}
	}
}

func TestRunDir(t *testing.T) {
	for _, c := range []struct{ env, line, want string }{
		{"", "name destroy n", ipc.DefaultRunDir},
		{"/e", "name destroy n", "/e"},
		{"/e", "--run-dir /f name destroy n", "/f"},
		{"/e", "name destroy n --run-dir /g", "/g"},
		{"/e", "--run-dir /f show flows --run-dir /g", "/g"},
		{"/e", "irm name destroy n", "/e"},
	} {
		t.Setenv("O7S_RUN_DIR", c.env)
		f := &fake{}
		if _, errs, _ := run(t, f, append([]string{"o7s-router"}, strings.Fields(c.line)...)...); len(f.calls) != 1 || f.calls[0].dir != c.want {
			t.Errorf("O7S_RUN_DIR=%s %s: %+v %s", c.env, c.line, f.calls, errs)
		}
	}
}

func TestMistakes(t *testing.T) {
	for _, c := range []struct{ line, want string }{
		{"", "o7s-router: expected a command: o7s-router {daemon|ipcp|name|bind|unbind|show|lab|version|oping}"},
		{"fly", `o7s-router: unknown command "fly" (expected {daemon|ipcp|name|`},
		{"ipcp", "expected a command: o7s-router ipcp {create|bootstrap|enroll|connect|disconnect|destroy|list}"},
		{"ipcp fly", `unknown command "fly" (expected ipcp {create|bootstrap|`},
		{"ipcp create", "ipcp create: IPCP is missing (expected IPCP)"},
		{"ipcp create a", "ipcp create: --type is missing (expected local, unicast,"},
		{"ipcp bootstrap a", "ipcp bootstrap: --layer is missing"},
		{"ipcp create --type unicast", "ipcp create: IPCP is missing (expected IPCP)"},
		{"ipcp create a b --type unicast", `ipcp create: unexpected argument "b" (expected IPCP only)`},
		{"ipcp create a --colour red", "unknown option -colour (--help lists what there is)"},
		{"ipcp create a --type", "flag needs an argument: -type"},
		{"ipcp enroll a", "ipcp enroll: expected at least one of --layer and --dst"},
		{"ipcp connect a b -c x", `unknown component "x" (expected dt, mgmt or *)`},
		{"ipcp connect a b -q x", `unknown qos "x" (expected raw, best,`},
		{"ipcp connect a", "ipcp connect: DST is missing (expected IPCP DST)"},
		{"ipcp list -o xml", `ipcp list: unknown output "xml" (expected table or json)`},
		{"ipcp list a", `ipcp list: unexpected argument "a" (expected none)`},
		{"name create n --lb x", `unknown load-balancing policy "x" (expected round-robin or spillover)`},
		{"name create n --skeypath /no/such/file", "no such file"},
		{"name register n", "name register: expected at least one --layer or --ipcp"},
		{"name list a b", `unexpected argument "b" (expected at most a PREFIX)`},
		{"bind program /no/such/prog n", `program "/no/such/prog": no such executable here or in PATH`},
		{"bind process x n", `bind process: "x" is not a process id`},
		{"show", "expected a command: o7s-router show {layers|flows|names|neighbors|lsdb|routes|directory|fastpath|drops}"},
		{"show cats", `unknown command "cats" (expected show {layers|`},
		{"show routes -o yaml", `show routes: unknown output "yaml" (expected table or json)`},
		{"daemon now", `daemon: unexpected argument "now" (expected none)`},
		{"daemon --log-level loud", `unknown log level "loud" (expected debug, info, warn or error)`},
		{"daemon --log-format xml", `unknown log format "xml" (expected text or json)`},
		{"lab up", "lab up: FILE is missing (expected FILE)"},
		{"lab up /no/such/file.toml", "no such file"},
		{"lab exec x.toml", "lab exec: HOST is missing (expected FILE HOST COMMAND ARGUMENT...)"},
		{"irm foo", `irm: unknown operation "foo"`},
		{"irm ipcp create name a type x", `irm: ipcp create: unknown type "x"`},
	} {
		f := &fake{}
		out, errs, status := run(t, f, append([]string{"o7s-router"}, strings.Fields(c.line)...)...)
		if status != 1 || out != "" || !strings.Contains(errs, c.want) || strings.Count(errs, "\n") != 1 || len(f.calls) != 0 {
			t.Errorf("%s: status %d, calls %v\nstdout %q\nstderr %q, expected %q", c.line, status, f.calls, out, errs, c.want)
		}
	}
}

func TestRefusalAndNoDaemon(t *testing.T) {
	f := &fake{err: o7serr.FromCode(-1007, `unknown name "x" (create, bind or register it here first)`)}
	for _, prog := range []string{"o7s-router", "irm"} {
		out, errs, status := run(t, f, prog, "name", "destroy", "x")
		if status != 1 || out != "" || errs != prog+": unknown name \"x\" (create, bind or register it here first)\n" {
			t.Errorf("%s: %d %q %q", prog, status, out, errs)
		}
		_, errs, status = run(t, &fake{down: true}, prog, "name", "destroy", "x")
		if status != 1 || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "cannot talk to the resource manager") {
			t.Errorf("%s: %d %q", prog, status, errs)
		}
	}
}

// TestNameExists: irm creates a name again without a word, as the reference's
// does; our own command says that it is there.
func TestNameExists(t *testing.T) {
	f := &fake{err: o7serr.FromCode(o7serr.EEXIST.Code(), `name "x" exists already`)}
	if out, errs, status := run(t, f, "irm", "name", "create", "x"); status != 0 || out+errs != "" {
		t.Errorf("irm: %d %q %q", status, out, errs)
	}
	if _, errs, status := run(t, f, "o7s-router", "name", "create", "x"); status != 1 || !strings.Contains(errs, "exists already") {
		t.Errorf("o7s-router: %d %q", status, errs)
	}
	if _, _, status := run(t, f, "irm", "name", "destroy", "x"); status != 1 {
		t.Errorf("another command: %d", status)
	}
}

func TestMulticall(t *testing.T) {
	if _, _, status := run(t, &fake{}, "/usr/bin/oping", "-n", "x"); status != 42 {
		t.Errorf("oping: %d", status)
	}
	if _, _, status := run(t, &fake{}, "o7s-router", "oping", "-l"); status != 41 {
		t.Errorf("o7s-router oping: %d", status)
	}
	f := &fake{results: map[string]any{"list ipcps": ipc.ListResult{IPCPs: []ipc.IPCPInfo{{ID: 7, Name: "dix12", Type: "eth-dix", Layer: "dix12"}}}}}
	out, _, status := run(t, f, "/usr/local/bin/irm", "i", "l")
	if status != 0 || !strings.Contains(out, "|       7 |                dix12 |    eth-dix |                dix12 |\n") {
		t.Errorf("irm i l: %d\n%s", status, out)
	}
	if out, _, status := run(t, &fake{}, "irm", "help"); status != 0 || !strings.HasPrefix(out, "Usage: irm") {
		t.Errorf("irm help: %d %q", status, out)
	}
	if out, _, status := run(t, &fake{}, "irmd", "--version"); status != 0 || !strings.HasPrefix(out, "Ouroboros version ") {
		t.Errorf("irmd --version: %d %q", status, out)
	}
	for _, c := range [][]string{{"--config", "/etc/x"}, {"--fly"}, {"now"}} {
		out, errs, status := run(t, &fake{}, append([]string{"irmd"}, c...)...)
		if status != 1 || out != "" || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "--stdout") {
			t.Errorf("irmd %v: %d %q %q", c, status, out, errs)
		}
	}
	if _, errs, status := run(t, &fake{}, "irmd", "--stdout"); status != 0 || errs != "" {
		t.Errorf("irmd --stdout: %d %q", status, errs)
	}
}

func TestDaemonOptions(t *testing.T) {
	t.Setenv("O7S_RUN_DIR", "/e")
	var got daemon.Options
	var out, errs bytes.Buffer
	app := App{Stdout: &out, Stderr: &errs, Daemon: func(_ context.Context, o daemon.Options) error { got = o; return nil }}
	if s := app.Main(strings.Fields("o7s-router daemon --run-dir /r --metrics :9100 --no-xdp --group net --log-level debug --log-format json")); s != 0 {
		t.Fatal(errs.String())
	}
	if got.RunDir != "/r" || got.Metrics != ":9100" || !got.NoXDP || got.Group != "net" || !got.Log.Enabled(context.Background(), -4) || got.Version == "" {
		t.Errorf("%+v", got)
	}
	if s := app.Main([]string{"o7s-router", "daemon"}); s != 0 || got.RunDir != "/e" || got.NoXDP {
		t.Errorf("%d %+v", s, got)
	}
}

var results = map[string]any{
	"list ipcps": ipc.ListResult{IPCPs: []ipc.IPCPInfo{
		{ID: 3, Name: "uni.h2", Type: "unicast", State: "boot"},
		{ID: 1, Name: "dix12", Type: "eth-dix", Layer: "dix12", State: "operational", Hash: "SHA3_256"},
	}},
	"list names": ipc.ListResult{Names: nameInfos},
	"names":      nameInfos,
	"layers": []irm.LayerInfo{
		{ID: 1, IPCP: "dix12", Type: "eth-dix", Layer: "dix12", State: "operational", Hash: "SHA3_256", Names: []string{"uni", "uni.h2"}, Counters: map[string]uint64{"rx_packets": 3}},
		{ID: 3, IPCP: "uni.h2", Type: "unicast", Layer: "uni", State: "operational", Hash: "SHA3_256", Address: 0x0a1b2c3d, Names: []string{}, Counters: map[string]uint64{}},
		{ID: 4, IPCP: "new", Type: "unicast", State: "boot", Names: []string{}, Counters: map[string]uint64{}},
	},
	"flows": []irm.FlowInfo{
		{
			ID: 1, State: "allocated", PID: 4711, Prog: "oping", Name: "oping", Layer: "uni", IPCP: "uni.h1", Local: "64", Remote: "3d.2c.1b.0a/65",
			QoS: qos.Raw, MPL: 100, MTU: 1481, Path: "xdp", RxPackets: 5, RxBytes: 320, TxPackets: 6, TxBytes: 384,
		},
		{ID: 2, State: "allocated", PID: 4712, Prog: "evil\x1b[2J\tname", Name: "x", Layer: "dix12", MTU: 1496, Path: "user", Why: "no app port", Down: true, RxDropped: 2},
	},
	"neighbors": []ipcp.Neighbor{
		{IPCP: "uni.h2", Layer: "uni", Address: 0x0a1b2c3d, Component: "dt", Dst: "uni.h1", Via: "dix12", State: "up", Path: "xdp", RxPackets: 100, TxPackets: 99, Silent: 0.25},
		{IPCP: "uni.h2", Layer: "uni", Address: 0x4f3a21c7, Component: "mgmt", Via: "dix23", State: "down", Path: "user (management)", Silent: 12.04},
	},
	"lsdb": []ipcp.LSA{
		{IPCP: "uni.h2", Layer: "uni", Src: 0x0a1b2c3d, Dst: 0x4f3a21c7, Seqno: 12, Age: 3.21, Own: true, Usable: true},
		{IPCP: "uni.h2", Layer: "uni", Src: 0x4f3a21c7, Dst: 1, Seqno: 1 << 40, Age: 59.96},
	},
	"routes": []ipcp.Route{
		{IPCP: "uni.h2", Layer: "uni", Dst: 0x4f3a21c7, NextHops: []uint64{0x4f3a21c7}, Alternate: 0x0a1b2c3d, Cost: 1, Via: []string{"dix23"}, Path: "xdp"},
		{IPCP: "uni.h2", Layer: "uni", Dst: 1 << 33, NextHops: []uint64{0x4f3a21c7, 0x0a1b2c3d}, Cost: 2, Via: []string{"dix23", "dix23"}, Path: "user"},
	},
	"directory": []ipcp.DirEntry{
		{IPCP: "uni.h2", Layer: "uni", Key: "42dee3b0415b4f690fd91cbd99876f1e9bd8d9745ef7fa32b142773af0349d54", Name: "oping", Value: "c7.21.3a.4f", Kind: "stored", Expiry: 86399},
		{IPCP: "uni.h2", Layer: "uni", Key: "f5026d3f8e19fda479a32fe85ef23322f5b776f3c4dd8190af9b1e8c8c18d114", Value: "3d.2c.1b.0a", Kind: "local"},
	},
	"fastpath": irm.FastPathInfo{Kernel: true, Ports: []irm.PortInfo{
		{Name: "e21", Slot: 1, Mode: "native", Reasons: []string{}, Verdicts: []irm.VerdictInfo{{Reason: "forwarded", Help: "redirected to another port", Packets: 1000}, {Reason: "ttl", Help: "hop limit reached", Packets: 1, Drop: true}}},
		{Name: "app:oping/4711", Slot: 5, Mode: "generic", PID: 4711, Reasons: []string{"tap has no native mode", "peer without GRO"}, Verdicts: []irm.VerdictInfo{}},
	}},
	"drops": []irm.DropInfo{{Where: "e21", Reason: "ttl", Help: "hop limit reached", Packets: 1}, {Where: "programs", Reason: "ring_full", Help: "a program did not read its flow in time", Packets: 7}},
}

var nameInfos = []ipc.NameInfo{
	{Name: "uni.h2", LB: "spillover", IPCPs: []string{"uni.h2"}, Registered: []string{"dix12", "dix23"}, Programs: []string{}, Processes: []int32{}},
	{Name: "oping", LB: "round-robin", Programs: []string{"/usr/bin/oping"}, Processes: []int32{4711, 4712}, Registered: []string{"uni.h2"}, IPCPs: []string{}, Accepting: 1},
}

// Every list has a table and JSON; both are stable.
func TestGolden(t *testing.T) {
	lines := [][]string{{"ipcp", "list"}, {"name", "list"}}
	for _, s := range shows {
		lines = append(lines, []string{"show", s.what})
	}
	for _, l := range lines {
		for _, format := range []string{"table", "json"} {
			out, errs, status := run(t, &fake{results: results}, append(append([]string{"o7s-router"}, l...), "-o", format)...)
			if status != 0 || errs != "" {
				t.Errorf("%v: %d %q", l, status, errs)
				continue
			}
			file := filepath.Join("testdata", strings.Join(l, "-")+"."+map[string]string{"table": "txt", "json": "json"}[format])
			if *update {
				if err := os.WriteFile(file, []byte(out), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), out); d != "" {
				t.Errorf("%v -o %s (-want +got):\n%s", l, format, d)
			}
			for _, line := range strings.Split(out, "\n") {
				if format == "table" && strings.HasSuffix(line, " ") {
					t.Errorf("%v: line ends in spaces: %q", l, line)
				}
			}
		}
	}
}

// An empty list is a header, and [] in JSON.
func TestEmpty(t *testing.T) {
	for _, s := range shows {
		if s.what == "fastpath" {
			continue
		}
		out, _, status := run(t, &fake{}, "o7s-router", "show", s.what, "-o", "json")
		if out != "[]\n" || status != 0 {
			t.Errorf("show %s -o json: %d %q", s.what, status, out)
		}
		out, _, status = run(t, &fake{}, "o7s-router", "show", s.what)
		if strings.Count(out, "\n") != 1 || status != 0 {
			t.Errorf("show %s: %d %q", s.what, status, out)
		}
	}
}

// Help and completion exist for every command and go to standard output.
func TestHelp(t *testing.T) {
	var walk func(path []string, c *cli.Command)
	walk = func(path []string, c *cli.Command) {
		path = append(slices.Clone(path), c.Name)
		if c.Usage == "" {
			t.Errorf("%v has no usage", path)
		}
		if c.SkipFlagParsing {
			return
		}
		out, errs, status := run(t, &fake{}, append(path, "--help")...)
		if status != 0 || errs != "" || !strings.Contains(out, c.Usage) {
			t.Errorf("%v --help: %d %q %q", path, status, out, errs)
		}
		for _, s := range c.Subcommands {
			walk(path, s)
		}
	}
	for _, c := range (App{}).Commands().Commands {
		if c.Name != "help" {
			walk([]string{"o7s-router"}, c)
		}
	}
}
