# `make demo` and `make test` need Python 3.11+ and a C++ compiler; everything else they fetch.
PYTHON ?= python3
VENV ?= .venv
# Without a card the pinned release is enough; with one, the newest that pip finds.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
# What the adapters are held against. Their dependencies are left out: they would bring torchvision,
# which does not fit every torch, and much that no loss needs.
PEERS := open_clip_torch==3.3.0 FlagEmbedding==1.4.2 tevatron==0.1.0 gradcache==0.0.1 \
	lightning==2.6.6 lightning-utilities torchmetrics
# Processes that test, of some 2 GB each.
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all test-long test-isa lint aot mutants bench gpu clean

demo: $(READY)  ## both stages of RankPO on a synthetic job-talent world: outputs/demo/report.png
	$(BIN)/rankpo-fast demo --output_dir outputs/demo

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not long"

test-all: test test-long test-isa  ## every test there is

test-long: $(READY)  ## tests of compilers, of many processes and of long grids
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m long

test-isa: $(READY)  ## the numeric tests in the instruction sets of smaller machines
	$(BIN)/python tests/support/instruction_sets.py -n $(JOBS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers $(JOBS)

aot: $(READY)  ## compiles the Triton kernels for sm_80, sm_90 and sm_100: fails on spills and the like
	$(BIN)/python -m bench.aot

mutants: $(READY)  ## breaks the code in known ways and looks whether the tests notice
	PYTHONPATH=tests $(BIN)/python -m mutants

bench: $(READY)  ## speed, memory and error of losses and training beside their peers: build/bench/report.html
	$(BIN)/rankpo-fast bench

gpu:  ## on a machine with a card and no internet: tests, sanitizer, bench, one result file
	PYTHON="$(PYTHON)" bash bench/gpu.sh

$(READY): setup.py pyproject.toml CMakeLists.txt $(wildcard kernels/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[test]"
	$(BIN)/pip install --quiet --no-deps $(PEERS)
	touch $@

clean:
	rm -rf $(VENV) build dist outputs *.egg-info kernels/rankpo_kernels/*.so
