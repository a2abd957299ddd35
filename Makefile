# Every target sets up what it needs: a virtual environment in .venv with the tested versions, the package
# installed editable, and the C++ kernels compiled.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: train test test-all gpu mfu bench bench-cpu wheel lint format clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

train: $(VENV)/.installed  ## train the quickstart model on the CPU, offline, in about a minute
	$(BIN)/python -m fastgpt.train --preset quickstart --device cpu --overwrite

# A process a core, each with one thread: most of the time goes into Triton's compiler and its interpreter.
test: $(VENV)/.installed  ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# make test compiles ahead of time, and interprets, only what differs from what is on record, and a sample of the rest.
test-all: $(VENV)/.installed  ## run the test suite with all that make test takes from records or draws less of
	FASTGPT_TEST_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile
	$(BIN)/python -m tests.kernels.interpreted

# Without a compiler or xdist it does without. The tests are stopped after a while, so that the timings get their turn.
gpu:  ## test and time kernels and steps on an NVIDIA GPU, in ten minutes, with the python3 at hand as it is (PYTHON=…)
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('error: torch sees no GPU; make test needs none')"
	-$(PYTHON) setup.py -q build_ext --inplace
	@folder=$$($(PYTHON) -c "from bench.timing import results_folder; print(results_folder('cuda'))") || exit 1; \
	mkdir -p "$$folder"; \
	workers=$$($(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 8"); \
	echo "testing; output goes to $$folder/tests.txt"; \
	OMP_NUM_THREADS=2 timeout -s INT 170 $(PYTHON) -m pytest tests/kernels tests/train/test_step.py \
		tests/train/test_account.py tests/data/test_prefetch.py \
		-k "(triton or compile or ops or on_a_gpu) and not ahead_of_time" $$workers \
		--tb=short --durations=10 -W "default:fastgpt runs on plain PyTorch:UserWarning" > "$$folder/tests.txt" 2>&1; \
	status=$$?; \
	tail -n 20 "$$folder/tests.txt"; \
	timeout -s INT 240 $(PYTHON) -m bench.mfu --device cuda --preset gpt2-124m --seconds 15 --profile --loss_steps 200 \
		--contenders fastgpt "fastgpt, no graphs" eager compile || status=$$?; \
	timeout -s INT 180 $(PYTHON) -m bench.kernels --device cuda --seconds 60 || status=$$?; \
	exit $$status

mfu:  ## time whole training steps against torch.compile, on a GPU with the python3 at hand (ARGS=… for flags)
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

lint: $(VENV)/.installed  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed  ## rewrite files in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove everything that was built, not the data nor the runs
	rm -rf $(VENV) build dist *.egg-info fastgpt/kernels/*.so

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
