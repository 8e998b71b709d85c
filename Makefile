# make demo   sets up .venv and runs the main job (about 4 minutes on 2 idle cores)
# make test   sets up .venv, then lint, type check and tests; test-oldest and test-plain: the tests on other versions
# make help   lists the rest
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.installed-docs
INSTALL := pip install --quiet --disable-pip-version-check
TORCH := $(shell grep -E '^torch(vision)?==' constraints.txt)
PYTEST := pytest --numprocesses auto --maxprocesses 4
LIBRARY_TESTS := tests/policy tests/training/test_upstream.py tests/training/test_trl_surface.py \
	tests/training/test_rollouts.py tests/training/test_shared_views.py tests/training/test_resume.py

# A command that is silent for minutes, with a line every nine seconds. It has no comma.
alive = @( while sleep 9; do echo "installing, $$SECONDS s so far"; done ) & beat=$$!; trap "kill $$beat" EXIT; $(1)

.PHONY: check-python demo docs test test-oldest test-plain verl-test micro gpu-acceptance clean help
.DEFAULT_GOAL := help

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 13

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cppo needs Python 3.11 or newer: make PYTHON=python3.11 ...")'

$(STAMP): pyproject.toml constraints.txt | check-python
	$(PYTHON) -m venv .venv
	$(call alive,$(BIN)/python -m $(INSTALL) -c constraints.txt -e '.[dev]')
	@touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m $(INSTALL) -c constraints.txt -e '.[docs]'
	@touch $@

.venv-oldest/.installed: pyproject.toml constraints.txt constraints-oldest.txt | check-python
	$(PYTHON) -m venv .venv-oldest
	$(call alive,.venv-oldest/bin/python -m $(INSTALL) -c constraints-oldest.txt $(TORCH) -e '.[dev]')
	@touch $@

.venv-verl/.installed: pyproject.toml constraints-verl.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else "verl runs on Python 3.11 and 3.12: make PYTHON=python3.11 verl-test")'
	$(PYTHON) -m venv .venv-verl
	$(call alive,.venv-verl/bin/python -m $(INSTALL) -r constraints-verl.txt)
	.venv-verl/bin/python -m $(INSTALL) --no-deps -e .
	@touch $@

demo: $(STAMP) ## train the embedded micro VLM with CPPO, evaluate before and after, write report.html
	$(BIN)/cppo train --overwrite true

docs: $(DOCS_STAMP) ## run the code of the pages and build their site; open site/index.html
	$(BIN)/$(PYTEST) tests/test_documents.py tests/test_site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

test: $(STAMP) ## lint, type check and tests
	$(BIN)/ruff check src tests benchmarks examples tools
	$(BIN)/ruff format --check src tests benchmarks examples tools
	$(BIN)/mypy
	$(BIN)/$(PYTEST)

test-oldest: .venv-oldest/.installed ## the tests on constraints-oldest.txt, in .venv-oldest
	.venv-oldest/bin/$(PYTEST)

test-plain: check-python ## tests of what meets the libraries on what pip takes without constraints, in .venv-plain
	$(PYTHON) -m venv .venv-plain
	.venv-plain/bin/python -m $(INSTALL) --upgrade --upgrade-strategy eager '.[dev]'
	.venv-plain/bin/$(PYTEST) $(LIBRARY_TESTS)

verl-test: .venv-verl/.installed ## the tests of CPPO inside verl, in .venv-verl
	.venv-verl/bin/pytest tests/verl

micro: $(STAMP) ## rebuild the embedded micro VLM from nothing (about 25 minutes on 2 cores)
	$(BIN)/python -m cppo.assets.rebuild

gpu-acceptance: $(STAMP) ## are the numbers right on this GPU, and what do they cost (at most 9 minutes)
	$(BIN)/python benchmarks/gpu_acceptance.py --json gpu_acceptance.json

clean: ## remove the environment, builds and caches (not your runs)
	rm -rf .venv .venv-oldest .venv-plain .venv-verl dist build site .pytest_cache .ruff_cache .mypy_cache
