package frcp

import (
	"testing"
	"unsafe"

	"github.com/o7s/o7s-router/lib/qos"
)

// Ten thousand idle flows in one program must stay small (bar: 16 KiB each,
// rings of the layer included).
func TestIdleSize(t *testing.T) {
	a, b, w := ourPair(t, qos.Data, 0)
	msg, buf := make([]byte, 1000), make([]byte, 4096)
	now := w.now
	for range 100 {
		roundTrip(&now, a, b, 8, msg, buf)
	}
	for _, c := range []*Conn{a, b} {
		n := unsafe.Sizeof(*c) + uintptr(cap(c.out.s))*unsafe.Sizeof(slot{}) +
			uintptr(cap(c.early.s))*unsafe.Sizeof(arrival{}) + uintptr(cap(c.ready.s))*unsafe.Sizeof(message{})
		if n > 3072 {
			t.Errorf("%d bytes", n)
		}
		t.Logf("%d bytes, the Conn itself %d", n, unsafe.Sizeof(*c))
	}
	if a.lwe != a.seqno || b.rHead != b.rTail {
		t.Fatal("not idle")
	}
	a.Trim()
	b.Trim()
	roundTrip(&now, a, b, 8, msg, buf)
}
