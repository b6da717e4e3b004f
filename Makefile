# make demo   installs into .venv, trains on the built-in photos, evaluates, prints the figures and the report's path
# make test   installs into .venv and runs every test
# make lint   style and types
# All may be run again; .venv is made once and renewed when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint clean chromium

demo: $(VENV)/.core
	$(BIN)/intra demo --out demo

test: $(VENV)/.dev chromium
	$(BIN)/python -m pytest

# The tests of the page need a browser: on a fresh Debian it is installed; elsewhere they are skipped without one.
chromium:
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || \
		! command -v apt-get >/dev/null || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } \
			>/dev/null 2>&1 || echo "chromium could not be installed; the tests of the page are skipped"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "intra needs Python 3.11 or newer; $(PYTHON) is older. Use: make PYTHON=python3.11 demo"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@
