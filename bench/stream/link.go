// Package stream is what the contenders of a comparison have in common: one
// program that sends and one that receives, over a flow, QUIC, TCP or a unix
// socket, so that they differ in the transport only.
package stream

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"time"

	"github.com/quic-go/quic-go"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/qos"
)

// Networks that Dial and Listen know.
const (
	Raw  = "raw"        // a flow with qos.Raw
	Data = "data"       // a reliable flow, qos.Data
	Spec = "spec"       // the same without what our own ends do better than the specification
	QUIC = "quic"       // one stream of github.com/quic-go/quic-go
	TCP  = "tcp"        // the kernel's
	Unix = "unixpacket" // a unix socket that preserves messages, package net at both ends
)

// Link is a connection.
type Link interface {
	io.ReadWriteCloser
	SetReadDeadline(time.Time) error
}

// dialPatience is how long a server that has just been started is tried.
const dialPatience = 10 * time.Second

// Dial connects to a server of the same network: to is a name, an address and
// port, or a socket's name. Who is not there yet is tried again for a while.
func Dial(ctx context.Context, network, to string) (Link, error) {
	ctx, cancel := context.WithTimeout(ctx, dialPatience)
	defer cancel()
	for {
		l, err := dial(ctx, network, to)
		if err == nil {
			return l, nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
}

func dial(ctx context.Context, network, to string) (Link, error) {
	switch network {
	case Raw:
		return o7s.Alloc(ctx, to, &qos.Raw)
	case Data, Spec:
		return client(network).Alloc(ctx, to, &qos.Data)
	case QUIC:
		c, err := quic.DialAddr(ctx, to, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{alpn}}, quicConfig())
		if err != nil {
			return nil, err
		}
		s, err := c.OpenStreamSync(ctx)
		if err != nil {
			return nil, err
		}
		return quicLink{s, c}, nil
	case TCP, Unix:
		var d net.Dialer
		c, err := d.DialContext(ctx, network, to)
		if err != nil {
			return nil, err
		}
		return c.(Link), nil
	}
	return nil, fmt.Errorf("unknown network %q", network)
}

func client(network string) *o7s.Client {
	return o7s.New(o7s.Options{FRCPSpec: network == Spec})
}

// Listener gives the links that others dial.
type Listener interface {
	Accept(ctx context.Context) (Link, error)
}

// Listen serves at an address and port or a socket's name; flows come to the
// names that are bound to the program.
func Listen(ctx context.Context, network, at string) (Listener, error) {
	switch network {
	case Raw, Data, Spec:
		return flows{client(network)}, nil
	case QUIC:
		cert, err := certificate()
		if err != nil {
			return nil, err
		}
		l, err := quic.ListenAddr(at, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{alpn}}, quicConfig())
		if err != nil {
			return nil, err
		}
		return quicListener{l}, nil
	case TCP, Unix:
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, network, at)
		if err != nil {
			return nil, err
		}
		return netListener{l}, nil
	}
	return nil, fmt.Errorf("unknown network %q", network)
}

type flows struct{ c *o7s.Client }

func (f flows) Accept(ctx context.Context) (Link, error) { return f.c.Accept(ctx) }

type netListener struct{ net.Listener }

func (l netListener) Accept(ctx context.Context) (Link, error) {
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return c.(Link), nil
}

// QUIC.

const alpn = "o7s-bench"

// quicConfig opens the windows so far that they are no limit: the default is a
// megabyte and a half for a connection at the start.
func quicConfig() *quic.Config {
	const window = 64 << 20
	return &quic.Config{
		InitialStreamReceiveWindow: window, MaxStreamReceiveWindow: window,
		InitialConnectionReceiveWindow: window, MaxConnectionReceiveWindow: window,
		MaxIdleTimeout: time.Minute,
	}
}

type quicLink struct {
	*quic.Stream
	c *quic.Conn
}

func (l quicLink) Close() error { return l.c.CloseWithError(0, "") }

type quicListener struct{ l *quic.Listener }

func (l quicListener) Accept(ctx context.Context) (Link, error) {
	c, err := l.l.Accept(ctx)
	if err != nil {
		return nil, err
	}
	s, err := c.AcceptStream(ctx)
	if err != nil {
		return nil, err
	}
	return quicLink{s, c}, nil
}

func certificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
