# make book   set up .venv, run every chapter at smoke size, build the book, look at it in a browser
# make test   set up .venv, run the tests, the doctests and every notebook
# Both need only Python 3.10 to 3.13, make and git. PYTHON=/path/to/python chooses an interpreter.

SHELL := bash
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.x3mat-setup
export X3MAT_SMOKE ?= 1

.PHONY: help setup book test notebooks lint clean

help:
	@sed -n 's/^# //p' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/setup.sh
	tools/setup.sh "$(VENV)"
	@touch $@

book: setup notebooks
	$(BIN)/python tools/build_book.py
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_browser.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 \
	    --nbmake --nbmake-timeout=600 notebooks tests x3mat x3mat_book x3mat_gcmc

notebooks: setup
	$(BIN)/python tools/export_notebooks.py

lint: setup
	$(BIN)/ruff check x3mat x3mat_book x3mat_gcmc tests tools book/_ext notebooks
	$(BIN)/python tools/export_notebooks.py --check

clean:
	rm -rf _build .pytest_cache .ruff_cache
