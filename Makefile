# make demo and make test do all the set-up themselves; everything lives in .venv.
SHELL := /bin/bash
PY := .venv/bin/python
INSTALLED := .venv/installed
LOCKS := requirements.lock requirements-dev.lock
# The longest first, so that both processes end at about the same time.
TEST = $(PY) -m pytest --numprocesses 2 --no-loadscope-reorder $(addprefix tests/,ray cluster golden s3 unit real gpu)
BASE := docker.io/library/python:3.11-slim-bookworm
BASE_DIGEST := cluster/image/base.digest
DEVICE := cuda
BUILD = docker build --platform linux/amd64 --build-arg BASE=$$(cat $(BASE_DIGEST)) --build-arg DEVICE=$(DEVICE)
COMPILE = .venv/bin/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --custom-compile-command "make lock"

.PHONY: help install demo test test-all test-nightly lint format bench docs image sbom lock clean

help: ## list what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## a virtual environment from the locks

$(INSTALLED): $(LOCKS) $(wildcard cluster/image/*.lock) cluster/image/install.sh pyproject.toml
	@echo "1 of 2: the locked packages, PyTorch and Ray among them, into .venv (several GB; a minute or more without output)"
	cluster/image/install.sh .venv $(LOCKS)
	@echo "2 of 2: carclass itself"
	.venv/bin/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "Installed. Next: make demo, or .venv/bin/carclass --help"

demo: $(INSTALLED) ## the whole chain on the embedded sample
	$(PY) jobs/pipeline.py

test: $(INSTALLED) ## every subsystem once, in minutes
	$(TEST) -m "not slow and not nightly"

test-all: $(INSTALLED) ## all tests but the nightly ones
	$(TEST) -m "not nightly"

test-nightly: $(INSTALLED) ## the nightly ones: long outages, losses of hosts, the runbook
	$(PY) -m pytest -m nightly tests

lint: $(INSTALLED) ## ruff, its formatter and mypy
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format: $(INSTALLED) ## apply the fixes of ruff
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

bench: $(INSTALLED) ## every benchmark that runs on the sample
	set -e; for name in ingest memory nodes parts rows tune scale; do $(PY) jobs/benchmark.py $$name; done
	@echo "Not run: masking, frozen, train, epochs and predict need --photos and --weights (python jobs/benchmark.py --help)."

docs: $(INSTALLED) ## docs/configuration.md from the schema
	$(PY) -m carclass.config.reference > docs/configuration.md

image: $(BASE_DIGEST) ## the cluster's image carclass, with Docker; DEVICE=cpu is smaller
	$(BUILD) --tag carclass .

sbom: $(BASE_DIGEST) ## what the image contains: build/sbom/carclass.cdx.json
	$(BUILD) --target sbom --output build/sbom .

# The base image by its digest. Commit this file, so that all builds start from the same image; delete it for an update.
$(BASE_DIGEST):
	digest=$$(docker buildx imagetools inspect $(BASE) --format '{{.Manifest.Digest}}') && \
	echo "$(BASE)@$$digest" > $@

lock: $(INSTALLED) ## resolve the dependencies again
	$(COMPILE) requirements.in -o requirements.lock
	$(COMPILE) requirements-dev.in -o requirements-dev.lock

clean: ## remove what make built
	rm -rf .venv build
