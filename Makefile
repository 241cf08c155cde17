# make demo       index, train, evaluate and ask on the packaged data
# make test       the quick tests;  make test-all  every test;  make lint  ruff and mypy
# The virtual environment .venv is made where it is missing, and brought up to date when pyproject.toml changes.

VENV := .venv
BIN := $(VENV)/bin
# Written when an installation is complete, so that one that was interrupted is done again.
STAMP := $(VENV)/.installed
# Command-line arguments for pytest, as in: make test ARGS="-k gates"
ARGS ?=
# A process for each core, but no more than pay for importing torch.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4

.PHONY: demo test test-all lint clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/ragmoe demo

test: $(STAMP)
	$(PYTEST) $(ARGS)

test-all: $(STAMP)
	$(PYTEST) -m '' $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml
	@rm -f $@
	@if ! $(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	  found=; \
	  for python in python3 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	      found=$$python; break; \
	    fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make: needs Python 3.11 or newer with venv; tried python3, python3.13, python3.12 and python3.11." >&2; \
	    echo "make: on Debian or Ubuntu: apt install python3-venv" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "Installing ragmoe and what it needs into $(VENV)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
