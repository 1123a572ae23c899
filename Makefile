# Every target sets up what it needs; `make setup` alone makes the .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the version that made requirements.lock; only the bootstrap uses it, the lock holds the rest
UV := uv==0.13.9

.PHONY: help setup demo test lint format chaos fuzz bench bench-gpu routers docs lock
.DEFAULT_GOAL := help
export OMP_WAIT_POLICY := passive

help:
	@echo "make demo    a small task stream with three strategies, compared, with pictures (about two minutes)"
	@echo "make test    lint, types, layers and the test suite"
	@echo "make setup   only the .venv, from requirements.lock"
	@echo "make lint    ruff, type checker, import layers"
	@echo "make chaos   200 random kills, each resumed and compared bit by bit"
	@echo "make fuzz    300 random configurations that must train, resume and add an expert, or be refused by name"
	@echo "make bench   speed beside a hand-written loop and Avalanche's own, and the MoE layer's beside other libraries"
	@echo "make bench-gpu  the MoE layer's on one GPU, in bfloat16"
	@echo "make routers  every router on two streams, the table of docs/routers.md (half an hour; DATA=DIR has CLINC150)"
	@echo "make docs    the generated references and tables of docs/"
	@echo "make lock    requirements.lock from pyproject.toml"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "cmoe needs Python 3.11 or newer; say which with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check "$(UV)"
	@echo "installing the pinned requirements (a first time downloads about 3 GB, mostly torch)"
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	@$(BIN)/cmoe run quickstart

test: lint
	@$(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/ty check -q cmoe tasks
	@$(BIN)/lint-imports > .lint-imports.log 2>&1 || { cat .lint-imports.log; exit 1; }
	@rm -f .lint-imports.log; echo "lint, types and layers: clean"

format: setup
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format -q .

chaos: setup
	@$(BIN)/python -m tests.chaos --kills 200

fuzz: setup
	@$(BIN)/python -m tests.fuzz --configs 300

bench: setup
	@$(BIN)/python benchmarks/stream_overhead.py
	@$(BIN)/python benchmarks/moe_layer.py
	@$(BIN)/python benchmarks/moe_scale.py

bench-gpu: setup
	@$(BIN)/python benchmarks/moe_layer.py --device cuda
	@$(BIN)/python benchmarks/moe_scale.py --device cuda --dtype bfloat16

routers: setup
	@$(BIN)/python benchmarks/routers.py --docs docs $(if $(DATA),--data $(DATA))

docs: setup
	@$(BIN)/python -m cmoe.cli.reference docs

lock: setup
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --upgrade \
		--extra dev --override overrides.txt pyproject.toml -o requirements.lock
