package lab

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const good = `
name = "t"
hosts = ["h1", "h2", "h3"]
[[link]]
ends = ["h1", "h2"]
layer = "dix12"
[[link]]
ends = ["h2", "h3"]
layer = "dix23"
mtu = 9000
gro = true
[[layer]]
name = "uni"
routing = "lfa"
options = { ls_t_update = 5, hash = "SHA3_256" }
[[layer.member]]
host = "h1"
[[layer.member]]
host = "h2"
enroll = "h1"
[[layer.member]]
host = "h3"
enroll = "h2"
[[service]]
name = "oping"
host = "h3"
layers = ["uni"]
program = "oping"
[[check]]
host = "h1"
ping = "oping"
within = "2s"
`

func TestParse(t *testing.T) {
	topo, err := Parse("good.toml", []byte(good))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"e23", "e32"}, topo.Links[1].Devices); d != "" {
		t.Error(d)
	}
	if l := topo.Links[0]; l.MTU != 1500 || l.GRO != nil || topo.Links[1].MTU != 9000 || !*topo.Links[1].GRO {
		t.Errorf("links %+v", topo.Links)
	}
	y := &topo.Layers[0]
	if y.Type != "unicast" || !slices.Equal(y.Over, []string{"dix12", "dix23"}) {
		t.Errorf("layer %+v", y)
	}
	if got := topo.lowerAt(y, "h1"); !slices.Equal(got, []string{"dix12"}) {
		t.Errorf("below uni at h1: %v", got)
	}
	want := []string{"oping", "-n", "oping", "-c", "3", "-i", "10ms"}
	if d := cmp.Diff(want, topo.Checks[0].argv()); d != "" {
		t.Error(d)
	}
	if time.Duration(topo.Checks[0].Within) != 2*time.Second {
		t.Errorf("within %v", topo.Checks[0].Within)
	}
}

// Every mistake is reported with the line and column it stands at.
func TestMistakes(t *testing.T) {
	const head = "name = 'x'\nhosts = ['h1', 'h2', 'h3']\n" // what follows begins at line 3
	link := "[[link]]\nends = ['h1', 'h2']\nlayer = 'd'\n"
	for _, tc := range []struct{ name, text, want string }{
		{"unknown key", head + "colour = 1", `f:3:1: unknown key "colour"`},
		{"unknown nested key", head + "[[link]]\nends = ['h1', 'h2']\nmtoo = 3", `f:5:1: unknown key "link.mtoo"`},
		{"wrong type", head + "[[link]]\nends = 'h1'", `f:4:8:`},
		{"syntax", head + "[[link", `f:3:6: expected`},
		{"duration", head + "[[check]]\nhost = 'h1'\nping = 'x'\nwithin = 'soon'", `f:6:10:`},
		{"no name", "hosts = ['a']", "f: no name given"},
		{"dash", "name = 'a-b'\nhosts = ['a']", `f:1:8: bad lab name "a-b"`},
		{"path", "name = 'x'\nhosts = ['../a']", `f:2:10: bad host name`},
		{"bin", "name = 'x'\nhosts = ['bin']", `f:2:10: bad host name`},
		{"no hosts", "name = 'x'", "f: no hosts given"},
		{"host twice", "name = 'x'\nhosts = ['a', 'b', 'a']", `f:2:20: host "a" is there twice`},
		{"one end", head + "[[link]]\nends = ['h1']", "f:4:1: a link has 2 ends, not 1"},
		{"wrong host", head + "[[link]]\nends = ['h1', 'h9']", `f:4:15: unknown host "h9" (hosts: h1, h2, h3)`},
		{"loop", head + "[[link]]\nends = ['h1', 'h1']", `f:4:1: both ends are at host "h1"`},
		{"duplicate link", head + link + "[[link]]\nends = ['h2', 'h1']", `f:7:1: second link between "h2" and "h1": give its devices`},
		{"duplicate device", head + link + "[[link]]\nends = ['h1', 'h3']\ndevices = ['e12', 'x']", `f:8:12: device "e12" of host "h1" belongs to link[0] already`},
		{"long device", head + "[[link]]\nends = ['h1', 'h3']\ndevices = ['ok', 'abcdefghijklmnop']", `f:5:18: bad device name`},
		{"mtu", head + "[[link]]\nends = ['h1', 'h3']\nmtu = 20", "f:5:7: mtu 20 is not between"},
		{"address", head + "[[link]]\nends = ['h1', 'h3']\naddresses = ['10.0.0.1/24', 'x']", `f:5:29: bad address "x"`},
		{"layer on two links of a host", head + link + "[[link]]\nends = ['h2', 'h3']\nlayer = 'd'", `f:8:9: a host has layer "d" on two links`},
		{"layer type", head + "[[layer]]\nname = 'u'\ntype = 'udp4'\nmember = [{host = 'h1'}]", `f:5:8: unknown layer type "udp4"`},
		{"routing", head + "[[layer]]\nname = 'u'\nrouting = 'ospf'\nmember = [{host = 'h1'}]", `f:5:11: unknown routing "ospf"`},
		{"over", head + "[[layer]]\nname = 'u'\nover = ['w']\nmember = [{host = 'h1'}]", `f:5:9: unknown layer "w"`},
		{"layer twice", head + link + "[[layer]]\nname = 'd'\nmember = [{host = 'h1'}]", `f:7:8: layer "d" is there twice`},
		{"no members", head + "[[layer]]\nname = 'u'", `f:3:3: layer "u" has no members`},
		{"member twice", head + "[[layer]]\nname = 'u'\nmember = [{host = 'h1'}, {host = 'h1'}]", `f:5:34: host "h1" is a member of layer "u" already`},
		{"two bootstraps", head + "[[layer]]\nname = 'u'\nmember = [{host = 'h1'}, {host = 'h2'}]", `"h1" and "h2" both bootstrap layer "u"`},
		{"enrol through a stranger", head + link + "[[layer]]\nname = 'u'\nmember = [{host = 'h1'}, {host = 'h2', enroll = 'h3'}]", `f:8:49: host "h3" is no member of layer "u"`},
		{"enrol through nothing", head + link + "[[layer]]\nname = 'u'\nmember = [{host = 'h1'}, {host = 'h3', enroll = 'h1'}]", `f:8:49: hosts "h3" and "h1" have no layer below "u" in common`},
		{"enrol in a circle", head + link + "[[layer]]\nname = 'u'\nmember = [{host = 'h1', enroll = 'h2'}, {host = 'h2', enroll = 'h1'}]", `enrols in a circle`},
		{"service", head + "[[service]]\nname = 'n'\nhost = 'h1'\nlayers = ['u']", `f:6:11: host "h1" is in no layer "u"`},
		{"lb", head + "[[service]]\nname = 'n'\nhost = 'h1'\nlb = 'random'", `f:6:6: unknown lb "random"`},
		{"run", head + "[[run]]\nhost = 'h1'", "f:3:3: no command given"},
		{"check", head + "[[check]]\nhost = 'h1'", "f:3:3: a check has either ping or command"},
		{"expect", head + "[[check]]\nhost = 'h1'\nping = 'x'\nexpect = '('", "f:6:10: bad regular expression"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Parse("f", []byte(tc.text))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v\nwant %s", err, tc.want)
			}
		})
	}
	t.Run("all at once", func(t *testing.T) {
		_, err := Parse("f", []byte(head+"[[link]]\nends = ['h1', 'x']\n[[run]]\nhost = 'y'\ncommand = ['a']"))
		if err == nil || len(strings.Split(err.Error(), "\n")) != 2 {
			t.Errorf("got %v", err)
		}
	})
}

func TestShippedFiles(t *testing.T) {
	files, err := filepath.Glob("*.toml")
	if err != nil || len(files) < 5 {
		t.Fatalf("files %v, %v", files, err)
	}
	for _, f := range files {
		topo, err := Load(f)
		if err != nil {
			t.Error(err)
			continue
		}
		if topo.Name+".toml" != f || len(topo.Checks) == 0 {
			t.Errorf("%s: lab %q with %d checks", f, topo.Name, len(topo.Checks))
		}
		// All links are used by the layer: as many adjacencies as links.
		n := 0
		for _, m := range topo.Layers[0].Members {
			n += len(m.Connect)
			if m.Enroll != "" {
				n++
			}
		}
		if n != len(topo.Links) {
			t.Errorf("%s: %d links, %d adjacencies", f, len(topo.Links), n)
		}
	}
	if _, err := Load("nowhere.toml"); err == nil {
		t.Error("no error for a file that is not there")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte("name='x'\nhosts=['a','b']\nlink=[{ends=['a','b']},{ends=['a']}]\n[layer.member]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		topo, err := Parse("f", data)
		if (topo == nil) == (err == nil) {
			t.Errorf("topology %v, error %v", topo, err)
		}
	})
}

func TestMAC(t *testing.T) {
	if got := mac(0, 1, 1).String(); got != "02:00:00:00:01:02" {
		t.Error(got)
	}
	seen := map[string]bool{}
	for i := range 300 {
		seen[mac(i, i+1, 1).String()] = true
		seen[mac(i+1, i, 1).String()] = true
		seen[mac(i, i+1, 2).String()] = true
	}
	if len(seen) != 900 {
		t.Errorf("%d different addresses, want 900", len(seen))
	}
}

func TestNamesOfDevices(t *testing.T) {
	small, large := &Topology{Hosts: make([]string, 9)}, &Topology{Hosts: make([]string, 100)}
	if small.device(8, 0) != "e91" || large.device(0, 11) == large.device(11, 0) || len(large.device(99, 98)) > 15 {
		t.Error(small.device(8, 0), large.device(0, 11), large.device(11, 0))
	}
}
