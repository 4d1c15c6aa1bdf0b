// Package capi is where the C library lives: libouroboros-dev, for C and C++
// programs written for the interface of spec 34.
//
//   - include: the headers, as they are installed.
//   - cshared: the library. C on the outside, Go inside.
//   - calls: what it does, without C.
//   - testdata: programs in C and C++ that the tests compile against an
//     installed library and run.
//
// make capi builds bin/libouroboros-dev.so, make install-capi PREFIX=DIR
// installs library, headers and the pkg-config file. Both need a C compiler;
// nothing else in the repository does.
package capi
