package frcp

import (
	"strings"
	"testing"

	"github.com/o7s/o7s-router/lib/qos"
)

// The worked bytes of docs/frcp.md: what our own ends say to each other.
func TestWorkedBytesExt(t *testing.T) {
	now := 1000 * second
	a := newConn(t, Config{QoS: qos.Data, Rand: rands(1, 0x89abcdef)})
	b := newConn(t, Config{QoS: qos.Data, Rand: rands(1, 0x00c0ffee)})
	check := func(what string, c *Conn, want string) []byte {
		t.Helper()
		if got := poll(c, now); got != strings.ReplaceAll(want, " ", "") {
			t.Fatalf("%s:\n %s, want\n %s", what, got, want)
		}
		return unhex(t, want)
	}
	write := func(c *Conn, s string) {
		t.Helper()
		if err := c.Write(now, []byte(s)); err != nil {
			t.Fatal(err)
		}
	}

	a.Announce()
	p := check("announcement", a, "82 000000 89abcdef 00000000")
	b.Input(now, p)
	p = check("answer", b, "8e abceef 00c0ffee 89abcdef")
	a.Input(now, p)
	check("nothing more", a, "")

	var sent [][]byte
	for _, s := range []struct{ text, want string }{
		{"one", "8f c100ee 89abcdef 00c0ffee 6f6e65"},
		{"two", "8d c100ee 89abcdf0 00c0ffee 74776f"},
		{"six", "8d c100ee 89abcdf1 00c0ffee 736978"},
		{"ten", "8d c100ee 89abcdf2 00c0ffee 74656e"},
	} {
		write(a, s.text)
		sent = append(sent, check(s.text, a, s.want))
	}
	b.Input(now, sent[0])
	b.Input(now, sent[2])
	check("a hole", b, "8e abceef 00c0ffee 89abcdf0  01 0008 89abcdf1 89abcdf2")
	b.Input(now, sent[2])
	check("came twice", b, "8e abceef 00c0ffee 89abcdf0  04 0004 89abcdf1  01 0008 89abcdf1 89abcdf2")

	b.Input(now, sent[1])
	b.Input(now, sent[3])
	a.Input(now, check("all of it", b, "8e abceef 00c0ffee 89abcdf3"))
	for _, want := range []string{"one", "two", "six", "ten"} {
		if got := read(t, b); got != want {
			t.Fatal(got)
		}
	}

	// The size of the path: a message of 1300 bytes is cut for packets of 1200,
	// and a packet of 1496 asks whether such pass.
	write(a, strings.Repeat("x", 1300))
	first := poll(a, now)
	if !strings.HasPrefix(first, "ef"+"c100ee"+"89abcdf3"+"00c0ffee"+"7878") || len(first) != 2*1200 {
		t.Fatalf("first fragment: %d bytes, %.40s", len(first)/2, first)
	}
	last := poll(a, now)
	if !strings.HasPrefix(last, "ad"+"c100ee"+"89abcdf4"+"00c0ffee"+"7878") || len(last) != 2*(HeaderLen+1300-1188) {
		t.Fatalf("last fragment: %d bytes, %.40s", len(last)/2, last)
	}
	probe := poll(a, now)
	if !strings.HasPrefix(probe, "8c"+"c100ee"+"00000000"+"00c0ffee"+"02"+"05c9"+"000005d8"+"0000") || len(probe) != 2*1496 {
		t.Fatalf("probe: %d bytes, %.60s", len(probe)/2, probe)
	}
	b.Input(now, unhex(t, probe))
	a.Input(now, check("answer to the probe", b, "8e abcef3 00c0ffee 89abcdf3  03 0004 000005d8"))
	if a.fit() != 1484 {
		t.Fatal(a.fit())
	}
}
