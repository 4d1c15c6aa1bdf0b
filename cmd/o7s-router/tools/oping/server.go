package oping

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
)

const (
	maxFlows = 256
	// idle is how long a flow may be without requests.
	idle = 10 * time.Second
)

func serve(ctx context.Context, n kit.Network, o options, out *kit.Printer, stderr io.Writer) int {
	out.Line("Ouroboros ping server started.")
	slots := maxFlows
	if o.busy {
		slots = 1
	}
	return kit.Serve(ctx, n, slots, "oping", kit.After(out, stderr), func(ctx context.Context, f kit.Flow) {
		fd := f.FD()
		if !o.quiet {
			out.Line(fmt.Sprintf("New flow %d.", fd))
		}
		err := echo(f, fd, o, out)
		switch {
		case o.quiet || ctx.Err() != nil:
		case kit.Silent(err):
			out.Line(fmt.Sprintf("Flow %d timed out.", fd))
		default:
			out.Line(fmt.Sprintf("Flow %d closed.", fd))
		}
	})
}

// echo answers the requests of a flow until it ends.
func echo(f kit.Flow, fd int, o options, out *kit.Printer) error {
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
			out.Begin().Str("Received ").Num(n).Str(" bytes on fd ").Num(fd).Str(".").End()
		}
	}
}
