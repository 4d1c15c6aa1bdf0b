# o7s-router: build, test and run. Everything but `generate` and `lint` needs
# only Go; `demo`, `bench` and the root-only tests need root.

PREFIX  ?= /usr/local
GO      ?= go
BIN     := bin/o7s-router
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X github.com/o7s/o7s-router/cmd/o7s-router/version.Version=$(VERSION)
# Pinned: generated BPF objects are compared byte by byte.
CLANG   ?= clang-14

.PHONY: all build install generate test race fuzz bench demo lint clean

all: build

build:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "$(LDFLAGS)" -o $(BIN) ./cmd/o7s-router

install: build
	install -D -m 0755 $(BIN) $(DESTDIR)$(PREFIX)/bin/o7s-router
	for l in irm oping oecho ocbr operf ovpn; do ln -sf o7s-router $(DESTDIR)$(PREFIX)/bin/$$l; done
	install -d $(DESTDIR)$(PREFIX)/sbin
	ln -sf ../bin/o7s-router $(DESTDIR)$(PREFIX)/sbin/irmd

# Regenerates the BPF objects and the protobuf code (clang-14, protoc).
generate:
	BPF_CLANG=$(CLANG) $(GO) generate ./bpf ./lib/wire/pb

# TESTFLAGS=-v shows each test, and what it skips and why.
TESTFLAGS ?=
test: build
	$(GO) vet ./...
	$(GO) test $(TESTFLAGS) -timeout 8m ./...

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
