# `make demo` runs the main example, `make test` everything that must hold before a change lands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Random workloads against vLLM's own scheduler (docs/conformance.md); needs 3 GB and some minutes at first.
VLLM ?= 0.26.0
WORKLOADS ?= 2000
SEED ?= 1
SPECULATION ?= mixed

.PHONY: demo test check pytest validate conformance wheel clean
.DEFAULT_GOAL := demo

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.developing: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

demo: $(VENV)/.installed
	$(BIN)/servesim run scenarios/azure-conv-h100.yaml

test: check pytest

check: $(VENV)/.developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

pytest: $(VENV)/.developing
	$(BIN)/pytest --numprocesses auto

# Replays the recorded real runs and rewrites the accuracy page; needs neither a GPU nor vLLM.
validate: $(VENV)/.installed
	$(BIN)/servesim validate --out reports/validation

conformance: $(VENV)/.developing
	cd tests && $(CURDIR)/$(BIN)/python -m conformance --vllm $(VLLM) \
	  --workloads $(WORKLOADS) --seed $(SEED) --speculation $(SPECULATION)

# The built wheel, installed alone in a fresh environment and used from another folder.
wheel:
	rm -rf dist
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(VENV)-wheel/bin/python -m pip install --quiet --force-reinstall dist/*.whl
	cd / && $(CURDIR)/$(VENV)-wheel/bin/servesim check azure-conv-h100
	cd / && $(CURDIR)/$(VENV)-wheel/bin/servesim run poisson-chat --set workload.num_requests=200 --json > /dev/null

clean:
	rm -rf $(VENV) $(VENV)-wheel $(VENV)-vllm-* dist out
