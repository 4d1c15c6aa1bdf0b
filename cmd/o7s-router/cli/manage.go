package cli

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/qos"
)

// bootOptions are the options of bootstrap (spec 47 §1) by the key the daemon
// knows them by.
var bootOptions = []struct{ key, usage string }{
	{"hash", "directory hash: SHA3_224, SHA3_256, SHA3_384 or SHA3_512 (local, eth, unicast; default SHA3_256)"},
	{"dev", "network interface (eth-dix, eth-llc)"},
	{"ethertype", "EtherType, hexadecimal (eth-dix; default A000)"},
	{"ip", "local IP address (udp4, udp6)"},
	{"dns", "DNS server (udp4, udp6)"},
	{"port", "UDP port (udp4, udp6; default 3435)"},
	{"addr_size", "address size in bytes (unicast; 4)"},
	{"eid_size", "endpoint id size in bytes (unicast; 8)"},
	{"ttl", "hop limit (unicast; default 60)"},
	{"addr_auth", "address authority (unicast; flat)"},
	{"directory", "directory policy (unicast; DHT)"},
	{"dht_alpha", "members asked at the same time (unicast; default 3)"},
	{"dht_k", "replicas of a directory entry (unicast; default 8)"},
	{"dht_t_expire", "lifetime of a directory entry in seconds (unicast; default 86400)"},
	{"dht_t_refresh", "refresh period of directory contacts in seconds (unicast; default 900)"},
	{"dht_t_replicate", "replication period of directory entries in seconds (unicast; default 900)"},
	{"routing", "link_state, lfa or ecmp (unicast; default link_state)"},
	{"ls_t_timeo", "lifetime of a link-state entry in seconds (unicast; default 60)"},
	{"ls_t_update", "refresh period of link-state entries in seconds (unicast; default 15)"},
	{"ls_t_recalc", "periodic route calculation in seconds (unicast; default 4)"},
	{"congestion", "congestion avoidance: mb-ecn or none (unicast; default mb-ecn)"},
}

// flagName is the spelling of a key as an option of ours; the key itself works too.
func flagName(key string) (name string, aliases []string) {
	name = strings.ReplaceAll(key, "_", "-")
	if name != key {
		aliases = []string{key}
	}
	return name, aliases
}

const typeWords = "local, unicast, broadcast, eth-llc, eth-dix, udp4 or udp6"

func output() cli.Flag {
	return &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: "table", Usage: "table or json"}
}

func outputOf(c *cli.Context) (string, error) {
	o := c.String("output")
	if o != "table" && o != "json" {
		return "", fmt.Errorf("%s: unknown output %q (expected table or json)", path(c), o)
	}
	return o, nil
}

func (a *App) ipcpCommands() []*cli.Command {
	boot := []cli.Flag{
		&cli.StringFlag{Name: "type", Aliases: []string{"t"}, Usage: "create the IPC process with this type if it does not exist: " + typeWords},
		&cli.StringFlag{Name: "layer", Aliases: []string{"l"}, Usage: "name of the new layer"},
		&cli.BoolFlag{Name: "autobind", Usage: "bind it to its own and the layer's name"},
	}
	for _, o := range bootOptions {
		name, aliases := flagName(o.key)
		boot = append(boot, &cli.StringFlag{Name: name, Aliases: aliases, Usage: o.usage})
	}
	comp := &cli.StringFlag{Name: "component", Aliases: []string{"c"}, Value: "*", Usage: "dt, mgmt or * for both"}
	return []*cli.Command{
		{
			Name: "create", Usage: "create an IPC process", ArgsUsage: "IPCP",
			Flags: []cli.Flag{&cli.StringFlag{Name: "type", Aliases: []string{"t"}, Usage: typeWords}},
			Action: func(c *cli.Context) error {
				if err := arguments(c, "IPCP"); err != nil {
					return err
				}
				if c.String("type") == "" {
					return fmt.Errorf("%s: --type is missing (expected %s)", path(c), typeWords)
				}
				return a.call(c, ipc.OpIPCPCreate, ipc.IPCPArgs{Name: c.Args().First(), Type: c.String("type")}, nil)
			},
		},
		{
			Name: "bootstrap", Usage: "start a layer", ArgsUsage: "IPCP", Flags: boot,
			Action: func(c *cli.Context) error {
				if err := arguments(c, "IPCP"); err != nil {
					return err
				}
				if c.String("layer") == "" {
					return fmt.Errorf("%s: --layer is missing (expected the name of the new layer)", path(c))
				}
				args := ipc.BootstrapArgs{
					Name: c.Args().First(), Type: c.String("type"), Layer: c.String("layer"), Autobind: c.Bool("autobind"),
				}
				for _, o := range bootOptions {
					if name, _ := flagName(o.key); c.IsSet(name) {
						if args.Options == nil {
							args.Options = map[string]string{}
						}
						args.Options[o.key] = c.String(name)
					}
				}
				return a.call(c, ipc.OpIPCPBootstrap, args, nil)
			},
		},
		{
			Name: "enroll", Usage: "join a layer through a member of it", ArgsUsage: "IPCP",
			Flags: []cli.Flag{
				&cli.StringFlag{Name: "type", Aliases: []string{"t"}, Value: "unicast", Usage: "unicast or broadcast"},
				&cli.StringFlag{Name: "layer", Aliases: []string{"l"}, Usage: "name of the layer"},
				&cli.StringFlag{Name: "dst", Aliases: []string{"d"}, Usage: "name of the member to join through (default: the layer's)"},
				&cli.BoolFlag{Name: "autobind", Usage: "bind it to its own and the layer's name"},
			},
			Action: func(c *cli.Context) error {
				if err := arguments(c, "IPCP"); err != nil {
					return err
				}
				args := ipc.EnrollArgs{
					Name: c.Args().First(), Type: c.String("type"), Layer: c.String("layer"), Dst: c.String("dst"), Autobind: c.Bool("autobind"),
				}
				if args.Layer == "" && args.Dst == "" {
					return fmt.Errorf("%s: expected at least one of --layer and --dst", path(c))
				}
				return a.call(c, ipc.OpIPCPEnroll, args, nil)
			},
		},
		{
			Name: "connect", Usage: "make an adjacency to another member", ArgsUsage: "IPCP DST",
			Flags: []cli.Flag{comp, &cli.StringFlag{Name: "qos", Aliases: []string{"q"}, Value: "raw", Usage: "raw, best, video, voice or data (data transfer only)"}},
			Action: func(c *cli.Context) error {
				if err := arguments(c, "IPCP", "DST"); err != nil {
					return err
				}
				q, err := qos.ByName(c.String("qos"))
				if err != nil {
					return fmt.Errorf("%s: %w", path(c), err)
				}
				return a.adjacency(c, ipc.OpIPCPConnect, q)
			},
		},
		{
			Name: "disconnect", Usage: "take an adjacency down", ArgsUsage: "IPCP DST", Flags: []cli.Flag{comp},
			Action: func(c *cli.Context) error {
				if err := arguments(c, "IPCP", "DST"); err != nil {
					return err
				}
				return a.adjacency(c, ipc.OpIPCPDisconnect, qos.Spec{})
			},
		},
		{
			Name: "destroy", Usage: "leave the layer and end an IPC process", ArgsUsage: "IPCP",
			Action: func(c *cli.Context) error {
				if err := arguments(c, "IPCP"); err != nil {
					return err
				}
				return a.call(c, ipc.OpIPCPDestroy, ipc.IPCPArgs{Name: c.Args().First()}, nil)
			},
		},
		{
			Name: "list", Usage: "list IPC processes", Flags: []cli.Flag{output()},
			Action: func(c *cli.Context) error {
				out, err := outputOf(c)
				if err == nil {
					err = arguments(c)
				}
				if err != nil {
					return err
				}
				var r ipc.ListResult
				if err := a.call(c, ipc.OpList, ipc.ListArgs{What: "ipcps"}, &r); err != nil {
					return err
				}
				slices.SortFunc(r.IPCPs, func(x, y ipc.IPCPInfo) int { return cmp.Compare(x.ID, y.ID) })
				return a.print(out, "ipcps", orEmpty(r.IPCPs))
			},
		},
	}
}

func (a *App) adjacency(c *cli.Context, op ipc.Op, q qos.Spec) error {
	comp := c.String("component")
	if comp != "dt" && comp != "mgmt" && comp != "*" {
		return fmt.Errorf("%s: unknown component %q (expected dt, mgmt or *)", path(c), comp)
	}
	return a.call(c, op, ipc.ConnectArgs{Name: c.Args().Get(0), Dst: c.Args().Get(1), Component: comp, QoS: q}, nil)
}

func (a *App) nameCommands() []*cli.Command {
	create := []cli.Flag{&cli.StringFlag{Name: "lb", Value: "round-robin", Usage: "load balancing among servers: round-robin or spillover"}}
	security := []struct{ key, usage string }{
		{"sencpath", "server's encryption configuration"}, {"scrtpath", "server's certificate"}, {"skeypath", "server's key"},
		{"cencpath", "client's encryption configuration"}, {"ccrtpath", "client's certificate"}, {"ckeypath", "client's key"},
	}
	for _, s := range security {
		create = append(create, &cli.StringFlag{Name: s.key, Usage: "file of the " + s.usage})
	}
	where := []cli.Flag{
		&cli.StringSliceFlag{Name: "layer", Aliases: []string{"l"}, Usage: "in the layers that match (* for any run of characters); may be repeated"},
		&cli.StringSliceFlag{Name: "ipcp", Aliases: []string{"i"}, Usage: "with the IPC processes that match; may be repeated"},
	}
	register := func(op ipc.Op) cli.ActionFunc {
		return func(c *cli.Context) error {
			if err := arguments(c, "NAME"); err != nil {
				return err
			}
			args := ipc.RegisterArgs{Name: c.Args().First(), IPCPs: c.StringSlice("ipcp"), Layers: c.StringSlice("layer")}
			if len(args.IPCPs)+len(args.Layers) == 0 {
				return fmt.Errorf("%s: expected at least one --layer or --ipcp", path(c))
			}
			return a.call(c, op, args, nil)
		}
	}
	return []*cli.Command{
		{
			Name: "create", Usage: "create a name", ArgsUsage: "NAME", Flags: create,
			Action: func(c *cli.Context) error {
				if err := arguments(c, "NAME"); err != nil {
					return err
				}
				args := ipc.NameArgs{Name: c.Args().First(), LB: c.String("lb")}
				if args.LB != "round-robin" && args.LB != "spillover" {
					return fmt.Errorf("%s: unknown load-balancing policy %q (expected round-robin or spillover)", path(c), args.LB)
				}
				for _, s := range security {
					if !c.IsSet(s.key) {
						continue
					}
					if err := (machine{}).Readable(c.String(s.key)); err != nil {
						return fmt.Errorf("%s: --%s: %w", path(c), s.key, err)
					}
					if args.Security == nil {
						args.Security = map[string]string{}
					}
					args.Security[s.key] = c.String(s.key)
				}
				return a.call(c, ipc.OpNameCreate, args, nil)
			},
		},
		{
			Name: "destroy", Usage: "destroy a name", ArgsUsage: "NAME",
			Action: func(c *cli.Context) error {
				if err := arguments(c, "NAME"); err != nil {
					return err
				}
				return a.call(c, ipc.OpNameDestroy, ipc.NameArgs{Name: c.Args().First()}, nil)
			},
		},
		{Name: "register", Usage: "make a name known in layers", ArgsUsage: "NAME", Flags: where, Action: register(ipc.OpNameRegister)},
		{Name: "unregister", Usage: "the inverse of register", ArgsUsage: "NAME", Flags: where, Action: register(ipc.OpNameUnregister)},
		{
			Name: "list", Usage: "list names", ArgsUsage: "[PREFIX]", Flags: []cli.Flag{output()},
			Action: func(c *cli.Context) error {
				out, err := outputOf(c)
				if err != nil {
					return err
				}
				if c.NArg() > 1 {
					return fmt.Errorf("%s: unexpected argument %q (expected at most a PREFIX)", path(c), c.Args().Get(1))
				}
				var r ipc.ListResult
				if err := a.call(c, ipc.OpList, ipc.ListArgs{What: "names", Prefix: c.Args().First()}, &r); err != nil {
					return err
				}
				slices.SortFunc(r.Names, func(x, y ipc.NameInfo) int { return cmp.Compare(x.Name, y.Name) })
				return a.print(out, "names", orEmpty(r.Names))
			},
		},
	}
}

func orEmpty[T any](l []T) []T {
	if l == nil {
		return []T{}
	}
	return l
}

func (a *App) bindCommands(op ipc.Op) []*cli.Command {
	program := &cli.Command{
		Name: "program", Usage: "all processes of a program", ArgsUsage: "PROGRAM NAME",
		Action: func(c *cli.Context) error {
			if err := arguments(c, "PROGRAM", "NAME"); err != nil {
				return err
			}
			prog := c.Args().First()
			if abs, err := (machine{}).Program(prog); err == nil {
				prog = abs
			} // else it was removed; its base name decides
			return a.call(c, op, ipc.BindArgs{Prog: prog, Name: c.Args().Get(1)}, nil)
		},
	}
	if op == ipc.OpBind {
		program.ArgsUsage = "PROGRAM NAME [-- ARGUMENT...]"
		program.Flags = []cli.Flag{&cli.BoolFlag{Name: "auto", Usage: "start it with the arguments when a flow arrives and nobody accepts"}}
		program.Action = func(c *cli.Context) error {
			if err := arguments(c, "PROGRAM", "NAME", "ARGUMENT..."); err != nil {
				return err
			}
			prog, err := (machine{}).Program(c.Args().First())
			if err != nil {
				return fmt.Errorf("%s: %w", path(c), err)
			}
			args := ipc.BindArgs{Prog: prog, Name: c.Args().Get(1), Auto: c.Bool("auto")}
			if extra := c.Args().Slice()[2:]; len(extra) > 0 {
				args.Args = extra
			}
			return a.call(c, op, args, nil)
		}
	}
	return []*cli.Command{
		program,
		{
			Name: "process", Usage: "one running process", ArgsUsage: "PID NAME",
			Action: func(c *cli.Context) error {
				if err := arguments(c, "PID", "NAME"); err != nil {
					return err
				}
				pid, err := strconv.ParseInt(c.Args().First(), 10, 32)
				if err != nil || pid <= 0 {
					return fmt.Errorf("%s: %q is not a process id", path(c), c.Args().First())
				}
				return a.call(c, op, ipc.BindArgs{PID: int32(pid), Name: c.Args().Get(1)}, nil)
			},
		},
		{
			Name: "ipcp", Usage: "an IPC process of this node", ArgsUsage: "IPCP NAME",
			Action: func(c *cli.Context) error {
				if err := arguments(c, "IPCP", "NAME"); err != nil {
					return err
				}
				return a.call(c, op, ipc.BindArgs{IPCP: c.Args().First(), Name: c.Args().Get(1)}, nil)
			},
		},
	}
}

// machine is the machine the commands run on.
type machine struct{}

// Program implements irmcmd.Env.
func (machine) Program(prog string) (string, error) {
	if st, err := os.Stat(prog); err == nil && !st.IsDir() {
		if st.Mode()&0o111 == 0 {
			return "", fmt.Errorf("program %q: not executable", prog)
		}
		return filepath.Abs(prog)
	}
	p, err := exec.LookPath(prog)
	if err != nil {
		return "", fmt.Errorf("program %q: no such executable here or in PATH", prog)
	}
	return filepath.Abs(p)
}

// Readable implements irmcmd.Env.
func (machine) Readable(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	return f.Close()
}
