# `make check` is the gate, and exactly what .ci/run runs. `make test` needs only Rust, gcc, make and apt.

CARGO ?= cargo

.PHONY: check format lint test docs layers proto

check: format layers proto lint docs test
	@echo "check: all is well"

format:
	@echo "== format"
	@$(CARGO) fmt --check

lint:
	@echo "== clippy"
	@$(CARGO) clippy --quiet --locked --all-targets -- -D warnings

test:
	@echo "== test"
	@ci/deps
	@$(CARGO) test --quiet --locked --no-fail-fast
	@ci/clients

# Those of private items too: whoever changes the crate reads them, and their links must lead somewhere.
docs:
	@echo "== docs"
	@RUSTDOCFLAGS="-D warnings" $(CARGO) doc --quiet --locked --no-deps --document-private-items

layers:
	@echo "== layers"
	@ci/layers --self-test
	@ci/layers

proto:
	@echo "== proto"
	@ci/proto
