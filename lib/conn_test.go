package o7s

import (
	"net"
	"testing"

	"golang.org/x/net/nettest"

	"github.com/o7s/o7s-router/lib/qos"
)

// streams makes the two ends of a stream within the machine.
func (d *fake) streams(t *testing.T, q *qos.Spec) (a, b *Conn) {
	t.Helper()
	x, y := d.pairQoS(t, d.client(t), d.client(t), q)
	var err error
	if a, err = NewConn(x); err != nil {
		t.Fatal(err)
	}
	if b, err = NewConn(y); err != nil {
		t.Fatal(err)
	}
	return a, b
}

func TestNetConn(t *testing.T) {
	for name, q := range map[string]*qos.Spec{"data": &qos.Data, "raw": &qos.Raw} {
		t.Run(name, func(t *testing.T) {
			d := newFake(t)
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				a, b := d.streams(t, q)
				return a, b, func() { a.Close(); b.Close() }, nil
			})
		})
	}
}
