# Every target makes its own .venv and installs what it needs; nothing else is changed.
PYTHON ?= python3
PIP_ARGS ?=
TEST_WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL_FILES := $(wildcard launch/*.sh launch/*.sbatch) evidence/data.sh examples/medical/run.sh .ci/run
IMAGE_TARGET ?= cpu
IMAGE ?= mmmoe:$(IMAGE_TARGET)
BASE ?=
IMAGE_ARGS ?=

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test check page-check parity reshard chaos fuzz methods-walk cluster image gpu bench evidence methods clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## Fetch real data, train on two processes, evaluate, and show the report
	launch/demo.sh

test: $(STAMP) ## Run the tests (not the slow ones, nor those that need a network, a GPU or a browser)
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations=15 -m "not slow and not network and not gpu and not browser"

check: $(STAMP) ## Lint, check the format and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(SHELL_FILES)
	$(BIN)/hadolint Dockerfile

page-check: $(STAMP) ## Open the page of mmmoe routing in headless Chromium, and look at what it shows; says what it needs
	@if ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null; then \
	  echo "make page-check needs Chromium; on Debian: apt-get install chromium" >&2; exit 1; fi
	$(BIN)/python -m pytest -q -m browser tests/evaluate/test_routing_browser.py

parity: $(STAMP) ## Train every layout against one process (15 minutes on 2 cores); write docs/parallelism.md
	@$(BIN)/python -W ignore -m tests.layouts.parity --write docs/parallelism.md

reshard: $(STAMP) ## Save under each layout and engine, resume under every other (10 minutes)
	@$(BIN)/python -W ignore -m tests.layouts.reshard

chaos: $(STAMP) ## Kill ranks of a run 50 times, with streams and with remote shards 10 times each; compare (15 minutes)
	@$(BIN)/python -W ignore -m tests.chaos.run
	@$(BIN)/python -W ignore -m tests.chaos.run --streams --kills 10 --steps 40
	@$(BIN)/python -W ignore -m tests.chaos.run --remote --kills 10 --steps 40

fuzz: $(STAMP) ## Feed 20,000 damaged files to all readers of files (10 minutes)
	@$(BIN)/python -W ignore -m tests.fuzz.run --cases 20000

methods-walk: $(STAMP) ## Train each config of configs/methods in small on one rank and two, kill, resume, export, evaluate (a minute each)
	@$(BIN)/python -W ignore -m tests.methods.walk

cluster: $(STAMP) ## As root: runs over simulated hosts, of which one fails (15 minutes); says what it needs
	@$(BIN)/python -W ignore -m tests.cluster.run

image: ## Build the container image: IMAGE_TARGET=cpu|cuda BASE=an image to build on (docs/clusters.md)
	@set -e; if docker info >/dev/null 2>&1; then build="docker build"; \
	elif command -v podman >/dev/null; then build="podman build"; \
	elif command -v buildah >/dev/null; then build="buildah bud"; \
	else echo "make image needs docker (with its daemon), podman or buildah; on Debian: apt-get install buildah" >&2; exit 1; fi; \
	set -x; $$build --target $(IMAGE_TARGET) $(if $(BASE),--build-arg BASE=$(BASE)) \
	  --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) -t $(IMAGE) $(IMAGE_ARGS) .

gpu: $(STAMP) ## On a machine with a GPU: its tests and benchmarks; write benchmarks/GPU.md (8 minutes)
	@$(BIN)/python -m benchmarks.common.gpu_report --write benchmarks/GPU.md

bench: $(STAMP) ## Run every benchmark with --quick, compared with other libraries
	@set -e; $(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[bench]'; \
	 for file in $(wildcard benchmarks/*.py); do \
	  echo "== $$file"; PYTHONPATH=. $(BIN)/python "$$file" --quick; \
	done

evidence: $(STAMP) ## Train the studies of docs/evidence.md, ONLY="captions prose" some (hours; repeat it to continue)
	@$(BIN)/python -m evidence $(if $(ONLY),--only $(ONLY))

methods: $(STAMP) ## Train the methods of docs/methods.md beside their baselines, ONLY="memory_queue" some (hours; repeat it to continue)
	@$(BIN)/python -m evidence --page methods $(if $(ONLY),--only $(ONLY))

clean: ## Remove .venv and the caches, but not data/ and runs/
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(wildcard mmmoe_pretrain data_prep launch tests benchmarks evidence) -name __pycache__ -type d -prune -exec rm -rf {} +

# trackio works with Pillow 13 and asks for an older one; the dev extra has its other dependencies.
$(STAMP): pyproject.toml constraints.txt
	@set -e; found=; \
	for python in $(PYTHON) python3.11 python3.12 python3.13; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    found=$$python; break; \
	  fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "Python 3.11 or later is needed, and '$(PYTHON)' is not; name one: make PYTHON=/path/to/python3.11 ..." >&2; \
	  exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$$found cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; \
	  exit 1; \
	fi; \
	echo "Installing into $(VENV) with $$("$$found" --version); the first time takes some minutes"; \
	"$$found" -m venv $(VENV); \
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[dev]'; \
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt --no-deps trackio; \
	touch $@
