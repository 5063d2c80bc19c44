# make demo    install, then generate with a real model on two ranks
# make quick   the tests that start no engine and take no time
# make test    every test but those of `make soak`    TESTS="tests/cluster -k scheduler" runs some
# make soak    long tests, for confidence
# make test-gpu    the tests that need CUDA, which `make test` skips where there is none; TESTS="tests/gpu/FILE.py" too
# make check   ruff, its formatter and mypy
# make bench   the benchmarks that take minutes and no GPU; BENCH="soak serve_kills" runs others of tests/bench
# make tree    every source file, and what it does
# make docs    the documentation as a site, into site/
#
# Python 3.11 or newer is looked for; PYTHON=/path/to/python names one. VENV=/path puts the environment elsewhere.

PYTHON ?= $(shell for name in python3 python3.12 python3.11 python3.13; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TESTS ?=
BENCH ?= step_overhead http_path serve_start demo_on_cpu
DEMO_PROMPTS := \
	"What is the capital of France?" \
	"Explain in two sentences why the sky is blue." \
	"Write a haiku about rays gliding through the sea." \
	"Name three things a compiler does."

.DELETE_ON_ERROR:
.PHONY: demo test quick soak test-gpu check bench tree docs clean

demo: $(VENV)/.demo
	$(BIN)/eagleray generate --model demo --tensor-parallel-size 2 --temperature 0 --max-tokens 96 $(DEMO_PROMPTS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(if $(TESTS),$(TESTS),-n 2 -m "not soak")

quick: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not engine and not slow and not soak"

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -v $(if $(TESTS),$(TESTS),tests/gpu)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	set -e; for script in $(BENCH); do $(BIN)/python "tests/bench/$$script.py"; done

tree:
	@$(PYTHON) tests/support/tree.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache build dist src/*.egg-info

# A bare Debian has python3 and pip but not ensurepip, which venv wants for putting pip in: then the host's pip does it.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; install one or give PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip --clear $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV); the first time takes a few minutes"
	$(PIP) install --quiet --editable ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV) with the tools for checks and tests; the first time takes a few minutes"
	$(PIP) install --quiet --editable ".[demo,dev]"
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV) with what builds the documentation"
	$(PIP) install --quiet --editable ".[docs]"
	@touch $@
