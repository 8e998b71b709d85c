# make demo   sets up .venv and runs the main job (about 4 minutes on 2 idle cores)
# make test   sets up .venv, then lint, type check and tests
# make help   lists the rest
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test micro gpu-smoke clean help
.DEFAULT_GOAL := help

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cppo needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## train the embedded micro VLM with CPPO, evaluate before and after, write report.html
	$(BIN)/cppo train --overwrite true

test: $(STAMP) ## lint, type check and tests
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --maxprocesses 4

micro: $(STAMP) ## rebuild the embedded micro VLM from nothing (about 25 minutes on 2 cores)
	$(BIN)/python -m cppo.assets.rebuild

gpu-smoke: $(STAMP) ## prove the CUDA path on a machine with a GPU (about 5 minutes)
	$(BIN)/python benchmarks/gpu_smoke.py

clean: ## remove the environment, builds and caches (not your runs)
	rm -rf .venv dist build .pytest_cache .ruff_cache .mypy_cache
