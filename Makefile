# make demo    sets up .venv, then runs the main job on real input
# make test    sets up .venv, then passes the C++ and the Python tests
# make bench   measures every goal that this machine can, and prints goal, newest row and gap
# make gpu     on a machine with a GPU: builds with $(PYTHON)'s own packages, tests, measures, appends rows
# make lint    format, lint, types
#
# The set-up runs once: its stamps are older than pyproject.toml, constraints.txt or the C++ sources only after an edit.
#   PYTHON=python3.12 make test         another interpreter, 3.10 to 3.13 (after `make clean`)
#                                       The CPU build of torch is taken where pip's indexes have it (PyTorch's own CPU
#                                       index does: name it in PIP_EXTRA_INDEX_URL); else PyPI's, with CUDA on Linux
#   PYTEST_ARGS="-k gemm" make test     arguments for pytest
#   SECONDS=300 make gpu                how long that may take; GPU_ARGS="--only gemm" for some of it

PYTHON ?= python3
SECONDS ?= 520
SHELL := /bin/bash
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
EXTRAS := triton,demo,train,serve,eval,test,dev
CXX_SOURCES := CMakeLists.txt $(shell find csrc python tests/cpp -type f 2>/dev/null)
BUILD := build/editable

.PHONY: demo test bench gpu lint setup clean
.DELETE_ON_ERROR:

setup: .venv/.built

demo: .venv/.built
	$(BIN)/fp8kernels demo $(DEMO_ARGS)

test: .venv/.built
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	@$(BIN)/python -m bench.ledger

bench: .venv/.built
	$(BIN)/python -m bench.goals --run

# no .venv and no network: see bench/gpu.py
gpu:
	$(PYTHON) -m bench.gpu --seconds $(SECONDS) $(GPU_ARGS)

lint: .venv/.built
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

# torch comes first and alone, as its CPU build if that is to be had; every later line names it too, or pip would take
# another one.
.venv/.tools: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 10) <= v < (3, 14) or sys.exit(f"fp8kernels needs Python 3.10 to 3.13; {sys.executable} is {v[0]}.{v[1]}. Set PYTHON.")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install -q -c constraints.txt "$(TORCH)+cpu" 2>/dev/null || $(PIP) install -q -c constraints.txt "$(TORCH)"
	$(PIP) install -q -c constraints.txt "$(TORCH)" scikit-build-core pybind11 cmake ninja
	touch $@

.venv/.built: .venv/.tools $(CXX_SOURCES)
	$(PIP) install -q --no-build-isolation -Cbuild-dir=$(BUILD) -Ccmake.define.FP8KERNELS_BUILD_TESTS=ON \
	  -c constraints.txt "$(TORCH)" -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
