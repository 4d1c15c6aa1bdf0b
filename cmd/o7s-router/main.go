// Command o7s-router is an Ouroboros node: the daemon, its management commands
// and the tools, in one binary. It also serves under the names of the
// reference's commands (irmd, irm, oping).
package main

import (
	"os"

	"github.com/o7s/o7s-router/cmd/o7s-router/cli"
)

func main() {
	os.Exit(cli.App{}.Main(os.Args))
}
