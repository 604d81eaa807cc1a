# `make help` lists the targets. Everything runs in a virtual environment that the targets make themselves.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BASE ?= smollm2-135m-instruct
OUT ?= runs/demo
JOBS ?= 2
CLIENTS := bertopic chromadb haystack-ai sentence-transformers-haystack lancedb litellm llama-index-embeddings-huggingface txtai

export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup demo cards test test-fast test-newest test-floor constraints compatibility test-engines test-clients test-docker test-neighbours lint audit clean

# $(call install,ENVIRONMENT,CONSTRAINTS,REQUIREMENTS): what builds the package is installed like all else, not fetched apart.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet $(2) 'setuptools>=77' $$(grep '^torch==' constraints.txt)
	$(1)/bin/pip install --quiet $(2) --no-build-isolation --editable '.[dev]' $(3)
endef
# $(call run_tests,ENVIRONMENT): says after a failure what is installed otherwise; RECORD=1 notes the run for docs/compatibility.md
define run_tests
	OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(JOBS) --dist worksteal --junitxml $(1)/junit.xml; status=$$?; \
	if [ -n "$(RECORD)" ]; then $(1)/bin/python .ci/versions.py record $(1)/junit.xml; $(MAKE) compatibility; fi; \
	if [ $$status != 0 ]; then $(1)/bin/python .ci/versions.py diff; fi; \
	exit $$status
endef

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.done ## Make the virtual environment of constraints.txt: CPU torch, gem_st, tools

$(VENV)/.done: pyproject.toml constraints.txt
	$(call install,$(VENV),--constraint constraints.txt)
	touch $@

demo: setup ## Make a real LLM an embedder that answers from what it retrieves (BASE=base-8m: small, offline, both modes)
	$(BIN)/python examples/demo.py --base $(BASE) --output $(OUT)

cards: setup ## Render the cards in model_cards, those of gem-base-8m from a new demo
	$(BIN)/python examples/demo.py --base base-8m --output runs/demo-8m
	$(BIN)/python model_cards/render.py --demo runs/demo-8m

test: setup lint ## Lint, then run all tests, in two processes (JOBS=n for others)
	$(call run_tests,$(VENV))

test-fast: setup ## Run the tests of the method: modeling, losses, structure; about a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow' tests/modeling tests/losses tests/test_structure.py

test-newest: ## Run all tests on today's releases of everything but torch, and say what differs from constraints.txt
	rm -rf .venv-newest
	$(call install,.venv-newest)
	.venv-newest/bin/python .ci/versions.py diff
	$(call run_tests,.venv-newest)

test-floor: ## Run all tests on the oldest releases that pyproject.toml admits (PYTHON=python3.10 for the oldest Python)
	rm -rf .venv-floor
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/pip install --quiet 'setuptools>=77'
	.venv-floor/bin/pip install --quiet --no-build-isolation --editable '.[test]' $$($(PYTHON) .ci/versions.py floors)
	.venv-floor/bin/python .ci/versions.py diff
	$(call run_tests,.venv-floor)

constraints: test-newest ## Make constraints.txt of today's releases, if their tests pass
	.venv-newest/bin/python .ci/versions.py freeze > constraints.new && mv constraints.new constraints.txt

compatibility: ## Make docs/compatibility.md of the runs that were noted
	$(PYTHON) .ci/versions.py page > docs/compatibility.new && mv docs/compatibility.new docs/compatibility.md

# Engines need packages that exclude each other, hence an environment each. Of llama-cpp-python only the sources are
# taken, for llama.cpp's converter of checkpoints.
test-engines: setup ## Serve checkpoints with ONNX Runtime, OpenVINO and llama.cpp and compare vectors (15 minutes)
	rm -rf runs/engines
	$(BIN)/python benchmarks/engines.py --engine torch
	$(PYTHON) -m venv .venv-onnx
	.venv-onnx/bin/pip install --quiet $$(grep '^torch==' constraints.txt) 'sentence-transformers[onnx]<6'
	.venv-onnx/bin/python benchmarks/engines.py --engine onnx
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/pip install --quiet $$(grep '^torch==' constraints.txt) 'sentence-transformers[openvino]>=6'
	.venv-openvino/bin/pip uninstall --quiet --yes torchvision  # a build for other torch than this one
	.venv-openvino/bin/python benchmarks/engines.py --engine openvino
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/pip install --quiet $$(grep '^torch==' constraints.txt) 'sentence-transformers>=6' gguf sentencepiece xllamacpp
	.venv-llama/bin/pip download --quiet --no-deps --no-binary :all: --dest runs/engines llama-cpp-python
	mkdir runs/engines/source && tar -xf runs/engines/llama_cpp_python-*.tar.gz -C runs/engines/source --strip-components 1
	.venv-llama/bin/python benchmarks/engines.py --engine llama.cpp --llama-cpp runs/engines/source/vendor/llama.cpp
	.venv-llama/bin/python benchmarks/engines.py --engine llama.cpp --llama-cpp runs/engines/source/vendor/llama.cpp --outtype f16
	$(BIN)/python benchmarks/llama_cpp.py

test-clients: ## Run the lines of docs/integrations.md, with the clients that `make test` leaves out (BERTopic, Chroma, ...)
	$(call install,.venv-clients,--constraint constraints.txt)
	.venv-clients/bin/pip install --quiet --constraint constraints.txt $(CLIENTS)
	OMP_NUM_THREADS=1 .venv-clients/bin/python -m pytest tests/test_clients.py tests/serving/test_clients.py

test-docker: ## Run the Dockerfile's steps without Docker, and its server (TORCH_INDEX= for PyPI's torch; minutes)
	$(PYTHON) .ci/dockerfile.py

test-neighbours: setup ## Run Sentence Transformers' own tests with a GEM model in place of theirs; clones github.com
	rm -rf runs/sentence-transformers
	git clone --quiet --depth 1 --branch v$$($(BIN)/python -c 'from importlib.metadata import version; print(version("sentence-transformers"))') \
		https://github.com/huggingface/sentence-transformers runs/sentence-transformers
	$(BIN)/python benchmarks/neighbours/run.py runs/sentence-transformers

lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: ## Look up known vulnerabilities of what constraints.txt names; asks pypi.org for its advisories
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --disable-pip --no-deps --requirement constraints.txt

clean: ## Remove environments and outputs
	rm -rf .venv .venv-* runs build dist *.egg-info
