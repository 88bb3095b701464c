# Targets build .venv here when it is missing or older than pyproject.toml or constraints.txt.
# For the CPU build of torch on Linux, which is much smaller than the CUDA one, set
# PIP_EXTRA_INDEX_URL as the README describes.

ARCH ?= t5
ARGS ?=
DEVICE ?= cpu
# The torch build in the image, as PyTorch names it: cpu, cu126, cu130.
VARIANT ?= cu126
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.built
# The first of these that is new enough and can create environments; `make PYTHON=...` overrides it.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help quickstart test numerics lint bench image imagetest moved

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(STAMP) ## all stages on the built-in corpus: make quickstart ARCH=t5|llama [ARGS="--seed 1"]
	$(BIN)/rlhf quickstart --arch $(ARCH) $(ARGS)

# Two processes with one thread each: tiny models gain nothing from more.
# isolated.py cuts off the network, so that no test can depend on it.
test: $(STAMP) ## all tests with coverage; make test ARGS="-m 'not slow'" for the fast ones
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/support/isolated.py -m pytest -m "" -n 2 --dist worksteal --cov --cov-report=term $(ARGS)

# What passes on this CPU must pass on others: older instructions and an order that changes daily and
# is printed first; then a few files with two threads.
numerics: $(STAMP) ## the fast tensor tests again, as on an older CPU, in another order, in threads
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		$(BIN)/python tests/support/isolated.py -m pytest -m "numerics and not slow" \
		-n 2 --dist worksteal --shuffle $$(date +%j) $(ARGS)
	OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 $(BIN)/python tests/support/isolated.py -m pytest \
		-m "numerics and not slow" -q tests/objectives tests/models/test_language_model.py \
		tests/ppo/test_groups.py

lint: $(STAMP) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

# Peers get their own environments below benchmarks/.peers.
bench: $(STAMP) ## compare with the peers, an hour: make bench [DEVICE=cuda] [ARGS="--only 'ppo_*'"]
	$(BIN)/python benchmarks/bench.py --device $(DEVICE) $(ARGS)

image: ## build the container image rlhf:VARIANT with Docker: make image [VARIANT=cpu|cu126|cu130]
	@command -v docker >/dev/null || { echo "make image needs Docker, and there is no docker command \
	here; containers/cloudbuild.yaml builds the image without it" >&2; exit 1; }
	docker build --build-arg VARIANT=$(VARIANT) --build-arg REVISION=$$(git rev-parse HEAD) \
		--tag rlhf:$(VARIANT) .

# Separate from `test`, because pip needs a network.
imagetest: $(STAMP) ## run the Dockerfile's steps as a script, without Docker; needs a package index
	$(BIN)/python -m pytest -m "" -rs tests/test_container.py $(ARGS)

# An environment contains absolute paths, so moving the checkout makes it stale too.
$(STAMP): pyproject.toml constraints.txt $(if $(filter $(CURDIR),$(shell cat $(STAMP) 2>/dev/null)),,moved)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with its venv module is needed, but was \
	not found (Debian, Ubuntu: apt install python3 python3-venv)" >&2; exit 1; }
	@echo "building $(VENV) with $(PYTHON)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@echo '$(CURDIR)' > $@
