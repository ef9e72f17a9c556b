# make demo       digits from the bundled denoiser, plain Inductor beside a plan
# make test       the tests, in minutes           (ARGS="-k plan" goes to pytest)
# make test-all   those marked thorough, too  (every denoiser, every variant)
# make lint       ruff and mypy
# make clean      remove .venv and caches
#
# All of them work in .venv, made on first use and brought up to date when pyproject.toml or
# constraints.txt changed.  Without a CUDA device, TORCH_INDEX=https://download.pytorch.org/whl/cpu
# saves some gigabytes of download on Linux.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
ARGS ?=
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format clean

help:
	@sed -n 's/^# make/  make/p' Makefile

demo: $(VENV)/.examples
	@$(BIN)/python examples/demo.py

# Not `python -m pytest`: that would put this folder, and with it a bare `passes`, on sys.path.
test: $(VENV)/.dev
	@$(BIN)/pytest --numprocesses auto --dist worksteal $(ARGS)

test-all: $(VENV)/.dev
	@$(BIN)/pytest --thorough --numprocesses auto --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch by itself first, by its exact pin: left to the resolver, pip may try several builds of it.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "difa_fx needs Python 3.10 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@echo "[1/2] torch into $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --constraint constraints.txt torch
	@touch $@

$(VENV)/.examples $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	@echo "[2/2] difa_fx[$*] into $(VENV)"
	@$(PIP) install --constraint constraints.txt --editable '.[$*]'
	@touch $@
