# Two commands on a fresh machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all check docs clean

# torch is installed first and by its exact version, so that nothing else pulls a build for accelerators.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) -e ".[dev]"
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/tersenet demo

test: export OMP_NUM_THREADS = 1
test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow" -n 2 $(ARGS)

test-all: export OMP_NUM_THREADS = 1
test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 $(ARGS)

# Formats, lints, types and runs the fast tests on two cores, in about a minute.
check: export OMP_NUM_THREADS = 1
check: $(VENV)/.test
	$(BIN)/ruff format src tests benchmarks examples
	$(BIN)/ruff check --fix src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow and not minutes" -n 2 $(ARGS)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
