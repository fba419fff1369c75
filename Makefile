# Every target sets itself up: .venv is made on first use, and again when the pins change.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/distil-rank

# What users set: make distil TEACHER=spectral RANK=0.95 DATA=my.npz ARGS="--distil.lr 1e-4"
FASTA ?= data/sample.fasta.gz
STORE ?=
BACKBONE ?= auto
POOLING ?= mean
PRECISION ?= auto
LAYERS ?=
CODE ?=
DATA ?= auto
SPLIT ?= auto
TEACHER ?= denoising
RANK ?= 64
OUT ?= compressed
LABELS ?=
GROUPS ?=
TASK ?= auto
KEEP ?= 0.99
METRIC ?= invariant
DTYPE ?= bit
BYTES ?=
MAP ?=
CODES ?= codes
ARGS ?=

# Lightning takes RANK in its environment for the number of a process among many; make would put it there.
unexport RANK

DATA_ARGS = --data.source "$(DATA)" --data.split "$(SPLIT)"

help: ## What there is, in one line each
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Expected Python 3.11 or newer but got $$($(PYTHON) --version); try make PYTHON=python3.12" >&2; exit 2; }
	@echo "Setting up .venv (once; a minute or two) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[int8,search]'
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing what the tests need ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: .venv/installed ## Install into .venv, with exact versions

embed: .venv/installed ## FASTA to ESM-2 embeddings (FASTA= STORE=embeddings/NAME|s3://BUCKET/NAME BACKBONE= POOLING=mean|bos|residue PRECISION=auto|fp32|bf16|int8|auto-int8 LAYERS=4|3,4,5|all CODE=FOLDER of a code map)
	@$(RUN) embed --fasta "$(FASTA)" $(if $(STORE),--store "$(STORE)") --backbone "$(BACKBONE)" --pooling "$(POOLING)" \
	  --precision "$(PRECISION)" $(if $(CODE),--code "$(CODE)") \
	  $(if $(LAYERS),--layer "$(LAYERS)") $(ARGS)

train-teacher: .venv/installed ## Make the dense layer (TEACHER=denoising|random|spectral|FILE:KEY DATA=)
	@$(RUN) train-teacher --teacher.kind "$(TEACHER)" $(DATA_ARGS) $(ARGS)

distil: .venv/installed ## Distil it and report what survived (TEACHER= RANK=64|0.95|auto DATA= SPLIT=)
	@$(RUN) distil --teacher.kind "$(TEACHER)" --rank "$(RANK)" $(DATA_ARGS) $(ARGS)

benchmark: .venv/installed ## The three teachers of the original, one table (DATA= RANK= SPLIT=)
	@$(RUN) benchmark --rank "$(RANK)" $(DATA_ARGS) $(ARGS)

sweep: .venv/installed ## One teacher at many ranks, with the Pareto figure (TEACHER= DATA=)
	@$(RUN) sweep --teacher.kind "$(TEACHER)" $(DATA_ARGS) $(ARGS)

compress: .venv/installed ## A layer of your own model, to a folder that deploys (MODEL=FILE LAYER= DATA= RANK= OUT=)
	@test -n "$(MODEL)" || { echo "Expected MODEL=FILE, a saved model, but got none." >&2; exit 2; }
	@$(RUN) compress --model "$(MODEL)" $(if $(LAYER),--layer "$(LAYER)") \
	  $(if $(filter file,$(origin RANK)),,--rank "$(RANK)") --output "$(OUT)" $(DATA_ARGS) $(ARGS)

evaluate: .venv/installed ## Representations on a labelled task (DATA= LABELS= GROUPS= TASK=; alone: on the labelled sample)
	@$(RUN) evaluate --data "$(DATA)" --task "$(TASK)" $(if $(LABELS),--labels.source "$(LABELS)") \
	  $(if $(GROUPS),--groups "$(GROUPS)") $(if $(filter command environment,$(origin FASTA)),--fasta "$(FASTA)" --backbone "$(BACKBONE)") \
	  --precision "$(PRECISION)" $(ARGS)

code: .venv/installed ## A few bytes for each protein (DATA= METRIC=variance|whitened|invariant RANK= DTYPE=float32|int8|bit|pq BYTES= CODES= LABELS=; MAP=FOLDER of a code map that is there)
	@$(RUN) code --data "$(DATA)" $(if $(MAP),--encoder "$(MAP)") --metric "$(METRIC)" --rank "$(RANK)" --dtype "$(DTYPE)" $(if $(BYTES),--bytes "$(BYTES)") \
	  --codes "$(CODES)" --task "$(TASK)" $(if $(LABELS),--labels.source "$(LABELS)") $(if $(GROUPS),--groups "$(GROUPS)") $(ARGS)

search: .venv/installed ## Proteins against codes, with E-values (CODES= FASTA=; ARGS=--self for all against all)
	@$(RUN) search --codes "$(CODES)" $(if $(findstring --self,$(ARGS)),,--fasta "$(FASTA)") $(ARGS)

recommend: .venv/installed ## The cheapest pipeline that keeps your function (FASTA= LABELS= DATA= KEEP=0.99; alone: the labelled sample)
	@$(RUN) recommend --data "$(DATA)" --keep "$(KEEP)" --task "$(TASK)" $(if $(LABELS),--labels.source "$(LABELS)") \
	  $(if $(GROUPS),--groups "$(GROUPS)") $(if $(filter command environment,$(origin FASTA)),--fasta "$(FASTA)" --backbone "$(BACKBONE)") \
	  --precision "$(PRECISION)" $(ARGS)

ui: .venv/installed ## Browse the runs in MLflow
	@$(RUN) ui $(ARGS)

test: .venv/installed-dev ## Run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -q $(ARGS)  # one worker a core, one thread a worker

check-docs: .venv/installed-dev ## Run all that the README tells to type, as it stands, in a fresh clone of the last commit (20 minutes)
	@DISTIL_RANK_FRESH_CLONE=1 $(BIN)/python -m pytest -q -s tests/test_fresh_clone.py $(ARGS)

notebooks: .venv/installed-dev ## Run the notebooks in full; copies with outputs go to results/notebooks
	@mkdir -p results/notebooks && cp notebooks/*.ipynb results/notebooks
	@$(BIN)/jupyter-execute --inplace results/notebooks/*.ipynb

docs: .venv/installed-dev ## Build the documentation site into site/, strictly
	@$(BIN)/zensical build --strict $(ARGS)

package: .venv/installed-dev ## Wheel and source distribution, into dist/
	@rm -rf dist && $(BIN)/python -m build --outdir dist >/dev/null && ls -l dist

lint: .venv/installed-dev ## Format check, lint and types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

clean: ## Remove .venv, results and caches; runs in mlruns/ and embeddings stay
	@rm -rf .venv results dist site .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# All that `help` lists.
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*\#\#.*/\1/p' $(MAKEFILE_LIST))
