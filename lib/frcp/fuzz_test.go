package frcp

import (
	"encoding/binary"
	"testing"

	"github.com/o7s/o7s-router/lib/qos"
)

// Any packets, at any times, to an end with data under way: no panic, bounded
// memory, the accounts stay right, and Poll comes to an end.
func FuzzInput(f *testing.F) {
	f.Add(uint8(0), []byte("\x0c\x03\x00\x00\x00\x89\xab\xcd\xef\x00\x00\x00\x00"))
	f.Add(uint8(1), []byte("\x10\x83\x00\x00\x00\x89\xab\xcd\xef\x00\x00\x00\x00abcd\x10\xe1\x00\x00\x00\x89\xab\xcd\xf0\x00\x00\x00\x00abcd"))
	// Selective acknowledgements of what is under way, true and false.
	f.Add(uint8(8), ackPackets(0x89abcdef))
	f.Add(uint8(12), ackPackets(0x89abcdef))
	f.Fuzz(func(t *testing.T, mode uint8, in []byte) {
		spec := qos.Data
		if mode&1 != 0 {
			spec = qos.Video
		}
		if mode&2 != 0 {
			spec = withCRC(spec)
		}
		c := newConn(t, Config{QoS: spec, Rand: rands(1, 0x89abcdef), MaxPacket: 64, MaxMessage: 300, Window: int(mode >> 4)})
		if mode&8 != 0 {
			c.meet(second)
		}
		now := second
		buf := make([]byte, 64)
		for i := 0; len(in) > 0; i++ {
			n := min(int(in[0]), len(in)-1)
			c.Input(now, in[1:1+n:1+n])
			in = in[1+n:]
			if i%2 == 0 {
				_ = c.Write(now, buf[:20+i%100%30])
			}
			if i%3 == 0 {
				_, _, _ = c.Read(buf)
			}
			for k := 0; c.Poll(now, buf) > 0; k++ {
				if k > 1000 {
					t.Fatal("Poll without end")
				}
			}
			if err := c.invariant(now); err != nil {
				t.Fatal(err)
			}
			if d := c.Deadline(); mode&4 != 0 && d != Never {
				now = max(now+1, d)
			} else {
				now += 7 * ms
			}
		}
		if c.rTail-c.rHead > 2*refWindow+4 || c.earlyN > refWindow {
			t.Fatal("unbounded memory")
		}
		c.Close(now)
		c.Release()
	})
}

// ackPackets are control packets of an end of ours about a run that begins at s.
func ackPackets(s uint32) (all []byte) {
	for i, v := range [][]span{
		{{s + 2, s + 4}},
		{{s + 1, s + 2}, {s + 6, s + 9}, {s + 3, s + 3}},
		{{s + 1000, s + 1001}, {s - 1, s + 2}, {s + 5, s + 4}},
		{{s, s + 1}, {s + 1, s + 5}},
	} {
		p := make([]byte, HeaderLen, 200)
		Header12{}.Put(p, Header{Flags: Ext | Ack | FC | DRF, Seq: 7, Ack: s + uint32(i/2), Window: s + 300})
		p = appendSack(p, spanSet{v}, nil, 200)
		p = appendSize(p, tlvTwice, s, 4)
		all = append(append(all, byte(len(p))), p...)
	}
	return all
}

// Two ends, and a network, a reader and a writer that do what the bytes say: what
// is delivered is what was written, and once the network is good again all of it
// arrives.
func FuzzPair(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 2, 3, 1, 2, 3, 1, 2, 3})
	f.Add([]byte("wwwwwwww1lll1swd2r!wwww3e2k"))
	f.Fuzz(func(t *testing.T, in []byte) { pair(t, in, 0) })
}

// FuzzPlainPair is FuzzPair with ends of which one hides what it is, or both.
func FuzzPlainPair(f *testing.F) {
	for plain := range uint8(4) {
		f.Add(plain, []byte{0, 0, 0, 1, 2, 3, 1, 2, 3, 1, 2, 3})
		f.Add(plain, []byte("wwwwwwww1lll1swd2r!wwww3e2k"))
	}
	f.Fuzz(func(t *testing.T, plain uint8, in []byte) { pair(t, in, plain) })
}

// pair does what in says with two ends, of which the bits of plain hide what they
// are.
func pair(t *testing.T, in []byte, plain uint8) {
	var ends [2]*Conn
	for i := range ends {
		ends[i] = newConn(t, Config{QoS: withCRC(qos.Data), Rand: rands(uint64(i), 0xfffffff0), MaxPacket: 40, MaxMessage: 200, Plain: plain>>i&1 != 0})
	}
	now := second
	type sent struct {
		p  []byte
		at int64
	}
	var net [2][]sent // towards end i
	var wrote, read [2]uint32
	msg, buf := make([]byte, 32), make([]byte, 200)
	poll := func(i int) {
		for k := 0; ; k++ {
			n := ends[i].Poll(now, buf)
			if n == 0 {
				break
			}
			if k > 2000 {
				t.Fatal("Poll without end")
			}
			net[1-i] = append(net[1-i], sent{append([]byte(nil), buf[:n]...), now})
		}
		if err := ends[i].invariant(now); err != nil {
			t.Fatal(err)
		}
	}
	receive := func(i int) {
		for {
			n, _, err := ends[i].Read(buf)
			if err != nil {
				return
			}
			if n < 4 || binary.BigEndian.Uint32(buf) != read[i] {
				t.Fatalf("message %d is %x", read[i], buf[:n])
			}
			read[i]++
		}
	}
	if len(in) > 2000 {
		in = in[:2000]
	}
	for _, op := range in {
		i := int(op >> 7)
		q := &net[i]
		switch arg := int(op >> 4 & 7); op & 15 {
		case 0, 1, 2, 3: // write
			for range arg + 1 {
				binary.BigEndian.PutUint32(msg, wrote[i])
				if n := 4 + int(op&3)*7 - arg/7; ends[i].Write(now, msg[:max(n, 4)]) == nil {
					wrote[i]++
				}
			}
			poll(i)
		case 4, 5, 6, 7, 8: // deliver
			for range arg*arg + 1 {
				if len(*q) > 0 {
					if x := (*q)[0]; now-x.at <= int64(defaultMPL) { // what delta-t rests on
						ends[i].Input(now, x.p)
					}
					*q = (*q)[1:]
				}
			}
			poll(i)
		case 9: // lose
			*q = (*q)[min(len(*q), arg+1):]
		case 10: // swap
			if n := len(*q); n > arg+1 {
				(*q)[0], (*q)[arg+1] = (*q)[arg+1], (*q)[0]
			}
		case 11: // twice
			if n := len(*q); n > 0 && n < 5000 {
				x := (*q)[arg%n]
				*q = append(*q, sent{append([]byte(nil), x.p...), x.at})
			}
		case 12: // damage
			if n := len(*q); n > 0 {
				p := (*q)[arg%n].p
				p[int(op)*7%len(p)] ^= 1 << arg
			}
		case 13:
			now += int64(arg+1) * int64(arg+1) * 3 * ms
			poll(i)
		case 14:
			receive(i)
			poll(i)
		case 15:
			now = max(now, min(ends[i].Deadline(), now+second))
			poll(i)
		}
	}
	// A good network from here on.
	for k := 0; ; k++ {
		for i := range ends {
			for _, x := range net[i] {
				if now-x.at <= int64(defaultMPL) {
					ends[i].Input(now, x.p)
				}
			}
			net[i] = nil
			receive(i)
		}
		poll(0)
		poll(1)
		if ends[0].err != nil || ends[1].err != nil {
			return // more than R may have passed
		}
		if read[0] == wrote[1] && read[1] == wrote[0] && ends[0].TxLen()+ends[1].TxLen()+len(net[0])+len(net[1]) == 0 {
			break
		}
		if k > 5000 {
			t.Fatalf("wrote %v, read %v", wrote, read)
		}
		if len(net[0])+len(net[1]) == 0 {
			now = max(now, min(ends[0].Deadline(), ends[1].Deadline(), now+second))
		}
		now += ms
	}
}
