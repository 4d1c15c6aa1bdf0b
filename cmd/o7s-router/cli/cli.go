// Package cli is the command line of o7s-router: its own commands, and under
// the names irmd and irm those of the reference (spec 45 §6, §9). Commands turn
// words into requests to the daemon and replies into tables or JSON; they print
// nothing on success, and one line on standard error with exit status 1 on
// failure.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/o7s/o7s-router/cmd/o7s-router/daemon"
	"github.com/o7s/o7s-router/cmd/o7s-router/version"
	"github.com/o7s/o7s-router/lib/ipc"
)

// Caller makes requests to a daemon; *ipc.Client is one.
type Caller interface {
	Call(ctx context.Context, op ipc.Op, args, result any) ([]int, error)
	Close() error
}

// App is what the commands work with. Zero values mean the real ones.
type App struct {
	Stdout, Stderr io.Writer
	Dial           func(ctx context.Context, runDir string) (Caller, error)

	// Daemon runs the daemon until ctx ends; daemon.Run.
	Daemon func(ctx context.Context, o daemon.Options) error
	// Tools are programs on the application library, by name; they get the
	// arguments after their name and return the exit status.
	Tools map[string]func(args []string) int
}

func (a *App) defaults() {
	if a.Stdout == nil {
		a.Stdout = os.Stdout
	}
	if a.Stderr == nil {
		a.Stderr = os.Stderr
	}
	if a.Daemon == nil {
		a.Daemon = daemon.Run
	}
	if a.Dial == nil {
		a.Dial = func(ctx context.Context, runDir string) (Caller, error) { return ipc.Dial(ctx, runDir) }
	}
}

// Main runs the program that args[0] names and returns its exit status.
func (a App) Main(args []string) int {
	a.defaults()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	name, args := filepath.Base(args[0]), args[1:]
	switch name {
	case "irm":
		return a.status(name, a.irm(ctx, args))
	case "irmd":
		return a.status(name, a.irmd(ctx, args))
	}
	if tool := a.Tools[name]; tool != nil {
		return tool(args)
	}
	if len(args) > 0 {
		switch first := args[0]; {
		case first == "irm":
			return a.status("irm", a.irm(ctx, args[1:]))
		case a.Tools[first] != nil:
			return a.Tools[first](args[1:])
		}
	}
	return a.status("o7s-router", a.run(ctx, args))
}

// exitStatus is an error that has been reported already.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// ExitStatus makes a command end with this status and no message of its own.
func ExitStatus(n int) error {
	if n == 0 {
		return nil
	}
	return exitStatus(n)
}

// status reports err, one line unless a lab has more to tell, and gives the exit status for it.
func (a *App) status(prog string, err error) int {
	var exit exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return int(exit)
	case errors.Is(err, context.Canceled):
		fmt.Fprintf(a.Stderr, "%s: interrupted\n", prog)
		return 1
	}
	fmt.Fprintf(a.Stderr, "%s: %s\n", prog, strings.TrimRight(err.Error(), "\n"))
	return 1
}

// run parses and runs the commands of o7s-router itself.
func (a *App) run(ctx context.Context, args []string) error {
	if len(args) == 1 && args[0] == "--version" {
		args = []string{"version"}
	}
	app := a.tree()
	return app.RunContext(ctx, append([]string{app.Name}, intersperse(app.Commands, app.Flags, args)...))
}

// Commands returns the command tree, for generated documentation.
func (a App) Commands() *cli.App {
	a.defaults()
	return a.tree()
}

func (a *App) tree() *cli.App {
	app := &cli.App{
		Name:                   "o7s-router",
		Usage:                  "an Ouroboros node: daemon, management and tools",
		Version:                version.String(),
		Writer:                 a.Stdout,
		ErrWriter:              a.Stderr,
		HideVersion:            true,
		EnableBashCompletion:   true,
		UseShortOptionHandling: true,
		Flags: []cli.Flag{&cli.StringFlag{
			Name: "run-dir", EnvVars: []string{"O7S_RUN_DIR"}, Value: ipc.DefaultRunDir,
			Usage: "directory of the daemon's socket",
		}},
		ExitErrHandler: func(*cli.Context, error) {}, // status does it
		Commands: []*cli.Command{
			a.daemonCommand(),
			group("ipcp", "manage IPC processes", a.ipcpCommands()...),
			group("name", "manage names", a.nameCommands()...),
			group("bind", "say who serves a name", a.bindCommands(ipc.OpBind)...),
			group("unbind", "the inverse of bind", a.bindCommands(ipc.OpUnbind)...),
			a.showCommand(),
			group("lab", "networks of hosts in namespaces, from a file", a.labCommands()...),
			{
				Name: "version", Usage: "print the version",
				Action: func(c *cli.Context) error {
					if err := arguments(c); err != nil {
						return err
					}
					_, err := fmt.Fprintf(a.Stdout, "o7s-router %s\n", version.String())
					return err
				},
			},
		},
	}
	app.Commands = append(app.Commands, a.toolCommands()...)
	app.Action = unknownCommand("", app.Commands)
	app.OnUsageError = usageError
	for _, c := range app.Commands {
		finish(c)
	}
	return app
}

// toolUsage says what tools do, for the list of commands.
var toolUsage = map[string]string{
	"oping": "check that a server answers, and how fast",
	"oecho": "send a message and get it back",
	"ocbr":  "send at a constant bit rate",
	"operf": "measure bandwidth, loss and round-trip times",
	"ovpn":  "carry IP packets or Ethernet frames over flows",
	"proxy": "carry TCP to names and names to TCP",
	"run":   "run a program with its TCP connections over flows",
}

// toolCommands are the tools in the list of commands. They read their options
// themselves; Main runs them before the list is asked.
func (a *App) toolCommands() []*cli.Command {
	var cmds []*cli.Command
	for _, name := range slices.Sorted(maps.Keys(a.Tools)) {
		cmds = append(cmds, &cli.Command{
			Name: name, Usage: toolUsage[name], Category: "tools", SkipFlagParsing: true,
			Action: func(c *cli.Context) error { return ExitStatus(a.Tools[name](c.Args().Slice())) },
		})
	}
	return cmds
}

// group is a command that has subcommands only.
func group(name, usage string, sub ...*cli.Command) *cli.Command {
	return &cli.Command{Name: name, Usage: usage, Subcommands: sub, Action: unknownCommand(name+" ", sub)}
}

func unknownCommand(path string, sub []*cli.Command) cli.ActionFunc {
	return func(c *cli.Context) error {
		var known []string
		for _, s := range sub {
			if !s.Hidden {
				known = append(known, s.Name)
			}
		}
		list := path + "{" + strings.Join(known, "|") + "}"
		if c.NArg() == 0 {
			return fmt.Errorf("expected a command: o7s-router %s (--help tells more)", list)
		}
		return fmt.Errorf("unknown command %q (expected %s)", c.Args().First(), list)
	}
}

func usageError(_ *cli.Context, err error, _ bool) error {
	msg := strings.Replace(err.Error(), "flag provided but not defined: ", "unknown option ", 1)
	return fmt.Errorf("%s (--help lists what there is)", msg)
}

// finish sets what is the same for all commands. The run directory may be
// given anywhere.
func finish(c *cli.Command) {
	c.OnUsageError = usageError
	c.HideHelpCommand = true
	runDir := &cli.StringFlag{Name: "run-dir", Usage: "directory of the daemon's socket (environment O7S_RUN_DIR)"}
	if len(c.Subcommands) == 0 && !c.SkipFlagParsing && !slices.ContainsFunc(c.Flags, func(f cli.Flag) bool { return slices.Contains(f.Names(), "run-dir") }) {
		c.Flags = append(c.Flags, runDir)
	}
	for _, s := range c.Subcommands {
		finish(s)
	}
}

// runDir is the run directory: of the command's own option, else of the
// program's, else of the environment, else the default.
func runDir(c *cli.Context) string {
	for _, l := range c.Lineage() {
		if v := l.String("run-dir"); l.IsSet("run-dir") && v != "" {
			return v
		}
	}
	return ipc.RunDir("")
}

// arguments checks that a command got exactly the positional arguments called
// names; one that ends in "..." takes any number.
func arguments(c *cli.Context, names ...string) error {
	n := len(names)
	open := n > 0 && strings.HasSuffix(names[n-1], "...")
	if open {
		n--
	}
	switch got := c.NArg(); {
	case got < n:
		return fmt.Errorf("%s: %s is missing (expected %s)", path(c), names[got], strings.Join(names, " "))
	case got > n && !open && n == 0:
		return fmt.Errorf("%s: unexpected argument %q (expected none)", path(c), c.Args().Get(n))
	case got > n && !open:
		return fmt.Errorf("%s: unexpected argument %q (expected %s only)", path(c), c.Args().Get(n), strings.Join(names, " "))
	}
	for i := range n {
		if c.Args().Get(i) == "" {
			return fmt.Errorf("%s: %s is empty", path(c), names[i])
		}
	}
	return nil
}

func path(c *cli.Context) string {
	return strings.TrimPrefix(c.Command.HelpName, "o7s-router ")
}

// call makes one request to the daemon.
func (a *App) call(c *cli.Context, op ipc.Op, args, result any) error {
	conn, err := a.Dial(c.Context, runDir(c))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Call(c.Context, op, args, result)
	return err
}

// intersperse moves the options of the command that args names before its
// arguments, because the flag package stops at the first argument. What
// follows "--" stays as it is.
func intersperse(cmds []*cli.Command, flags []cli.Flag, args []string) []string {
	var opts, rest []string
	for i := 0; i < len(args); i++ {
		w := args[i]
		if w == "--" {
			rest = append(rest, args[i+1:]...)
			break
		}
		if len(w) > 1 && w[0] == '-' {
			opts = append(opts, w)
			if name, _, joined := strings.Cut(strings.TrimLeft(w, "-"), "="); !joined && takesValue(flags, name) {
				if i++; i == len(args) {
					return opts // without its value: for the parser to complain about
				}
				opts = append(opts, args[i])
			}
			continue
		}
		if j := slices.IndexFunc(cmds, func(c *cli.Command) bool { return c.HasName(w) }); j >= 0 {
			c := cmds[j]
			out := append(opts, w)
			if c.SkipFlagParsing {
				return append(out, args[i+1:]...)
			}
			return append(out, intersperse(c.Subcommands, c.Flags, args[i+1:])...)
		}
		rest = append(rest, w)
		cmds = nil
	}
	if len(rest) == 0 {
		return opts
	}
	return append(append(opts, "--"), rest...)
}

func takesValue(flags []cli.Flag, name string) bool {
	for _, f := range flags {
		if slices.Contains(f.Names(), name) {
			v, ok := f.(cli.DocGenerationFlag)
			return ok && v.TakesValue()
		}
	}
	return false
}
