# Each verb does all its own set-up: a fresh machine needs python3 (with venv), a C++17 compiler and make.
# The environment is .venv; torch comes first, as $(TORCH), because the package's own dependency on torch
# would fetch the variant with CUDA. PIP_INDEX_URL and its like choose where packages come from.

PYTHON ?= python3
TORCH ?= torch==2.13.0

bin := .venv/bin
installed := .venv/.installed
sources := pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
checked_cpp := $(filter %.h %.cpp %.cu %.cuh,$(sources))

.PHONY: install demo test lint bench bench-check bench-curves compare wheel gpu-check
.DEFAULT_GOAL := install
.DELETE_ON_ERROR:

install: $(installed)

.venv/.torch:
	test -x $(bin)/python || $(PYTHON) -m venv .venv
	$(bin)/python -m pip install --quiet "$(TORCH)"
	$(bin)/python -m pip install --quiet "scikit-build-core>=0.11" "pybind11>=2.13" cmake ninja
	@touch $@

$(installed): .venv/.torch $(sources)
	PATH="$(CURDIR)/$(bin):$$PATH" $(bin)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	@touch $@

demo: $(installed)
	$(bin)/pyxai-bounds demo --out runs/demo

# One process for each core, each on one thread: a test that is about threads sets their number itself.
side_by_side := OMP_NUM_THREADS=1 $(bin)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: $(installed)
	$(side_by_side)
	TRITON_INTERPRET=1 $(side_by_side) tests/kernels

lint: $(installed)
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/clang-format --dry-run -Werror $(checked_cpp)
	$(bin)/mypy pyxai_bounds

bench: $(installed)
	$(bin)/python -m bench

# Other libraries take part where they can be imported: bench/peers/__init__.py says how.
bench-curves: $(installed)
	$(bin)/python -m bench.curves

bench-check: $(installed)
	$(bin)/python -m bench --check bench/results/cpu/gradient_bounds.csv

# Interrupted, it goes on with: .venv/bin/python -m bench.compare
compare: $(installed)
	$(bin)/python -m bench.compare --fresh

wheel: $(installed)
	rm -rf dist
	PATH="$(CURDIR)/$(bin):$$PATH" $(bin)/python -m build --no-isolation --wheel --outdir dist

# Without .venv, and without a network: under whatever python has PyTorch with CUDA, as in PYTHON=python3.
# OUT is a folder for results and log; by default bench/results/<gpu> and build.
gpu-check:
	$(PYTHON) bench/gpu_check.py $(if $(OUT),--out "$(OUT)")
