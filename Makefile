# `make help` lists the targets. Everything runs in a virtual environment that the targets make themselves.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BASE ?= examples/base-8m
OUT ?= runs/demo
JOBS ?= 2

export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup demo cards test test-fast test-floor test-engines lint clean

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

cards: demo ## Render the cards in model_cards, those of gem-base-8m from a new demo
	$(BIN)/python model_cards/render.py --demo $(OUT)

test: setup lint ## Lint, then run all tests, in two processes (JOBS=n for others)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-fast: setup ## Run the tests that take seconds
	$(BIN)/python -m pytest -m 'not slow'

test-floor: ## Run all tests on the oldest supported Sentence Transformers and transformers
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/pip install --quiet --constraint constraints.txt torch
	.venv-floor/bin/pip install --quiet --constraint constraints.txt --editable '.[test]' \
		sentence-transformers==6.0.0 transformers==5.4.0
	OMP_NUM_THREADS=1 .venv-floor/bin/python -m pytest -n $(JOBS) --dist worksteal

# Engines need packages that exclude each other, hence an environment each; llama-cpp-python is compiled.
test-engines: setup ## Serve a stock export with ONNX Runtime, OpenVINO and llama.cpp and compare vectors (10 minutes)
	rm -rf runs/engines
	$(BIN)/python benchmarks/engines.py --engine torch
	$(PYTHON) -m venv .venv-onnx
	.venv-onnx/bin/pip install --quiet --constraint constraints.txt torch 'sentence-transformers[onnx]<6'
	.venv-onnx/bin/python benchmarks/engines.py --engine onnx
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/pip install --quiet --constraint constraints.txt torch 'sentence-transformers[openvino]>=6'
	.venv-openvino/bin/pip uninstall --quiet --yes torchvision  # a build for other torch than this one
	.venv-openvino/bin/python benchmarks/engines.py --engine openvino
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/pip install --quiet --constraint constraints.txt torch 'sentence-transformers>=6' gguf sentencepiece llama-cpp-python
	.venv-llama/bin/pip download --quiet --no-deps --no-binary :all: --dest runs/engines llama-cpp-python
	mkdir runs/engines/source && tar -xf runs/engines/llama_cpp_python-*.tar.gz -C runs/engines/source --strip-components 1
	.venv-llama/bin/python benchmarks/engines.py --engine llama.cpp --llama-cpp runs/engines/source/vendor/llama.cpp
	.venv-llama/bin/python benchmarks/engines.py --engine llama.cpp --llama-cpp runs/engines/source/vendor/llama.cpp --outtype f16

lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## Remove environments and outputs
	rm -rf .venv .venv-* runs build dist *.egg-info
