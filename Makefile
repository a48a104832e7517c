# make up      the environment, the default model, a swarm on this machine and a page to talk with it
# make check   lint, types and every test that starts no process: for every change
# make test    the same environment, then every check and test
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  ?=
ARGS   ?=
# With WORKERS=2 the tests run side by side, a file at a time, in the order that tests/conftest.py gives them; by default one by one.
WORKERS ?= 0
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help environment up chat check test quick lint format bench fuzz soak tiny-chat clean

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

environment: $(VENV)/.made  ## the virtual environment in .venv, with what was tested

$(VENV)/.made: pyproject.toml constraints.txt hatch_build.py $(shell find web -not -path '*/node_modules*' -type f 2>/dev/null)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Corolla needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

up: environment  ## a swarm on this machine and its page; MODEL=alias, directory or hub id, ARGS="--servers 3 --port 8080"
	@$(BIN)/corolla up $(MODEL) $(ARGS)

chat: environment  ## a conversation in this terminal; MODEL=alias, directory or hub id, ARGS="--temperature 0"
	@$(BIN)/corolla chat $(MODEL) $(ARGS)

check: environment  ## ruff, mypy and every test that starts no process
	@$(MAKE) --no-print-directory --jobs 2 --output-sync lint quick

test: lint  ## every check, then every test
	$(PYTEST) $(ARGS)

quick: environment
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'not long' $(ARGS)

lint: environment  ## ruff, mypy and the contracts of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: environment  ## let ruff write the format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: environment  ## the table of docs/performance.md, measured here
	$(BIN)/python benchmarks/engine.py $(ARGS)

fuzz: environment  ## odd frames, messages and requests against servers and gateways, half an hour of them
	$(BIN)/python -m tests.swarm.fuzz_frames 1000000
	ONEDNN_PRIMITIVE_CACHE_CAPACITY=128 LRU_CACHE_CAPACITY=128 $(BIN)/python -m tests.swarm.fuzz_messages --messages 100000 $(ARGS)
	$(BIN)/python -m tests.server.positions 1000
	$(BIN)/python -m tests.gateway.fuzz_requests 10000

soak: environment  ## twenty minutes of servers that come and go under chats; ARGS="--minutes 5"
	$(BIN)/python -m tests.swarm.soak $(ARGS)

tiny-chat: environment  ## a chat model from nothing; DATA=a file or directory of dialogues
	@COROLLA=$(BIN)/corolla examples/tiny_chat.sh $(DATA) $(or $(DIR),tiny-chat)

clean:  ## remove the environment and caches (models stay)
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
