# make help lists what there is.

# Which environment: venv (a folder .venv) or conda; taken from what is active where it is not given.
ENV ?= $(if $(CONDA_DEFAULT_ENV),$(if $(filter base,$(CONDA_DEFAULT_ENV)),venv,conda),venv)
# Which PyTorch: cuda or cpu (several gigabytes less); what is installed, else by whether there is an NVIDIA GPU.
INSTALLED = $(patsubst .venv/.ready-%,%,$(firstword $(wildcard .venv/.ready-cpu .venv/.ready-cuda)))
TORCH ?= $(if $(INSTALLED),$(INSTALLED),$(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu))
# Which Python makes the .venv.
PYTHON ?= python3
# A tool that is only a function of the shell says in a variable where its program is.
CONDA ?= $(firstword $(foreach tool,mamba micromamba conda,$(if $(shell command -v $(tool) 2>/dev/null),$(tool))) \
	$(MAMBA_EXE) $(CONDA_EXE))
# Further arguments of train.py: make train ARGS="EPOCHS=3".
ARGS ?=

TORCH_CPU_INDEX = https://download.pytorch.org/whl/cpu
ifeq ($(ENV),conda)
# --json prints the same in all three: a line for each environment's folder. Empty where there is none.
CONDA_DIR = $(shell $(CONDA) env list --json 2>/dev/null | sed -nE 's|^ *"(.*[/\\]dida-tools)",?$$|\1|p' | head -n 1)
ENV_PYTHON = $(CONDA_DIR)/bin/python
# None of them must ask anything.
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

.PHONY: help env env-dev env-remove train test test-all lint format doc template-diff template-update clean
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
	$(ENV_PYTHON) -m pylint dida_tools $(wildcard *.py tools/*.py)

format: $(DEV_READY)  ## format the code
	$(ENV_PYTHON) -m ruff check --fix .
	$(ENV_PYTHON) -m ruff format .

doc: $(DEV_READY)  ## build the documentation: docs/_build/index.html
	$(ENV_PYTHON) -m sphinx -W --keep-going -b html docs docs/_build

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

-include docker.mk  # images

template-diff:  ## in a project: what its template has changed since; TAG=v1.2.0 TEMPLATE=folder or URL
	$(PYTHON) tools/template.py diff $(TAG) $(if $(TEMPLATE),--template "$(TEMPLATE)")

template-update:  ## in a project: merge that, then run the tests
	$(PYTHON) tools/template.py update $(TAG) $(if $(TEMPLATE),--template "$(TEMPLATE)")
	$(MAKE) test

clean:  ## remove caches; data, logs and weights stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info */_build
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
