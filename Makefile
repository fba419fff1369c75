# Every target sets itself up: .venv is made on first use, and again when the pins change.
.DEFAULT_GOAL := help
PYTHON := python3
BIN := .venv/bin
RUN := exec $(BIN)/distil-rank
# Python compiles the modules that it imports, once; pip would compile all 16,000 of them. Old pips download at half the speed.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

# What each target takes, as in: make distil TEACHER=spectral RANK=0.95 DATA=my.npz ARGS="--distil.lr 1e-4". Only the command
# line counts: DATA or RANK in somebody's environment mean something else. Defaults are the commands' own.
USES_embed := FASTA STORE BACKBONE POOLING PRECISION LAYERS CODE
USES_train-teacher := TEACHER DATA SPLIT LABELS TASK GROUPS
USES_distil := TEACHER RANK DATA SPLIT
USES_benchmark := RANK DATA SPLIT
USES_sweep := TEACHER DATA SPLIT
USES_compress := MODEL LAYER RANK DATA SPLIT OUT
USES_export := MODEL RANK OUT
USES_evaluate := DATA TASK LABELS GROUPS FASTA BACKBONE PRECISION
USES_judge := $(USES_evaluate)
USES_code := DATA METRIC RANK DTYPE CODES ENCODER TASK LABELS GROUPS
USES_search := CODES FASTA ENGINE LABELS
USES_predict := MODEL FASTA DATA OUT
USES_recommend := DATA KEEP TASK LABELS GROUPS FASTA BACKBONE PRECISION

TYPED := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
UNUSED := $(filter-out ARGS PYTHON $(foreach goal,$(MAKECMDGOALS),$(USES_$(goal))),$(TYPED))
ifneq ($(UNUSED),)
$(error Expected variables out of $(strip ARGS $(foreach goal,$(MAKECMDGOALS),$(USES_$(goal)))) for make $(MAKECMDGOALS) but got $(UNUSED))
endif
option = $(if $(filter command,$(origin $(1))),$(if $($(1)),$(2) "$($(1))"))
override ARGS := $(if $(filter command,$(origin ARGS)),$(ARGS))

# Lightning takes RANK in its environment for the number of a process among many; make would put it there.
unexport RANK

DATA_OPTIONS = $(call option,DATA,--data.source) $(call option,SPLIT,--data.split)
TASK_OPTIONS = $(call option,DATA,--data) $(call option,TASK,--task) $(call option,LABELS,--labels.source) \
  $(call option,GROUPS,--groups)
EMBED_OPTIONS = $(call option,FASTA,--fasta) $(call option,BACKBONE,--backbone) $(call option,PRECISION,--precision)

help: ## What there is, in one line each
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Expected Python 3.11 or newer but got $$($(PYTHON) --version); try make PYTHON=python3.12" >&2; exit 2; }
	@echo "Setting up .venv (once; a minute or two) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --upgrade pip && $(PIP) --editable '.[int8,search]'
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing what the tests need ..."
	@$(PIP) --editable '.[dev]'
	@touch $@

setup: .venv/installed ## Install into .venv, with exact versions

embed: .venv/installed ## FASTA to ESM-2 embeddings (FASTA= STORE=embeddings/NAME|s3://BUCKET/NAME BACKBONE= POOLING=mean|bos|residue PRECISION=auto|fp32|bf16|int8|auto-int8 LAYERS=4|3,4,5|all CODE=FOLDER of an encoder)
	@$(RUN) embed $(EMBED_OPTIONS) $(call option,STORE,--store) $(call option,POOLING,--pooling) \
	  $(call option,LAYERS,--layer) $(call option,CODE,--code) $(ARGS)

train-teacher: .venv/installed ## Train the dense layer (LABELS=labels.tsv DATA= TASK= GROUPS=; or TEACHER=denoising|random|spectral|FILE:KEY DATA= SPLIT=)
	@$(RUN) train-teacher $(call option,TEACHER,--teacher.kind) $(DATA_OPTIONS) $(call option,LABELS,--labels.source) \
	  $(call option,TASK,--task) $(call option,GROUPS,--groups) $(ARGS)

distil: .venv/installed ## Distil it and report what is retained (TEACHER= RANK=64|0.95|auto DATA= SPLIT=; TEACHER=results/teachers/NAME RANK=0.999 makes a predictor)
	@$(RUN) distil $(call option,TEACHER,--teacher.kind) $(call option,RANK,--rank) $(DATA_OPTIONS) $(ARGS)

predict: .venv/installed ## New proteins through a predictor (MODEL=results/predictors/NAME FASTA=new.fasta, or DATA=; OUT=FILE.tsv)
	@$(RUN) predict $(call option,MODEL,--model) $(call option,FASTA,--fasta) $(call option,DATA,--data) \
	  $(call option,OUT,--output) $(ARGS)

benchmark: .venv/installed ## The three teachers of the original, one table (DATA= RANK= SPLIT=)
	@$(RUN) benchmark $(call option,RANK,--rank) $(DATA_OPTIONS) $(ARGS)

sweep: .venv/installed ## One teacher at many ranks, with the Pareto figure (TEACHER= DATA= SPLIT=)
	@$(RUN) sweep $(call option,TEACHER,--teacher.kind) $(DATA_OPTIONS) $(ARGS)

compress: .venv/installed ## A layer of your own model, to a folder that deploys (MODEL=FILE LAYER= DATA= RANK= OUT=)
	@$(RUN) compress $(call option,MODEL,--model) $(call option,LAYER,--layer) $(call option,RANK,--rank) \
	  $(call option,OUT,--output) $(DATA_OPTIONS) $(ARGS)

export: .venv/installed ## That folder for another runtime (MODEL=FOLDER RANK= OUT=FILE; ARGS="--to onnx|dense")
	@$(RUN) export $(call option,MODEL,--artefact) $(call option,RANK,--rank) $(call option,OUT,--output) $(ARGS)

evaluate: .venv/installed ## Representations on a labelled task (DATA= LABELS= GROUPS= TASK=; alone: on the labelled sample)
	@$(RUN) evaluate $(TASK_OPTIONS) $(EMBED_OPTIONS) $(ARGS)

judge: .venv/installed # evaluate's old name, for one release
	@$(RUN) judge $(TASK_OPTIONS) $(EMBED_OPTIONS) $(ARGS)

code: .venv/installed ## A few bytes for each protein (DATA= METRIC=variance|whitened|invariant RANK= DTYPE=float32|int8|bit CODES= LABELS=; ENCODER=FOLDER of one that is there)
	@$(RUN) code $(TASK_OPTIONS) $(call option,METRIC,--metric) $(call option,RANK,--rank) $(call option,DTYPE,--dtype) \
	  $(call option,CODES,--codes) $(call option,ENCODER,--encoder) $(ARGS)

search: .venv/installed ## Proteins against codes and by alignment, with E-values (CODES= FASTA= ENGINE=codes|alignment|both LABELS=; ARGS="--self true" for all against all)
	@$(RUN) search $(call option,CODES,--codes) $(call option,FASTA,--fasta) $(call option,ENGINE,--engine) \
	  $(call option,LABELS,--labels.source) \
	  $(if $(filter FASTA ARGS,$(TYPED)),,--fasta data/sample.fasta.gz) $(ARGS)

recommend: .venv/installed ## The cheapest pipeline that retains your function (FASTA= LABELS= DATA= KEEP=0.99; alone: the labelled sample)
	@$(RUN) recommend $(TASK_OPTIONS) $(EMBED_OPTIONS) $(call option,KEEP,--keep) $(ARGS)

ui: .venv/installed ## Browse the runs in MLflow
	@$(RUN) ui $(ARGS)

test: .venv/installed-dev ## Run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(($$(nproc) * 3 / 2)) --dist worksteal -q $(ARGS)  # of one thread each; many wait

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
.PHONY: judge $(shell sed -n 's/^\([a-z-]*\):.*\#\#.*/\1/p' $(MAKEFILE_LIST))
