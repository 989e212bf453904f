# Everything runs in .venv, which `make install` creates; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin
ENV := FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 OMP_NUM_THREADS=1
# tests that run at once, each with a share of the files; whoever is done takes over what the other has left
JOBS ?= 2
TEST := $(ENV) $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

.PHONY: help install demo test test-slow test-long test-all lint bench studies

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: .venv/.installed ## create .venv with fedgpt and its development tools

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,ray]"
	touch $@

demo: install ## train the default model on the State of the Union addresses (about two minutes)
	$(BIN)/fedgpt run experiment=demo

test: install ## the default test suite
	$(TEST)

test-slow: install ## the other tests: Ray, SuperLink, kill and resume, each study's smoke run
	$(TEST) -m "slow and not long" --durations=20

test-long: install ## tests of more than 60 s each
	$(TEST) -m long

test-all: install ## all of them
	$(TEST) -m ""

lint: install ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: install ## speed and memory, as ratios against a reference measured in the same run
	for name in train overhead memory clock compress aggregate privacy; do $(BIN)/python benchmarks/$$name.py || exit 1; done

studies: install ## the studies in simulations/, one after the other
	for study in simulations/*/run.py; do $(BIN)/python $$study || exit 1; done
