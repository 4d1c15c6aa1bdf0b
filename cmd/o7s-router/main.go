// Command o7s-router is an Ouroboros node: the daemon, its management commands
// and the tools, in one binary. It also serves under the names of the
// reference's commands (irmd, irm, oping, oecho, ocbr, operf, ovpn).
package main

import (
	"io"
	"os"

	"github.com/o7s/o7s-router/cmd/o7s-router/cli"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/ocbr"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/oecho"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/operf"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/oping"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/ovpn"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/proxy"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/run"
)

func main() {
	tools := map[string]func([]string) int{}
	for name, tool := range map[string]func(args []string, stdout, stderr io.Writer) int{
		"oping": oping.Main,
		"oecho": oecho.Main,
		"ocbr":  ocbr.Main,
		"operf": operf.Main,
		"ovpn":  ovpn.Main,
		"run":   run.Main,
		"proxy": proxy.Main,
	} {
		tools[name] = func(args []string) int { return tool(args, os.Stdout, os.Stderr) }
	}
	os.Exit(cli.App{Tools: tools}.Main(os.Args))
}
