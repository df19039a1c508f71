# make demo   trains a small anchored-branch transformer on airfoil flow and shows what it learnt
# make windtunnel   learns the flow around car-like bodies from OpenFOAM's cases, writes an unseen one for ParaView
# make test   the tests, on every core; it says what it leaves out and why
# make test-slow    the long tests: emulated sweeps, whole programs, builds
# make test-corpus  the PTX emulator with kernels by Triton and NVIDIA's CUTLASS, descriptors against CuTe's (installs Triton: a gigabyte)
# make fuzz   random calls against float64 on every instruction set, a minute; FUZZ_ARGS="--seconds 3600" goes on
# make fuzz-arguments   wrong arguments, guided by coverage: refused alike with data and without (FUZZ_ARGS)
# make fuzz-native   the key-range table under sanitizers, guided by coverage (FUZZ_SEED, FUZZ_SECONDS)
# make bench  the CPU benchmarks, into benchmarks/results
# make docs   the documentation site, into build/docs
# make gpu    everything that needs a GPU: tests, sanitizers, benchmarks (DRY_RUN=1: the same stages on the CPU)
# make gpu-package   what travels to a machine with a GPU and no network, and the first three commands there
# make wheel  one wheel for every Python and torch, and the source distribution, into dist
# make test-noether  the integration tests against releases of emmiai-noether from PyPI, put under build/noether
# make test-physicsnemo   the integration tests against nvidia-physicsnemo from PyPI, put under build/physicsnemo
# make test-cuda-torch   the library in a torch that is built with CUDA, on a machine without a GPU (gigabytes)
# make wheel-test   the wheel in fresh environments, with every torch and Python that can be had (gigabytes)
# Each sets up all that it needs: an environment where torch is importable is used, otherwise .venv is made.

SHELL := /bin/bash
.DELETE_ON_ERROR:

BASE_PYTHON ?= python3
HAS_TORCH := $(shell $(BASE_PYTHON) -c "import importlib.util as u; print(int(u.find_spec('torch') is not None))" 2>/dev/null)
ifeq ($(HAS_TORCH),1)
PYTHON := $(BASE_PYTHON)
else
PYTHON := .venv/bin/python
endif
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
TORCH ?= $(if $(filter-out 0,$(HAS_GPU)),torch>=2.10,torch==2.13.0)
# Programs that were installed beside the interpreter.
BIN = $(shell dirname "$$(command -v $(PYTHON))")
PIP := $(PYTHON) -m pip --disable-pip-version-check
# Workers take tests from each other's ends, so that one long file does not decide.
JOBS ?= $(shell nproc)
PYTEST = $(PYTHON) -m pytest -q --numprocesses $(JOBS) --dist worksteal
TEST_NEEDS := build/.complete build/.test-packages build/.examples-packages build/.docs-packages
# Elsewhere the corpus is left out where Triton is not installed: it is a gigabyte.
TEST_NEEDS += $(if $(CI),build/.corpus-packages)
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo windtunnel test fuzz fuzz-arguments fuzz-native test-slow test-corpus test-cuda-torch bench docs gpu gpu-package wheel wheel-test test-noether test-physicsnemo test-sanitizers test-aarch64 lint typecheck format clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

build/.tools:
	@command -v $(BASE_PYTHON) >/dev/null || { echo "Python >= 3.10 is missing: install python3 or set BASE_PYTHON"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "A C++20 compiler is missing: install g++ >= 12 or clang >= 15, or set CXX"; exit 1; }
	@[ -x "$$(command -v $(PYTHON))" ] || $(BASE_PYTHON) -m venv .venv || { echo "Can't make .venv: install python3-venv"; exit 1; }
	@$(PYTHON) -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH)" || { echo "Can't install $(TORCH): is there a network? Set TORCH to a requirement that can be had"; exit 1; }
	@$(PIP) install --quiet "setuptools>=77" wheel "cmake>=3.22" ninja || { echo "Can't install the build tools: is there a network?"; exit 1; }
	@mkdir -p build && touch $@

# The demo builds what this machine can run; everything else builds what its toolkit can compile.
build/.runnable: build/.tools $(SOURCES)
	@[ build/.complete -nt build/.runnable ] || \
	  PATH="$(BIN):$$PATH" ANCHOR_ATTENTION_CUDA=$(if $(filter-out 0,$(HAS_GPU)),AUTO,OFF) \
	  $(PIP) install --quiet --no-build-isolation --no-deps -e .
	@touch $@

build/.complete: build/.tools $(SOURCES)
	PATH="$(BIN):$$PATH" ANCHOR_ATTENTION_CUDA=AUTO $(PIP) install --quiet --no-build-isolation --no-deps -e .
	@touch $@ build/.runnable

build/.%-packages: build/.tools pyproject.toml
	@$(PYTHON) scripts/install_extra.py $*
	@touch $@

demo: build/.runnable build/.examples-packages
	$(PYTHON) examples/airfoil/run.py

windtunnel: build/.runnable build/.windtunnel-packages
	$(PYTHON) examples/windtunnel/run_windtunnel.py

test: $(TEST_NEEDS)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# One limit for all: a test of a whole program or of every barrier of a kernel takes minutes on an old machine.
test-slow: $(TEST_NEEDS)
	$(PYTEST) -m slow --timeout 1800 $(PYTEST_ARGS)

test-corpus: $(TEST_NEEDS) build/.corpus-packages
	$(PYTEST) tests/tools/corpus --timeout 1800 $(PYTEST_ARGS)

fuzz: build/.complete build/.test-packages
	$(PYTHON) -m tests.fuzz $(FUZZ_ARGS)

fuzz-arguments: build/.complete build/.test-packages
	$(PYTHON) -m tests.fuzz.arguments $(FUZZ_ARGS)

# Needs no torch. Coverage comes from the table's own file alone.
FUZZER ?= build/fuzz_key_ranges
FUZZ_FLAGS := -std=c++20 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -Icsrc

$(FUZZER): tests/fuzz/fuzz_key_ranges.cpp csrc/key_ranges.cpp csrc/key_ranges.h
	@mkdir -p $(@D)
	$${CXX:-g++} $(FUZZ_FLAGS) -fsanitize-coverage=trace-pc -c csrc/key_ranges.cpp -o $@.o
	$${CXX:-g++} $(FUZZ_FLAGS) tests/fuzz/fuzz_key_ranges.cpp $@.o -o $@

fuzz-native: $(FUZZER)
	$(FUZZER) $(or $(FUZZ_SEED),0) $(or $(FUZZ_SECONDS),60)

bench: build/.runnable build/.bench-packages
	$(PYTHON) -m benchmarks.run_cpu $(BENCH_ARGS)

docs: build/.runnable build/.docs-packages
	$(PYTHON) -m sphinx -W --keep-going -q docs build/docs
	@echo "build/docs/index.html"

# With a library that was built elsewhere, nothing is built or installed: the machine may have no network.
ifdef ANCHOR_ATTENTION_LIBRARY
gpu: export PYTHONPATH := python
gpu:
else
gpu: build/.complete build/.gpu-packages
endif
	$(PYTHON) -m benchmarks.gpu $(if $(DRY_RUN),--device cpu --quick) $(GPU_ARGS)

gpu-package: build/.complete
	$(PYTHON) -m benchmarks.gpu.package

wheel: build/.tools build/.wheel-packages
	$(PYTHON) scripts/build_wheel.py dist

wheel-test: wheel
	PATH="$(BIN):$$PATH" $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir build/from-sdist $$(ls -t dist/*.tar.gz | head -n 1)
	$(PYTHON) scripts/test_wheel.py $$(ls -t dist/*.whl | head -n 1)

# One run for each release, with its folders on the path. NOETHER_VERSIONS chooses among those that the script knows.
NOETHER_VERSIONS ?= 1.1.0 2.0.0 2026.4.0
test-noether: build/.runnable build/.test-packages
	$(PYTHON) scripts/noether_versions.py $(NOETHER_VERSIONS)

# Left out, and said so, where the package can't be had: then the script ends with 3.
test-physicsnemo: build/.runnable build/.test-packages
	folder="$$($(PYTHON) scripts/fetch_physicsnemo.py)" || { [ $$? = 3 ]; exit; }; \
	  PYTHONPATH="python:$$folder:$$PYTHONPATH" \
	  $(PYTHON) -m pytest -q -p no:cacheprovider tests/integrations/test_physicsnemo_package.py \
    tests/integrations/test_physicsnemo_shards.py

test-cuda-torch: build/.complete
	PYTHONPATH=python $(PYTHON) -m tools.cuda_torch

# Neither needs torch; both need CMake.
test-sanitizers:
	PATH="$(BIN):$$PATH" scripts/test_sanitizers.sh

test-aarch64:
	PATH="$(BIN):$$PATH" scripts/test_aarch64.sh

lint: build/.tools build/.dev-packages
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	find csrc tests tools examples \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -print0 | xargs -0 $(BIN)/clang-format --dry-run -Werror

typecheck: build/.tools build/.dev-packages
	$(PYTHON) -m mypy

format: build/.tools build/.dev-packages
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	find csrc tests tools examples \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -print0 | xargs -0 $(BIN)/clang-format -i

clean:
	rm -rf build dist python/anchor_attention/*.so python/anchor_attention/share python/*.egg-info
