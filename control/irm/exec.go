package irm

import (
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/o7s/o7s-router/control/irm/registry"
)

// childGrace is what started programs have between SIGTERM and SIGKILL when
// the daemon ends. The reference's 30 s (spec 47 §4.1) would delay its restart.
const childGrace = 2 * time.Second

// child is a program that was started because a flow arrived.
type child struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it was reaped
}

// startProgram starts what x says; it needs mu. Whether it accepts or ends,
// the registry learns.
func (m *IRM) startProgram(x registry.Exec) {
	if m.closed {
		m.reg.Ended(x.Name)
		return
	}
	cmd := exec.Command(x.Path, x.Args...)
	cmd.Env = append(os.Environ(), "O7S_RUN_DIR="+m.cfg.RunDir)
	if m.cfg.Output != nil {
		cmd.Stdout, cmd.Stderr = m.cfg.Output, m.cfg.Output
	}
	// Its own group: a Ctrl-C at the daemon's terminal is not meant for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		m.log.Error("cannot start program", "name", x.Name, "prog", x.Path, "err", err)
		m.reg.Ended(x.Name)
		return
	}
	m.stats.started.Add(1)
	m.log.Info("started program", "name", x.Name, "prog", x.Path, "pid", cmd.Process.Pid)
	c := &child{name: x.Name, cmd: cmd, done: make(chan struct{})}
	m.children[c] = struct{}{}
	m.wg.Go(func() {
		err := cmd.Wait()
		close(c.done)
		m.log.Info("program ended", "name", c.name, "prog", cmd.Path, "pid", cmd.Process.Pid, "state", cmd.ProcessState.String(), "err", err)
		m.mu.Lock()
		delete(m.children, c)
		m.reg.Ended(c.name)
		m.unlock()
	})
}

// stopChildren ends the started programs.
func (m *IRM) stopChildren() {
	m.mu.Lock()
	var list []*child
	for c := range m.children {
		list = append(list, c)
		_ = c.cmd.Process.Signal(syscall.SIGTERM)
	}
	m.mu.Unlock()
	grace := time.NewTimer(childGrace)
	defer grace.Stop()
	for _, c := range list {
		select {
		case <-c.done:
			continue
		case <-grace.C:
			grace.Reset(0)
			_ = c.cmd.Process.Kill()
			<-c.done
		}
	}
}
