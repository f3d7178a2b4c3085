# SPDX-License-Identifier: Apache-2.0
# What a person types. `make help` lists it.

SHELL := /bin/bash
CARGO ?= cargo
GUEST := target/guest
BARE := $(GUEST)/bare.elf
TARGET := x86_64-unknown-linux-gnu
BRUME := target/release/brume

.DEFAULT_GOAL := help
.PHONY: help build deps guest bare demo test test-unit test-e2e test-long bench schemathesis lint fmt clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## Install the Debian packages that building and testing need
	@resources/deps.sh

# Linked statically: a third less memory for each machine, and no time for the dynamic linker.
build: deps ## Build brume (target/release/brume)
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --release --locked --target $(TARGET) -p brume-cli
	@install -D target/$(TARGET)/release/brume $(BRUME)

guest: deps ## Build the Linux guest (target/guest), or take it from the cache
	@resources/guest/build.sh --out $(GUEST)
	@install -m 644 resources/guest/cmdline.txt $(GUEST)

bare: deps ## Build the bare guest of tests and benchmarks
	@mkdir -p $(GUEST)
	$(CARGO) build --release --locked --manifest-path tests/bare-guest/Cargo.toml --target-dir target/bare-guest
	@install target/bare-guest/release/bare-guest $(BARE)

demo: build guest ## Boot a Linux guest with a disk and a network and show what it says
	@resources/demo.sh $(BRUME) $(GUEST)

test: test-unit test-e2e ## Run unit tests, then end-to-end tests on /dev/kvm

# All of the workspace each time: of a part, cargo would compile what that needs once more.
test-unit: deps ## Run the tests that need no /dev/kvm
	$(CARGO) test --locked --workspace

test-e2e: build guest bare ## Run the end-to-end tests
	$(CARGO) test --locked --workspace --test e2e

test-long: build guest bare ## Run the tests that take minutes, 17 GiB of memory, or a loop device
	$(CARGO) test --locked --workspace -- --ignored --nocapture
	$(CARGO) test --locked --workspace --test e2e -- --ignored --nocapture

bench: build bare ## Measure; FIRECRACKER, CLOUD_HYPERVISOR, QEMU=path measure those binaries beside
	$(CARGO) run --release --locked -p brume-tests --bin bench -- $(BENCH_ARGS)

schemathesis: build guest ## Send brume what schemathesis makes up from the OpenAPI document (needs PyPI)
	@resources/schemathesis.sh $(BRUME) $(GUEST)

lint: ## Check formatting and lints
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --locked --workspace --test e2e -- -D warnings

fmt: ## Format all code
	$(CARGO) fmt --all

clean: ## Remove what was built here; the guest's cache stays
	rm -rf target
