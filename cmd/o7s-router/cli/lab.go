package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/o7s/o7s-router/cmd/o7s-router/demo"
	"github.com/o7s/o7s-router/deploy/lab"
)

func (a *App) labCommands() []*cli.Command {
	options := func() []cli.Flag {
		return []cli.Flag{
			&cli.StringFlag{Name: "prefix", EnvVars: []string{"O7S_LAB_PREFIX"}, Usage: "in front of the lab's name, to run several of one file"},
			&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "say what is done"},
		}
	}
	return []*cli.Command{
		{
			Name: "up", Usage: "build a lab and leave it running", ArgsUsage: "FILE", Flags: options(),
			Action: func(c *cli.Context) error {
				l, err := a.lab(c, "FILE")
				if err != nil {
					return err
				}
				for _, k := range l.Topology().Links {
					if k.Impair != nil {
						return fmt.Errorf("%s: the link %s - %s is impaired, which ends with this command (use lab run)", path(c), k.Ends[0], k.Ends[1])
					}
				}
				return l.Up(c.Context)
			},
		},
		{
			// What follows the host is another command line.
			Name: "exec", Usage: "run a command on a host of a lab that is up", ArgsUsage: "FILE HOST COMMAND [ARGUMENT...]", SkipFlagParsing: true,
			Action: func(c *cli.Context) error {
				l, err := a.lab(c, "FILE", "HOST", "COMMAND", "ARGUMENT...")
				if err != nil {
					return err
				}
				host, argv := c.Args().Get(1), c.Args().Slice()[2:]
				if hosts := l.Topology().Hosts; !slices.Contains(hosts, host) {
					return fmt.Errorf("%s: unknown host %q (expected one of %v)", path(c), host, hosts)
				}
				err = l.Exec(c.Context, host, lab.Streams{In: os.Stdin, Out: a.Stdout, Err: a.Stderr}, argv...)
				var exit *exec.ExitError
				if errors.As(err, &exit) && exit.ExitCode() > 0 {
					return ExitStatus(exit.ExitCode())
				}
				return err
			},
		},
		{
			Name: "run", Usage: "build a lab, do its checks, take it down", ArgsUsage: "FILE", Flags: options(),
			Action: func(c *cli.Context) error {
				l, err := a.lab(c, "FILE")
				if err != nil {
					return err
				}
				return l.Run(c.Context)
			},
		},
		{
			Name: "demo", Usage: "build a three-node lab, ping across it and show what the middle node did", ArgsUsage: "FILE", Flags: options(),
			Action: func(c *cli.Context) error {
				if err := arguments(c, "FILE"); err != nil {
					return err
				}
				opt, err := a.labOptions(c)
				if err != nil {
					return err
				}
				opt.Stdout = nil // the demo tells its own story
				return demo.Run(c.Context, c.Args().First(), opt, a.Stdout)
			},
		},
		{
			Name: "down", Usage: "take a lab down", ArgsUsage: "FILE", Flags: options(),
			Action: func(c *cli.Context) error {
				l, err := a.lab(c, "FILE")
				if err != nil {
					return err
				}
				return l.Down(context.WithoutCancel(c.Context))
			},
		},
	}
}

// lab opens the lab of the file that is the first argument.
func (a *App) lab(c *cli.Context, args ...string) (*lab.Lab, error) {
	if err := arguments(c, args...); err != nil {
		return nil, err
	}
	t, err := lab.Load(c.Args().First())
	if err != nil {
		return nil, err
	}
	opt, err := a.labOptions(c)
	if err != nil {
		return nil, err
	}
	return lab.New(t, opt)
}

func (a *App) labOptions(c *cli.Context) (lab.Options, error) {
	opt := lab.Options{Prefix: c.String("prefix"), Stdout: a.Stdout}
	if os.Geteuid() != 0 {
		return opt, fmt.Errorf("%s: network namespaces need root", path(c))
	}
	if c.Command.SkipFlagParsing {
		opt.Prefix = os.Getenv("O7S_LAB_PREFIX")
	}
	if c.Bool("verbose") {
		opt.Log = slog.New(slog.NewTextHandler(a.Stderr, nil))
	}
	return opt, nil
}
