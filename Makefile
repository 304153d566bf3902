# make help lists what there is.

# Which environment: venv (a folder .venv) or conda; taken from what is active where it is not given.
ENV ?= $(if $(CONDA_DEFAULT_ENV),$(if $(filter base,$(CONDA_DEFAULT_ENV)),venv,conda),venv)
# Which PyTorch: cuda or cpu (several gigabytes less); what is installed, else by whether there is an NVIDIA GPU.
INSTALLED = $(patsubst .venv/.ready-%,%,$(firstword $(wildcard .venv/.ready-cpu .venv/.ready-cuda)))
TORCH ?= $(if $(INSTALLED),$(INSTALLED),$(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu))
# Which Python makes the .venv.
PYTHON ?= python3
CONDA ?= $(firstword $(foreach tool,mamba micromamba conda,$(if $(shell command -v $(tool) 2>/dev/null),$(tool))))
# Further arguments of train.py: make train ARGS="EPOCHS=3".
ARGS ?=

TORCH_CPU_INDEX = https://download.pytorch.org/whl/cpu
ifeq ($(ENV),conda)
RUN = $(shell $(CONDA) env list 2>/dev/null | awk '$$1 == "dida-tools" {print $$NF}')/bin/python
READY = env
DEV_READY = env-dev
else
RUN = .venv/bin/python
READY = .venv/.ready-$(TORCH)
DEV_READY = .venv/.dev-ready-$(TORCH)
OTHER = $(if $(filter cpu,$(TORCH)),cuda,cpu)
endif

.PHONY: help env env-dev env-remove train test test-all lint format clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | awk -F ':.*  ## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo "Variables: ENV=venv|conda  TORCH=cpu|cuda  PYTHON=python3.12  ARGS=\"EPOCHS=3 ...\""

train: $(READY)  ## train a small U-Net on the built-in scenes (sets up the environment first)
	$(RUN) train.py $(ARGS)

test: $(DEV_READY)  ## run the tests (sets up the development environment first)
	$(RUN) -m pytest

test-all: $(DEV_READY)  ## run the slow tests too
	$(RUN) -m pytest -m "slow or not slow"

lint: $(DEV_READY)  ## check style, types and common mistakes
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pylint dida_tools train.py predict.py run_prediction.py runs.py hyperparameter.py

format: $(DEV_READY)  ## format the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

ifeq ($(ENV),conda)
env:  ## set up the environment: .venv, or conda's dida-tools with ENV=conda
	@test -n "$(CONDA)" || { echo "ENV=conda, but there is no conda, mamba or micromamba: install one, or use ENV=venv."; exit 1; }
	$(CONDA) env list | grep -qE '^\s*dida-tools\s' || $(CONDA) env create -y -f environment.yml
	$(RUN) -m pip install --quiet --no-deps -e .

env-dev: env  ## set up the development environment
	$(CONDA) env update -n dida-tools -f dev.yml
	@$(RUN) tools/check_torchvision.py

env-remove:  ## remove the environment
	$(CONDA) env remove -y -n dida-tools
else
env: $(READY)
env-dev: $(DEV_READY)
env-remove:
	rm -rf .venv
endif

.venv/.ready-$(TORCH): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON): install Python 3.11 or newer, or give PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$$($(PYTHON) --version) is too old: install Python 3.11 or newer, or give PYTHON=python3.12."; exit 1; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@test ! -e .venv/.ready-$(OTHER) || { rm -f .venv/.*ready-$(OTHER); .venv/bin/python -m pip uninstall -q -y torch; }
	@echo "Installing PyTorch ($(TORCH); the other with TORCH=$(OTHER)) and what else is needed: some minutes."
ifeq ($(TORCH),cpu)
	@# The build without CUDA has an index of its own; where that cannot be reached, pip's usual places must do.
	@.venv/bin/python -m pip install --quiet --no-deps --retries 0 --timeout 10 --constraint constraints.txt \
		--index-url $(TORCH_CPU_INDEX) torch >/dev/null 2>&1 || \
		echo "PyTorch's index of CPU builds gave none: pip takes what it finds, on Linux perhaps gigabytes with CUDA."
endif
	.venv/bin/python -m pip install --quiet --constraint constraints.txt -e .
	@touch $@

.venv/.dev-ready-$(TORCH): .venv/.ready-$(TORCH)
	.venv/bin/python -m pip install --quiet --constraint constraints.txt -e ".[dev]"
	@.venv/bin/python tools/check_torchvision.py
	@touch $@

clean:  ## remove caches; data, logs and weights stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
