# Every target starts from nothing: it makes .venv, installs, builds csrc, and runs. PYTHON names another Python,
# LABELS a folder of PNG masks of real scenes for `bench`, PREBUILT a Python that has torch: `gpu` then installs and
# builds nothing, and takes the library that lies in cisc_ext.
PYTHON ?= python3
OUT ?= benchmarks/results
LABELS ?=
PREBUILT ?=
JOBS ?= 2
TORCH := torch==2.13.0
PY := .venv/bin/python
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
ifeq ($(GPU),)
export CISC_CUDA ?= 0
endif

hash = $(shell cat $(1) | sha256sum | cut -c1-16)
PACKAGES := .venv/.packages-$(call hash,pyproject.toml Makefile)
SETTINGS := $(shell echo '$(CISC_CUDA) $(CISC_CPP) $(CISC_DEBUG) $(CISC_CUDA_ARCHS) $(CXX) $(CUDA_HOME)' | sha256sum | cut -c1-8)
BUILT := .venv/.built-$(call hash,setup.py pyproject.toml Makefile $(wildcard csrc/*))-$(SETTINGS)

SIMULATED := test_ops.py test_golden.py test_ops_rules.py test_ops_properties.py test_ops_special.py \
    test_ops_errors.py test_cross_similarity.py test_gpu_cases.py test_cuda_losses.py \
    test_cuda_features.py test_cross_chips.py test_screened.py

.PHONY: help setup demo test soak lint format bench gpu

help:
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(BUILT)  ## make .venv, install, build

demo: $(BUILT)  ## the six stages on a small generated data set, into runs/demo, made anew
	@rm -rf runs/demo
	$(PY) train.py demo --out runs/demo

# The CUDA kernels as C++ too, where there is a C++ compiler: as on a chip of 9.0; then what differs on older ones, and
# with threads in other orders, so that a missing barrier shows.
test: $(BUILT)  ## all tests, in JOBS processes; then those of the CUDA kernels, run on the CPU
	@export OMP_WAIT_POLICY=passive
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
	[ -f cisc_ext/_ops.so ] || { echo "CUDA kernels not tested: no C++ compiler" >&2; exit 0; }
	CISC_SIMT=1 CISC_CUDA=0 $(PY) setup.py --quiet build --build-lib build/simt
	export CISC_OPS=build/simt/cisc_ext/_ops.so
	CISC_SIMT_CHIP=90 $(PY) -m pytest -n $(JOBS) -q -rfE -k "cpp or test_cuda_losses or test_cuda_features or simulated" \
	    $(addprefix tests/,$(SIMULATED))
	CISC_SIMT_CHIP=80 CISC_SIMT_ORDER=shuffle $(PY) -m pytest -n $(JOBS) -q -rfE -k "cpp and cross_similarity" \
	    tests/test_ops.py tests/test_cross_similarity.py
	CISC_SIMT_CHIP=75 CISC_SIMT_ORDER=reverse $(PY) -m pytest -n $(JOBS) -q -rfE \
	    -k "cpp and (test_implementation or golden or test_cross)" \
	    tests/test_ops.py tests/test_golden.py tests/test_cross_similarity.py
	CISC_SIMT_ORDER=reverse CISC_SIMT_ASYNC=mixed $(PY) -m pytest -n $(JOBS) -q -rfE \
	    -k "simulated-90 and gradients and not long_rows" tests/test_cross_chips.py

soak: $(BUILT)  ## 100 000 random calls of the operators under AddressSanitizer and UBSan, 800 of the CUDA kernels on the CPU
	@$(PY) tests/fuzz.py --cases 100000 --json "$(OUT)/soak.json"
	$(PY) tests/fuzz.py --simt --cases 800 --json "$(OUT)/soak_simt.json"

lint: $(PACKAGES)  ## style, types and format; changes nothing
	@$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/clang-format --dry-run -Werror csrc/* tests/*.cpp tests/simt/*

format: $(PACKAGES)  ## bring Python and C++ into the house's form
	@$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	.venv/bin/clang-format -i csrc/* tests/*.cpp tests/simt/*

# The extra "bench" has the rivals; the results say so where they are missing.
bench: $(BUILT)  ## time and memory of a training step and of every kernel, into $(OUT); tables and pictures
	@$(PY) -c 'from importlib.metadata import requires; print(*(r.split(";")[0] for r in requires("cisc_ext") if "bench" in r))' | \
	    xargs $(PY) -m pip install --quiet --disable-pip-version-check || echo "rivals could not be installed" >&2
	$(PY) -m benchmarks.step --json "$(OUT)/step_cpu.json"
	$(PY) -m benchmarks.kernels --json "$(OUT)/kernels_cpu.json"
	$(PY) -m benchmarks.similarity $(if $(LABELS),--labels "$(LABELS)") --json "$(OUT)/similarity_cpu.json"
	$(PY) -m benchmarks.plots --json "$(OUT)/kernels_cpu.json"
	$(PY) -m benchmarks.tables

# Refuses before anything is installed where there is no GPU.
gpu:  ## tests, targets, sanitizer, step and benchmark on an NVIDIA GPU, results into $(OUT)
ifeq ($(GPU),)
	@echo "make gpu: no NVIDIA GPU here (nvidia-smi -L fails)" >&2
	exit 1
else ifneq ($(PREBUILT),)
	@$(PREBUILT) -m benchmarks.gate --out "$(OUT)"
else
	@$(MAKE) --no-print-directory $(BUILT)
	$(PY) -m benchmarks.gate --out "$(OUT)"
endif

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, got " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# What builds comes first, then the package's own list (pyproject.toml), still without C++.
$(PACKAGES): | .venv/bin/python
	@$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH) 'setuptools>=77' ninja pybind11
	CISC_CPP=0 $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[build,reports,test]'
	rm -f .venv/.packages-*
	touch $@

$(BUILT): $(PACKAGES)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(PY) -m cisc_ext info | grep '^compiled operators: none' || true
	rm -f .venv/.built-*
	touch $@
