// Package shim holds the socket shim of `o7s-router run` as shared objects. They
// are generated from shim.c, which says what they do, and committed, so that a
// build needs no C compiler.
package shim

//go:generate ./build.sh amd64
//go:generate ./build.sh arm64
