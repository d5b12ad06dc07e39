# `make check` is the gate, and exactly what .ci/run runs. `make test` needs only Rust, gcc, make and apt.

CARGO ?= cargo

.PHONY: check format lint test clients crash consistency mutants bench bench-guard docs layers proto contract

check: format layers proto lint docs test
	@echo "check: all is well"

format:
	@echo "== format"
	@$(CARGO) fmt --all --check

lint:
	@echo "== clippy"
	@$(CARGO) clippy --quiet --locked --workspace --all-targets -- -D warnings
	@$(CARGO) clippy --quiet --locked --all-targets --features planted-faults -- -D warnings

test:
	@echo "== test"
	@ci/deps
	@$(CARGO) test --quiet --locked --no-fail-fast --package tidegate --package tidegate-examples
	@KILLS=10 $(CARGO) test --quiet --locked --features planted-faults --test crash
	@SECONDS_TO_RUN=8 $(CARGO) test --quiet --locked --features planted-faults --test consistency
	@ci/clients

# Builds the examples in Python, Go, Node and Java, those whose tools are installed, and runs them against a gateway; with grpcurl, and a client that
# goes through the whole contract. Says what was skipped, and why.
clients:
	@echo "== clients"
	@ci/clients

# Kills the real binary under load and judges what it comes back with: KILLS=1000 for longer, SEED=n to repeat the choices of a run.
crash:
	@echo "== crash"
	@ci/deps
	@$(CARGO) test --quiet --locked --features planted-faults --test crash

# Breaks networks, Redis, PostgreSQL and gateways under concurrent clients, and judges what those saw: SECONDS_TO_RUN=600 for longer than its
# three minutes, SEED=n to repeat the choices of a run.
consistency:
	@echo "== consistency"
	@ci/deps
	@$(CARGO) test --quiet --locked --features planted-faults --test consistency

# Proves that the proofs can fail: plants bugs, each of which a suite must catch.
mutants:
	@echo "== mutants"
	@ci/deps
	@ci/mutants

# The gateway beside its floor and its peers, in eleven minutes; QUICK=1 for three. STAGES="reads writes" for some of it.
bench:
	@echo "== bench"
	@ci/deps etcd=etcd-server h2load=nghttp2-client
	@ci/bench $(STAGES)

# Counts what a Get and a Put cost in instructions, which no busy machine changes: a loss or a gain of more than 5 % must be looked at.
bench-guard:
	@echo "== bench-guard"
	@ci/deps valgrind=valgrind
	@ci/bench-guard

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

# Takes what was added to the contract into the baseline that it is checked against. Refuses when it would break clients or journals.
contract:
	@echo "== contract"
	@ci/proto --write
