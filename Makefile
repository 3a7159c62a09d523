# Everything a new machine needs happens inside .venv; each goal sets itself up.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

DEMO_METHODS := random,magnitude,magnitude:pattern=model,magnitude:allocation=erk,lamp,wanda,$\
random:pattern=2:4,magnitude:pattern=2:4,wanda:pattern=2:4,teal:sparsity=0.25,teal:sparsity=0.5,$\
streaming_llm:sparsity=0.5,streaming_llm:sparsity=0.75

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint type docs report bench clean

help: ## List the goals
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

setup: $(STAMP) ## Create .venv and install the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gossamer needs Python 3.11 or newer; run make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## Compare sparsity methods on the packaged model, offline: table, JSON, report
	HF_HUB_OFFLINE=1 $(BIN)/gossamer compare nano --out report --sparsity 0.3,0.5 \
	  --methods "$(DEMO_METHODS)"

test: setup ## Run every test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: setup ## Style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

type: setup ## Types
	$(BIN)/pyright

docs: setup ## Regenerate the tables of the documentation
	$(BIN)/python -m gossamer.cli.tables docs

report: setup ## Build report/index.html from the last demo's records
	$(BIN)/gossamer report report

bench: setup ## Measure the core's speed figures
	$(BIN)/python benchmarks/selection.py

clean: ## Remove what the goals made
	rm -rf .venv report build dist
