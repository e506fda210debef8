# Every target needs only `make` and Python 3.11 or newer; the first makes .venv.
PYTHON ?= python3.11
BIN := .venv/bin
RUN := $(BIN)/python
QUICK ?=
SET ?= S
HOURS ?= 2
CPU_SECONDS ?= 1600
COCO_ROOT ?= data/coco
SCALE := $(if $(QUICK),quick,$(if $(filter M,$(SET)),emoji_m,emoji))
DATA := $(if $(QUICK),emoji_quick,$(SCALE))
MEASURE := $(if $(QUICK),quick,offline)
EFFORT := $(if $(filter emoji_m,$(SCALE)),trainer.max_steps_multiplier=$(HOURS))
MODEL ?= models/$(SCALE)
STAGES := clip judge prior decoder upsampler_256 upsampler_1024

.DEFAULT_GOAL := help
.PHONY: help setup lint doctor format test data-emoji data-coco eval-coco train bench race paper clean

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

doctor: setup ## Check the environment, packages, data and bundles, and suggest fixes
	$(RUN) src/doctor.py

format: setup ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint ## Lint, then run the tests
	$(BIN)/pytest

data-emoji: setup ## Make the emoji scenes, set S
	$(RUN) src/prepare.py emoji --set S

data-coco: setup ## Fetch MS-COCO val2014 into COCO_ROOT: 7 GB, resumable, checked
	$(RUN) src/prepare.py fetch-coco --out $(COCO_ROOT)

eval-coco: setup ## Evaluate MODEL on COCO_ROOT as papers do: 30,000 captions, 256 px
	COCO_ROOT=$(COCO_ROOT) $(RUN) src/evaluate.py model=$(MODEL) data=coco measure=full \
		out=$(MODEL)/coco

train: setup ## Train and evaluate every stage that models/ lacks: set S, or SET=M HOURS=2; QUICK=1
	$(if $(filter-out S M,$(SET)),$(error SET is $(SET): it can be S or M))
	for stage in $(STAGES); do test -f models/$(SCALE)/$$stage.safetensors || \
		$(RUN) src/train.py stage=$$stage scale=$(SCALE) upstream=train $(EFFORT) || exit 1; done
	$(RUN) src/evaluate.py model=models/$(SCALE) data=$(DATA) measure=$(MEASURE)

bench: setup ## Compare speed with diffusers, GLIDE and DALLE2-pytorch: ten minutes
	$(RUN) benchmarks/speed.py $(if $(QUICK),--quick)

race: setup ## Race DALLE2-pytorch's decoder, CPU_SECONDS each, with MODEL's CLIP and prior
	OMP_NUM_THREADS=1 $(RUN) benchmarks/race.py --model $(MODEL) \
		--seconds $(CPU_SECONDS) scale=$(SCALE)

paper: setup ## Reproduce the paper's figures and tables with MODEL on one page
	$(RUN) src/evaluate.py measure=paper model=$(MODEL) out=$(MODEL)/paper

clean: ## Remove caches; data, models and runs stay
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf .ruff_cache .pytest_cache .import_linter_cache
