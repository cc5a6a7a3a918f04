# make demo   an environment in .venv, the package with whatever can be built, and the main job on real images
# make test   the same, and the test suite          (ARGS="…" goes to the program or to pytest; -n 0: one process)
#
# TORCH and TRITON choose what is installed; TRITON= leaves triton out. FASTREG_BUILD_CPU and FASTREG_BUILD_CUDA
# (0 or 1) are passed to the build.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.8.0
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-all lint format clean

demo: $(VENV)/demo
	@$(PY) -m fastreg --summary
	$(PY) -m benchmarks.longtail $(ARGS)

# Threads that spin while they wait would take the cores from the tests beside theirs.
test: export OMP_WAIT_POLICY ?= PASSIVE
test: $(VENV)/test
	@$(PY) -m fastreg --summary
	$(PY) -m pytest -n auto --maxprocesses 4 $(ARGS)

test-all: $(VENV)/test
	@$(PY) -m fastreg --summary
	$(PY) -m pytest -m '' $(ARGS)

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files csrc tests | grep -E '\.(h|cpp|cu)$$')

format: $(VENV)/dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files csrc tests | grep -E '\.(h|cpp|cu)$$')

clean:
	rm -rf $(VENV) build dist *.egg-info fastreg/*.so fastreg/_build.json

$(VENV)/torch: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fastreg needs Python 3.11 or newer: make PYTHON=…"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" numpy "setuptools>=77" wheel ninja
	@test -z "$(TRITON)" || $(PY) -c 'import triton' 2>/dev/null || $(PIP) "$(TRITON)" || echo "triton cannot be installed here; going on without it"
	@touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

# The extra of that name from pyproject.toml; the package itself is not built a second time.
$(VENV)/test $(VENV)/demo $(VENV)/dev: $(VENV)/built
	$(PIP) $$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(@F)"])')
	@test $(@F) != test || $(PIP) --no-deps timm  # of which a test needs one file; its torchvision might want another torch
	@touch $@
