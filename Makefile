# Every target makes the virtual environment that it needs.
# make PYTHON=python3.12 VENV=/somewhere/else ... takes another Python or place.

PYTHON = python3
VENV = .venv
ALGORITHM = npg
ENV = Hopper-v5
STEPS = 1_000_000
SEED = 0
BUDGET = 30
CAMPAIGN = --kills 1000 --files 10_000 --words 1000 --environments 10 --disks 20 --minutes 30

INSTALLED = $(VENV)/installed
DEVELOPS = $(VENV)/develops
PIP = $(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt
RUN = $(VENV)/bin/python

.PHONY: help .venv train policies test test-slow campaign lint docs bench bench-gpu clean

help:
	@echo "make train   train $(ALGORITHM) on $(ENV); ALGORITHM=, ENV=, STEPS= and SEED= change it"
	@echo "make policies  train a policy for each of the eleven tasks, with its evaluation and film, in runs/policies"
	@echo "make test    run the tests, but for the few that start many processes: make test-slow runs those"
	@echo "make campaign  kill runs, damage files, mistype words, fill a disk, for hours; CAMPAIGN= says how often"
	@echo "make lint    check style, format and types"
	@echo "make docs    build the documents and the API's pages into build/site"
	@echo "make bench   run every benchmark; takes long. BUDGET= are the minutes of those that train, which go on next time"
	@echo "make bench-gpu  on a GPU: tests, rates from physics alone to whole training, torch.compile, and returns; 8 minutes"
	@echo "make .venv   only make the virtual environment, with what training needs"
	@echo "make clean   remove the virtual environment and what tools leave; runs stay"

.venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(DEVELOPS): $(INSTALLED)
	$(PIP) -e ".[dev,video,bench,onnx,tune]"
	@touch $@

train: $(INSTALLED)
	$(RUN) train.py $(ALGORITHM) --env $(ENV) --steps $(STEPS) --seed $(SEED)

test: $(DEVELOPS)
	$(RUN) -m pytest -q -n auto --maxprocesses 4 -m "not slow"

test-slow: $(DEVELOPS)
	$(PIP) -e ".[ray,warp]"
	$(RUN) -m pytest -q -m slow

campaign: $(DEVELOPS)
	OMP_NUM_THREADS=1 $(RUN) -m tests.campaign $(CAMPAIGN)

lint: $(DEVELOPS)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(INSTALLED)
	$(PIP) -e ".[docs]"
	$(RUN) docs/generate_options.py
	$(RUN) -W error docs/build_site.py build/site
	@echo "open build/site/index.html"

policies: $(DEVELOPS)
	mkdir -p build
	$(RUN) -m benchmarks.natural.policies --budget-minutes 1000 --picture build/policies.gif

bench: $(DEVELOPS)
	$(PIP) -e ".[warp]"
	set -e; for script in $(basename $(wildcard benchmarks/*/*.py)); do \
	  module=$$(echo $$script | tr / .); budget=; \
	  $(RUN) -m $$module --help | grep -q -e --budget-minutes && budget="--budget-minutes $(BUDGET)"; \
	  echo "$$module $$budget"; $(RUN) -m $$module $$budget; done

bench-gpu: $(DEVELOPS)
	$(PIP) -e ".[warp]"
	$(RUN) -m benchmarks.first_gpu

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
