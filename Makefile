# sales-push. `make demo` and `make test` need Python 3.11 to 3.13 with venv, and make; they fetch everything else.
# Every target that measures (demo, bench) ends with one line of JSON holding its figures.

# The system's own python3 is preferred: Debian builds it with PGO and LTO, 5 % more messages a second than a plain build
# (measured in alternating pairs against one by pyenv).
ifndef PYTHON
FIT := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON := $(shell for p in /usr/bin/python3 python3; do "$$p" -c '$(FIT)' 2>/dev/null && echo "$$p" && break; done || echo python3)
endif
VENV ?= .venv
BIN := $(VENV)/bin
# No build may fetch anything on its own: what builds need is installed first, with hashes, like everything else.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
BUILD := deploy/requirements-build.txt
RUNTIME := deploy/requirements.txt
DEV := deploy/requirements-dev.txt
FAST := deploy/requirements-fast.txt
POSTGRES := deploy/requirements-postgres.txt
COMPILE := deploy/requirements-compile.txt
LOCK := $(BIN)/uv pip compile --quiet --generate-hashes --universal --python-version 3.11 \
	--no-emit-index-url --no-header --no-annotate
# One test process per core of the smallest machine we build on; 0 runs them in one, for a debugger.
TEST_WORKERS ?= 2
# A test process that ends by a signal ends the run: started anew, xdist may wait for its tests for ever.
TWO := -n $(TEST_WORKERS) --dist loadfile --max-worker-restart=0
# make chaos: 300 kills for a release (0 failures in n kills: under 3/n, 95 %).
KILLS ?= 20
SEED ?= 1
WORKERS ?= 2
SOURCES := engine tracker policy benchmarks tests
# Everything on a message's way, from laws to whole journeys.
COMPILED_TESTS := tests/laws tests/dialogues tests/engine tests/tracker tests/journeys/test_delivery.py \
	tests/journeys/test_queue.py tests/journeys/test_forgotten.py
# What is measured is what an operator is told to run: compiled where this machine can, else the text; the JSON says which.
COMPILED := @$(BIN)/sales-push compile || echo "measured as text"

.PHONY: help demo test debian fast compiled check lint format types contracts bench chaos chaos-matrix chaos-blocked bench-queue bench-peers bench-ledger bench-erasure policy-table docs lock clean
.DEFAULT_GOAL := help

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- environments: .runtime is what an operator installs, .dev adds the tools; .dev satisfies both ----------------

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(BUILD) $(RUNTIME) pyproject.toml | $(VENV)/bin/python
	$(PIP) --require-hashes -r $(BUILD)
	$(PIP) --require-hashes --no-build-isolation -r $(RUNTIME)
	$(PIP) --no-index --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(BUILD) $(DEV) pyproject.toml | $(VENV)/bin/python
	$(PIP) --require-hashes -r $(BUILD)
	$(PIP) --require-hashes --no-build-isolation -r $(DEV)
	$(PIP) --no-index --no-deps --no-build-isolation --editable .
	@touch $@ $(VENV)/.runtime

$(VENV)/.fast: $(VENV)/.dev $(FAST)
	$(PIP) --require-hashes --no-build-isolation -r $(FAST)
	@touch $@

# --- what people type -----------------------------------------------------------------------------------------------

demo: $(VENV)/.runtime ## A real campaign through every floor in under three minutes; ends with one line of JSON
	@$(BIN)/sales-push demo $(DEMO)

test: $(VENV)/.dev ## All tests that need nothing but the wheels
	$(BIN)/python -m pytest -m "not debian and not fast" $(TWO)

debian: $(VENV)/.dev ## The tests that use Debian packages (.ci/run installs them); they fail when a tool is missing
	$(BIN)/python -m pytest -m debian

fast: $(VENV)/.fast ## Install the [fast] extra and run its tests: a processor with AVX-512 IFMA is needed
	$(BIN)/python -m pytest -m fast

compiled: $(VENV)/.dev ## Compile the hot rooms and run their tests on what came out: needs gcc and python3-dev
	$(BIN)/sales-push compile
	SALESPUSH_COMPILED=1 $(BIN)/python -m pytest -m "not debian and not fast and not doubles" $(TWO) \
		$(COMPILED_TESTS)

# Where the processor can, [fast] is part of what a change must pass.
CHECK_FAST := $(if $(shell grep -om1 avx512ifma /proc/cpuinfo 2>/dev/null),fast)

check: lint types contracts compiled test debian $(CHECK_FAST) ## Everything a change must pass

lint: $(VENV)/.dev ## Format and lint, changing nothing
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: $(VENV)/.dev ## mypy strict
	$(BIN)/mypy

contracts: $(VENV)/.dev ## Floors, one door, exhaustive rooms, pure rooms
	$(BIN)/lint-imports

format: $(VENV)/.dev ## Put the sources into shape
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.dev ## Micro-benchmarks, then the journey; ends with one line of JSON
	$(COMPILED)
	@$(BIN)/python -m benchmarks $(BENCH)

bench-queue: $(VENV)/.dev ## What a million waiting recipients cost: bytes and CPU each; ends with one line of JSON
	@$(BIN)/python -m benchmarks.queue $(BENCH)

bench-peers: $(VENV)/.dev ## Postfix, nodemailer, aiosmtplib and ours in turn, to one sink; ends with one line of JSON
	$(COMPILED)
	@$(BIN)/python -m benchmarks.peers $(PEERS)

bench-ledger: $(VENV)/.dev ## Events a second into a ledger that is full already, and how far it lags; one line of JSON
	@$(BIN)/python -m benchmarks.ledger $(LEDGER)

chaos: $(VENV)/.dev ## Kill every role at random (KILLS=20 SEED=1 WORKERS=2), then at each crash point; one line of JSON
	@$(BIN)/python -m tests.chaos --kills $(KILLS) --seed $(SEED) --workers $(WORKERS) $(CHAOS)

chaos-matrix: $(VENV)/.dev ## What {always, everysec} lose at kill -9, full disk, older dump, power cut; one line of JSON
	@$(BIN)/python -m tests.chaos.matrix --seed $(SEED) $(MATRIX)

chaos-blocked: $(VENV)/.dev ## A blocked provider's 10,000 domains beside 100 free ones: what these keep; one line of JSON
	@$(BIN)/python -m tests.chaos.blocked $(BLOCKED)

bench-erasure: $(VENV)/.dev ## How long the answer to an erasure takes in a large ledger, and what is left; one line of JSON
	@$(BIN)/python -m benchmarks.erasure $(ERASURE)

policy-table: $(VENV)/.dev ## Each promise of the privacy policy, its tests, and whether they guard it; one line of JSON
	@$(BIN)/python -m tests.promises

docs: $(VENV)/.dev ## docs/configuration.md, retention.md and inventory.md from the models
	@mkdir -p docs
	$(BIN)/sales-push config --markdown > docs/configuration.md.new
	mv docs/configuration.md.new docs/configuration.md
	for page in retention inventory; do $(BIN)/sales-push policy $$page --markdown --shipped > docs/$$page.md.new \
		&& mv docs/$$page.md.new docs/$$page.md || exit 1; done

lock: $(VENV)/.dev ## Resolve the dependencies again (needs the network); commit the six files
	$(PIP) uv
	$(LOCK) deploy/requirements-build.in -o $(BUILD)
	$(LOCK) pyproject.toml -o $(RUNTIME)
	$(LOCK) pyproject.toml --extra dev -c $(RUNTIME) -o $(DEV)
	$(LOCK) pyproject.toml --extra fast -c $(RUNTIME) -o $(FAST)
	$(LOCK) pyproject.toml --extra postgres -c $(RUNTIME) -o $(POSTGRES)
	$(LOCK) deploy/requirements-compile.in -c $(DEV) -c $(BUILD) -o $(COMPILE)

clean: ## Remove the environment and everything made here
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache build dist demo-data
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
