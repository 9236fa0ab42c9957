# Everything from a fresh clone: `make run`, `make test`, `make lab`. The first call installs into .venv (about 1.6 GB).
#   make run ARGS="-p data=digits"      make test ARGS="tests/workbook -x"      make run PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help install run test lab lint results update clean
help:            ## what there is
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1	/'

install: $(INSTALLED)   ## install the versions of requirements.lock into .venv

run: $(INSTALLED)   ## run notebooks 00 to 08 headlessly and print where the report is
	$(BIN)/python -m unimod run all -f params/default.yaml $(ARGS)

test: $(INSTALLED)  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

lab: $(INSTALLED)   ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks $(ARGS)

lint: $(INSTALLED)  ## check style
	$(BIN)/ruff check .

results: $(INSTALLED)  ## write notebooks/records/RESULTS.md and the README's table from the records
	$(BIN)/python -m unimod.workbook.results

update:             ## resolve anew within pyproject's bounds; rewrite requirements.lock if the tests pass
	$(PYTHON) .ci/lock.py update $(ARGS)

clean:              ## remove the virtual environment and caches; runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "unimod needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another one:" \
	    "make PYTHON=python3.12"; exit 3; }
	@echo "Installing into .venv; this takes some minutes, once."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.lock -e ".[notebooks,test]"
	@touch $@
