# Every target prepares the virtual environment that it needs and can be repeated.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
STAGES ?= cold_start dual_rl
ARGS ?=
export VENV STAGES
WITH_VENV := PATH="$(abspath $(VENV))/bin:$$PATH"

.PHONY: help quickstart evidence figures test style quality setup clean

help: ## list the targets
	@echo 'make TARGET [ARGS="further arguments"]'
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 14

quickstart: setup ## train a tiny video reward model on this machine and show how well it judges unseen videos
	@$(WITH_VENV) bash cold_start/quickstart.sh
	@$(WITH_VENV) bash dual_rl/quickstart.sh $(ARGS)

evidence: setup ## train, score and draw the comparison of models (ARGS="--size full" on GPUs)
	@$(WITH_VENV) python figure/run_evidence.py $(ARGS)

figures: setup ## draw every figure again from the committed results
	@$(WITH_VENV) bash -c 'for script in figure/draw_*.py; do python "$$script" || exit; done'

# Whole files go to two processes: many tests wait for processes that they start.
test: setup ## run the tests (ARGS="-k losses" selects some, ARGS="-m slow" runs the long ones)
	@$(WITH_VENV) python -m pytest -n 2 --dist loadfile $(ARGS)

quality: setup ## check style and formatting without changing a file
	@$(WITH_VENV) ruff check .
	@$(WITH_VENV) ruff format --check .

style: setup ## format the code and fix what can be fixed
	@$(WITH_VENV) ruff check --fix .
	@$(WITH_VENV) ruff format .

setup: ## prepare the virtual environment (VENV=.venv, STAGES="cold_start dual_rl", MACHINE=cpu|gpu)
	@bash .ci/setup_env.sh

clean: ## remove caches; the environment and everything trained stay
	@rm -rf .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path '*/.venv/*' -prune -exec rm -rf {} +
