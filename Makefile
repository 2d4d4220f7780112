# SPDX-License-Identifier: Apache-2.0
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help deps install demo demo-video demo-hls demo-hw results test test-hw test-slow test-mqbench test-families lint format bench clean

VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt

# The checkout itself always comes first, also where an environment is shared between checkouts.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# Installation runs again only when these files change: their checksum is in the stamps' names (times would differ
# between checkouts that share an environment).
PINS := $(shell cat setup.py constraints.txt | cksum | cut -d' ' -f1)
DEPS := $(VENV)/.deps-$(PINS)
INSTALLED := $(VENV)/.installed-$(PINS)

help:  ## print the targets
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22
	@echo
	@echo "  Variables: VENV=$(VENV)  PYTHON=$(PYTHON)  WORKERS=$(WORKERS) (parallel tests)"

$(DEPS):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else f"\
	make: the pinned versions need Python 3.11 or 3.12, got {v[0]}.{v[1]}: use `make install PYTHON=python3.11`")'
	rm -f $(VENV)/.deps-* $(VENV)/.installed-*
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja
	$(PIP) torch torchvision
	$(PY) tools/build_mmcv.py
	$(PY) -c 'import setuptools; from distutils.core import run_setup; d = run_setup("setup.py", stop_after="init"); \
	extras = [line for name, lines in d.extras_require.items() if name not in ("mqbench", "hf", "openvino", "bench") for line in lines]; \
	print(*d.install_requires, *extras, sep="\n")' > $(VENV)/requirements.txt
	SAM2_BUILD_CUDA=0 $(PIP) --no-build-isolation -r $(VENV)/requirements.txt
	touch $@

$(INSTALLED): $(DEPS)
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

deps: $(DEPS)  ## the environment without the package itself (what CI shares between checkouts)

install: $(INSTALLED)  ## make .venv and install everything into it (about 5 min on two idle cores, and the download)

DEMO := work_dirs/demo_sam_tiny_w4a4

demo: install  ## quantize the embedded small SAM to 4 bits and report FP beside quantized (<= 10 min)
	$(PY) tools/ptq.py mm_configs/demo_sam_tiny_w4a4.py
	$(PY) tools/time_image.py $(DEMO)/quantized.safetensors

demo-video: install  ## follow objects through generated clips with the embedded small SAM 2, FP beside 4 bits (<= 10 min)
	$(PY) tools/ptq.py mm_configs/demo_sam2_tiny_w4a4.py

$(DEMO)/quantized.pth: | $(INSTALLED)
	$(PY) tools/ptq.py mm_configs/demo_sam_tiny_w4a4.py

demo-hls: install $(DEMO)/quantized.pth  ## the model of `make demo` as HLS C++: export, golden model, csim, cocotb (<= 10 min)
	$(PY) tools/demo_hls.py $(DEMO)/quantized.pth -o work_dirs/demo_hls

demo-hw: install $(DEMO)/quantized.pth  ## one accelerator for the model of `make demo`: C++, RTL, synthesis, cycle model, report
	$(PY) tools/demo_hw.py $(DEMO)/quantized.pth -o work_dirs/demo_hw

results: install  ## run what is missing of the tables of results and ablations (many hours; needs images in AHCQ_DATA)
	$(PY) tools/results_table.py --fill --write

test: lint  ## lint, then all tests but the slow ones
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --durations=10

test-hw: deps  ## the hardware tests alone (part of `make test`): csim, cocotb, mutants, hls4ml
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --durations=10 tests/hls

test-slow: deps  ## the tests that take minutes each
	$(PY) -m pytest -m slow

test-mqbench: deps  ## the tests against the real MQBench (docs/mqbench.md: how to install it); fails where it is missing
	@$(PY) -c 'import mqbench.prepare_by_platform, mqbench.convert_deploy, mqbench.advanced_ptq, onnxsim' 2>/dev/null || \
	{ echo "make: MQBench does not import in $(VENV): see docs/mqbench.md, or name its folder in PYTHONPATH"; exit 1; }
	OMP_NUM_THREADS=1 $(PY) -m pytest -W ignore --durations=10 $$(find tests -name 'test_mqbench_*.py' | sort)

# Interpreters of further environments, with packages that cannot be installed together.
PYTHONS ?= $(PY)

test-families: deps  ## other people's models, where their packages are installed: measure them, write docs/models.md
	OMP_NUM_THREADS=1 $(PY) -m tests.families --pythons $(PYTHONS)

lint: deps  ## check format and style with ruff, types with mypy
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: deps  ## format, and mend what ruff can mend
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: deps  ## time and error of the range search against trying candidates one by one
	$(PY) tools/bench_range_search.py

clean:  ## remove .venv, caches and build leftovers (not work_dirs, not the wheel of mmcv)
	rm -rf .venv build dist ahcq_plugin.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find ahcq_plugin hls mm_configs tests tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
