# `make demo` and `make test` do all the set-up on a fresh machine, each in one command.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Where real counts and an environment with scvi-tools 1.4.2 are, if they are there: make bench DATA=... SCVI=...
DATA :=
SCVI :=

.PHONY: demo test test-long check bench bench-full docs clean

demo: $(VENV)/.installed
	$(BIN)/celbo demo -o celbo-demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not long"

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m long

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: bench = --repeats 1 --epochs 6
bench: seeds = 0
bench: sets = $(if $(DATA),pbmc3k kang_ifnb) simulated_20k
bench-full: bench = --repeats 3
bench-full: seeds = 0 1 2
bench-full: sets = pbmc3k kang_ifnb simulated_20k
bench bench-full: $(VENV)/.installed-dev
	mkdir -p benchmark-results
	$(BIN)/python benchmarks/checking.py
	$(BIN)/python benchmarks/throughput.py $(bench) $(if $(SCVI),--scvi-python $(SCVI)) --json benchmark-results/throughput.json
	$(BIN)/python benchmarks/scaling.py --json benchmark-results/scaling.json
	$(BIN)/python benchmarks/time_to_quality.py $(or $(DATA),.) --sets $(sets) --seeds $(seeds) $(if $(SCVI),--scvi-python $(SCVI)) \
		--work benchmark-results --json benchmark-results/quality.json
	$(BIN)/python benchmarks/picture.py benchmark-results docs/images/speed.svg
	$(if $(and $(SCVI),$(findstring full,$@)),$(BIN)/python benchmarks/quality.py $(DATA) --scvi-python $(SCVI) --work benchmark-results)

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W -q -b html docs docs/_build
	@echo "open docs/_build/index.html"

clean:
	rm -rf $(VENV) docs/_build celbo-demo .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "celbo needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,check]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@
