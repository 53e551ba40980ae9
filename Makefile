# Two commands: `make demo` sets up and does the main job on this machine alone; `make test` sets up and passes the tests.
#   make demo TORCH_INDEX=URL    where the plain pin of torch would bring a CUDA build that this machine has no use for
#   make demo ARGS=--exit        end after the summary instead of serving until Ctrl-C

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
STUDY ?= 1 2 3
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --progress-bar on -c constraints.txt

.PHONY: setup setup-dev demo test test-long results bench-serving lint format clean

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "genmodels needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up: torch, then Ray and the rest (about 2 minutes)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	@$(PIP) -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(PIP) -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/genmodels run jobs/quickstart.yaml --no-auth $(ARGS)

test: setup-dev lint
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile --no-loadscope-reorder

test-long: setup-dev
	$(BIN)/python -m pytest -m long

# The study's tests, as they were and improved; 4 and 5 need a GPU: make results STUDY="1 2 3 4 5"
results: setup
	$(BIN)/genmodels run jobs/study.yaml $(STUDY:%=--only study-%) --no-auth --exit
	$(BIN)/genmodels run jobs/study-improved.yaml $(STUDY:%=--only improved-%) --no-auth --exit
	for test in $(STUDY); do \
		$(BIN)/genmodels evaluate study-$$test && $(BIN)/genmodels evaluate improved-$$test || exit 1; \
	done

bench-serving: setup-dev
	@$(PIP) -e '.[bench]'
	$(BIN)/python tests/bench_serving.py

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .genmodels samples
