package o7s

import (
	"context"
	"errors"
	"net"
	"strings"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// Dialer makes streams to names. The zero value is ready.
//
// A name is tried as it is given. Programs made for TCP insist on a port:
// net/http dials "name:80" for http://name/. So where that is no name here
// (o7serr.ENAME), "name" is tried.
type Dialer struct {
	// Client to use; nil means the package's.
	Client *Client
	// QoS to ask for; nil means qos.Data. A stream needs in_order and loss 0.
	QoS *qos.Spec
	// Timeout bounds a dial; 0 means 20 s, as the reference waits. A deadline
	// of the context may be earlier.
	Timeout time.Duration
}

// defaultDialTimeout is the time-out of allocations (spec 33 §3).
const defaultDialTimeout = 20 * time.Second

// Dial makes a stream to name with a Dialer's defaults. The net.Conn is a
// *Conn. Its signature is that of grpc.WithContextDialer.
func Dial(ctx context.Context, name string) (net.Conn, error) {
	return new(Dialer).DialContext(ctx, netName, name)
}

// Dial is DialContext without a context.
func (d *Dialer) Dial(network, name string) (net.Conn, error) {
	return d.DialContext(context.Background(), network, name)
}

// DialContext makes a stream to name; it fits http.Transport.DialContext. The
// network says what the caller takes a stream for: "o7s", "tcp", "unix" or
// variants of these. The net.Conn is a *Conn.
func (d *Dialer) DialContext(ctx context.Context, network, name string) (net.Conn, error) {
	switch network {
	case "", netName, "tcp", "tcp4", "tcp6", "unix":
	default:
		return nil, opError("dial", name, net.UnknownNetworkError(network))
	}
	c, err := d.DialConn(ctx, name)
	if err != nil {
		return nil, err // not a nil *Conn
	}
	return c, nil
}

// DialConn is DialContext for those who want the Conn. The context is for
// dialling only: its end does not end the stream.
func (d *Dialer) DialConn(ctx context.Context, name string) (*Conn, error) {
	limit := d.Timeout
	if limit <= 0 {
		limit = defaultDialTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	f, err := d.alloc(ctx, name)
	if err != nil {
		return nil, opError("dial", name, err)
	}
	c, err := NewConn(f)
	if err != nil {
		_ = f.Close()
		return nil, opError("dial", name, err)
	}
	return c, nil
}

func (d *Dialer) alloc(ctx context.Context, name string) (*Flow, error) {
	c, q := d.Client, d.QoS
	if c == nil {
		c = std
	}
	if q == nil {
		q = &qos.Data
	}
	f, err := c.Alloc(ctx, name, q)
	bare, ok := withoutPort(name)
	if !ok || !errors.Is(err, o7serr.ENAME) {
		return f, err
	}
	f, again := c.Alloc(ctx, bare, q)
	if errors.Is(again, o7serr.ENAME) {
		return nil, err // about the name that was asked for
	}
	return f, again
}

// withoutPort is name without a port, if it has one.
func withoutPort(name string) (string, bool) {
	i := strings.LastIndexByte(name, ':')
	if i <= 0 || i == len(name)-1 || strings.Trim(name[i+1:], "0123456789") != "" {
		return "", false
	}
	return name[:i], true
}
