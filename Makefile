# `make demo` and `make test` set up all they need in .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

setup: $(STAMP) ## make .venv with vLLM for CPUs and everything else

# The stamp is written last, so a set-up that failed midway starts afresh.
$(STAMP): pyproject.toml tools/setup.sh tools/vllm-metadata/pyproject.toml
	@PYTHON="$(PYTHON)" tools/setup.sh
	@touch $@

demo: $(STAMP) ## quantize the demo model, serve it with vLLM, get a completion
	@$(PY) examples/demo.py

# Two halves side by side, one thread for each: two cores finish both in little more than the longer one.
test: lint ## lint and run every test that needs no GPU
	@mkdir -p build; export OMP_NUM_THREADS=1; \
	$(PY) -m pytest tests/unit > build/unit-tests.log 2>&1 & unit=$$!; \
	$(PY) -m pytest tests/integration; integration=$$?; \
	wait $$unit; unit=$$?; cat build/unit-tests.log; exit $$((unit | integration))

lint: $(STAMP) ## ruff and mypy
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
