.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := dev,deepspeed,triton,wandb,gym

# the jobs below are for one device; TRL refuses several GPUs in one process
export CUDA_VISIBLE_DEVICES ?= 0
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test test-fast lint typecheck bench compare smollm2 assets clean

help: ## Show this help
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Create .venv and install the package with every extra that runs on a CPU

# torch first and alone: the constraint keeps every later resolution from replacing it
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lenvm-rl needs Python 3.11 or newer, found " + sys.version.split()[0] + ": make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $(STAMP)

demo: setup ## Train the embedded policy with LenVM-GRPO and show it before and after (CPU, minutes)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/grpo_lenvm.py --output_dir outputs/demo

test: setup ## Run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: setup ## Run the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: setup ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup ## Check types
	$(BIN)/mypy

bench: setup ## Measure the step time beside plain GRPO's, and the advantages beside loops
	$(BIN)/python benchmarks/step_time.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/advantages.py --json docs/data/advantages.json --figure docs/figures/advantages.png

compare: setup ## LenVM beside DLER, HAPO and plain GRPO, five seeds each: table and figure in outputs/compare (hours)
	$(BIN)/python recipes/compare.py lenvm dler hapo grpo --seeds 5

smollm2: setup ## Build SmolLM2-135M-Instruct, pretrain a LenVM on its rollouts, take a few LenVM-GRPO steps
	$(BIN)/python recipes/smollm2.py
	$(BIN)/python recipes/pretrain_lenvm.py --config recipes/configs/smollm2_lenvm.yaml
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/grpo_lenvm.py --config recipes/configs/smollm2.yaml

assets: setup ## Rebuild the embedded policy and its length critic
	$(BIN)/python recipes/build_assets.py --output_dir outputs/assets

clean: ## Remove outputs and caches, keep .venv
	rm -rf outputs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis wandb
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
