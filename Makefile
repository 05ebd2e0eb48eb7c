# Two commands: `make demo` and `make test`. Both work in a fresh clone and need Python ≥ 3.11 and make, nothing else.

PYTHON ?= python3
# Which torch to install, in pip's words; whether that is a CPU or a CUDA build depends on the package index. The CPU build
# is enough for both commands. For another one: make test TORCH="torch" (options of pip may follow).
TORCH ?= torch==2.13.0
# Processes that share the tests; each takes up to 4 GB.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint dist site pictures bench bench-quick clean

demo: $(VENV)/.installed
	$(BIN)/python -m demos.swingup

test: lint
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# An sdist, and from it a wheel; see tests/packaging.
dist: $(VENV)/.installed
	$(BIN)/python -m build --no-isolation

# All of docs/ as a site, in build/site.
site: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Pictures and printed output of README and docs anew; one page's: make pictures PAGES=tutorial.
pictures: $(VENV)/.installed
	$(BIN)/python -m tests.docs.remake $(PAGES)

# Against JAX and torch, see docs/benchmarks.md; flags: make bench BENCH="--system cartpole --batch 8".
bench: $(VENV)/.bench-installed
	$(BIN)/python -m tests.benchmarks $(BENCH)

bench-quick: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks --quick

$(VENV)/.bench-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[bench]"
	touch $@

$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "warp_phys needs Python 3.11 or newer, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test,gymnasium,reinforcement,jax,newton,mujoco,docs,export,tensorboard]"
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info
