// Package serving makes a tool serve names: it binds its process to them at the
// daemon and hands over the flows that arrive.
package serving

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// retryWait is how long a failed accept waits before the next.
const retryWait = 100 * time.Millisecond

// Options of a Server.
type Options struct {
	Client *o7s.Client
	RunDir string // of Client's daemon
	// Layers to register names with, besides binding them.
	Layers []string
	// Bound says that whoever runs the node has bound the names already: they
	// are not bound here, which takes rights.
	Bound bool
	// Handle gets every flow, in a goroutine of its own.
	Handle func(*o7s.Flow)
	// Failed gets the errors of requests that failed on the way. It may be nil.
	Failed func(error)
}

// Server serves names. It is safe for concurrent use.
type Server struct {
	o      Options
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // the accept loop and what it started

	mu    sync.Mutex // guards what follows
	names map[string]int
	loop  bool
}

// New returns a server that serves nothing yet.
func New(o Options) *Server {
	ctx, cancel := context.WithCancel(context.Background())
	return &Server{o: o, ctx: ctx, cancel: cancel, names: map[string]int{}}
}

// Add serves a name from now on; each Add wants a Remove. Binding takes rights:
// o7serr.EPERM without.
func (s *Server) Add(ctx context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.names[name]++; s.names[name] > 1 {
		return nil
	}
	if err := s.bind(ctx, name); err != nil {
		delete(s.names, name)
		return err
	}
	if !s.loop {
		s.loop = true
		s.wg.Go(s.accept)
	}
	return nil
}

func (s *Server) bind(ctx context.Context, name string) error {
	if err := s.o.Client.Connect(ctx); err != nil {
		return err
	}
	if s.o.Bound {
		return nil
	}
	pid := int32(os.Getpid())
	err := s.call(ctx, ipc.OpBind, ipc.BindArgs{Name: name, PID: pid})
	if err == nil && len(s.o.Layers) > 0 {
		if err = s.call(ctx, ipc.OpNameRegister, ipc.RegisterArgs{Name: name, Layers: s.o.Layers}); err != nil {
			_ = s.call(ctx, ipc.OpUnbind, ipc.BindArgs{Name: name, PID: pid})
		}
	}
	if err != nil {
		return fmt.Errorf("serve name %s: %w", name, err)
	}
	return nil
}

// Remove undoes an Add.
func (s *Server) Remove(ctx context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.names[name]--; s.names[name] > 0 {
		return nil
	}
	delete(s.names, name)
	if s.o.Bound {
		return nil
	}
	return s.call(ctx, ipc.OpUnbind, ipc.BindArgs{Name: name, PID: int32(os.Getpid())})
}

func (s *Server) call(ctx context.Context, op ipc.Op, args any) error {
	c, err := ipc.Dial(ctx, s.o.RunDir)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Call(ctx, op, args, nil)
	return err
}

// accept hands flows over until the server closes. When the daemon was
// restarted it binds the names anew.
func (s *Server) accept() {
	lost := false
	for {
		f, err := s.o.Client.Accept(s.ctx)
		if err == nil {
			s.wg.Go(func() { s.o.Handle(f) })
			continue
		}
		if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		gone := errors.Is(err, o7serr.EIRMD)
		if s.o.Failed != nil && !(gone && lost) {
			s.o.Failed(err)
		}
		lost = gone
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(retryWait):
		}
		if gone {
			lost = s.rebind() != nil
		}
	}
}

func (s *Server) rebind() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := range s.names {
		if err := s.bind(s.ctx, n); err != nil {
			return err
		}
	}
	return nil
}

// Close ends accepting and waits until no Handle runs any more.
func (s *Server) Close() {
	s.cancel()
	s.wg.Wait()
}
