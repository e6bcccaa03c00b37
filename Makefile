# Each target sets up what it needs in .venv, once; see CONTRIBUTING.md.

# The first of these that is Python 3.11 or newer makes .venv; "make test PYTHON=/a/python" names another.
PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11 python
PY := .venv/bin/python

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help demo test test-long test-slow lint docs clean gone
.NOTPARALLEL:

help:
	@echo "make demo    tune a model by hypergradients and draw what happened"
	@echo "make test    lint, type check, tests"
	@echo "make test-long   the tests that take more than seven seconds each, most of it compiling"
	@echo "make test-slow   the tests that take minutes"
	@echo "make lint    the first two of these"
	@echo "make docs    the documentation, in build/docs/index.html"
	@echo "make clean   remove .venv and everything built"

demo: .venv/.ready-examples
	@MPLBACKEND=Agg $(PY) examples/plot_tune_logistic.py

# Two processes: one thread each for NumPy's linear algebra.
test test-long test-slow: export OPENBLAS_NUM_THREADS := 1

test: lint
	@$(PY) -m pytest -n 2 --dist worksteal -m "not long and not slow"

test-long: .venv/.ready-test
	@$(PY) -m pytest -n 2 --dist worksteal -m "long and not slow"

test-slow: .venv/.ready-test
	@$(PY) -m pytest -n 2 --dist worksteal -m slow

lint: .venv/.ready-test
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m pyright --pythonpath $(PY)

# -E: read every page again. Otherwise a second call would not repeat the warnings that failed the first one.
# Examples run again only if they have changed.
docs: .venv/.ready-docs
	@$(PY) -m sphinx -W --keep-going -E -q -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

clean:
	@rm -rf .venv build dist examples/build docs/auto_examples docs/sg_execution_times.rst
	@rm -rf .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra of pyproject.toml. The stamp comes last: an interrupted set-up is taken up again.
# pip's words go to .venv/pip.log, and from there to the terminal if it fails. A .venv whose Python is gone, because
# the system has another one now, is made again.
gone: ;
.venv/.ready-%: pyproject.toml $(if $(shell $(PY) -c "" 2>/dev/null && echo there),,gone)
	@set -eu; \
	usable='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(PY) -c "$$usable" 2>/dev/null; then \
	    python=; \
	    for candidate in $(PYTHON); do \
	        if "$$candidate" -c "$$usable" 2>/dev/null; then python=$$candidate; break; fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "bilevel needs Python 3.11 or newer, and none was found (looked for: $(PYTHON))." >&2; \
	        echo "Install one, or say where it is: make PYTHON=/path/to/python3.11 ..." >&2; \
	        exit 1; \
	    fi; \
	    if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	        echo "$$python cannot make virtual environments (on Debian and Ubuntu: install python3-venv)." >&2; \
	        exit 1; \
	    fi; \
	fi; \
	echo "Setting up .venv (once, about a minute)…"; \
	if [ -n "$${python-}" ]; then "$$python" -m venv --clear .venv; fi; \
	if ! { $(PY) -c 'import pip' 2>/dev/null || $(PY) -m ensurepip; } > .venv/pip.log 2>&1 \
	    || ! $(PY) -m pip install -q -e '.[$*]' >> .venv/pip.log 2>&1; then \
	    cat .venv/pip.log >&2; \
	    echo "Setting up .venv failed; pip's message is above." >&2; \
	    exit 1; \
	fi; \
	touch $@
