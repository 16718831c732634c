# Every target sets up .venv by itself the first time; needs Python 3.11 or 3.12 (with venv and headers) and a C++ compiler.

# The first interpreter that really runs, is new enough and can make virtual environments.
PYTHON = $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready

.PHONY: read test test-slow mutants sanitize compile lint format bench clean

read: $(READY)  ## read the sample pictures with the built-in model, and compare with what is on them
	@$(BIN)/trocr-fast evaluate --lines examples/lines

test: $(READY)  ## everything that is not slow
	$(BIN)/python -m pytest -n 2

test-slow: $(READY)  ## the real configurations at full size, and the device code of all cases
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m bench.compile

mutants: $(READY)  ## plant bugs, one at a time: the tests must find each
	$(BIN)/python tests/mutants/run.py

sanitize: $(READY)  ## csrc under the sanitizers of g++
	bash tests/csrc/sanitize.sh

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

compile: $(READY)  ## the device code of the hot cases, with no GPU: registers and spills
	$(BIN)/python -m bench.compile --hot

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)  ## results go to bench/results
	$(BIN)/python -m bench.startup
	$(BIN)/python -m bench.packed_linear
	$(BIN)/python -m bench.cpu_attention
	$(BIN)/python -m bench.encoder_groups
	$(BIN)/python -m bench.cross_memory
	$(BIN)/python -m bench.paged_cache
	$(BIN)/python -m bench.throughput --config base
	$(BIN)/python -m bench.throughput --config base --lengths iam --lines 32
	$(BIN)/python -m bench.throughput --config builtin --batch 1 8
	$(BIN)/python -m bench.latency

$(READY): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "expected Python 3.11 or 3.12 with venv on the PATH, found none" >&2; exit 1; }
	@echo "setting up .venv: about two minutes" >&2
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,bench]'
	touch $(READY)

clean:
	rm -rf .venv build dist *.egg-info trocr_fast/*.so
