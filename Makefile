# python3 and make are all that is needed. Everything is installed into $(VENV).
#
# Another build of PyTorch: make install TORCH=torch==2.11.0 PIP_FLAGS="--index-url <that build's index>"

PYTHON ?= python3
# Not from the environment, where it may be somebody's own: make VENV=folder.
VENV := .venv
TORCH ?= torch==2.13.0
# make versions: the Pythons that have that build of PyTorch; and those to try, all if none is named.
TORCH_ON ?= 3.11
PYTHONS ?=
PIP_FLAGS ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?=

ifneq ($(words $(VENV)),1)
$(error VENV is "$(VENV)"; give one folder, without a space in its name)
endif
BIN := $(VENV)/bin
WHEELS := wheels
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_FLAGS) -c constraints.txt
, := ,
# One thread a test process: pytest and the demo use the cores themselves.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-heavy test-torchao versions conformance support lint format docs bench asv asv-quick clean

help:
	@echo "make demo         run the main job: RecAdam beside AdamW on three frameworks, with a report"
	@echo "make test         run the tests (make test-heavy: those that take minutes)"
	@echo "make test-torchao runs those of the pull around its 8-bit and 4-bit optimizers"
	@echo "make versions     try the wheel on every Python, over the newest and the lowest libraries: docs/versions.md"
	@echo "make conformance  hold every backend to its claims (make support: rewrite docs/support.md)"
	@echo "make lint         ruff and mypy;  make format: reformat"
	@echo "make docs         build the documentation into docs/_build/html"
	@echo "make bench        one step beside its peers: a table of ratios; make asv: the suite that tracks them"
	@echo "make asv-quick    every benchmark of that suite, small and once: whether it runs"
	@echo "make install      install everything into $(VENV);  make clean: remove that and what was built, no runs"

# Debian's python3 has venv without pip; then pip comes from Debian's package of its wheel.
$(BIN)/python:
	@if { [ -e $(VENV) ] || [ -L $(VENV) ]; } && [ ! -e $(VENV)/.made ]; then echo "$(VENV) is there and is no environment of make; give another by VENV=..." >&2; exit 1; fi
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	  echo "no pip in this Python: taking it from Debian's package python3-pip-whl" && \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  folder=$$(mktemp -d) && chmod 755 $$folder && cd $$folder && \
	  apt-get -qq download python3-pip-whl && dpkg -x *.deb . && cd "$(CURDIR)" && \
	  wheel=$$(ls $$folder/usr/share/python-wheels/pip-*.whl) && \
	  $(BIN)/python $$wheel/pip install -q --no-index $$wheel && rm -rf $$folder; \
	} || { \
	  rm -rf $(VENV); \
	  echo "cannot make $(VENV): install Python's venv and pip (Debian: apt-get install python3-venv)"; \
	  exit 1; \
	}
	@touch $(VENV)/.made

# What to say when pip fails: what is missing, and what to copy where. $(1) are the extras.
define OFFLINE
{ echo "cannot install into $(VENV); pip's reason is above. If no package index can be reached from here:"; \
  echo "  1. on a connected machine with the same system and Python, in a clone of this project:"; \
  echo "       python3 -m pip download -d $(WHEELS) -c constraints.txt hatchling editables '$(TORCH)' '.[$(1)]'"; \
  echo "  2. copy that folder to $(CURDIR)/$(WHEELS), and from the same machine's ~/.cache/recadam/archives,"; \
  echo "     where 'recadam fetch' puts models and data, all files to $${RECADAM_CACHE:-$$HOME/.cache/recadam}/archives"; \
  echo "  3. make $(MAKECMDGOALS) PIP_FLAGS='--no-index --find-links $(WHEELS)'"; \
  exit 1; } >&2
endef

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	@if [ ! -e $(VENV)/.made ]; then echo "$(VENV) is there and make did not make it; give another by VENV=..., or touch $(VENV)/.made to let make have it" >&2; exit 1; fi
	@echo "installing (PyTorch, JAX and the harness) into $(VENV)"
	@$(PIP) "$(TORCH)" -e ".[torch,jax,finetune]" || $(call OFFLINE,torch$(,)jax$(,)finetune)
	@touch $@

$(VENV)/.development: $(VENV)/.runtime
	@echo "installing (tests, linters, documentation) into $(VENV)"
	@$(PIP) "$(TORCH)" hatchling -e ".[all]" || $(call OFFLINE,all)
	@touch $@

install: $(VENV)/.development

demo: $(VENV)/.runtime
	@$(BIN)/recadam demo --out runs/demo

test: $(VENV)/.development
	$(THREADS) $(BIN)/python -m pytest -n auto -m "not heavy" $(PYTEST_FLAGS)

test-heavy: $(VENV)/.development
	$(THREADS) $(BIN)/python -m pytest -n auto -m heavy $(PYTEST_FLAGS)

# torchao lies apart: transformers imports it where it is installed, and then every process prints what it misses.
test-torchao: $(VENV)/.development
	@$(PIP) --no-deps --upgrade --target $(VENV)/torchao torchao==0.18.0
	$(THREADS) PYTHONPATH=$(VENV)/torchao $(BIN)/python -m pytest -k table -rN tests/backends/torch/test_torch_pull.py

versions: $(VENV)/.development
	@$(if $(PYTHONS),,rm -f runs/versions/3.*-newest.json runs/versions/3.*-lowest.json)
	@$(THREADS) TORCH="$(TORCH)" TORCH_ON="$(TORCH_ON)" PIP_FLAGS="$(PIP_FLAGS)" \
	  $(BIN)/nox $(if $(PYTHONS),--error-on-missing-interpreters) \
	  -s $(or $(PYTHONS:%=versions-%),versions lowest table)

conformance: $(VENV)/.development
	@$(BIN)/recadam conformance --golden tests/golden

support: $(VENV)/.development
	@{ sed '/^| backend/,$$d' docs/support.md && $(BIN)/recadam backends --markdown; } > docs/support.new
	@mv docs/support.new docs/support.md

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.development
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

# Runs are not made by make alone, nor is what else lies beside them: they stay.
clean:
	rm -rf .asv .nox docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@if [ -e $(VENV)/.made ]; then rm -rf $(VENV); elif [ -e $(VENV) ]; then echo "$(VENV) stays: make did not make it"; fi

$(VENV)/.bench: $(VENV)/.development
	@$(PIP) "$(TORCH)" -e ".[bench]"
	@touch $@

bench: $(VENV)/.bench
	@RECADAM_BENCH=$(or $(RECADAM_BENCH),regular) $(BIN)/python asv_benchmarks/report.py $(BENCH_FLAGS)

ASV := asv_benchmarks/asv.conf.json

asv: $(VENV)/.bench
	@$(BIN)/asv machine --yes --config $(ASV) >/dev/null
	$(BIN)/asv run --config $(ASV) HEAD^! --show-stderr
	$(BIN)/asv publish --config $(ASV)

# Of this tree, in this environment; keeps nothing, and ends with an error if a benchmark fails.
asv-quick: $(VENV)/.bench
	@$(BIN)/asv machine --yes --config $(ASV) >/dev/null
	RECADAM_BENCH=quick $(BIN)/asv run --config $(ASV) --python=same --quick --show-stderr
