package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
)

// SOCKS5 (RFC 1928): no authentication, CONNECT. It is as short as a library's
// use would be, and says in its replies what went wrong with a flow.
const (
	socksVersion = 5

	noAuth       = 0x00
	noAcceptable = 0xff

	cmdConnect = 1

	atypIPv4   = 1
	atypDomain = 3
	atypIPv6   = 4

	repOK          = 0
	repFailure     = 1
	repHost        = 4 // host unreachable
	repRefused     = 5
	repTTL         = 6 // "TTL expired": what others use for a time-out
	repCommand     = 7
	repAddressType = 8
)

// handshakeTimeout is how long a client may take to say what it wants.
const handshakeTimeout = 10 * time.Second

// socksError is what is wrong with a request, and the reply it gets; 0: none.
type socksError struct {
	reply byte
	text  string
}

func (e socksError) Error() string { return e.text }

// greet reads the greeting and answers it (RFC 1928 §3).
func greet(c io.ReadWriter) error {
	var b [2 + 255]byte
	if _, err := io.ReadFull(c, b[:2]); err != nil {
		return err
	}
	if b[0] != socksVersion {
		return socksError{0, fmt.Sprintf("not a SOCKS5 client (it starts with byte %d)", b[0])}
	}
	methods := b[2 : 2+int(b[1])]
	if _, err := io.ReadFull(c, methods); err != nil {
		return err
	}
	for _, m := range methods {
		if m == noAuth {
			_, err := c.Write([]byte{socksVersion, noAuth})
			return err
		}
	}
	_, _ = c.Write([]byte{socksVersion, noAcceptable})
	return socksError{0, "the client insists on authentication"}
}

// readRequest reads what the client wants (RFC 1928 §4, §5).
func readRequest(c io.Reader) (host string, port uint16, err error) {
	var b [256 + 2]byte
	if _, err := io.ReadFull(c, b[:4]); err != nil {
		return "", 0, err
	}
	if b[0] != socksVersion {
		return "", 0, socksError{repFailure, fmt.Sprintf("request of version %d", b[0])}
	}
	cmd, typ := b[1], b[3]
	n := 0
	switch typ {
	case atypIPv4:
		n = 4
	case atypIPv6:
		n = 16
	case atypDomain:
		if _, err := io.ReadFull(c, b[:1]); err != nil {
			return "", 0, err
		}
		if n = int(b[0]); n == 0 {
			return "", 0, socksError{repFailure, "the host is empty"}
		}
	default:
		return "", 0, socksError{repAddressType, fmt.Sprintf("unknown address type %d", typ)}
	}
	if _, err := io.ReadFull(c, b[:n+2]); err != nil {
		return "", 0, err
	}
	if cmd != cmdConnect {
		return "", 0, socksError{repCommand, fmt.Sprintf("command %d (only CONNECT is served)", cmd)}
	}
	port = binary.BigEndian.Uint16(b[n:])
	if typ == atypDomain {
		return string(b[:n]), port, nil
	}
	a, _ := netip.AddrFromSlice(b[:n])
	return a.Unmap().String(), port, nil
}

// answer sends a reply (RFC 1928 §6). The bound address is none: flows have none.
func answer(c io.Writer, reply byte) error {
	_, err := c.Write([]byte{socksVersion, reply, 0, atypIPv4, 0, 0, 0, 0, 0, 0})
	return err
}

// replyFor is the reply that tells a client of a failed flow.
func replyFor(err error) byte {
	switch {
	case errors.Is(err, o7serr.ENAME):
		return repHost
	case errors.Is(err, o7serr.EIPCP):
		return repRefused // the name is known, and nobody serves it
	case errors.Is(err, o7serr.ETIMEDOUT), errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return repTTL
	}
	return repFailure
}

// serveSOCKS serves a connection of --socks.
func (p *proxy) serveSOCKS(c *net.TCPConn) {
	from := c.RemoteAddr().String()
	_ = c.SetDeadline(time.Now().Add(handshakeTimeout))
	host, port, err := func() (string, uint16, error) {
		if err := greet(c); err != nil {
			return "", 0, err
		}
		return readRequest(c)
	}()
	if err != nil {
		if err != io.EOF { //nolint:errorlint // a client that only looks whether the port is open
			p.failed(fmt.Errorf("SOCKS request: %w", err), "tcp", from)
		}
		var e socksError
		if errors.As(err, &e) && e.reply != 0 {
			_ = answer(c, e.reply)
		}
		p.drop(c)
		_ = c.Close()
		return
	}
	_ = c.SetDeadline(time.Time{})
	about := []any{"host", host, "port", port, "tcp", from}
	ctx, cancel := context.WithTimeout(p.ctx, p.o.connect)
	f, err := p.o.rule.Dial(ctx, p.client, host, port, &p.o.qos)
	cancel()
	p.drop(c)
	if err != nil {
		p.failed(err, about...)
		_ = c.SetWriteDeadline(time.Now().Add(handshakeTimeout))
		_ = answer(c, replyFor(err))
		_ = c.Close()
		return
	}
	if err := answer(c, repOK); err != nil {
		_, _ = c.Close(), f.Abort()
		p.failed(err, about...)
		return
	}
	p.relay(f, c, about...)
}
