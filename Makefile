# Every target makes the environment first, if there is none: a clone, Python 3.11 and make are enough.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

help: ## What there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/|/' | column -t -s '|'

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet -c constraints.txt -e '.[wandb,tensorboard,viz,fast,hf,search,ray,emoji-m3,dev]'
	@touch $(STAMP)

install: $(STAMP) ## The environment, in .venv

demo: ## Build Emoji-M3 mini, train CLIP and Symile on the joint task, evaluate both: about ten minutes on two cores
	@start=$$(date +%s) && $(MAKE) --no-print-directory install && \
	$(BIN)/python -m benchmarks.demo --setup-seconds $$(( $$(date +%s) - start ))

test: $(STAMP) ## Format, lint, types, and all tests but the slow ones
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m 'not slow'

test-slow: $(STAMP) ## The tests that take a quarter of a minute and more
	$(BIN)/python -m pytest -m slow

test-all: test test-slow ## Both

format: $(STAMP) ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

data: $(STAMP) ## Emoji-M3 mini in data/emoji_m3
	$(BIN)/python -m data_prep.emoji_m3 --out data/emoji_m3 --size mini

xor: $(STAMP) ## The XOR sweep of Symile and its rivals: ten minutes on two cores; JSON and plot in benchmarks/results
	$(BIN)/python -m benchmarks.xor

swav: $(STAMP) ## SwAV on pictures alone, judged by a linear probe; JSON in benchmarks/results
	$(BIN)/python -m benchmarks.swav_pictures

compare: $(STAMP) ## Every objective on two tasks, three seeds, modalities missing: hours; table, plot, JSON in benchmarks/results
	$(BIN)/python -m benchmarks.compare

bench: $(STAMP) ## Time, memory and traffic of the losses beside other packages: ten minutes; table, and JSON in benchmarks/results
	$(BIN)/python -m benchmarks.losses

bench-streaming: $(STAMP) ## CPU time of the data layer beside webdataset: three minutes; table, and JSON in benchmarks/results
	$(BIN)/python -m benchmarks.streaming

bench-retrieval: $(STAMP) ## Time and memory of ranking beside CLIP_benchmark: table, and JSON in benchmarks/results
	$(BIN)/python -m benchmarks.retrieval

bench-step: $(STAMP) ## A training step beside a plain loop and open_clip's own: four minutes; table, and JSON in benchmarks/results
	$(BIN)/python -m benchmarks.step

bench-batches: $(STAMP) ## Memory and time of gradient caching: three minutes; table, and JSON in benchmarks/results
	$(BIN)/python -m benchmarks.gradient_caching

bench-corpus: $(STAMP) ## Ways of packing and embedding a corpus: table, and JSON in benchmarks/results
	$(BIN)/python -m benchmarks.corpus_scale

soak: $(STAMP) ## 5,000 steps on one process and on two: what grows; seven minutes
	$(BIN)/python -m benchmarks.soak

lock: $(STAMP) ## Write constraints.txt from the environment
	@{ head -1 constraints.txt; VIRTUAL_ENV=$(VENV) $(BIN)/uv pip freeze | grep == | grep -v -E '^(mmrep|uv)=='; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## Remove the environment and caches; data/ and runs/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

.PHONY: help install demo test test-slow test-all format data xor swav compare bench bench-streaming bench-retrieval bench-step bench-batches bench-corpus soak lock clean
