# The commands of a checkout. Everything is installed into .venv beside this file, with the versions of constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
OLDEST := .venv-oldest/bin
OLDEST_INSTALLED := .venv-oldest/.installed

.PHONY: demo test test-oldest lint format clean

demo: $(INSTALLED)
	$(BIN)/vlv demo

# Two workers with one thread each: torch's own threads would only get in each other's way.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The model on the oldest versions that setup.py allows.
test-oldest: $(OLDEST_INSTALLED)
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest -n 2 $(wildcard tests/test_model*.py tests/test_doors*.py)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[all]'
	touch $@

$(OLDEST_INSTALLED): setup.py constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install -c constraints-oldest.txt -e . pytest pytest-timeout pytest-xdist
	touch $@
