# make sweep: from nothing to the table, the plot and the page of sweeps/quickstart.toml.
# make test:  lint, types and the whole test suite.
# Both set up what they need: a virtual environment in .venv with the versions of constraints.txt.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: sweep test setup lint clean

sweep: setup
	$(BIN)/termwise sweep sweeps/quickstart.toml

test: lint
	$(BIN)/mypy -p termwise
	$(BIN)/pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "termwise needs Python 3.11 or newer; none was found. Set PYTHON=/path/to/python3." >&2; exit 3; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "termwise needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version)." >&2; exit 3; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		package=python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv; \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -y -q $$package; \
		else echo "termwise needs the package $$package: sudo apt-get install $$package" >&2; exit 3; fi; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf .venv runs build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
