# `make train` runs the main job, `make test` the whole test suite; each does all the set-up it needs.
PYTHON ?= python3
ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check -qq install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help train test smoke clean

help:
	@echo 'make train    set up and run the main job; ARGS="rounds=5 seed=1" changes its settings'
	@echo 'make test     set up and run ruff, mypy and the tests; ARGS="-k codec" chooses among the tests'
	@echo 'make smoke    a run of seconds'
	@echo 'make clean    remove what these made, but not runs/'

train: $(VENV)/train.stamp
	@$(BIN)/python -m experiments.train +experiment=quickstart $(ARGS)

smoke: $(VENV)/train.stamp
	@$(BIN)/python -m experiments.train +experiment=smoke $(ARGS)

# Many tests wait for processes to start: two files at a time, in their order, in which the last ones are the quick ones.
# pytest comes last, so that its summary is the last line.
test: $(VENV)/test.stamp
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/train.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing the pinned dependencies into $(VENV): minutes, once'
	@$(INSTALL) torch
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/test.stamp: $(VENV)/train.stamp
	@$(INSTALL) --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find diloco dipaco experiments tests -name __pycache__ -prune -exec rm -rf {} +
