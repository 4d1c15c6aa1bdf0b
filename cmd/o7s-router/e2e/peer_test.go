package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// peerName is the name under which the test binary is a program of its own.
const peerName = "e2e-peer"

// peerMain is that program:
//
//	e2e-peer echo [TAG]  accepts flows and echoes, with the tag in front
//	e2e-peer hold NAME   allocates a flow, sends a message, and reads until an error
//
// It prints a line for every step.
func peerMain(args []string) int {
	ctx := context.Background()
	switch args[0] {
	case "echo":
		tag := strings.Join(args[1:], " ")
		fmt.Println("ready")
		for {
			f, err := o7s.Accept(ctx)
			if err != nil {
				fmt.Println("end:", o7serr.Code(err), err)
				return 0
			}
			go func() {
				defer f.Close()
				buf := make([]byte, 2048)
				for {
					n, err := f.Read(buf)
					if err != nil {
						return
					}
					_, _ = f.Write(append([]byte(tag), buf[:n]...))
				}
			}()
		}
	case "hold":
		f, err := o7s.Alloc(ctx, args[1], nil)
		if err != nil {
			fmt.Println("end:", o7serr.Code(err), err)
			return 1
		}
		if got, err := ask(f, "hello"); err != nil || got != "hello" {
			fmt.Println("end:", o7serr.Code(err), got, err)
			return 1
		}
		fmt.Println("up")
		_ = f.SetReadDeadline(time.Time{})
		buf := make([]byte, 2048)
		for {
			if _, err := f.Read(buf); err != nil {
				fmt.Println("end:", o7serr.Code(err), err)
				return 0
			}
		}
	}
	fmt.Println("unknown", args)
	return 2
}

// program is a running e2e-peer.
type program struct {
	t     *testing.T
	cmd   *exec.Cmd
	lines chan string // closed at the end of its output
}

// start starts e2e-peer on a host.
func (n *network) start(host string, args ...string) *program {
	n.t.Helper()
	p := &program{t: n.t, cmd: exec.Command(peerPath(), args...), lines: make(chan string, 64)}
	p.cmd.Args[0] = peerName
	p.cmd.Env = append(os.Environ(), "O7S_RUN_DIR="+n.RunDir(host), "O7S_LAB="+n.Name())
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	p.cmd.Stderr = p.cmd.Stdout
	if err := p.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	go func() {
		defer close(p.lines)
		sc := bufio.NewScanner(out)
		for sc.Scan() {
			p.lines <- sc.Text()
		}
		_, _ = io.Copy(io.Discard, out)
	}()
	n.t.Cleanup(p.kill)
	return p
}

// kill is kill -9; it may be called again.
func (p *program) kill() {
	_ = p.cmd.Process.Kill()
	var exit *exec.ExitError
	if err := p.cmd.Wait(); err != nil && !errors.As(err, &exit) && !strings.Contains(err.Error(), "already called") {
		p.t.Log(err)
	}
}

// expect waits for a line that starts with prefix.
func (p *program) expect(limit time.Duration, prefix string) string {
	p.t.Helper()
	t := time.NewTimer(slack * limit)
	defer t.Stop()
	for {
		select {
		case line, ok := <-p.lines:
			if !ok {
				p.t.Fatalf("%v: ended without %q", p.cmd.Args, prefix)
			}
			if strings.HasPrefix(line, prefix) {
				return line
			}
			p.t.Logf("%v: %s", p.cmd.Args, line)
		case <-t.C:
			p.t.Fatalf("%v: no %q after %v", p.cmd.Args, prefix, limit)
		}
	}
}
