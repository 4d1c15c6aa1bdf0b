package e2e

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/lib/ipc"
)

func oneLine(s string) bool {
	return strings.Count(s, "\n") == 1 && strings.HasSuffix(s, "\n") && len(strings.TrimSpace(s)) > 0
}

// TestWrongCommands gives command lines that cannot be right: one line that
// says what was expected, exit status 1.
func TestWrongCommands(t *testing.T) {
	t.Parallel()
	n := up(t, parse(t, `
name = "wrong"
hosts = ["h1", "h2"]
[[link]]
ends = ["h1", "h2"]
layer = "dix12"
`))
	for _, line := range []string{
		"o7s-router", "o7s-router nonsense", "o7s-router show", "o7s-router show nothing", "o7s-router show layers more",
		"o7s-router show layers -o xml", "o7s-router show layers --frobnicate", "o7s-router --frobnicate show layers",
		"o7s-router ipcp", "o7s-router ipcp create", "o7s-router ipcp create x", "o7s-router ipcp create x --type nothing",
		"o7s-router ipcp create x --type", "o7s-router ipcp create dix12 --type local",
		"o7s-router ipcp create x --type udp4",
		"o7s-router ipcp bootstrap x --layer l", "o7s-router ipcp bootstrap x --layer l --type eth-dix",
		"o7s-router ipcp bootstrap x --layer l --type eth-dix --dev nodev", "o7s-router ipcp bootstrap x --layer l --type eth-dix --dev lo0123456789012345",
		"o7s-router ipcp bootstrap x --layer l --type eth-dix --dev e12 --ethertype A000",
		"o7s-router ipcp bootstrap x --layer l --type eth-dix --dev e12 --ethertype zz", "o7s-router ipcp bootstrap x --layer l --type eth-dix --dev e12 --ethertype 12",
		"o7s-router ipcp bootstrap x --layer l --type unicast --routing magic", "o7s-router ipcp bootstrap x --layer l --type unicast --addr-size 5",
		"o7s-router ipcp bootstrap x --layer l --type unicast --dev e12", "o7s-router ipcp bootstrap x --layer l --type unicast --ls-t-update never",
		"o7s-router ipcp bootstrap dix12 --layer other",
		"o7s-router ipcp enroll", "o7s-router ipcp enroll x", "o7s-router ipcp enroll x --layer nolayer", "o7s-router ipcp enroll dix12 --layer l",
		"o7s-router ipcp connect", "o7s-router ipcp connect x", "o7s-router ipcp connect x y", "o7s-router ipcp connect dix12 y", "o7s-router ipcp connect x y --component z",
		"o7s-router ipcp connect x y --qos z", "o7s-router ipcp disconnect x y", "o7s-router ipcp destroy x",
		"o7s-router name create", "o7s-router name create x --lb magic", "o7s-router name destroy nobody", "o7s-router name register x",
		"o7s-router name register x --layer nolayer", "o7s-router name register x --ipcp noipcp", "o7s-router name unregister x --layer dix12",
		"o7s-router name create x --skeypath /no/such/file",
		"o7s-router bind program /no/such/program x", "o7s-router bind program /etc/passwd x", "o7s-router bind process 1 x", "o7s-router bind process abc x",
		"o7s-router bind ipcp noipcp x", "o7s-router bind magic x y", "o7s-router unbind program sh nobody", "o7s-router unbind process 7 nobody",
		"o7s-router lab", "o7s-router lab up", "o7s-router lab up /no/such/file", "o7s-router lab up /etc/passwd", "o7s-router lab exec /no/such/file h1 true",
		"o7s-router daemon extra", "o7s-router daemon --log-level loud", "o7s-router daemon --group nogroupofthisname",
		"irm nonsense", "irm ipcp create name x", "irm ipcp create name x type nothing", "irm ipcp bootstrap name x", "irm ipcp destroy name x",
		"irm ipcp bootstrap name x layer l type eth-dix dev nodev", "irm bind program /no/such/program name x", "irm name register x layer nolayer", "irm name destroy nobody",
		"irm ipcp connect name x dst y", "irm ipcp enroll name x layer nolayer",
		"irmd --nonsense", "irmd extra",
		"oping", "oping -n", "oping -n nobody", "oping --frobnicate", "oping -n x -c nothing", "oping -n x -s 3", "oping -n x -q magic", "oping -n x extra",
	} {
		out, errs, status := n.run("h1", strings.Fields(line)...)
		// Usage, of a line without all it needs, may have its lines.
		if status != 1 || !oneLine(errs) && !strings.Contains(strings.ToLower(errs+out), "usage") || strings.TrimSpace(errs) == "" || out != "" {
			t.Errorf("%s: exit status %d\nstdout: %s\nstderr: %s", line, status, out, errs)
		}
	}
	// Nothing of all that had an effect.
	var r ipc.ListResult
	if err := n.call("h1", ipc.OpList, ipc.ListArgs{What: "ipcps"}, &r); err != nil || len(r.IPCPs) != 1 {
		t.Errorf("ipcps after wrong commands: %+v %v", r.IPCPs, err)
	}
	if l := show[[]irm.LayerInfo](n, "h1", "layers"); len(l) != 1 || l[0].State != "operational" {
		t.Errorf("layers after wrong commands: %+v", l)
	}
}

// TestTutorial types the published tutorials: the reference's commands, older
// grammar and abbreviations included.
func TestTutorial(t *testing.T) {
	t.Parallel()
	n := up(t, parse(t, `
name = "tutorial"
hosts = ["h1", "h2"]
[[link]]
ends = ["h1", "h2"]
`))
	silent := func(host, line string) {
		t.Helper()
		out, errs, status := n.run(host, strings.Fields(line)...)
		if status != 0 || out != "" || errs != "" {
			t.Fatalf("%s$ %s: exit status %d\n%s%s", host, line, status, out, errs)
		}
	}
	if out := n.ok("h1", "irm", "ipcp", "list"); out != "No IPCPs in system.\n\n" {
		t.Errorf("%q", out)
	}
	if out := n.ok("h1", "irm", "name", "list"); out != "No names in system.\n\n" {
		t.Errorf("%q", out)
	}
	// The first: a local layer and two programs.
	silent("h1", "irm i b t local n local_ipcp l local_layer")
	silent("h1", "irm b prog oping n my_server")
	silent("h1", "irm n reg my_server layer local_layer")
	server, err := n.Start(t.Context(), "h1", "oping", "-l")
	if err != nil {
		t.Fatal(err)
	}
	n.accepting("h1", "my_server", 1)
	report := regexp.MustCompile(`(?s)^Pinging my_server with 64 bytes of data \(3 packets\):\n\n` +
		`64 bytes from my_server: seq=0 time=[0-9.]+ (ms|µs)\n64 bytes from my_server: seq=1 .*seq=2 [^\n]*\n\n` +
		`--- my_server ping statistics ---\n3 packets transmitted, 3 received, 0 out-of-order, 0% packet loss, time: [0-9.]+ ms\n` +
		`rtt min/avg/max/mdev = [0-9.]+/[0-9.]+/[0-9.]+/[0-9.]+ (ms|µs)\n$`)
	if out := n.ok("h1", "oping", "-n", "my_server", "-c", "3", "-i", "10ms"); !report.MatchString(out) {
		t.Errorf("oping prints\n%s", out)
	}
	select {
	case err := <-server:
		t.Errorf("the server ended: %v", err)
	default:
	}

	// The second, over a link, in the words of older days.
	for _, h := range []string{"h1", "h2"} {
		dev := map[string]string{"h1": "e12", "h2": "e21"}[h]
		silent(h, "irm ipcp bootstrap type shim-eth-dix name eth layer eth_layer if "+dev)
	}
	silent("h1", "irm ipcp bootstrap type normal name normal.1 layer normal_layer autobind fd 8 pff simple")
	silent("h1", "irm register name normal.1 layer eth_layer")
	silent("h1", "irm register normal_layer layer eth_layer")
	silent("h2", "irm name create normal_layer")
	silent("h2", "irm name create normal.1")
	silent("h2", "irm ipcp enroll name normal.2 layer normal_layer autobind")
	silent("h2", "irm ipcp connect name normal.2 component mgmt dst normal.1")
	silent("h2", "irm ipcp connect name normal.2 component dt dst normal.1")
	silent("h1", "irm bind program oping name oping_server")
	silent("h1", "irm reg n oping_server l normal_layer")
	silent("h2", "irm n c oping_server")
	again, err := n.Start(t.Context(), "h1", "oping", "-l")
	if err != nil {
		t.Fatal(err)
	}
	_ = again
	n.accepting("h1", "oping_server", 1)
	eventually(t, 5*time.Second, func() error {
		_, errs, status := n.run("h2", "oping", "-n", "oping_server", "-c", "2", "-i", "10ms")
		if status != 0 {
			return errString(errs)
		}
		return nil
	})
	if out := n.ok("h2", "oping", "-n", "oping_server", "-c", "5", "-i", "5ms", "-Q"); !strings.Contains(out, "5 packets transmitted, 5 received") || strings.Contains(out, "seq=") {
		t.Errorf("oping -Q prints\n%s", out)
	}
	if out := n.ok("h2", "oping", "-n", "oping_server", "-d", "100ms", "-f"); !strings.Contains(out, " 0% packet loss") {
		t.Errorf("oping -f prints\n%s", out)
	}

	const rule = "+---------+----------------------+------------+----------------------+\n"
	table := n.ok("h2", "irm", "ipcp", "list")
	if want := rule + "|     pid |                 name |       type |                layer |\n" + rule; !strings.HasPrefix(table, want) || !strings.HasSuffix(table, rule+"\n") {
		t.Errorf("irm ipcp list prints\n%s", table)
	}
	if u, e := strings.Index(table, "|             normal.2 |    unicast |         normal_layer |"), strings.Index(table, "|                  eth |    eth-dix |            eth_layer |"); u < 0 || e < u {
		t.Errorf("irm ipcp list prints\n%s", table)
	}
	names := n.ok("h1", "irm", "n", "l")
	if !strings.Contains(names, "|                                          my_server |            spillover |\n") {
		t.Errorf("irm name list prints\n%s", names)
	}
	silent("h1", "irm unreg n oping_server l normal_layer")
	silent("h1", "irm unbind prog oping name oping_server")
	silent("h2", "irm ipcp disconnect name normal.2 dst normal.1")
	silent("h2", "irm ipcp destroy name normal.2")
	if out, errs, status := n.run("h1", "irmd", "--version"); status != 0 || !strings.HasPrefix(out, "Ouroboros version ") {
		t.Errorf("irmd --version: %d %s%s", status, out, errs)
	}
}

type errString string

func (e errString) Error() string { return string(e) }

// TestOwnCommands sets a network up with our own commands only.
func TestOwnCommands(t *testing.T) {
	t.Parallel()
	n := up(t, parse(t, `
name = "own"
hosts = ["h1", "h2"]
[[link]]
ends = ["h1", "h2"]
`))
	quiet := func(host, line string) {
		t.Helper()
		if out := n.ok(host, strings.Fields("o7s-router "+line)...); out != "" {
			t.Errorf("%s prints %q", line, out)
		}
	}
	for _, h := range []string{"h1", "h2"} {
		dev := map[string]string{"h1": "e12", "h2": "e21"}[h]
		quiet(h, "ipcp create dix --type eth-dix")
		quiet(h, "ipcp bootstrap dix --layer dix --dev "+dev+" --ethertype b00b")
	}
	quiet("h1", "ipcp bootstrap uni.1 --type unicast --layer uni --autobind --routing ecmp --ttl 30")
	quiet("h1", "name register uni.1 --layer dix")
	quiet("h2", "name create uni.1")
	quiet("h2", "ipcp enroll uni.2 --dst uni.1 --autobind")
	quiet("h2", "ipcp connect uni.2 uni.1")
	quiet("h1", "bind program --auto oping svc -- -l")
	quiet("h1", "name register svc --layer u*")
	quiet("h2", "name create svc --lb spillover")
	eventually(t, 5*time.Second, func() error {
		_, errs, status := n.run("h2", "oping", "-n", "svc", "-c", "2", "-i", "10ms")
		if status != 0 {
			return errString(errs)
		}
		return nil
	})
	var ipcps []ipc.IPCPInfo
	if err := json.Unmarshal([]byte(n.ok("h2", "o7s-router", "ipcp", "list", "-o", "json")), &ipcps); err != nil || len(ipcps) != 2 {
		t.Errorf("%+v %v", ipcps, err)
	}
	var names []ipc.NameInfo
	if err := json.Unmarshal([]byte(n.ok("h1", "o7s-router", "name", "list", "sv", "-o", "json")), &names); err != nil || len(names) != 1 || names[0].Name != "svc" {
		t.Errorf("%+v %v", names, err)
	}
	quiet("h2", "ipcp disconnect uni.2 uni.1 --component dt")
	quiet("h2", "ipcp destroy uni.2")
	quiet("h2", "ipcp destroy dix")
	quiet("h1", "unbind program oping svc")
	quiet("h1", "name unregister svc --layer uni")
	quiet("h1", "name destroy svc")
	if out := n.ok("h1", "o7s-router", "version"); !strings.HasPrefix(out, "o7s-router ") {
		t.Errorf("version prints %q", out)
	}
}
