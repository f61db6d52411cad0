# Everything a fresh clone needs: `make serve` and `make test`. See CONTRIBUTING.md.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= smollm2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Made anew only when what it is made from changes.
STAMP := $(VENV)/.installed

.PHONY: serve test test-slow test-gpu bench-gpu lint format docs kernels kernels-check bench-cpu bench-peers clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
.PHONY: help

$(STAMP): pyproject.toml ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hotplug needs Python 3.11 or newer; try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c ci/constraints.txt -e '.[cpu,cuda,dev]'
	@touch $@

# C++ kernels of the CPU platform, where there is a compiler; PyTorch's serve where there is none.
NATIVE := hotplug/platforms/cpu/native
$(NATIVE)/libhotplug_cpu.so: $(NATIVE)/build.py $(wildcard $(NATIVE)/src/*) | $(STAMP)
	@$(BIN)/python -m hotplug.platforms.cpu.native.build --optional

native: $(NATIVE)/libhotplug_cpu.so ## build the C++ kernels of the CPU platform
.PHONY: native

serve: $(STAMP) native ## fetch the default model if needed and serve it (MODEL= HOST= PORT= ARGS=)
	$(BIN)/hotplug serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

# A process for each core, up to four, and one thread in each; a file's tests stay together, as they share engines.
test: $(STAMP) native ## the test suite (ARGS= for pytest)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m 'not slow' -n logical --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: $(STAMP) native ## the long runs, which `make test` leaves out
	$(BIN)/pytest -q -m slow $(ARGS)

soak: $(STAMP) native ## 500 random requests through a server of MODEL: nothing fails, leaks or drifts (ARGS='--exec MODE')
	$(BIN)/python ci/bench/soak.py $(MODEL) $(ARGS)
.PHONY: soak

test-gpu: ## on the GPU machine: kernels, models and conformance on the device (PYTHON= is the machine's own)
	$(PYTHON) -m pytest -q tests/gpu tests/test_cuda_kernels.py $(ARGS)
	$(PYTHON) -m hotplug.cli conform --platform cuda --quick

resolve: $(STAMP) ## the requirements resolve from a package index alone, on every supported Python
	$(BIN)/python ci/resolve.py
.PHONY: resolve

# The record of each version of Triton is made and checked with that version: it is installed beside the environment.
TRITONS ?= $(sort $(basename $(notdir $(wildcard ci/kernels_record/*.json))))

kernels: $(STAMP) ## compile every Triton kernel for all GPUs and record what it takes in ci/kernels_record (TRITONS= for versions)
	@for version in $(TRITONS); do $(BIN)/python ci/kernels.py --write --triton $$version $(ARGS) || exit 1; done

kernels-check: $(STAMP) ## the same, compared with what is recorded
	@for version in $(TRITONS); do $(BIN)/python ci/kernels.py --check --triton $$version $(ARGS) || exit 1; done

bench-gpu: ## on the GPU machine: the table of docs/benchmarks.md (ARGS= for models and workloads)
	$(PYTHON) ci/bench/gpu.py $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## let ruff format and repair what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(STAMP) ## write docs/ops.md and ROADMAP.md anew
	$(BIN)/python ci/docs/ops.py
	$(BIN)/python ci/docs/roadmap.py

bench-cpu: $(STAMP) native ## hotplug and its peers on this processor, one table (ARGS= for engines and repeats)
	$(BIN)/python ci/bench/cpu.py $(ARGS)

bench-host: $(STAMP) ## the host's own cost on a device that computes nothing, one table (ARGS= for rows and repeats)
	$(BIN)/python ci/bench/host.py $(ARGS)
.PHONY: bench-host

bench-check: $(STAMP) ## HEAD (default: the files as they are) beside BASE (default: origin/main): what got slower; exit 1 then
	$(BIN)/hotplug bench track --check $(if $(BASE),--base $(BASE)) $(if $(HEAD),--head $(HEAD)) $(ARGS)
.PHONY: bench-check

counts: $(STAMP) native ## record in ci/counts.json what the counted scenarios take: calls, allocations, bytes, instructions
	PYTHONPATH=ci/bench $(BIN)/python -m track.counts --write

counts-check: $(STAMP) native ## the same, compared with what is recorded
	PYTHONPATH=ci/bench $(BIN)/python -m track.counts --check
.PHONY: counts counts-check

bench-peers: ## environments of the CPU's peers, made side by side (ARGS= for some of them: llama openvino vllm)
	PYTHON=$(PYTHON) ci/bench/peers.sh $(ARGS)

bench-compare: $(STAMP) native ## hotplug beside all of them, each at its defaults and tuned: rows and table in .bench/ (ARGS=)
	$(BIN)/python ci/bench/compare_cpu.py $(ARGS)
.PHONY: bench-compare

bench-compare-gpu: ## on the GPU machine: hotplug beside vLLM in one run (ARGS='--vllm-site DIR', ARGS=--dry-run without a GPU)
	$(PYTHON) ci/bench/compare_gpu.py $(ARGS)
.PHONY: bench-compare-gpu

bench-tables: $(STAMP) ## write the comparison tables of docs/ from ci/bench/results (ARGS='--keep FILE' to take rows over)
	$(BIN)/python ci/bench/write_tables.py $(ARGS)
.PHONY: bench-tables

bench-native: $(STAMP) native ## products of the C++ kernels beside PyTorch's, at one small model's shapes
	$(BIN)/python ci/bench/cpu_linear.py $(ARGS)
.PHONY: bench-native

clean: ## remove the environment and all caches of tools; fetched models stay
	rm -f $(NATIVE)/*.so
	rm -rf $(VENV) .triton .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
