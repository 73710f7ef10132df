.DEFAULT_GOAL := help
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test test-slow lint format clean

help: ## This list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: install it, or: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP) ## The whole way on a real model: Gemma-3-270M, a real S3 server, one table at the end
	$(BIN)/python -m jobs.demo

test: $(STAMP) ## All tests but the slow ones
	$(BIN)/python -m pytest -q

test-slow: $(STAMP) ## The slow tests
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP) ## ruff, mypy, codespell, and the direction of the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/lint-imports

format: $(STAMP) ## Let ruff put code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and the demo's state
	rm -rf .venv .demo
