// Program grpc is gRPC over flows: a server that echoes, and a client of it.
//
//	irm name create echo.example
//	irm bind program $PWD/grpc name echo.example
//	grpc server echo.example &
//	grpc client echo.example hello world
//
// It is a module of its own so that the library does not depend on gRPC. What
// is special about flows are two lines: where the server gets its listener
// (serve), and how the client dials (connect).
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"

	o7s "github.com/o7s/o7s-router/lib"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch args := os.Args[1:]; {
	case len(args) == 2 && args[0] == "server":
		err = serve(ctx, args[1])
	case len(args) > 2 && args[0] == "client":
		err = ask(ctx, args[1], args[2:])
	default:
		err = errors.New("expected `server NAME` or `client NAME WORD...`")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "grpc:", err)
		os.Exit(1)
	}
}

// serve answers calls to name until ctx ends.
func serve(ctx context.Context, name string) error {
	l, err := o7s.Listen(ctx, name)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	s.RegisterService(&echoService, echo{})
	defer context.AfterFunc(ctx, s.GracefulStop)()
	return s.Serve(l)
}

// connect returns a client connection to name. "passthrough" keeps gRPC from
// looking the name up in the DNS.
func connect(name string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+name,
		grpc.WithContextDialer(o7s.Dial),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// ask has each word echoed.
func ask(ctx context.Context, name string, words []string) error {
	c, err := connect(name)
	if err != nil {
		return err
	}
	defer c.Close()
	for _, w := range words {
		got, err := echoOnce(ctx, c, w)
		if err != nil {
			return err
		}
		fmt.Println(got)
	}
	return nil
}

// A service is usually generated from a .proto file; this one is written by
// hand, with messages that protobuf brings along, to keep the example short:
//
//	service Echo {
//	  rpc Once(google.protobuf.StringValue) returns (google.protobuf.StringValue);
//	  rpc Each(stream google.protobuf.StringValue) returns (stream google.protobuf.StringValue);
//	}
var echoService = grpc.ServiceDesc{
	ServiceName: "example.Echo",
	HandlerType: (*echoServer)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Once", Handler: func(
		srv any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor,
	) (any, error) {
		in := new(wrapperspb.StringValue)
		if err := decode(in); err != nil {
			return nil, err
		}
		return srv.(echoServer).Once(ctx, in)
	}}},
	Streams: []grpc.StreamDesc{{StreamName: "Each", ServerStreams: true, ClientStreams: true, Handler: func(
		srv any, s grpc.ServerStream,
	) error {
		return srv.(echoServer).Each(s)
	}}},
}

type echoServer interface {
	Once(context.Context, *wrapperspb.StringValue) (*wrapperspb.StringValue, error)
	Each(grpc.ServerStream) error
}

type echo struct{}

func (echo) Once(_ context.Context, in *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
	return wrapperspb.String(strings.ToUpper(in.Value)), nil
}

func (echo) Each(s grpc.ServerStream) error {
	for {
		in := new(wrapperspb.StringValue)
		switch err := s.RecvMsg(in); {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
		if err := s.SendMsg(wrapperspb.String(strings.ToUpper(in.Value))); err != nil {
			return err
		}
	}
}

func echoOnce(ctx context.Context, c grpc.ClientConnInterface, s string, o ...grpc.CallOption) (string, error) {
	out := new(wrapperspb.StringValue)
	err := c.Invoke(ctx, "/example.Echo/Once", wrapperspb.String(s), out, o...)
	return out.Value, err
}

func echoEach(ctx context.Context, c grpc.ClientConnInterface) (grpc.ClientStream, error) {
	return c.NewStream(ctx, &echoService.Streams[0], "/example.Echo/Each")
}
