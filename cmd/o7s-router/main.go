// Command o7s-router is an Ouroboros node: the daemon, its management commands
// and the tools, in one binary. It also serves under the names of the
// reference's commands (irmd, irm, oping).
package main

import (
	"os"

	"github.com/o7s/o7s-router/cmd/o7s-router/cli"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/oping"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/proxy"
	"github.com/o7s/o7s-router/cmd/o7s-router/tools/run"
)

func main() {
	tools := map[string]func([]string) int{
		"run":   func(args []string) int { return run.Main(args, os.Stdout, os.Stderr) },
		"proxy": func(args []string) int { return proxy.Main(args, os.Stdout, os.Stderr) },
		"oping": func(args []string) int { return oping.Main(args, os.Stdout, os.Stderr) },
	}
	os.Exit(cli.App{Tools: tools}.Main(os.Args))
}
