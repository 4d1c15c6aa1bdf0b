//go:build !amd64 && !arm64

package shim

import "debug/elf"

// Object is empty: the shim is built for amd64 and arm64.
var Object []byte

// Machine is none.
const Machine = elf.EM_NONE
