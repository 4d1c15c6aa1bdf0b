package cli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/o7s/o7s-router/cmd/o7s-router/daemon"
	"github.com/o7s/o7s-router/cmd/o7s-router/irmcmd"
	"github.com/o7s/o7s-router/cmd/o7s-router/version"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// irm is the reference's management command.
func (a *App) irm(ctx context.Context, args []string) error {
	cmd, err := irmcmd.Parse(args, machine{})
	if err != nil {
		return err
	}
	for _, n := range cmd.Notices {
		fmt.Fprintln(a.Stderr, n)
	}
	if cmd.Help != "" {
		_, err := io.WriteString(a.Stdout, cmd.Help)
		return err
	}
	conn, err := a.Dial(ctx, ipc.RunDir(""))
	if err != nil {
		return err
	}
	defer conn.Close()
	for _, c := range cmd.Calls {
		var r ipc.ListResult
		_, err := conn.Call(ctx, c.Op, c.Args, &r)
		// The reference creates a name that exists without a word, and its
		// tutorials do so.
		if c.Op == ipc.OpNameCreate && errors.Is(err, o7serr.EEXIST) {
			err = nil
		}
		if err != nil {
			return err
		}
		if _, err := io.WriteString(a.Stdout, irmcmd.Table(c, r)); err != nil {
			return err
		}
	}
	return nil
}

// irmd is the reference's daemon (spec 45 §6).
func (a *App) irmd(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("irmd", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	config := f.String("config", "", "")
	stdout := f.Bool("stdout", false, "")
	ver := f.Bool("version", false, "")
	const options = "(options: --stdout, --version)"
	switch err := f.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		_, err := fmt.Fprintln(a.Stdout, "usage: irmd [--stdout] [--version]\nMore options: o7s-router daemon --help")
		return err
	case err != nil:
		return fmt.Errorf("%w %s", err, options)
	case f.NArg() > 0:
		return fmt.Errorf("unexpected argument %q %s", f.Arg(0), options)
	case *ver:
		_, err := fmt.Fprintf(a.Stdout, "Ouroboros version %s\n", version.String())
		return err
	case *config != "":
		return errors.New("--config: configuration files are not read yet; use irm to set the node up " + options)
	}
	out := a.Stderr
	if *stdout {
		out = a.Stdout
	}
	return a.startDaemon(ctx, daemon.Options{Log: slog.New(slog.NewTextHandler(out, nil))})
}

func (a *App) startDaemon(ctx context.Context, o daemon.Options) error {
	o.Version = version.String()
	o.Ready = func() {
		if err := notify("READY=1"); err != nil {
			o.Log.Warn("cannot tell the service manager", "err", err)
		}
	}
	err := a.Daemon(ctx, o)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil // asked to stop
	}
	return err
}

// notify tells the service manager that started us about our state, if there
// is one (sd_notify(3)).
func notify(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	_, err = conn.Write([]byte(state))
	return errors.Join(err, conn.Close())
}

func (a *App) daemonCommand() *cli.Command {
	return &cli.Command{
		Name: "daemon", Usage: "run the node",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "metrics", EnvVars: []string{"O7S_METRICS"}, Usage: "serve Prometheus metrics on this `ADDRESS`"},
			&cli.StringFlag{Name: "group", EnvVars: []string{"O7S_GROUP"}, Usage: "members of this group may manage the node, as root may (default: ouroboros or o7s, if there is one)"},
			&cli.BoolFlag{Name: "no-xdp", EnvVars: []string{"O7S_NO_XDP"}, Usage: "forward in user space, load no XDP program"},
			&cli.BoolFlag{Name: "no-withdraw", Hidden: true, Usage: "neither send nor heed withdrawals of links, to measure what loop-free alternates do alone"},
			&cli.StringFlag{Name: "log-level", EnvVars: []string{"O7S_LOG_LEVEL"}, Value: "info", Usage: "debug, info, warn or error"},
			&cli.StringFlag{Name: "log-format", EnvVars: []string{"O7S_LOG_FORMAT"}, Value: "text", Usage: "text or json"},
		},
		Action: func(c *cli.Context) error {
			if err := arguments(c); err != nil {
				return err
			}
			log, err := daemon.NewLogger(c.String("log-level"), c.String("log-format"))
			if err != nil {
				return fmt.Errorf("%s: %w", path(c), err)
			}
			return a.startDaemon(c.Context, daemon.Options{
				RunDir: runDir(c), Group: c.String("group"), Metrics: c.String("metrics"), NoXDP: c.Bool("no-xdp"),
				NoWithdraw: c.Bool("no-withdraw"), Log: log,
			})
		},
	}
}
