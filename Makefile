# `make demo` and `make test` set up all they need in .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready
CPU := kernels/bitsmoe_kernels/_cpu
CPU_KERNELS := $(CPU)/libbitsmoe_cpu.so
QUANTIZER_TESTS := tests/unit/offline_quant tests/unit/bitsmoe

.DEFAULT_GOAL := help
.PHONY: help setup demo quick test nightly lint style docs wheel clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

setup: $(STAMP) ## make .venv with vLLM for CPUs and everything else

# The stamp is written last, so a set-up that failed midway starts afresh.
$(STAMP): pyproject.toml tools/setup.sh tools/torchvision_operators.py tools/vllm-metadata/pyproject.toml
	@PYTHON="$(PYTHON)" tools/setup.sh
	@touch $@

# The set-up compiles them; here they are compiled again after a change.
$(CPU_KERNELS): $(wildcard $(CPU)/*.cpp $(CPU)/*.h) $(CPU)/build.py | $(STAMP)
	@$(PY) -m bitsmoe_kernels._cpu.build

demo: $(STAMP) $(CPU_KERNELS) ## quantize the demo model, serve it with vLLM, get a completion
	@$(PY) examples/demo.py

# Two halves side by side, about equally long: the quantizer's tests and the types, all other tests.
quick: style ## lint, types and the quick tests, in about a minute
	@mkdir -p build; export OMP_NUM_THREADS=1; \
	( $(PY) -m mypy; types=$$?; $(PY) -m pytest $(QUANTIZER_TESTS) -q -m "not slow"; exit $$((types | $$?)) ) \
	> build/quick.log 2>&1 & first=$$!; \
	$(PY) -m pytest tests/unit $(QUANTIZER_TESTS:%=--ignore=%) -q -m "not slow"; second=$$?; \
	wait $$first; first=$$?; cat build/quick.log; exit $$((first | second))

JOBS ?= 2
test: style ## lint, types and the tests that need no GPU; JOBS=4: four processes side by side
	@$(PY) -m tools.all_tests --jobs $(JOBS)

nightly: $(STAMP) ## what `make test` leaves to the night: families and options that go the way of others
	HF_HUB_OFFLINE=1 $(PY) -m pytest tests/unit tests/integration -m nightly; other=$$?; \
	$(PY) -m pytest tests/ptx -m nightly; exit $$((other | $$?))

lint: style ## ruff, codespell and mypy
	$(PY) -m mypy

style: $(STAMP) $(CPU_KERNELS)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/codespell

docs: $(STAMP) ## build the documentation site in site/ and check its links
	$(PY) -m mkdocs build --strict

wheel: $(STAMP) ## build wheel and source distribution in dist/ and try them in an empty environment
	$(PY) -m tools.try_wheel

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
