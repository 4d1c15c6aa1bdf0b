package model

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/fastpath/fib"
	"github.com/o7s/o7s-router/fastpath/tables"
)

// node is a transit node: port 1 (02:00:00:00:00:01), EtherType 0xA000, flow 64
// comes from a neighbour, wire 2 leads to 0x4e5f6071.
func node() *Pipeline {
	t := tables.New(tables.Config{
		Ports: 3, EthBlocks: 2, Layers: 2, Buckets: 16, NextHops: 4, Wires: 4, Apps: 4, FlowBuckets: 2,
	})
	t.Ports[1].Mac = tables.MAC([]byte{2, 0, 0, 0, 0, 1})
	t.Ports[1].Proto[0] = tables.MakeProto(0xa000, 1)
	t.Ports[2].Flags = tables.PortTx
	t.StoreEndpoint(1, 64, tables.MakeEndpoint(tables.EndpointDT, 1, 1))
	t.StoreEndpoint(1, 65, tables.MakeEndpoint(tables.EndpointUser, 0, 0))
	tab := fib.NewTable(t.FIB, fib.MakeRef(1, 8))
	if err := tab.Set(0x4e5f6071, 1); err != nil {
		panic(err)
	}
	t.Layers[1] = tables.Layer{Fib: uint64(tab.Ref()), Addr: 7, AddrSize: 4}
	t.NextHops[1].Count, t.NextHops[1].Wire[0] = 1, 2
	w := &t.Wires[2]
	w.State, w.Port, w.MaxFrame = tables.WireUp, 2, 1514
	copy(w.Hdr[:], unhex("02aaaaaaaaaa 02bbbbbbbbbb a000 0047"))
	return &Pipeline{Tables: t, Counters: NewCounters(t)}
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		panic(err)
	}
	return b
}

const ethernet = "020000000001 02cccccccccc a000 0040 0014"

// The worked bytes of spec 20: one transit node.
func TestWorkedBytes(t *testing.T) {
	p := node()
	frame := unhex(ethernet + "71605f4e 00 3c 02 4300000078563412 68656c6c6f")
	// Our queue is empty, so the mark stays.
	want := unhex("02aaaaaaaaaa 02bbbbbbbbbb a000 0047 0014" + "71605f4e 00 3b 02 4300000078563412 68656c6c6f")
	want = append(want, 0, 0, 0)
	frame = append(frame, 0, 0, 0) // padding travels along
	action, r, out := p.Frame(1, 0, frame)
	if action != bpf.XDPRedirect || r != bpf.Forward || out != 2 || !bytes.Equal(frame, want) {
		t.Fatalf("%v to port %d\n got %x\nwant %x", r, out, frame, want)
	}
	c := p.Counters
	if n := c.DT[1*tables.Cubes].C[tables.DTRcvd]; n.Packets != 1 || n.Bytes != 20 {
		t.Errorf("received %+v", n)
	}
	if n := c.DT[2*tables.Cubes].C[tables.DTSent]; n.Packets != 1 || n.Bytes != 20 {
		t.Errorf("sent %+v", n)
	}
}

func TestVerdicts(t *testing.T) {
	const payload = "71605f4e 00 3c 02 4300000078563412 68656c6c6f"
	for _, c := range []struct {
		name, frame string
		want        bpf.Reason
	}{
		{"other EtherType", "020000000001 02cccccccccc 0800 0040 0014" + payload, bpf.PassOther},
		{"other node's MAC", "020000000009 02cccccccccc a000 0040 0014" + payload, bpf.DropMAC},
		{"MAC of zeros (spec 10, oddity 10)", "000000000000 02cccccccccc a000 0040 0014" + payload, bpf.DropMAC},
		{"broadcast", "ffffffffffff 02cccccccccc a000 0040 0014" + payload, bpf.Forward},
		{"no DIX header", "020000000001 02cccccccccc a000 0040", bpf.DropTruncated},
		{"length beyond the frame", "020000000001 02cccccccccc a000 0040 0015" + payload, bpf.DropLength},
		{"management", "020000000001 02cccccccccc a000 0000 0000", bpf.PassNoSocket},
		{"flow of user space", "020000000001 02cccccccccc a000 0041 0000", bpf.PassNoSocket},
		{"keep-alive", "020000000001 02cccccccccc a000 0040 0000", bpf.PassNoSocket},
		{"unknown EID", "020000000001 02cccccccccc a000 0042 0000", bpf.DropEID},
		{"EID above all", "020000000001 02cccccccccc a000 1000 0000", bpf.DropEID},
		{"short header", "020000000001 02cccccccccc a000 0040 000e" + payload, bpf.DropDTTruncated},
		{"cube 3", ethernet + "71605f4e 03 3c 02 4300000078563412 68656c6c6f", bpf.DropCube},
		{"TTL 1", ethernet + "71605f4e 00 01 02 4300000078563412 68656c6c6f", bpf.DropTTL},
		{"TTL 0 does not wrap (spec 20, oddity 3)", ethernet + "71605f4e 00 00 02 4300000078563412 68656c6c6f", bpf.DropTTL},
		{"TTL 0 for this node", ethernet + "07000000 00 00 02 4300000078563412 68656c6c6f", bpf.PassNoSocket},
		{"address 0", ethernet + "00000000 00 3c 02 4300000078563412 68656c6c6f", bpf.DropNoRoute},
		{"unknown address", ethernet + "01000000 00 3c 02 4300000078563412 68656c6c6f", bpf.DropNoRoute},
	} {
		if _, r, _ := node().Frame(1, 0, unhex(c.frame)); r != c.want {
			t.Errorf("%s: %v, want %v", c.name, r, c.want)
		}
	}
}

// No frame makes the pipeline read or write outside of it, and a packet that is
// not forwarded stays as it was.
func FuzzFrame(f *testing.F) {
	f.Add(unhex(ethernet + "71605f4e 00 3c 02 4300000078563412 68656c6c6f"))
	f.Add(unhex("020000000001 02cccccccccc a000 0040 0000"))
	f.Add(unhex("020000000001 02cccccccccc a000 0040"))
	f.Fuzz(func(t *testing.T, frame []byte) {
		p := node()
		before := bytes.Clone(frame)
		_, r, _ := p.Frame(1, 0, frame)
		if r != bpf.Forward && !bytes.Equal(before, frame) {
			t.Fatalf("%v changed the frame", r)
		}
		if len(frame) >= 18 {
			_, _, _ = p.App(2, 0, frame)
		}
	})
}
