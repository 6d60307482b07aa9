# From nothing, with python3 >= 3.11 and its venv module:  make demo  or  make test

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: setup demo test check ci

setup: $(STAMP)

# Installs again only when pyproject.toml has changed.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || { echo "Making the virtual environment .venv"; $(PYTHON) -m venv .venv; }
	@echo "Installing the project and its tools into .venv (about three minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/python -m examples.quickstart --out demo_output

test: setup
	@$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ci: setup check test
