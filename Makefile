# `make help` lists the targets. Everything runs in a virtual environment that the targets make themselves.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BASE ?= examples/base-8m
OUT ?= runs/demo

export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-floor lint clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.done ## Make the virtual environment: CPU torch, gem_st, tools

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup ## Train GEM on a small LLM, with a before/after table and a picture (BASE=model id or folder)
	$(BIN)/python examples/demo.py --base $(BASE) --output $(OUT)

test: setup lint ## Lint, then run all tests
	$(BIN)/python -m pytest

test-fast: setup ## Run the tests that take seconds
	$(BIN)/python -m pytest -m 'not slow'

test-floor: ## Run all tests on the oldest supported Sentence Transformers and transformers
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/pip install --quiet --constraint constraints.txt torch
	.venv-floor/bin/pip install --quiet --constraint constraints.txt --editable '.[test]' \
		sentence-transformers==6.0.0 transformers==5.4.0
	.venv-floor/bin/python -m pytest

lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## Remove environments and outputs
	rm -rf .venv .venv-floor runs build dist *.egg-info
