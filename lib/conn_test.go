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

// The same over a network that loses and reorders: packets of the end-to-end
// protocol.
func TestNetConnNetwork(t *testing.T) {
	for name, rate := range map[string]float64{"clean": 0, "lossy": 0.02} {
		t.Run(name, func(t *testing.T) {
			d := newFake(t)
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				x, y, hx, hy := d.wired(t, qos.Data, &wire{loss: rate, swap: rate})
				d.mu.Lock()
				d.peers[x.ID()], d.peers[y.ID()] = hy, hx
				d.mu.Unlock()
				a, err := NewConn(x)
				if err != nil {
					return nil, nil, nil, err
				}
				b, err := NewConn(y)
				if err != nil {
					return nil, nil, nil, err
				}
				return a, b, func() { b.Close(); a.Close() }, nil // b never waits
			})
		})
	}
}
