# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
MINUTES ?= 4
PTX_TARGETS ?= 80 90 100
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-full lint format bench gpu-report aot oldest-triton newest-triton ptx-test ptx-report soak gpu-test kernel-package docs package locked clean

demo: $(VENV)/.installed ## train, sample, picture and time a small DC-DiT on scanned digits -> out/demo/report.md
	$(BIN)/dcdit demo --minutes $(MINUTES) --out out/demo

test: $(VENV)/.installed ## the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 15

test-full: $(VENV)/.installed ## the same with many more random examples per kernel
	DCDIT_FULL=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed ## all benchmarks on this machine -> benchmarks/results/
	$(BIN)/python -m benchmarks.harness.suite

gpu-report: ## checks, times and a page of a CUDA device within 9 minutes -> out/gpu-report/; plain Python, no network
	$(PYTHON) benchmarks/gpu_report.py --minutes 9 --out out/gpu-report

aot: $(VENV)/.installed ## compile every kernel for every target without a GPU; fails on a spill
	$(BIN)/python -m tools.aot --jobs 2

oldest-triton newest-triton: %-triton: $(VENV)/.installed out/%-triton/.installed ## every kernel at the width of XL, compiled by the oldest or the newest Triton that pyproject.toml accepts
	PYTHONPATH=out/$@ $(BIN)/python -m tools.aot --target sm_90 --dtype bf16 --width 1152 --jobs 2

out/%-triton/.installed: .ci/%-triton.txt
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --target $(@D) -r $<
	touch $@

ptx-test: $(VENV)/.installed ## the kernel tests on compiled kernels, whose PTX runs without a GPU (see tools/ptx)
	for target in $(PTX_TARGETS); do DCDIT_PTX=$$target $(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels || exit 1; done

ptx-report: $(VENV)/.installed ## counts of what compiled kernels do: bytes, instructions, bank conflicts
	$(BIN)/python -m tools.ptx.report

soak: $(VENV)/.installed ## an hour or more of random trouble (tools/soak) -> docs/soak.md; fails if there was a fault
	$(BIN)/python -m tools.soak --out docs/soak.md

gpu-test: ## everything that needs a CUDA device; plain Python, no network; without a device it says so and stops
	$(PYTHON) -m tools.gpu_suite

kernel-package: $(VENV)/.installed ## dcdit.ops as a package for Hugging Face's kernels -> out/kernel-package/
	$(BIN)/python -m tools.kernel_package --out out/kernel-package

docs: $(VENV)/.installed ## the documentation site -> site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: ## sdist and wheel -> dist/, checked, and the wheel used where nothing but its dependencies is installed
	rm -rf dist out/package
	$(PYTHON) -m venv out/package/tools
	out/package/tools/bin/python -m pip install --quiet --require-hashes -r .ci/release-requirements.txt
	out/package/tools/bin/python -m build --no-isolation
	out/package/tools/bin/check-wheel-contents dist/*.whl
	out/package/tools/bin/twine check --strict dist/*
	$(PYTHON) -m venv out/package/fresh
	out/package/fresh/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	out/package/fresh/bin/python -I tools/use_package.py
	rm -rf out/package

clean:
	rm -rf $(VENV) out site build dist *.egg-info

locked: ## .venv as CI has it: every file checked by its hash, PyTorch as its CPU build (Linux on x86-64)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r .ci/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
