# Two commands matter: `make demo` and `make test`. Each makes its own virtual environment, and finds it ready the second time.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt
RUNTIME := $(VENV)/.installed-runtime
DEVELOPMENT := $(VENV)/.installed-development

.PHONY: demo test families slow lint format recipes clean
.DEFAULT_GOAL := demo

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps make a second call quick: pip runs again only when what is to be installed has changed.
$(RUNTIME): pyproject.toml constraints.txt | $(PY)
	$(PIP_INSTALL) --editable .
	@touch $@

$(DEVELOPMENT): pyproject.toml constraints.txt | $(PY)
	$(PIP_INSTALL) --editable '.[test,evaluation]'
	@touch $@ $(RUNTIME)

demo: $(RUNTIME)  ## the main job: dense model -> faster model -> report (ARGS="--quick" for a shorter one)
	TRANSFORMERS_VERBOSITY=error $(VENV)/bin/shivelight demo $(ARGS)

# One thread for each of the two workers: torch's own threads would fight over the same cores.
test: $(DEVELOPMENT)  ## every fast test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m 'not slow' $(ARGS)

families: $(DEVELOPMENT)  ## what works with which backbone, for docs/families.md
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m 'not slow' tests/matrix --matrix benchmarks/results/families.json

slow: $(DEVELOPMENT)  ## the tests that `make test` leaves out
	$(PY) -m pytest -m slow $(ARGS)

lint: $(DEVELOPMENT)  ## style, imports, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEVELOPMENT)  ## mend what ruff can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

recipes: $(DEVELOPMENT)  ## rebuild every embedded file from nothing (hours on a CPU; it goes on where it stopped)
	$(PY) recipes/build.py $(ARGS)

clean:  ## remove what was built; the virtual environment goes too
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
