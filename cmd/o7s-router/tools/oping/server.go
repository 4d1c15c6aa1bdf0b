package oping

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"time"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
)

const (
	maxFlows = 256
	// idle is how long a flow may be without requests.
	idle = 10 * time.Second
	// A failing accept is tried again after this.
	acceptPause = 100 * time.Millisecond
)

func serve(ctx context.Context, n network, o options, out *printer, stderr io.Writer) int {
	out.line("Ouroboros ping server started.")
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	slots := maxFlows
	if o.busy {
		slots = 1
	}
	free := make(chan struct{}, slots)
	for {
		select {
		case free <- struct{}{}:
		case <-ctx.Done():
			return 0
		}
		f, err := n.Accept(ctx)
		switch {
		case ctx.Err() != nil:
			if err == nil {
				f.Close()
			}
			return 0
		case errors.Is(err, o7serr.EIRMD):
			out.flush()
			fmt.Fprintf(stderr, "oping: %v\n", err)
			return 1
		case err != nil: // of one client: spec 33 §3 says to accept again
			<-free
			out.flush()
			fmt.Fprintln(stderr, explain("Failed to accept flow", err))
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
			}
			continue
		}
		fd := f.FD()
		if !o.quiet {
			out.line(fmt.Sprintf("New flow %d.", fd))
		}
		wg.Go(func() {
			defer func() { <-free }()
			stop := context.AfterFunc(ctx, func() { f.Close() })
			defer stop()
			err := echo(f, fd, o, out)
			switch {
			case o.quiet || ctx.Err() != nil:
			case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, o7serr.EFLOWPEER):
				out.line(fmt.Sprintf("Flow %d timed out.", fd))
			default:
				out.line(fmt.Sprintf("Flow %d closed.", fd))
			}
			f.Close()
		})
	}
}

// echo answers the requests of a flow until it ends.
func echo(f flow, fd int, o options, out *printer) error {
	flags := o7s.Default | o7s.RNOPART
	polling := o.poll || o.busy
	if polling {
		flags |= o7s.RNOBLOCK
	}
	if err := f.SetFlags(flags); err != nil {
		return err
	}
	f.SetReadTimeout(idle)
	b := make([]byte, maxSize)
	last, spins := time.Now(), 0
	for {
		n, err := f.Read(b)
		switch {
		case err == nil:
		case errors.Is(err, o7serr.EMSGSIZE):
			continue
		case polling && errors.Is(err, o7serr.EAGAIN):
			if o.poll {
				runtime.Gosched()
			}
			if spins++; spins%1024 == 0 && time.Since(last) > idle {
				return os.ErrDeadlineExceeded
			}
			continue
		default:
			return err
		}
		if n < minSize || binary.BigEndian.Uint32(b) != echoRequest {
			continue
		}
		if polling {
			last = time.Now()
		}
		binary.BigEndian.PutUint32(b, echoReply)
		if _, err := f.Write(b[:n]); err != nil {
			return err
		}
		if !o.quiet {
			out.begin().str("Received ").num(n).str(" bytes on fd ").num(fd).str(".").end()
		}
	}
}
