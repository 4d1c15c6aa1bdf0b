// Package oecho is the echo tool of the reference (spec 45 §11.2): its options,
// its messages and its output.
//
// The client sends one message, the text and a zero byte; the server prints it
// and sends it back unchanged.
package oecho

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/kit"
	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

const (
	name    = "oecho"
	text    = "Client says hi!"
	maxSize = 256
	// The reference waits for ever at both ends. A client that says nothing
	// must not keep a server, nor a lost message a client.
	patience = 10 * time.Second
	// A flow whose packet was lost is given up by patience; so many may wait.
	maxFlows = 256
)

type options struct {
	name   string
	text   string
	qos    qos.Spec
	listen bool
	help   bool
	runDir string
}

const usage = `Usage: oecho [OPTION]...
Sends a message to a server, which sends it back.

  -l, --listen            run as server

Client:
  -n, --name NAME         name of the server (default: oecho)
  -m, --message TEXT      message, at most 255 bytes (default: Client says hi!)
  -q, --qos QOS           raw, best, video, voice or data (default: raw)

      --run-dir DIR       run directory of the daemon (default: $O7S_RUN_DIR)
      --help              print this text
`

func parse(args []string) (options, error) {
	o := options{name: name, text: text, qos: qos.Raw}
	err := kit.Parse(args, []kit.Opt{
		kit.Flag("l", "listen", &o.listen),
		kit.String("n", "name", &o.name),
		kit.String("m", "message", &o.text),
		kit.QoS("q", "qos", &o.qos),
		kit.Flag("h", "help", &o.help),
		kit.String("", "run-dir", &o.runDir),
	})
	switch {
	case err != nil || o.help:
	case o.listen && o.name != name:
		err = errors.New("a server (-l) has no server name (-n)")
	case o.name == "":
		err = errors.New("expected a name after -n")
	case len(o.text) >= maxSize:
		err = fmt.Errorf("-m: expected at most %d bytes", maxSize-1)
	}
	return o, err
}

// Main runs the tool with the arguments after its name and returns its exit status.
func Main(args []string, stdout, stderr io.Writer) int {
	o, err := parse(args)
	if err != nil {
		return kit.Wrong(stderr, "oecho", err)
	}
	if o.help {
		fmt.Fprint(stdout, usage)
		return 0
	}
	ctx, stop := kit.Interruptible()
	defer stop()
	n, done := kit.Library(o.runDir, "oecho", args)
	defer done()
	return run(ctx, n, o, stdout, stderr)
}

func run(ctx context.Context, n kit.Network, o options, stdout, stderr io.Writer) int {
	if o.listen {
		return serve(ctx, n, stdout, stderr)
	}
	f, err := n.Alloc(ctx, o.name, o.qos)
	if err != nil {
		fmt.Fprintln(stderr, kit.Explain("Failed to allocate flow", err))
		return 1
	}
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	err = ask(f, o, stdout)
	switch {
	case err == nil:
		return 0
	case ctx.Err() != nil:
		err = errors.New("interrupted")
	case kit.Silent(err):
		err = errors.New("the server did not reply")
	}
	fmt.Fprintf(stderr, "oecho: %v\n", kit.Reason(err))
	return 1
}

func ask(f kit.Flow, o options, stdout io.Writer) error {
	if err := setUp(f); err != nil {
		return err
	}
	if _, err := f.Write(append([]byte(o.text), 0)); err != nil {
		return err
	}
	b := make([]byte, maxSize)
	n, err := f.Read(b)
	if err == nil {
		_, err = fmt.Fprintf(stdout, "Server replied with %s\n", word(b[:n]))
	}
	return err
}

func setUp(f kit.Flow) error {
	f.SetReadTimeout(patience)
	f.SetWriteTimeout(patience)
	return f.SetFlags(o7s.Default | o7s.RNOPART)
}

// word is the text of a message: what is before the zero byte.
func word(b []byte) []byte {
	b, _, _ = bytes.Cut(b, []byte{0})
	return b
}

func serve(ctx context.Context, n kit.Network, stdout, stderr io.Writer) int {
	out := kit.NewPrinter(stdout)
	defer out.Flush()
	out.Line("Starting the server.")
	return kit.Serve(ctx, n, maxFlows, "oecho", kit.After(out, stderr), func(ctx context.Context, f kit.Flow) {
		out.Line("New flow.")
		err := answer(f, out)
		if err != nil && ctx.Err() == nil {
			out.Flush()
			fmt.Fprintf(stderr, "oecho: flow %d: %v\n", f.FD(), kit.Reason(err))
		}
	})
}

func answer(f kit.Flow, out *kit.Printer) error {
	if err := setUp(f); err != nil {
		return err
	}
	b := make([]byte, maxSize)
	n, err := f.Read(b)
	switch {
	case errors.Is(err, o7serr.EMSGSIZE):
		return fmt.Errorf("a message of more than %d bytes: %w", maxSize, o7serr.EMSGSIZE)
	case kit.Silent(err):
		return fmt.Errorf("no message within %v", patience)
	case err != nil:
		return err
	}
	out.Begin().Str("Message from client is ").Str(string(word(b[:n]))).Str(".").End()
	_, err = f.Write(b[:n])
	return err
}
