# `make quickstart` and `make test` need Python >= 3.10 and make, nothing else: no compiler, no accelerator.
#
#   make quickstart   set up, then train a small decoder on real text from end to end (a few minutes on two cores)
#   make test         set up, then run the tests
#   make check        format, lint, types, house rules, unit tests
#   make soak         the longer tests, then a small job struck at random for SOAK_MINUTES (5); fails at any difference
#   make bench        the head-to-head benchmarks (long; ARGS="--quick" for a first look)
#   make setup        the environment only
#
# PYTHON        interpreter the environment is made from
# TORCH_INDEX   package index for torch, for example https://download.pytorch.org/whl/cpu for the small CPU build
# TEST_JOBS     processes that run tests at the same time; most start several more
# ARGS          extra arguments for quickstart, test and bench

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
SOAK_MINUTES ?= 5
TEST_JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# In the order of folders: the long ones come first.
SIDE_BY_SIDE = -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder
TORCH_PIN := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check soak bench

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

# torch goes first, so that TORCH_INDEX decides its build and nothing after it moves the version.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Windlass needs Python >= 3.10; $(PYTHON) is `$(PYTHON) --version`. Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --prefer-binary \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_PIN)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --prefer-binary -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: setup
	$(BIN)/windlass quickstart $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SIDE_BY_SIDE) tests/unit

soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --minutes $(SOAK_MINUTES) $(ARGS)

bench: setup
	$(BIN)/python benchmarks/zero.py $(ARGS)
	$(BIN)/python benchmarks/pipeline.py $(ARGS)
	$(BIN)/python benchmarks/offload.py $(ARGS)
	$(BIN)/python benchmarks/checkpoint.py $(ARGS)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/loader.py
