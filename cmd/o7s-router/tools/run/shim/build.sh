#!/bin/sh
# Builds the shim's objects, byte for byte the same wherever gcc 12 of Debian 12
# does it: no build id, no compiler's name, no debug information, no library.
# $1: amd64 or arm64.
set -eu
cd "$(dirname "$0")"
case $1 in
amd64) cc=${SHIM_CC_AMD64:-gcc-12} arch=-fcf-protection=none ;;
arm64) cc=${SHIM_CC_ARM64:-aarch64-linux-gnu-gcc-12} arch=-mno-outline-atomics ;;
*) echo "build.sh: expected amd64 or arm64" >&2; exit 1 ;;
esac
exec "$cc" -std=gnu11 -O2 -Wall -Wextra -Werror \
	-fPIC -fvisibility=hidden -fno-ident -fno-stack-protector -fno-asynchronous-unwind-tables \
	-ffile-prefix-map="$PWD"=. -U_FORTIFY_SOURCE "$arch" \
	-shared -nostdlib -Wl,--build-id=none -Wl,--hash-style=gnu -Wl,-s \
	-Wl,-z,relro -Wl,-z,noexecstack -Wl,-z,noseparate-code \
	-o "shim_$1.so" shim.c
