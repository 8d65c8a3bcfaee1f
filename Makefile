# Every target sets up the environment by itself; that is a no-op while the environment is current.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/shapes_fcos.yaml
ARGS ?=
BENCH ?= runs/benchmarks

bin := $(VENV)/bin
installed := $(VENV)/.installed
parallel := -n 2 --dist loadfile --no-loadscope-reorder
benchmarks := train_step stage_two trainer ema memory evaluation start_up scaling overfit

.PHONY: help train test test-fast check format docs fuzz soak bench
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 16

train: $(installed)  ## train and evaluate CONFIG (generated data, CPU), or go on where it stopped
	$(bin)/python tools/train.py --config $(CONFIG) --resume $(ARGS)

test: check  ## lint, types and the whole test suite, about 6 minutes on 2 cores
	$(bin)/python -m pytest $(parallel) $(ARGS)

test-fast: $(installed)  ## the tests that need no second process and no long run, below 2 minutes
	$(bin)/python -m pytest $(parallel) -m "not slow" $(ARGS)

check: $(installed)  ## lint and types
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy

format: $(installed)  ## format, and fix what the linter can
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

docs: $(installed)  ## write docs/config.md and its JSON schema from the fields, and the tables of docs/reliability.md
	$(bin)/python -m detbb.heads.docs
	$(bin)/python tests/support/planted.py

fuzz: $(installed)  ## 5,000 inputs that nobody foresaw: configs, annotations, checkpoints, images
	DETBB_FUZZ=1250 $(bin)/python -m pytest tests/test_fuzz.py $(ARGS)

soak: $(installed)  ## 60 kills and 2,000 steps: is anything lost, does memory grow
	$(bin)/python benchmarks/soak.py $(ARGS)

bench: $(installed)  ## every figure of docs/benchmarks.md, about an hour; JSON below BENCH
	$(bin)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	mkdir -p $(BENCH)
	for name in $(benchmarks); do $(bin)/python benchmarks/$$name.py --json $(BENCH)/$$name.json $(ARGS) || exit 1; done

$(installed): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --constraint constraints.txt --editable '.[dev,export]'
	touch $@
