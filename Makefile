# Two commands do all set-up: `make quickstart` and `make test`. Each makes .venv when it is missing and
# updates it when setup.py or constraints.txt changed. `make` alone lists the targets.

# Which Python makes .venv (3.12 or newer); empty means: search PATH, then pyenv's versions.
PYTHON ?=
# Passed on to the quickstart, such as QUICKSTART_ARGS="--train-iters 320"; its own --help lists them.
QUICKSTART_ARGS ?=
# Passed on to pytest, such as PYTEST_ARGS="-k quickstart -x".
PYTEST_ARGS ?=
# How many tests run at once; those of one file follow each other.
TEST_WORKERS ?= 2
# Whose Megatron `make test-upstream` runs, a checkout of Megatron-LM, such as DIR=~/Megatron-LM.
DIR ?=
# How long `make gpu-report` may take, and what is passed on to it, such as GPU_REPORT_ARGS="--rows checks loss".
MINUTES ?= 10
GPU_REPORT_ARGS ?=

# Which of the workflows' cards `make cards` writes anew, such as CARDS="pipeline sweep"; empty means all.
CARDS ?=

VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python -m
# The environment that vLLM is tested in, whose versions are not those of .venv.
SERVING_VENV := .venv-serving

.PHONY: help venv quickstart test test-upstream test-serving cards lint docs gpu-check gpu-report clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## make or update .venv (PYTHON=/path/to/python3.12 chooses its Python)

$(STAMP): setup.py constraints.txt
	@PYTHON="$(PYTHON)" launch/make-venv.sh $(VENV)

quickstart: $(STAMP) ## train a dense and an SLA GPT on real text, compare them (QUICKSTART_ARGS="--help")
	@$(RUN) examples.quickstart.run $(QUICKSTART_ARGS)

test: $(STAMP) ## run the tests that need no GPU
	@$(RUN) pytest -q -m "not gpu" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-upstream: $(STAMP) ## run the tests of parity, pipelines and hybrids with a checkout's Megatron (DIR=/path/to/it)
	@$(RUN) tests.support.upstream $(DIR) $(PYTEST_ARGS)

test-serving: $(SERVING_VENV)/.installed ## test exports in vLLM, in an environment that it makes (.venv-serving, 6 GB)
	@$(SERVING_VENV)/bin/python -m pytest -q tests/serving $(PYTEST_ARGS)

$(SERVING_VENV)/.installed: setup.py constraints-serving.txt
	@PYTHON="$(PYTHON)" launch/make-serving-venv.sh $(SERVING_VENV)

cards: $(STAMP) ## run each workflow's test, and write what came out to docs/cards (CARDS="pipeline": that one)
	@$(RUN) tests.support.cards_run $(CARDS)

lint: $(STAMP) ## check style, formatting, and which folder imports which
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(VENV)/bin/lint-imports --no-cache

docs: $(STAMP) ## check links and commands of every page, then build them as a site, with search (build/site)
	@$(RUN) tests.support.documented

gpu-check: $(STAMP) ## run the tests that need a CUDA GPU
	@$(RUN) pytest -m gpu -rA $(PYTEST_ARGS)

gpu-report: $(STAMP) ## use a GPU for MINUTES (10): checks, speed, decoding, loss, all in one archive
	@$(RUN) benchmarks.gpu_report --minutes $(MINUTES) $(GPU_REPORT_ARGS)

clean: ## remove caches and build output; keeps the environments and runs/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . \( -name ".venv*" -o -name .git -o -name runs \) -prune -o -name __pycache__ -type d -exec rm -rf {} +
