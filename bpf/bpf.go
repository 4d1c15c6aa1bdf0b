// Package bpf holds the XDP programs, compiled, and their Go bindings.
//
// The C sources and the object files are in this directory; `make generate`
// compiles them with the pinned compiler and records the hash of the sources,
// which a test compares, so building and testing need no compiler for BPF.
//
// The package knows the programs, maps and drop reasons. What the tables mean
// and how they are changed is in fastpath/tables and fastpath.
//
// The programs load on kernels from 6.1 on and on little-endian machines: the
// data-transfer header is little-endian (spec 20 §2).
package bpf

//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type bucket -type fib8_key -type app -type flow -type flow_bucket -type verdict_count -type dt_count -type app_count Router o7s.bpf.c -- -O2 -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel Bench gen.bpf.c -- -O2 -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu
//go:generate go test -run ^TestSourcesAreCompiled$ -update .
