# `make demo` and `make test` do all set-up themselves, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tiny models on a few cores are fastest with one thread each.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo study study-quick backbones kills faults test test-fast walk lint clean

install: $(VENV)/.installed

# torch first and by its exact version: a resolver that is free to choose takes gigabytes of CUDA. torchao, for one test,
# beside the packages: diffusers would import it everywhere, with half a page of warnings.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q -c constraints.txt --no-deps --upgrade --target $(VENV)/torchao torchao
	touch $@

demo: install
	rm -rf outputs/demo
	$(BIN)/python -m lightning_dfd.toy.demo --output outputs/demo

# In the exact world, then in the video world. Each goes on where it was broken off; delete its folder to begin anew.
study: install
	$(BIN)/python -m lightning_dfd.toy.mixture --output outputs/study_exact
	$(BIN)/python -m lightning_dfd.toy.study --output outputs/study

study-quick: install
	$(BIN)/python -m lightning_dfd.toy.mixture --output outputs/study_exact_quick --quick
	$(BIN)/python -m lightning_dfd.toy.study --output outputs/study_quick --quick

# The contract of every family, and the table of what it measured. The stand-in is for Cosmos' safety checker.
backbones: install
	PYTHONPATH=tests/stand_ins $(BIN)/python -m lightning_dfd.testing docs/backbones.md

# Toy runs that are killed at random and have to end as if they had not been.
kills: install
	$(BIN)/python -m tests.faults.kills --kills 60 --output outputs/kills

# Bad inputs and faults: exit code 1 if one is lost.
faults: install
	$(BIN)/python -m tests.faults.suite --output outputs/faults

test: install lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# For editing: three families, no processes, below two minutes.
test-fast: install
	$(BIN)/python -m pytest -n 2 --dist worksteal --fast

# README and docs to the letter, from a fresh install; also a part of `make test`.
walk: install
	$(BIN)/python -m pytest -n 0 -s tests/test_newcomer.py

lint: install
	$(BIN)/ruff check lightning_dfd tests benchmarks
	$(BIN)/ruff format --check lightning_dfd tests benchmarks
	$(BIN)/mypy

clean:
	rm -rf $(VENV) outputs
