# `make demo` and `make test` are the two commands; both build the environment first when it is not there.
# Variables: PYTHON (an interpreter >= 3.11), VENV, TORCH (what pip is asked for), JOBS, ARGS (for scan or pytest).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
TORCH  ?= torch==2.13.0
JOBS   ?= 2
ARGS   ?=

BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# Each test process computes on one thread: with two processes on two cores more threads only wait for one another.
CALM    = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: help setup demo test test-slow rotation lint format bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    scan the demo model on real text: a report here, and demo-report.html"
	@echo "make test    the fast tests and every example in the documentation strings"
	@echo "make setup   the environment alone"
	@echo "make lint    ruff and the import contract     make format   let ruff rewrite"
	@echo "make test-slow, make rotation (two reproductions at full scale), make bench, make clean"

# The stamps remember what has been installed, so that a second call starts at once.
$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "actome needs Python 3.11 or later on the path, or PYTHON=/path/to/it"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "actome needs Python 3.11 or later; $(PYTHON) is older. Give another with PYTHON=/path/to/it"; exit 1; }
	@echo "== environment: $(VENV), from $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== installing $(TORCH), alone and first (about 200 MB)"
	@$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "== installing actome and what it needs"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	@echo "== installing the tools for tests and linting"
	@$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)/.bench: $(VENV)/.package
	@echo "== installing the libraries that the benchmarks compare with"
	@$(PIP) --editable ".[bench]"
	@touch $@

setup: $(VENV)/.package
	@echo "== ready: $(BIN)/actome --help"

demo: $(VENV)/.package
	@echo "== scanning the demo model on text that ships with Python"
	@$(BIN)/actome scan --html demo-report.html $(ARGS)

test: $(VENV)/.dev
	@echo "== fast tests and doctests, $(JOBS) processes"
	$(CALM) $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-slow: $(VENV)/.dev
	$(CALM) $(BIN)/python -m pytest -n $(JOBS) -m slow $(ARGS)

# Two of the reproductions at full scale, others each day.
rotation: $(VENV)/.dev
	$(CALM) ROTATION=$${ROTATION:-2} $(BIN)/python -m pytest -n $(JOBS) -m slow tests/test_papers_small.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache demo-report.html
