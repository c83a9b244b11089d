# Everything runs from a virtual environment that these targets create.
#
#   make demo        the main job: shards to a trained model that reads digits
#   make hello       the same path at its smallest, one rank, two minutes
#   make miniature   all stages, from pre-training to safety tuning, in miniature; 25 minutes
#   make test        the tests;  make test-all  adds the slow ones, AREA=tests/faults those of one area
#   make test-slurm  the tests on a real Slurm of two nodes, which Debian's packages are installed for; needs root
#   make bench       all benchmarks, side by side with their rivals, which are installed in ~/.cache/megablip-bench
#   make lint        style and formatting
#
# Where there is a GPU, plain `pip install torch` brings the right build. To
# choose another build of torch, say which and where pip finds it:
#   make test TORCH='torch==2.13.0' TORCH_PIP_ARGS='--index-url URL-OF-THE-CPU-WHEELS'

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=
AREA ?= tests

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo hello miniature test test-all test-slurm bench lint clean

demo: $(INSTALLED)
	$(BIN)/python -m tools.demo

hello: $(INSTALLED)
	$(BIN)/python -m tools.demo --hello

miniature: $(INSTALLED)
	$(BIN)/python -m tools.miniature

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not slurm" --numprocesses 2 --dist loadfile

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slurm" --durations=20 $(AREA)

test-slurm: $(INSTALLED)
	$(BIN)/python -m pytest -rs --durations=20 tests/slurm

bench: $(INSTALLED)
	$(BIN)/python -m tools.bench all

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info

# torch first: whatever else asks for it then finds it there.
$(INSTALLED): setup.cfg pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH_PIP_ARGS) '$(TORCH)'
	$(BIN)/pip install --quiet --constraint constraints-cpu.txt --editable '.[dev]'
	touch $@
