# make setup   everything into .venv        make serve   setup, then the demo model on 127.0.0.1:8000 (ARGS="--port 9000")
# make test    all checks (15 minutes)      make bench   measure a running server (ARGS="--help")
# make test-all   and those that take long (75 minutes)
# make test-mutants   breaks each promise of docs/conformance.md in a copy: its tests must fail (an hour; ARGS="B7 -j 1")
# make coverage   serves every architecture of mlx-lm, built small, and writes docs/models.md (half an hour; ARGS="--new")
# CUDA=12 or CUDA=13 picks an NVIDIA build on Linux; PYTHON picks the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

ifeq ($(shell uname -s),Darwin)
BACKEND :=
else ifneq ($(CUDA),)
BACKEND := cuda$(CUDA)
else
BACKEND := cpu
endif

comma := ,
RUN_EXTRAS := $(if $(BACKEND),[$(BACKEND)])
DEV_EXTRAS := [$(if $(BACKEND),$(BACKEND)$(comma))dev]
RUN_STAMP := $(VENV)/.millpond-run-$(BACKEND)
DEV_STAMP := $(VENV)/.millpond-dev-$(BACKEND)
PACKAGE := pyproject.toml setup.py $(wildcard millpond/native/*.c millpond/native/*.h)

.PHONY: setup setup-run serve chat test test-all test-mutants coverage lint format reference bench clean

setup: $(DEV_STAMP)

# Only what serving needs.
setup-run: $(RUN_STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Millpond needs Python 3.11 or later; $(PYTHON) is older or missing. Try: make PYTHON=python3.12 setup" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }

$(RUN_STAMP): $(PACKAGE) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.$(RUN_EXTRAS)'
	@touch $@

$(DEV_STAMP): $(PACKAGE) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.$(DEV_EXTRAS)'
	@touch $@ $(RUN_STAMP)

serve: setup
	$(BIN)/millpond serve demo $(ARGS)

chat: setup
	$(BIN)/millpond chat $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/configuration.md, from the settings themselves.
reference: setup
	$(BIN)/python -c 'import millpond.config as config, pathlib; \
		pathlib.Path("docs/configuration.md").write_text(config.reference(), encoding="utf-8")'
	PYTHONPATH=tests/support:tests $(BIN)/python -m api_page

test: lint
	$(BIN)/pytest -q -rs -n 2 --dist loadfile -m "not slow"

# Leaves the commit that passed in .test-all.
test-all: lint
	@rm -f .test-all
	$(BIN)/pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder -m "slow or not slow"
	@if git diff --quiet HEAD 2>/dev/null; then git rev-parse HEAD > .test-all; fi

test-mutants: setup
	PYTHONPATH=tests $(BIN)/python -m mutants $(ARGS)

coverage: setup
	PYTHONPATH=tests:tests/support $(BIN)/python -m architectures $(ARGS)

bench: setup
	$(BIN)/millpond bench $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis millpond/native/*.so \
		$(VENV)/.millpond-*
