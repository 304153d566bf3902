# make help lists the targets.

# Environment: venv (a folder .venv) or conda; default: what is active.
ENV ?= $(if $(CONDA_DEFAULT_ENV),$(if $(filter base,$(CONDA_DEFAULT_ENV)),venv,conda),venv)
# PyTorch: cuda or cpu (several gigabytes less); default: what is installed, else by whether there is an NVIDIA GPU.
INSTALLED = $(patsubst .venv/.ready-%,%,$(firstword $(wildcard .venv/.ready-cpu .venv/.ready-cuda)))
TORCH ?= $(if $(INSTALLED),$(INSTALLED),$(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu))
# The Python that makes the .venv.
PYTHON ?= python3
# Where the tool is a function of the shell, a variable names its program.
CONDA ?= $(firstword $(foreach tool,mamba micromamba conda,$(if $(shell command -v $(tool) 2>/dev/null),$(tool))) \
	$(MAMBA_EXE) $(CONDA_EXE))
# Further arguments of train.py: make train ARGS="EPOCHS=3".
ARGS ?=
# Wheels that no index has, such as dida-core's, lie in a folder wheels.
PIP_OPTIONS = --quiet --constraint constraints.txt $(if $(wildcard wheels),--find-links wheels)

TORCH_CPU_INDEX = https://download.pytorch.org/whl/cpu
ifeq ($(ENV),conda)
# --json prints a line for each environment's folder in all three. Empty where there is none.
CONDA_DIR = $(shell $(CONDA) env list --json 2>/dev/null | sed -nE 's|^ *"(.*[/\\]dida-tools)",?$$|\1|p' | head -n 1)
ENV_PYTHON = $(CONDA_DIR)/bin/python
# None of them may prompt.
export CONDA_ALWAYS_YES = true
export MAMBA_ALWAYS_YES = true
READY = env
DEV_READY = env-dev
else
ENV_PYTHON = .venv/bin/python
READY = .venv/.ready-$(TORCH)
DEV_READY = .venv/.dev-ready-$(TORCH)
OTHER = $(if $(filter cpu,$(TORCH)),cuda,cpu)
endif

.PHONY: help env env-dev env-remove train test test-all lint format template-diff template-update clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | awk -F ':.*  ## ' '{printf "  make %-16s %s\n", $$1, $$2}'
	@echo "Variables: ENV=venv|conda  TORCH=cpu|cuda  PYTHON=python3.12  ARGS=\"EPOCHS=3 ...\""

train: $(READY)  ## train a small U-Net on the built-in scenes (sets up the environment first)
	$(ENV_PYTHON) train.py $(ARGS)

test: $(DEV_READY)  ## run the tests (sets up the development environment first)
	$(ENV_PYTHON) -m pytest

test-all: $(DEV_READY)  ## run the slow tests too
	$(ENV_PYTHON) -m pytest -m "slow or not slow"

lint: $(DEV_READY)  ## check style, types and common mistakes
	$(ENV_PYTHON) -m ruff check .
	$(ENV_PYTHON) -m ruff format --check .
	$(ENV_PYTHON) -m mypy
	$(ENV_PYTHON) -m pylint dida_tools $(wildcard dida_core *.py tools/*.py)

format: $(DEV_READY)  ## format the code
	$(ENV_PYTHON) -m ruff check --fix .
	$(ENV_PYTHON) -m ruff format .

ifeq ($(ENV),conda)
.PHONY: conda-env
conda-env:  # by itself: make looks for the environment when it comes to a target, not to a line
	@test -n "$(CONDA)" || { echo "ENV=conda, but there is no conda, mamba or micromamba: install one, or use ENV=venv."; exit 1; }
	test -n "$(CONDA_DIR)" || $(CONDA) env create -f environment.yml

env: conda-env  ## set up the environment: .venv, or conda's dida-tools with ENV=conda
	$(ENV_PYTHON) -m pip install --quiet --no-deps -e .

env-dev: env  ## set up the development environment
	$(CONDA) env update -n dida-tools -f dev.yml
	@$(ENV_PYTHON) tools/check_torchvision.py

env-remove:  ## remove the environment
	$(CONDA) env remove -n dida-tools
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
	@echo "Installing PyTorch ($(TORCH); the other with TORCH=$(OTHER)) and the rest: some minutes."
ifeq ($(TORCH),cpu)
	@# The build without CUDA has an index of its own; where it is unreachable, pip's usual indexes must do.
	@.venv/bin/python -m pip install --quiet --no-deps --retries 0 --timeout 10 --constraint constraints.txt \
		--index-url $(TORCH_CPU_INDEX) torch >/dev/null 2>&1 || \
		echo "PyTorch's index of CPU builds is unreachable: pip takes what it finds, on Linux perhaps gigabytes with CUDA."
endif
	.venv/bin/python -m pip install $(PIP_OPTIONS) -e .
	@touch $@

.venv/.dev-ready-$(TORCH): .venv/.ready-$(TORCH)
	.venv/bin/python -m pip install $(PIP_OPTIONS) -e ".[dev]"
	@.venv/bin/python tools/check_torchvision.py
	@touch $@

-include docs/docs.mk docker.mk  # documentation, images

template-diff:  ## in a project: show later changes of its template; TAG=v1.2.0 TEMPLATE=folder or URL
	$(PYTHON) tools/template.py diff $(TAG) $(if $(TEMPLATE),--template "$(TEMPLATE)")

template-update:  ## in a project: merge them, then run the tests
	$(PYTHON) tools/template.py update $(TAG) $(if $(TEMPLATE),--template "$(TEMPLATE)")
	$(MAKE) test

clean:  ## remove caches; data, logs and weights stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info */build */*.egg-info */_build
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
