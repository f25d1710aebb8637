# `make demo` and `make test` work on a fresh checkout with Python 3.11 and pip alone.
#
#   PYTHON=python3.12 make test         choose the interpreter
#   PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" make demo
#                                       a CPU build of torch, without the gigabytes of CUDA

PYTHON ?= python3
PIP_FLAGS ?=
DEMO_FLAGS ?=
PYTEST_FLAGS ?= -n 2 --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet \
	--constraint constraints.txt $(PIP_FLAGS)

.PHONY: help demo test lint format clean

help:
	@echo "make demo    install and compare full precision with a 2-bit cache on SmolLM2"
	@echo "make test    install and run ruff, pyright and pytest"
	@echo "make lint    ruff and pyright alone"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove the virtual environment and the caches"

demo: $(VENV)/.demo-installed
	$(BIN)/squat-fx demo $(DEMO_FLAGS)

test: lint
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp is newer than what it was installed from, so nothing is installed twice.
$(VENV)/.demo-installed $(VENV)/.dev-installed: $(VENV)/.%-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
