# `make demo` and `make test` need Python 3.11+ and a C++ compiler; everything else they fetch.
PYTHON ?= python3
VENV ?= .venv
# Without a GPU the pinned release is enough; with one, the newest that pip finds.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
# What the adapters are held against. Their dependencies are left out: they would bring torchvision,
# which does not fit every torch, and much that no loss needs.
PEERS := open_clip_torch==3.3.0 FlagEmbedding==1.4.2 tevatron==0.1.0 gradcache==0.0.1 \
	lightning==2.6.6 lightning-utilities torchmetrics
# Processes that test, of some 2 GB each.
JOBS ?= 2
# uv takes less than half of pip's time, but reads none of its configuration: `make UV=` does without.
UV ?= $(shell command -v uv)
BIN := $(VENV)/bin
# Byte code is left to the first import: to compile all of torch's takes longer than to unpack it.
install = $(if $(UV),$(UV) pip install --python $(1),$(BIN)/python -m pip --python $(1) install --no-compile --quiet) --quiet
INSTALL = $(call install,$(BIN)/python)
# Where the environment keeps Python from writing byte code, each of many processes would make it anew. Some packages have
# templates that are no Python, whose errors mean nothing.
COMPILE = $(if $(PYTHONDONTWRITEBYTECODE),$(BIN)/python -m compileall -q -j $(JOBS) $(VENV)/lib > /dev/null || true)
RENTED := build/gpu-venv
# LOCKED=1 takes what tests need from there first, each file by its hash. Torch and what it takes of CUDA are not in it:
# they come with TORCH, from an index for this machine, and each index has other files of one version.
LOCK := requirements-test.lock
SBOM := build/sbom.json
UNLOCKED := torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-, cublas cuda-cccl \
	cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink \
	nvshmem-cu13 nvtx)
# Each stamp says that its part is installed in $(VENV).
MADE := $(VENV)/.made
READY_DEMO := $(VENV)/.ready-demo
READY_DOCS := $(VENV)/.ready-docs
READY := $(VENV)/.ready
READY_LONG := $(VENV)/.ready-long

.PHONY: help demo test test-all test-long faults test-isa lint docs wheel lock sbom aot mutants bench gpu gpu-carry gpu-cache gpu-wheels clean

help:  ## prints this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(READY_DEMO)  ## both stages of RankPO on a synthetic job-talent world: outputs/demo/report.png
	$(BIN)/rankpo-fast demo --output_dir outputs/demo

test: $(READY)  ## the tests but those marked long
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not long"

test-all: test test-long test-isa  ## every test there is

test-long: $(READY_LONG)  ## tests of compilers, of many processes and of long grids
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m long

faults: $(READY)  ## what goes wrong around a program: each fault, what it should end in, what it ends in
	$(BIN)/python tests/faults.py -n $(JOBS) --dist worksteal

test-isa: $(READY)  ## the numeric tests in the instruction sets of smaller machines
	$(BIN)/python tests/support/instruction_sets.py -n $(JOBS) --dist worksteal

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers $(JOBS)

docs: $(READY_DOCS)  ## the site of docs/, strictly: build/site
	$(BIN)/zensical build --strict

wheel: $(MADE)  ## the wheels in build/wheels; rankpo-fast's runs a loss in a bare environment of its own
	rm -rf build/wheels build/lib* build/bdist.* bench/build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheels . ./bench
	$(PYTHON) -m venv --clear --without-pip build/wheel-venv
	$(call install,build/wheel-venv/bin/python) "$(TORCH)" build/wheels/rankpo_fast-*.whl
	build/wheel-venv/bin/python -I .ci/wheel.py build/wheels/rankpo_fast-*.whl build/wheels/rankpo_bench-*.whl

lock: $(MADE)  ## requirements-test.lock anew: the newest releases that pyproject.toml allows, with their hashes
	$(BIN)/python -m pip install --quiet --upgrade --target build/uv "uv>=0.9,<1"
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("bench/pyproject.toml", "rb"))["project"]["dependencies"][1:], sep="\n")' | \
		build/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
		--custom-compile-command "make lock" $(addprefix --no-emit-package=, $(UNLOCKED)) \
		--extra test pyproject.toml - --output-file $(LOCK)

sbom: $(READY)  ## each package that $(VENV) has, with its licence, in CycloneDX: build/sbom.json
	mkdir -p $(dir $(SBOM))
	$(BIN)/python -m cyclonedx_py environment $(BIN)/python --pyproject pyproject.toml --gather-license-texts \
		--output-reproducible --output-file $(SBOM)

aot: $(READY)  ## compiles the Triton kernels for sm_80, sm_90 and sm_100: fails on spills and the like
	$(BIN)/python -m bench.aot

mutants: $(READY)  ## breaks the code in known ways and looks whether the tests notice
	PYTHONPATH=tests $(BIN)/python -m mutants

bench: $(READY)  ## speed, memory and error of losses and training beside their peers: build/bench/report.html
	$(BIN)/rankpo-fast bench

gpu:  ## on a rented GPU without internet: what is worth most first, one result file; REHEARSE=1: on a CPU
	$(PYTHON) -m bench.rented $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only $(ONLY)) $(if $(AGAIN),--again $(AGAIN)) $(if $(REHEARSE),--rehearse)

gpu-carry: gpu-cache gpu-wheels  ## what travels to it beside the checkout: build/gpu-carry

gpu-cache: $(RENTED)/.made  ## Triton's cache for it, compiled here
	PYTHONPATH="$(CURDIR)/kernels:$(CURDIR)" $(RENTED)/bin/python -m bench.rented.cache

gpu-wheels: $(RENTED)/.made  ## wheels of small peers and of what tests take
	$(RENTED)/bin/python bench/rented/wheels.py

clean:  ## removes what these targets made
	rm -rf $(VENV) build dist outputs .cache *.egg-info bench/build bench/*.egg-info kernels/rankpo_kernels/librankpo_native*

# The Python, Triton and packages of a rented machine: its cache is found by these, and a rehearsal
# runs with no more. Torch may be another, which asks for another Triton; 5 GB where pip finds it with CUDA alone.
RENTED_PYTHON ?= python3.12
$(RENTED)/.made:
	$(RENTED_PYTHON) -m venv $(RENTED)
	$(RENTED)/bin/python -m pip install --quiet "$(TORCH)" "numpy>=2,<2.4" "transformers==5.17.*" sentence-transformers==6.0.1 pytest nvidia-ml-py
	$(RENTED)/bin/python -m pip install --quiet --no-deps triton==3.6.0
	touch $@

# Python's own pip may be years old, and takes twice the time then.
$(MADE):
	$(if $(UV),$(UV) venv --quiet --seed --allow-existing --python "$(PYTHON)",$(PYTHON) -m venv) $(VENV)
	$(if $(UV),,$(BIN)/python -m pip install --no-compile --quiet "pip>=25.1")
	$(if $(LOCKED),$(INSTALL) --no-deps --require-hashes --requirement $(LOCK))
	touch $@

# An editable install compiles the native library, which therefore is as new as its sources.
NATIVE := setup.py CMakeLists.txt $(wildcard kernels/native/*)

$(READY_DEMO): $(MADE) pyproject.toml $(NATIVE)
	$(INSTALL) "$(TORCH)" --editable ".[train,plots,label]"
	touch $@

# rankpo-fast is there: by its name it is not built again.
$(READY): $(READY_DEMO) bench/pyproject.toml bench/setup.py
	$(INSTALL) "$(TORCH)" "rankpo-fast[test]" --editable ./bench
	$(INSTALL) --no-deps $(PEERS)
	$(COMPILE)
	touch $@

# Hundreds of megabytes that only a long test takes, with Java 17 where there is one.
$(READY_LONG): $(READY)
	$(INSTALL) "rankpo-fast[spark]"
	touch $@

# The site reads docstrings from the source: it needs neither torch nor this package.
$(READY_DOCS): $(MADE) pyproject.toml
	$(INSTALL) $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@
