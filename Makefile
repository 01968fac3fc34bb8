# caffejacinto-py. `make` lists the targets; PYTHON picks the interpreter that creates .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format type bench gpu docs proto models clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## create .venv and install the package (editable) with its dev, demo and hdf5 extras

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo,hdf5]'
	touch $@

demo: $(STAMP) ## train a net on scikit-learn's digits, make it sparse, quantize it; prints the table
	PATH="$(abspath $(BIN)):$$PATH" sh models/recipes/digits_demo.sh

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -q -n $(JOBS)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(STAMP) ## mypy
	$(BIN)/mypy

bench: $(STAMP) ## speed against hand-written PyTorch; files and data; start-up
	$(BIN)/python bench/train.py
	$(BIN)/python bench/files.py
	$(BIN)/python bench/feeder.py
	$(BIN)/python bench/startup.py

gpu: $(STAMP) ## the tests that need a GPU, and the table of bench/gpu.py
	$(BIN)/python -m pytest -q -m gpu tests/gpu
	$(BIN)/python bench/gpu.py

docs: $(STAMP) ## write docs/cli.md from the commands and docs/layers.md from the layer registry
	$(BIN)/python docs/generate.py

proto: $(STAMP) ## compile proto/caffe.proto into the package
	$(BIN)/python proto/build.py

models: $(STAMP) ## write the prototxts of models/
	$(BIN)/python models/generate.py

clean: ## remove the venv, caches, demo and runs
	rm -rf $(VENV) demo runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
