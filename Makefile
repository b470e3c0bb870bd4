# make demo        the main job: install, fetch a pretrained model and real sentences, tune it stock and patched
# make test        everything CI runs; make check: linters and types; make wheel: a wheel for every torch >= 2.10
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*)
TOOLS  := "setuptools>=77" wheel pybind11 ninja
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
# A torch that is there stays; else with a GPU the index's own build, without one the CPU build where pip can find it.
TORCH  ?= $(if $(HAS_GPU),torch>=2.10,torch==2.13.0+cpu)
TORCH_OTHERWISE ?= torch==2.13.0
# Without a GPU the CUDA library can only be compiled here, not run: one architecture shows that it does, in a minute.
ifeq ($(HAS_GPU),)
export TORCH_CUDA_ARCH_LIST ?= 9.0
endif

.PHONY: install bench demo studies test test-slow gpu-test sanitize check headers oldest format wheel doctor clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/pip install -q $(TOOLS)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)" 2>/dev/null \
		|| $(BIN)/pip install -q "$(TORCH_OTHERWISE)"
	touch $@

# The user's install, editable so that tests and kernels under work are one tree.
$(VENV)/.installed: $(SOURCES) | $(VENV)/.torch
	$(BIN)/pip install -q --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/petune demo $(ARGS)

# The papers' studies on a pretrained MiniLM and real sentences: 82 minutes on one core (bench/results has that run);
# goes on after a stop.
studies: install
	for study in transferability stability classification-head; do \
		$(BIN)/petune study bench/studies/$$study.toml --out study_results/$$study $(ARGS) || exit 1; done

# make bench ARGS="models --compile"; results go to bench_results/
bench: install
	$(BIN)/python -m bench $(ARGS)

doctor: install
	$(BIN)/petune doctor

# One process a core, a file to each; threads that wait leave their core to the others. On two cores half the time.
test: $(VENV)/.dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist loadfile $(ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q --slow -m slow $(ARGS)

gpu-test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

# The CUDA kernels under the host emulator, with AddressSanitizer and UBSan; both libraries must be there before Python's.
sanitize: $(VENV)/.dev
	PETUNE_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest -q tests/kernels/test_cuda_emulator*.py $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# The suite runs with a newer torch than the oldest that the wheel is for; here csrc meets that one's headers. The index
# has 2.10 for x86 with CUDA only, 0.9 GB; the Arm wheel is a sixth of it and has the same headers.
OLDEST := 2.10.0
headers: $(VENV)/.torch
	$(BIN)/pip download -q --no-deps --only-binary :all: --platform manylinux_2_28_aarch64 --python-version 3.11 \
		-d build torch==$(OLDEST)
	$(BIN)/python -m zipfile -e build/torch-$(OLDEST)-*.whl build/torch-$(OLDEST)
	for part in "" "-DPETUNE_CUDA -DUSE_CUDA"; do c++ $$part -std=c++20 -fsyntax-only -DTORCH_TARGET_VERSION=0x020a000000000000 \
		$$($(BIN)/python -m pybind11 --includes) -isystem build/torch-$(OLDEST)/torch/include \
		$$(printf -- '-DPETUNE_%s="" ' VERSION COMPILER TORCH CUDA_VERSION CUDA_ARCHS) csrc/bindings.cpp || exit 1; done

# The whole suite with the oldest versions that pyproject.toml admits, on a copy of the last commit: 5 GB, half an hour.
oldest:
	rm -rf build/oldest && mkdir -p build/oldest && git archive HEAD | tar -x -C build/oldest
	$(PYTHON) -m venv build/oldest/.venv && build/oldest/.venv/bin/pip install -q uv
	cd build/oldest && .venv/bin/uv pip compile -q --python .venv/bin/python --resolution lowest-direct --extra dev \
		pyproject.toml -o oldest.txt && .venv/bin/uv pip install -q --python .venv/bin/python -r oldest.txt
	cd build/oldest && .venv/bin/python setup.py -q build_ext --inplace && .venv/bin/python -m pytest -q $(ARGS)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix -q . || true
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# One wheel for this Python and every torch >= 2.10; the torch libraries stay outside it.
wheel: $(VENV)/.dev
	rm -rf dist wheelhouse
	$(BIN)/python -m build --wheel --no-isolation -o dist .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		--exclude 'libcu*' -w wheelhouse dist/*.whl
	@ls wheelhouse

clean:
	rm -rf build dist wheelhouse *.egg-info petune_kernels/*.so
