# Every target sets up what it needs: a virtual environment in .venv with the tested versions, the package
# installed editable, and the C++ kernels compiled.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: train test test-all gpu gpu-rehearsal gpu-proof asan amx soak corruption fuzz mfu bench bench-cpu wheel lint format clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

train: $(VENV)/.installed  ## train the quickstart model on the CPU, offline, in about a minute
	$(BIN)/python -m fastgpt.train --preset quickstart --device cpu --overwrite

# A process a core, each with one thread: most of the time goes into Triton's compiler and its interpreter.
test: $(VENV)/.installed  ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# make test compiles ahead of time, and interprets, only what differs from what is on record, and a sample of the rest.
test-all: $(VENV)/.installed  ## run the test suite with all that make test takes from records or draws less of
	FASTGPT_TEST_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile
	$(BIN)/python -m tests.kernels.interpreted

# If there is no compiler or no xdist, this runs without.
gpu:  ## test and time everything on an NVIDIA GPU in ten minutes, with this python3 (PYTHON=…, ARGS=… for flags)
	-$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m bench.gpu $(ARGS)

gpu-rehearsal: $(VENV)/.installed  ## run the stages of make gpu, small, on a machine without a GPU
	$(BIN)/python -m bench.gpu --rehearse --out build/gpu-rehearsal

soak: $(VENV)/.installed  ## kill small runs 1,300 times and compare what becomes of them, in about half an hour
	$(BIN)/python -m bench.robustness.soak

corruption: $(VENV)/.installed  ## damage the files of a small run 2,000 times, in about half an hour
	$(BIN)/python -m bench.robustness.corruption

gpu-proof: $(VENV)/.installed  ## check the GPU's kernels for illegal accesses and races, without a GPU
	$(BIN)/python -m bench.gpu_proof

# Python and PyTorch leave memory to the end of the process, which is no leak. Memory is handed out full of NaN, as the
# tests want it. A report ends a test's process; pytest leaves standard error alone, so that it can be read.
ASAN = build/asan
ASAN_RUN = LD_PRELOAD="$(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))" \
	ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255 \
	UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc PYTHONPATH=$(abspath $(ASAN))/lib:$(CURDIR) \
	PYTEST_ADDOPTS=--capture=sys FASTGPT_SANITIZE=1 OMP_NUM_THREADS=1

asan: $(VENV)/.installed  ## test the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in fifteen minutes
	PATH="$(abspath $(BIN)):$$PATH" FASTGPT_SANITIZE=1 FASTGPT_REQUIRE_BUILD=1 \
		$(BIN)/python setup.py -q build --build-lib $(ASAN)/lib --build-temp $(ASAN)/temp
	$(ASAN_RUN) $(BIN)/pytest -o pythonpath= -n auto tests/bench/test_asan.py tests/kernels -k "asan or cpp and not compile"

# In a library of its own, for CPUs with AVX512_BF16; the tests of the C++ kernels in fp32 and bf16 are those that it runs.
AMX = build/amx

amx: $(VENV)/.installed  ## test the C++ kernels for AMX on a CPU without it, in ten minutes
	PATH="$(abspath $(BIN)):$$PATH" FASTGPT_EMULATE_AMX=1 FASTGPT_REQUIRE_BUILD=1 \
		$(BIN)/python setup.py -q build --build-lib $(AMX)/lib --build-temp $(AMX)/temp
	FASTGPT_EMULATE_AMX=1 PYTHONPATH=$(abspath $(AMX))/lib:$(CURDIR) OMP_NUM_THREADS=1 \
		$(BIN)/pytest -o pythonpath= -n auto tests/bench/test_amx.py tests/kernels -k "amx or cpp and not compile"

fuzz: $(VENV)/.installed  ## call kernels and read files with random arguments and contents, ten minutes each
	$(BIN)/python -m bench.robustness.fuzz

mfu:  ## time whole training steps against torch.compile, on a GPU, with this python3 (ARGS=… for flags)
	$(PYTHON) -m bench.mfu $(ARGS)

bench: $(VENV)/.installed  ## time the kernels against their peers on this machine, a GPU if it has one
	$(BIN)/python -m bench.kernels

bench-cpu: $(VENV)/.installed  ## time whole training steps on the CPU against plain PyTorch, in under ten minutes
	$(BIN)/python -m bench.cpu

wheel: $(VENV)/.installed  ## build the source distribution, and the wheel from it, into dist
	rm -rf dist
	$(BIN)/python setup.py -q sdist
	PATH="$(abspath $(BIN)):$$PATH" FASTGPT_REQUIRE_BUILD=1 \
		$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist dist/*.tar.gz

lint: $(VENV)/.installed  ## check style, types and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/mypy
	$(BIN)/typos

format: $(VENV)/.installed  ## rewrite files in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i csrc/*

clean:  ## remove everything that was built, not the data nor the runs
	rm -rf $(VENV) build dist *.egg-info fastgpt/kernels/*.so

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
