# Each target works from a bare checkout: Python 3.11 and a package index are enough. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Hundreds of processes of the tests import the package: 0.3 s each, were it compiled every time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install test test-all test-long lint types imports unit slow demo serve clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(INSTALLED)  ## make .venv with everything in it

# torch first: whatever else asks for it then takes this very build. pip would compile 23,000 files on one core. In the
# mode `compat` the package is found before a folder that is called like it, such as a clone next to one's own scripts.
$(INSTALLED): pyproject.toml cluster/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint cluster/constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint cluster/constraints.txt \
		--config-settings editable_mode=compat --editable '.[cpu,dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # templates among them are no programs
	touch $@

test: lint types imports unit  ## style, types, import rules and tests, in minutes

test-all: test slow  ## everything that CI checks

test-long: install  ## proofs that take minutes each: many kills, a year of appends, scale, the steps of the image
	$(BIN)/pytest -m long

lint: install  ## ruff: style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install  ## mypy, strict
	$(BIN)/mypy

imports: install  ## the architecture: who may import whom
	$(BIN)/lint-imports --no-cache

unit: install  ## the tests that take seconds, and one pass of every job on Ray
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

slow: install  ## kills, full disks, hostile requests, S3, lost nodes; last those that need the machine to themselves
	$(BIN)/pytest -m "slow and not alone and not long" -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/pytest -m "alone and not long"

demo: install  ## every stage on a local Ray: recommendations first, a table of recommenders last
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python jobs/demo.py --config jobs/configs/demo.yaml

serve: install  ## the page and the HTTP interface over what `make demo` left, on 127.0.0.1:8000
	@test -d workspace/index || { echo "error: nothing to serve yet; run make demo first" >&2; exit 2; }
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python jobs/serve.py workspace=workspace

clean:  ## remove the virtual environment and the demo's workspace
	rm -rf $(VENV) workspace
