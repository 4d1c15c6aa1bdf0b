# o7s-router: build, test and run. Everything but `generate`, `lint`, `capi`
# and its tests needs only Go; `demo`, `bench` and the root-only tests need root.

PREFIX  ?= /usr/local
GO      ?= go
BIN     := bin/o7s-router
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X github.com/o7s/o7s-router/cmd/o7s-router/version.Version=$(VERSION)
# Pinned: generated BPF objects are compared byte by byte.
CLANG   ?= clang-14

.PHONY: all build install capi install-capi generate test race fuzz bench demo lint clean

all: build

build:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "$(LDFLAGS)" -o $(BIN) ./cmd/o7s-router

install: build
	install -D -m 0755 $(BIN) $(DESTDIR)$(PREFIX)/bin/o7s-router
	for l in irm oping oecho ocbr operf ovpn; do ln -sf o7s-router $(DESTDIR)$(PREFIX)/bin/$$l; done
	install -d $(DESTDIR)$(PREFIX)/sbin
	ln -sf ../bin/o7s-router $(DESTDIR)$(PREFIX)/sbin/irmd

# The C library needs a C compiler; everything else is built without.
CAPI     := bin/libouroboros-dev.so
CAPI_ABI := 0
# Programs ask pkg-config for at least a version of the reference: this is the
# one whose interface the library has.
CAPI_API := 0.23.0
capi:
	CGO_ENABLED=1 $(GO) build -buildmode=c-shared -trimpath -ldflags "-s -w -extldflags '-Wl,-soname,libouroboros-dev.so.$(CAPI_ABI) -Wl,--version-script=$(CURDIR)/lib/capi/cshared/libouroboros-dev.map'" -o $(CAPI) ./lib/capi/cshared
	rm -f bin/libouroboros-dev.h

install-capi: capi
	install -D -m 0755 $(CAPI) $(DESTDIR)$(PREFIX)/lib/libouroboros-dev.so.$(CAPI_ABI)
	ln -sf libouroboros-dev.so.$(CAPI_ABI) $(DESTDIR)$(PREFIX)/lib/libouroboros-dev.so
	install -d $(DESTDIR)$(PREFIX)/include/ouroboros $(DESTDIR)$(PREFIX)/lib/pkgconfig
	install -m 0644 lib/capi/include/ouroboros/*.h $(DESTDIR)$(PREFIX)/include/ouroboros
	sed 's|@PREFIX@|$(PREFIX)|; s|@VERSION@|$(CAPI_API)|' lib/capi/ouroboros-dev.pc.in >$(DESTDIR)$(PREFIX)/lib/pkgconfig/ouroboros-dev.pc

# Regenerates the BPF objects, the protobuf code and the socket shim (clang-14,
# protoc, gcc-12 for amd64 and arm64).
generate:
	BPF_CLANG=$(CLANG) $(GO) generate ./bpf ./lib/wire/pb ./cmd/o7s-router/tools/run/shim

# TESTFLAGS=-v shows each test, and what it skips and why.
TESTFLAGS ?=
test: build
	$(GO) vet ./...
	$(GO) test $(TESTFLAGS) -timeout 8m ./...
	cd lib/examples/grpc && $(GO) vet ./... && $(GO) test $(TESTFLAGS) -timeout 2m ./...

race:
	$(GO) test -race -timeout 20m ./...

# Every fuzz target for FUZZTIME each.
FUZZTIME ?= 20s
fuzz:
	@for p in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$p 2>/dev/null | grep '^Fuzz'); do \
	    echo "== $$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$p || exit 1; \
	  done; done

# ROWS=transit runs only the rows whose name starts with it.
ROWS ?=
bench: build
	$(GO) run ./bench -rows '$(ROWS)'

demo: build
	$(BIN) lab demo deploy/lab/line3.toml

lint:
	$(GO) vet ./...
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	golangci-lint run

clean:
	rm -rf bin
