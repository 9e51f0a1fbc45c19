# Two commands matter: `make demo` and `make test`. Both make .venv first, once.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := service trainers tuning serving tests benchmarks deploy packaging

.PHONY: demo test test-all bench install lint format types imports clean

demo: .venv/.installed
	$(BIN)/mimray demo

test: .venv/.installed-dev lint types imports
	$(BIN)/python -m pytest

# Everything, the long runs too.
test-all: .venv/.installed-dev lint types imports
	$(BIN)/python -m pytest -m "not gpu" --timeout 1800

# Short forms of the benchmarks of docs/performance.md, about 20 minutes on two cores; peers that
# are not installed are left out. PICTURES is a flat folder of JPEGs.
PICTURES ?=
bench: .venv/.installed-dev
	$(BIN)/python benchmarks/loading.py $(PICTURES) --rounds 3 --batches 16
	$(BIN)/python benchmarks/overhead.py $(PICTURES) --rounds 2 --updates 4 --batch 8
	$(BIN)/python benchmarks/steps.py --rounds 2 --batch 4

install: .venv/.installed

lint: .venv/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: .venv/.installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: .venv/.installed-dev
	$(BIN)/mypy

imports: .venv/.installed-dev
	$(BIN)/lint-imports

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@

clean:
	rm -rf .venv build dist runs
