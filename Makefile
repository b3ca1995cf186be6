# Most users need two commands: make demo and make test. Everything is installed into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
SOURCES = mm_hf examples tests benchmarks docs/tools setup.py

.PHONY: demo test test-fast test-newest test-oldest test-vision test-browser check format bench gpu model-table crash-recovery trainer-tests evidence docs figures errors fuzz dist clean

# torchvision and timm, in a directory of their own: without them everything works, too.
VISION = $(abspath $(VENV))/vision

demo: $(VENV)/.examples  ## train a small ViT with and without Dense MultiMix; tables and figures in outputs/demo
	$(BIN)/python examples/demo.py

# One worker per core, one thread per worker. An idle worker takes over tests of the other ones.
PYTEST = $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: $(VENV)/.dev  ## all tests
	$(PYTEST)

test-fast: $(VENV)/.dev  ## the tests without a mark, for the minute after a change
	$(PYTEST) -m "not (zoo or distributed or end_to_end or gpu or slow)"

test-newest:  ## all tests with the newest releases of all dependencies
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null

test-oldest:  ## all tests with the oldest versions that setup.py allows
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-vision: $(VENV)/.vision  ## the tests that depend on torchvision and timm
	PYTHONPATH=$(VISION) $(PYTEST) -m vision

test-browser: $(VENV)/.dev $(VENV)/.docs  ## every page of the documentation in Chromium at three widths
	$(BIN)/python -m pytest -m browser tests/browser

check: $(VENV)/.dev  ## formatting, lint, types
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/.dev  ## fix what ruff can fix
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: $(VENV)/.dev  ## 25 minutes: time and memory of the loss, of drawing factors and of training steps; benchmarks/results
	$(BIN)/python -m benchmarks.fused
	$(BIN)/python -m benchmarks.fused --growth
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.tables

# Installs nothing: a GPU machine has its own PyTorch, and may have no network.
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),python3)

gpu:  ## 35 minutes: everything that a GPU has to report, docs/gpu.md; REHEARSE=1 runs it in miniature on a CPU
	PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu$(if $(REHEARSE), --rehearse)

model-table: $(VENV)/.vision  ## checks every class of Transformers and family of timm; docs/models.md, docs/timm_models.md
	PYTHONPATH=$(VISION) $(BIN)/python -m benchmarks.supported_models
	PYTHONPATH=$(VISION) $(BIN)/python -m benchmarks.timm_models

crash-recovery: $(VENV)/.dev  ## half an hour: training runs interrupted at random times and resumed; benchmarks/results/crash_recovery.csv
	$(BIN)/python -m benchmarks.crash_recovery

trainer-tests: $(VENV)/.dev  ## half an hour: Transformers' tests of Trainer with MultiMixTrainer; CHECKOUT=copy of its repository
	$(BIN)/python -m pip install --quiet parameterized sentencepiece optuna
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.trainer_tests $(CHECKOUT)

evidence: $(VENV)/.evidence  ## days: all methods on eleven small tasks, three lengths, five seeds; resumable; docs/evidence.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evidence run --lengths 1 4 16
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evidence ablate

# Without --quiet, which hides warnings from the strict mode.
docs: $(VENV)/.docs  ## the documentation as a site that needs no network: outputs/docs/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "Open outputs/docs/index.html"

figures: $(VENV)/.dev $(VENV)/.evidence  ## figures and printed output of docs/, and the tutorial's notebook, in two minutes
	PYTHONPATH=. $(BIN)/python docs/tools/figures.py
	$(BIN)/python docs/tools/blocks.py docs/tutorial.md docs/your_model.md
	$(BIN)/python docs/tools/notebook.py docs/tutorial.md

errors: $(VENV)/.dev  ## docs/errors.md: every bad input is run, and its message copied
	HF_HUB_OFFLINE=1 $(BIN)/python docs/tools/errors.py

fuzz: $(VENV)/.dev  ## ten minutes: random losses, trainings, checkpoints, command lines, images and tables; continues
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 nice $(BIN)/python -m tests.fuzz

dist:  ## source archive and wheel, checked as PyPI does; REPOSITORY_URL=https://... for the README's links
	@test -x .venv-dist/bin/python || $(PYTHON) -m venv .venv-dist
	@.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt build twine
	rm -rf dist
	.venv-dist/bin/python -m build
	.venv-dist/bin/twine check --strict dist/*

$(VENV)/.examples $(VENV)/.dev $(VENV)/.evidence $(VENV)/.docs: $(VENV)/.%: setup.py $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(INSTALL) --editable '.[$*]'
	@touch $@

$(VENV)/.vision: $(VENV)/.dev tests/helpers/sitecustomize.py
	@rm -rf $(VISION)
	@$(INSTALL) --no-deps --target $(VISION) torchvision timm
	@cp tests/helpers/sitecustomize.py $(VISION)
	@touch $@

clean:
	rm -rf .venv .venv-* outputs build dist *.egg-info
