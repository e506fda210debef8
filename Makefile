# Every target needs only `make` and Python 3.11 or newer; the first makes .venv.
PYTHON ?= python3.11
BIN := .venv/bin
RUN := $(BIN)/python
MODEL ?= models/emoji
HOURS ?= 2
QUICK ?=
SCALE := $(if $(QUICK),quick,emoji)
STAGES := clip judge prior decoder upsampler_256 upsampler_1024

.DEFAULT_GOAL := help
.PHONY: help setup lint format test demo train-emoji data-emoji clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/installed ## Make .venv and install unclip with all that it needs

.venv/installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch torchvision
	$(BIN)/pip install -q -c constraints.txt -e '.[emoji,evaluation,dev]'
	touch $@

lint: setup ## Check style, formatting and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: setup ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint ## Lint, then run the tests
	$(BIN)/pytest

data-emoji: setup ## Make the emoji scenes, set S
	$(RUN) src/prepare.py emoji --set S

demo: setup ## Train all stages on emoji scenes and draw: 30 minutes on two cores; QUICK=1 for 4
	for stage in $(STAGES); do $(RUN) src/train.py stage=$$stage scale=$(SCALE) || exit 1; done
	$(RUN) src/evaluate.py scale=$(SCALE) model=models/$(SCALE)

clean: ## Remove caches; data, models and runs stay
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf .ruff_cache .pytest_cache .import_linter_cache *.egg-info src/*.egg-info
