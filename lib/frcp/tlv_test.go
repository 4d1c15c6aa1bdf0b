package frcp

import (
	"fmt"
	"strings"
	"testing"

	"github.com/o7s/o7s-router/lib/qos"
)

// all returns what an end sends now.
func all(c *Conn, now int64) []string {
	var out []string
	for p := poll(c, now); p != ""; p = poll(c, now) {
		out = append(out, p)
	}
	return out
}

// The worked bytes of docs/frcp.md: what our own ends say to each other.
func TestExtensionBytes(t *testing.T) {
	now := 1000 * second
	a := newConn(t, Config{QoS: qos.Data, Rand: rands(1, 0x89abcdef), MaxPacket: 1300})
	b := newConn(t, Config{QoS: qos.Data, Rand: rands(1, 0x00c0ffee), MaxPacket: 1300})
	// A long packet is told by its beginning and its length in bytes.
	want := func(what string, got []string, want ...string) {
		t.Helper()
		for i, g := range got {
			if len(g) > 2*64 {
				got[i] = fmt.Sprintf("%s...%d", g[:2*28], len(g)/2)
			}
		}
		if strings.Join(got, "\n") != strings.ReplaceAll(strings.Join(want, "\n"), " ", "") {
			t.Errorf("%s:\n got %s\nwant %s", what, strings.Join(got, "\n     "), strings.Join(want, "\n     "))
		}
	}
	give := func(c *Conn, ps ...string) {
		for _, p := range ps {
			c.Input(now, unhex(t, p))
		}
	}
	a.Announce()
	p := all(a, now)
	want("announcement", p,
		"82000000 89abcdef 00000000")
	give(b, p...)
	p = all(b, now)
	want("answer", p,
		"8eabceef 00c0ffee 89abcdef")
	give(a, p...)
	for _, m := range []string{"one", "two", "three", "four", "five", "six"} {
		if err := a.Write(now, []byte(m)); err != nil {
			t.Fatal(err)
		}
	}
	d := all(a, now)
	want("data", d,
		"8fc100ee 89abcdef 00c0ffee 6f6e65",
		"8dc100ee 89abcdf0 00c0ffee 74776f",
		"8dc100ee 89abcdf1 00c0ffee 7468726565",
		"8dc100ee 89abcdf2 00c0ffee 666f7572",
		"8dc100ee 89abcdf3 00c0ffee 66697665",
		"8dc100ee 89abcdf4 00c0ffee 736978")
	give(b, d[0], d[2], d[3], d[5])
	p = all(b, now)
	want("selective acknowledgement", p,
		"8eabceef 00c0ffee 89abcdf0 01001089abcdf189abcdf389abcdf489abcdf5")
	give(b, d[3])
	p2 := all(b, now)
	want("a packet that came twice", p2,
		"8eabceef 00c0ffee 89abcdf0 04000489abcdf201001089abcdf189abcdf389abcdf489abcdf5")
	now += 20 * ms
	give(a, p...)
	r := all(a, now)
	want("repetitions", r,
		"8dc100ee 89abcdf0 00c0ffee 74776f",
		"8dc100ee 89abcdf3 00c0ffee 66697665")
	give(b, r...)
	p = all(b, now)
	want("all acknowledged", p,
		"8eabceef 00c0ffee 89abcdf5")
	give(a, p...)
	_ = a.Write(now, make([]byte, 1288))
	p = all(a, now)
	probe := append([]string(nil), p...)
	want("probe", probe,
		"80000000 00000000 00000000 02050500000514000000000000000000...1300",
		"80000000 00000000 00000000 02000400000013",
		"8fc100ee 89abcdf5 00c0ffee 00000000000000000000000000000000...1300")
	give(b, p[1]) // the path is narrow
	p = all(b, now)
	want("answer", p,
		"8eabceef 00c0ffee 89abcdf5 03000400000013")
	give(a, p...)
	now += second
	p = all(a, now)
	pieces := append([]string(nil), p...)
	want("pieces", pieces,
		"80000000 00000000 00000000 02050500000514000000000000000000...1300",
		"80000000 00000000 00000000 02000400000013",
		"80000000 00000000 00000000 05048989abcdf5050800008100000000...1176",
		"80000000 00000000 00000000 05009189abcdf5050804808100000000...160")
	give(b, p...)
	if m := read(t, b); m != "one" {
		t.Fatal(m)
	}
	for range 6 {
		read(t, b)
	}
	p = all(b, now)
	want("arrived in pieces", p,
		"8eabcef6 00c0ffee 89abcdf6 0300040000051403000400000013")
	give(a, p...)
	_ = a.Write(now, make([]byte, 2400))
	p = all(a, now)
	fragments := append([]string(nil), p...)
	want("fragments", fragments,
		"efc100ee 89abcdf6 00c0ffee 00000000000000000000000000000000...1300",
		"adc100ee 89abcdf7 00c0ffee 00000000000000000000000000000000...1124")
	give(b, p...)
	read(t, b)
	a.CloseWrite(now)
	p = all(a, now)
	want("end of stream", p,
		"8dc100ee 89abcdf8 00c0ffee")
	give(b, p...)
	b.Close(now)
	p = all(b, now)
	want("end of stream of an end that closes", p,
		"84000000 00000000 89abcdf9",
		"afabcef9 00c0ffee 89abcdf9")
	give(a, p...)
	a.Close(now)
	p = all(a, now)
	want("farewells", p,
		"84000000 00000000 00c0ffef",
		"aec100ef 89abcdf9 00c0ffef",
		"aec100ef 89abcdf9 00c0ffef",
		"aec100ef 89abcdf9 00c0ffef")
}
