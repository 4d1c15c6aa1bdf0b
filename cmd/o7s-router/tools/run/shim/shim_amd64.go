package shim

import (
	"debug/elf"
	_ "embed" // the object
)

// Object is the shared object to preload.
//
//go:embed shim_amd64.so
var Object []byte

// Machine is what it runs on.
const Machine = elf.EM_X86_64
