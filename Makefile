# Every target first installs what it needs into .venv: a few minutes once, no time afterwards (scripts/install.sh).
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
export PYTHON BUILD BUILDER

define TRY
When it says "Application startup complete", from another terminal:

  curl http://$(HOST):$(PORT)/v1/chat/completions -H 'Content-Type: application/json' -d '{
    "model": "$(or $(MODEL),demo)", "messages": [{"role": "user", "content": "12+7*3-4"}],
    "temperature": 1, "em_inf": {"threshold": 0.3}}'

endef
export TRY

.PHONY: help install serve models test test-all bench bench-serving loadtest soak clients image sbom check format compat lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

install: ## only make .venv; PYTHON=python3.12 and BUILD=cpu or BUILD=cuda choose other than what is found
	@scripts/install.sh

serve: install ## start the server; MODEL=name-or-folder (default: the demo model), HOST, PORT, ARGS="more flags"
	@echo "$$TRY"
	.venv/bin/em-serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

models: install ## fetch two real models (SmolLM2 135M, Qwen2.5-Coder 0.5B) into build/models, in two minutes; ARGS="one's name"
	.venv/bin/python -m benchmarks.real_models $(ARGS)

test: install ## run the tests that need no engine, and one engine start with the essential checks; ARGS="-k name" chooses some
	@scripts/test-tools.sh
	@scripts/test.sh essential $(ARGS)

test-all: install ## run every test (what .ci/run calls); ARGS="-k name" chooses some
	@scripts/test-tools.sh
	@scripts/test.sh all $(ARGS)

bench: install ## measure the transform, into build/bench (minutes); ARGS="--quick", or "--rows 16 --arms ours,eager"
	.venv/bin/python -m benchmarks.transform --out build/bench $(ARGS)

bench-serving: install ## output tokens/s of the server, plugin on, off and hidden; MODEL=demo, vocab151k, 0.5b, 7b (CUDA) or a name of `make models`, ARGS=--quick
	.venv/bin/python -m benchmarks.serving $(if $(MODEL),--model $(MODEL)) $(ARGS)

loadtest: install ## serve the demo model and run the standard comparison on it (8 minutes on two cores), into build/loadtest/demo
	.venv/bin/python -m benchmarks.loadtest $(ARGS)

soak: install ## attack a server with the demo model for about 15 minutes and count what it answers, into build/soak; ARGS="--share 0.1"
	.venv/bin/python -m benchmarks.soak $(ARGS)

clients: install ## try common client libraries on a server with the demo model (installs them, network), into build/clients; ARGS="openai curl"
	@scripts/clients.sh $(ARGS)

image: ## build the image em-inf-server:cpu; TARGET=cuda, BUILDER=docker, podman or buildah, ARGS="its flags"
	@scripts/image-build.sh $(or $(TARGET),cpu) $(ARGS)

sbom: install ## list what the cpu image installs, as build/sbom/cpu.cdx.json (CycloneDX)
	@scripts/sbom.sh build/sbom/cpu.cdx.json

check: install ## check formatting and lint with ruff, types with mypy, layers with import-linter
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

format: install ## format the sources and fix what ruff can fix
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

compat: install ## check the places where we touch vLLM against the wheels of every supported release (about 1 GB)
	.venv/bin/python -m compat $(ARGS)

lock: install ## resolve requirements/*.lock again; ARGS=--upgrade moves every pin
	scripts/lock.sh $(ARGS)

clean: ## remove .venv
	rm -rf .venv
