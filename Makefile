# Every target sets up what it needs: a virtual environment in .venv with the tested versions, the package
# installed editable, and the C++ kernels compiled.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: train test lint format clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

train: $(VENV)/.installed  ## train the quickstart model on the CPU, offline, in about a minute
	$(BIN)/python -m fastgpt.train --preset quickstart --device cpu --overwrite

test: $(VENV)/.installed  ## run the test suite
	$(BIN)/python -m pytest

lint: $(VENV)/.installed  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed  ## rewrite files in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove everything that was built, not the data nor the runs
	rm -rf $(VENV) build dist *.egg-info fastgpt/kernels/*.so

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
