# Outrigger: every task a developer or CI needs. `make help` lists them.

GO        ?= go
BIN       := bin/outrigger
CACHE     := $(CURDIR)/.cache
TOOLS     := $(CACHE)/tools
PACKAGES  := ./...
# Everything but the tests that start processes: those run this code without the detector.
RACE      := $$($(GO) list ./... | grep -v -e /bench -e /cmd/)
FUZZTIME  ?= 30s
BENCH     ?= .
SOAK      ?= 1h
export PATH := $(TOOLS):$(PATH)

.PHONY: help build program run drill test race fuzz soak bench bench-compare generate generate-check lint consul ci deps clean

help:               ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

build: program      ## compile bin/outrigger, and bin/outrigger-dataplane for pods and nodes
	$(GO) build -tags dataplane -o $(BIN)-dataplane ./cmd/outrigger

program:
	$(GO) build -o $(BIN) ./cmd/outrigger

run: program        ## run a whole mesh on this machine and replay a real trace through it
	$(BIN) up --script demo $(ARGS)

# The Envoy of the test dependencies, if they are installed.
ENVOY ?= $(firstword $(wildcard .cache/venv/lib/python3*/site-packages/envoy/_bin/envoy))
drill: program      ## time rollbacks end to end at 100 sidecars, and kill the control plane during some (3 minutes)
	$(BIN) drill rollback $(if $(ENVOY),--envoys 2 --envoy $(ENVOY)) $(ARGS)

deps:               ## install what tests and benchmarks need beyond Go
	@bash .ci/deps

# .ci/gotest is go test that says at its end what failed. The time limits are for a machine
# that is an order of magnitude slower than the one the tests were written on.
test: deps          ## all tests, long suites in short rotating slices
	$(GO) vet $(PACKAGES)
	@GO=$(GO) .ci/gotest -timeout 30m $(PACKAGES)

race: deps          ## the same tests under the race detector
	@GO=$(GO) .ci/gotest -race -timeout 30m $(RACE)

fuzz:               ## every fuzz target for FUZZTIME each
	@bash .ci/fuzz $(FUZZTIME)

soak:               ## a sidecar under faults and half its load for SOAK (default 1h): memory, leaks, accounts
	OUTRIGGER_SOAK=$(SOAK) $(GO) test ./cmd/outrigger -run 'TestSoak$$' -v -timeout 24h

bench: build deps   ## compare with what a user would pick instead; BENCH=<regexp> selects
	@.ci/retry bash .ci/node gateway || { echo "not installed: the LLM gateway; its row says so" >&2; [ "$$CI" != true ]; }
	$(GO) run ./bench/runner -binary $(BIN) -run '$(BENCH)' -out bench/results/latest.json

bench-compare:      ## benchmarks of this tree against REF (default HEAD~1) through benchstat
	@bash .ci/bench-compare

generate: $(TOOLS)/protoc-gen-go ## regenerate code from api/*.proto
	@bash .ci/generate

generate-check: generate ## fail when generated code is not what the .proto files say
	git diff --exit-code -- api

lint: $(TOOLS)/staticcheck ## gofmt, vet, staticcheck
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet $(PACKAGES)
	$(GO) vet -tags dataplane ./cmd/outrigger
	cd bench/peers && ../../.ci/retry $(GO) list -deps -test ./... >/dev/null && $(GO) vet ./...
	$(TOOLS)/staticcheck $(PACKAGES)

ci: lint generate-check consul ## race detector, long slices, generated-code check
	@GO=$(GO) .ci/gotest -race -timeout 45m $(RACE)
	@OUTRIGGER_LONG=1 GO=$(GO) .ci/gotest -timeout 60m $(PACKAGES)

consul: $(TOOLS)/consul ## build a Consul agent for the tests of region/consul (minutes)

$(TOOLS)/consul: .ci/consul/go.mod
	cd .ci/consul && GOBIN=$(TOOLS) ../retry $(GO) install tool
	@touch $@

$(TOOLS)/protoc-gen-go $(TOOLS)/staticcheck: .ci/tools/go.mod
	cd .ci/tools && GOBIN=$(TOOLS) ../retry $(GO) install tool
	@touch $(TOOLS)/*

clean:              ## remove what was built
	rm -rf bin $(CACHE)
