# Every target works by itself on a machine that has Python 3.11 or newer, make and git.
#
#   make story    install into .venv and generate the example story into frames/
#   make test     install the development tools too, then lint, check types and run the tests
#   make check    the same as CI
#
# PYTHON=python3.12 chooses the interpreter, VENV=DIR another place for the environment, STORY_ARGS="…" further options.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STORY_ARGS ?=
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install story test check lint types format docs wheel clean

help:
	@sed -n '3,7p' Makefile | sed 's/^# \{0,3\}//'

# The environment: built once, again when what is installed into it changes.
$(VENV)/.stamp-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "mmi needs Python 3.11 or newer; $(PYTHON) is older or missing. Name another: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-story: $(VENV)/.stamp-python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[fast]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-story
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[fast,dev]'
	@touch $@

install: $(VENV)/.stamp-story

story: install
	$(BIN)/mmi story examples/story.jsonl --out frames/ $(STORY_ARGS)

test: lint types
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

check: test

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp-dev
	$(BIN)/mypy

format: $(VENV)/.stamp-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.stamp-dev
	$(BIN)/python tests/help_text.py > docs/help.md.new && mv docs/help.md.new docs/help.md

wheel: $(VENV)/.stamp-dev
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf build dist frames .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	find . -maxdepth 2 -name '*.egg-info' -prune -exec rm -rf {} +
