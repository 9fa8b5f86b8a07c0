# Everything sets up .venv by itself when it is missing: real vLLM, CPU build.
VENV ?= .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
# Another beside it, for the GPU: with the torch that is there already, or else the newest.
GPU_VENV ?= .venv-gpu
GPU_READY := $(GPU_VENV)/.ready

.PHONY: help setup system-deps demo test test-gpu test-slow test-matrix supported reference docs dist lint types format bench bench-gpu bench-plan bench-load bench-swap bench-serve bench-alternatives bench-transfer tables distill-demo fuzz clean screenshots
help: ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | column -t -s '|'

$(READY): pyproject.toml deploy/cpu/install.sh deploy/cpu/vllm-on-cpu/pyproject.toml
	@bash deploy/cpu/install.sh $(VENV)
	@touch $@

setup: $(READY) ## Make .venv.

$(GPU_READY): pyproject.toml
	@python3 -m venv --system-site-packages $(GPU_VENV)
	@$(GPU_VENV)/bin/python -m pip install --quiet torch pytest pytest-timeout \
	    openai prometheus-client --editable '.[distill]'
	@touch $@

system-deps: ## Install what the tests need from the system: Debian's prometheus and chromium.
	@bash deploy/system-deps.sh

demo: $(READY) ## Train, distil, plan, serve a real small model. KEEP=1 leaves it running.
	@$(BIN)/enchtable demo $(if $(KEEP),--keep) $(if $(PORT),--port $(PORT))

distill-demo: $(READY) ## The demo's models by the commands themselves, judged by the evaluation proper.
	@$(BIN)/enchtable demo --measure

test: $(READY) ## Run the tests: CPU only, real vLLM, a real small model. JOBS=1 for one file after the other.
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(or $(JOBS),2) --dist loadfile

test-gpu: $(GPU_READY) ## Run the tests that need a CUDA device, in an environment with a torch for it.
	@$(GPU_VENV)/bin/python -m pytest -m gpu

test-slow: $(READY) ## Run the tests that take minutes.
	@$(BIN)/python -m pytest -m slow

bench: $(READY) ## Measure all that needs no GPU, 30 minutes, 36 on a slow CPU; write the pages' tables and plots. FULL=1
	@$(BIN)/python -m benchmarks run --device cpu $(if $(FULL),--full); \
	    code=$$?; $(MAKE) --no-print-directory tables && exit $$code

bench-gpu: $(GPU_READY) ## Measure all that needs a CUDA device, in that environment; without one it says so.
	@$(GPU_VENV)/bin/python -m benchmarks run --device cuda $(if $(FULL),--full); \
	    code=$$?; set -e; \
	    $(GPU_VENV)/bin/python -m benchmarks tables; \
	    $(GPU_VENV)/bin/python -m benchmarks plot; exit $$code

bench-plan: $(READY) ## Measure planning against the algorithm as published. FULL=1
	@$(BIN)/python -m benchmarks run plan $(if $(FULL),--full)

bench-load: $(READY) ## Measure loading against plain vLLM and against merging to disk. FULL=1
	@$(BIN)/python -m benchmarks run load $(if $(FULL),--full)

bench-swap: $(READY) ## Measure swapping under load against a restart. FULL=1, or SOAK=500
	@$(BIN)/python -m benchmarks run swap $(if $(FULL),--full) $(if $(SOAK),-o soak=$(SOAK))

bench-serve: $(READY) ## Measure serving, merged against unmerged. FULL=1, or PLANT=0.05: a slowdown that it must find
	@$(BIN)/python -m benchmarks run serving $(if $(FULL),--full) $(if $(PLANT),-o plant=$(PLANT) -o seconds=0)

bench-alternatives: $(READY) ## Measure what is done instead of a merge: LoRA, Self-Reminder, SafeDecoding. FULL=1
	@$(BIN)/python -m benchmarks run alternatives $(if $(FULL),--full)

tables: $(READY) ## Write the tables and plots of README.md and docs/ out of the newest results.
	@$(BIN)/python -m benchmarks tables
	@$(BIN)/python -m benchmarks plot
	@$(BIN)/python docs/_reference

bench-transfer: $(READY) ## Measure what a vector gives back, and at what price; hours. SEEDS=0,1,2. REDUCED=1: 40 minutes.
	@$(BIN)/python -m benchmarks.safety_transfer $(if $(REDUCED),--reduced) $(if $(SEEDS),--seeds $(SEEDS))

fuzz: $(READY) ## Feed damaged inputs to every reader. FUZZ_SECONDS=36000 for a night.
	@$(BIN)/python tests/fuzz/fuzzer.py --seconds $(or $(FUZZ_SECONDS),600) --seed $$(date +%s)

supported: $(READY) ## Write README's table of what is supported out of the tests.
	@$(BIN)/python tests/supported.py

reference: $(READY) ## Write the reference parts of docs/ out of the code.
	@$(BIN)/python docs/_reference

screenshots: $(READY) ## Draw the pictures of docs/report.md anew, with Chromium.
	@$(BIN)/python tests/screenshots.py

docs: $(READY) ## Build the documentation's site into site/; any broken link fails it.
	@$(BIN)/python -m sphinx --fail-on-warning --keep-going -q docs site

dist: $(READY) ## Build wheel and sdist into dist/, and check them.
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation
	@$(BIN)/python -m twine check --strict dist/*

test-matrix: $(READY) ## Run the tests of serving on each vLLM of docs/versions.md. VERSIONS="..." KEEP=1
	@$(BIN)/python deploy/cpu/matrix.py $(VERSIONS) $(if $(KEEP),--keep)

lint: $(READY) types ## Check style and types.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY) ## Check types (mypy, strict).
	@$(BIN)/mypy
	@MYPYPATH=docs/_reference $(BIN)/mypy docs/_reference/*.py docs/conf.py

format: $(READY) ## Rewrite in the project's style.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Remove what was built; .venv stays.
	@rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
