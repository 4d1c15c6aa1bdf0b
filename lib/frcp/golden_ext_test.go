package frcp

import (
	"encoding/binary"
	"encoding/hex"
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

	// The size of the path: ahead of the first large message goes a packet of
	// 1496 bytes, which asks whether such pass, and a small one.
	write(a, strings.Repeat("x", 1300))
	probe := poll(a, now)
	if !strings.HasPrefix(probe, "80"+"000000"+"00000000"+"00000000"+"02"+"05c9"+"000005d8"+"0000") || len(probe) != 2*1496 {
		t.Fatalf("probe: %d bytes, %.60s", len(probe)/2, probe)
	}
	small := check("check", a, "80 000000 00000000 00000000  02 0004 00000013")
	whole := poll(a, now)
	if !strings.HasPrefix(whole, "8f"+"c100ee"+"89abcdf3"+"00c0ffee"+"7878") || len(whole) != 2*1312 {
		t.Fatalf("message: %d bytes, %.40s", len(whole)/2, whole)
	}
	b.Input(now, unhex(t, probe))
	b.Input(now, small)
	check("answers", b, "8e abcef3 00c0ffee 89abcdf3  03 0004 000005d8  03 0004 00000013")
}

// When the small one alone is answered, what is on the way goes in pieces.
func TestWorkedPieces(t *testing.T) {
	now := 1000 * second
	a, b, _ := ourPair(t, qos.Data, 0)
	if err := a.Write(now, []byte(strings.Repeat("x", 1300))); err != nil {
		t.Fatal(err)
	}
	first := a.lwe
	poll(a, now)
	b.Input(now, unhex(t, poll(a, now)))
	poll(a, now)
	a.Input(now, unhex(t, poll(b, now)))
	var pieces []string
	for range 20 {
		now += 100 * ms
		for p := poll(a, now); p != ""; p = poll(a, now) {
			if p[24:26] == "05" {
				pieces = append(pieces, p)
			}
			if len(p) <= 2*pmtuBase {
				b.Input(now, unhex(t, p))
			}
		}
		if b.Readable() {
			break
		}
		for p := poll(b, now); p != ""; p = poll(b, now) {
			a.Input(now, unhex(t, p))
		}
	}
	if len(read(t, b)) != 1300 || len(pieces) != 2 {
		t.Fatalf("%d pieces", len(pieces))
	}
	seq := hex.EncodeToString(binary.BigEndian.AppendUint32(nil, first))
	// number, length 1300, offset, DATA|EXT
	if want := "05" + "0489" + seq + "0514" + "0000" + "81" + "7878"; !strings.HasPrefix(pieces[0][24:], want) {
		t.Errorf("first piece %.60s, want %s", pieces[0][24:], want)
	}
	if want := "05" + "009d" + seq + "0514" + "0480" + "81" + "7878"; !strings.HasPrefix(pieces[1][24:], want) {
		t.Errorf("second piece %.60s, want %s", pieces[1][24:], want)
	}
}
