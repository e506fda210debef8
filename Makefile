# Every target needs only `make` and Python 3.11 or newer; the first one creates .venv.
PYTHON ?= $(shell for v in .11 .12 .13 ''; do command -v python3$$v && break; done)
BIN := .venv/bin
RUN := $(BIN)/python
QUICK ?=
SET ?= S
HOURS ?= 2
CPU_SECONDS ?= 1600
COCO_ROOT ?= data/coco
COUNT ?=
SCALE := $(if $(QUICK),quick,$(if $(filter M,$(SET)),emoji_m,emoji))
DATA := $(if $(QUICK),emoji_quick,$(SCALE))
MEASURE := $(if $(QUICK),quick,offline)
EFFORT := $(if $(filter emoji_m,$(SCALE)),trainer.max_steps_multiplier=$(HOURS))
MODEL ?= models/$(SCALE)
OUT ?= $(if $(filter models/demo models/demo/,$(MODEL)),runs/demo,$(MODEL))
STAGES := clip judge prior decoder upsampler_256 upsampler_1024

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo app lint doctor format test docs data-emoji data-coco eval-coco \
	train bench race paper clean

help: ## List all targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA.
setup: .venv/installed ## Create .venv and install what sampling, training and evaluation need

.venv/installed: pyproject.toml constraints.txt
	@test -x $(RUN) || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' && \
		$(PYTHON) -m venv .venv; } || { rm -rf .venv; \
		echo "no .venv: install Python 3.11 or newer with venv, or name it: make PYTHON=PATH" >&2; exit 1; }
	$(BIN)/pip install -q -c constraints.txt torch torchvision
	$(BIN)/pip install -q -c constraints.txt -e '.[emoji,evaluation]'
	touch $@

setup-dev: .venv/installed-dev ## Also install what tests, lint and benchmarks need

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[app,emoji,evaluation,dev,docs]'
	touch $@

demo: setup ## Generate and edit images with the trained bundle in models/demo, in two minutes
	$(RUN) src/demo.py

app: .venv/installed-app ## Open the page: generate and edit images in a browser
	$(RUN) src/app.py

.venv/installed-app: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[app]'
	touch $@

lint: setup-dev ## Check style, formatting, import layers and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

doctor: setup ## Check the environment, packages, data and bundles, and suggest fixes
	$(RUN) src/doctor.py

format: setup-dev ## Format the code and apply automatic fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint ## Run lint, then all tests
	$(BIN)/pytest

docs: setup-dev ## Build the documentation in site/; a warning is an error
	$(BIN)/zensical build --strict --clean

data-emoji: setup ## Render the emoji scenes, set S
	$(RUN) src/prepare.py emoji --set S

data-coco: setup ## Download MS-COCO val2014 into COCO_ROOT: 7 GB, resumable, verified
	$(RUN) src/prepare.py fetch-coco --out $(COCO_ROOT)

eval-coco: setup ## Evaluate MODEL on COCO with the protocol of papers: 30,000 captions (or COUNT), 256 px
	COCO_ROOT=$(COCO_ROOT) $(RUN) src/evaluate.py model=$(MODEL) data=coco measure=full \
		trainer=ddp out=$(OUT)/coco $(if $(COUNT),protocol.count=$(COUNT))

train: setup ## Train the missing stages and evaluate all: set S, SET=M HOURS=2, or QUICK=1
	$(if $(filter-out S M,$(SET)),$(error SET=$(SET): choose S or M))
	for stage in $(STAGES); do test -f models/$(SCALE)/$$stage.safetensors || \
		$(RUN) src/train.py stage=$$stage scale=$(SCALE) upstream=train $(EFFORT) || exit 1; done
	$(RUN) src/evaluate.py model=models/$(SCALE) data=$(DATA) measure=$(MEASURE)

bench: setup-dev ## Compare speed with diffusers, in ten minutes
	$(RUN) benchmarks/speed.py $(if $(QUICK),--quick)

race: setup ## Compare with DALLE2-pytorch's decoder, each trained for CPU_SECONDS
	OMP_NUM_THREADS=1 $(RUN) benchmarks/race.py --model $(MODEL) \
		--seconds $(CPU_SECONDS) scale=$(SCALE)

paper: setup ## Plot the paper's figures and tables with MODEL
	$(RUN) src/evaluate.py measure=paper model=$(MODEL) out=$(OUT)/paper

clean: ## Delete caches, but not data, models or runs
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf .ruff_cache .pytest_cache .import_linter_cache .cache site
