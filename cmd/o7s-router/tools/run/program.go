package run

import (
	"bufio"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/cmd/o7s-router/tools/run/shim"
)

// maxInterpreters is how many interpreters of interpreters the kernel follows.
const maxInterpreters = 5

// find looks a program up as a shell does, and says why a shim cannot be
// preloaded into it: it has to be linked dynamically, for this machine, and must
// not run with more rights than its caller.
func find(name string) (path string, err error) {
	if path, err = exec.LookPath(name); err != nil {
		return "", fmt.Errorf("%s: %w", name, cause(err))
	}
	if len(shim.Object) == 0 {
		return "", errors.New("running programs is built for amd64 and arm64 only (see o7s-router proxy)")
	}
	return path, check(path, 0)
}

func cause(err error) error {
	for {
		e := errors.Unwrap(err)
		if e == nil {
			return err
		}
		err = e
	}
}

func check(path string, depth int) error {
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			return nil // executable but not readable: for the kernel to judge
		}
		return err
	}
	defer f.Close()
	if what := privileged(f); what != "" {
		return fmt.Errorf("%s is %s: nothing can be preloaded into it (see o7s-router proxy)", path, what)
	}
	var magic [2]byte
	if _, err := io.ReadFull(f, magic[:]); err != nil || string(magic[:]) == "#!" {
		if _, err := f.Seek(2, io.SeekStart); err != nil {
			return err
		}
		line, _ := bufio.NewReader(io.LimitReader(f, 256)).ReadString('\n')
		words := strings.Fields(line)
		if len(words) == 0 || depth == maxInterpreters {
			return nil
		}
		return check(words[0], depth+1)
	}
	e, err := elf.NewFile(f)
	if err != nil {
		return nil // no ELF file: for the kernel to judge
	}
	defer e.Close()
	if e.Machine != shim.Machine || e.Class != elf.ELFCLASS64 {
		return fmt.Errorf("%s is built for another machine (%v, %v) than the shim", path, e.Machine, e.Class)
	}
	if e.Section(".go.buildinfo") != nil {
		return fmt.Errorf("%s is a Go program, which makes system calls by itself: nothing can be preloaded into it (see o7s-router proxy)", path)
	}
	for _, p := range e.Progs {
		if p.Type == elf.PT_INTERP {
			return nil
		}
	}
	return fmt.Errorf("%s is linked statically: nothing can be preloaded into it (see o7s-router proxy)", path)
}

// privileged says why the kernel runs a file with rights that its caller does
// not have; the loader preloads nothing then. "" when it does not.
func privileged(f *os.File) string {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return ""
	}
	switch {
	case st.Mode&unix.S_ISUID != 0 && int(st.Uid) != os.Geteuid():
		return "a setuid program"
	case st.Mode&unix.S_ISGID != 0 && st.Mode&unix.S_IXGRP != 0 && int(st.Gid) != os.Getegid():
		return "a setgid program"
	}
	if os.Geteuid() != 0 {
		if n, err := unix.Fgetxattr(int(f.Fd()), "security.capability", nil); err == nil && n > 0 {
			return "a program with capabilities"
		}
	}
	return ""
}
