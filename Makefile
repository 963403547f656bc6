# make test          everything that needs no WebUI, then the live tests of each WebUI that is found
# make live HOST=…   the live tests against one installed WebUI: a1111 or forge
# make lint          ruff
# make docs          the pictures in docs/

# The first Python from 3.10 to 3.12 that runs.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.10; do $$p -c \
  'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
  && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: test core live lint docs clean
.DELETE_ON_ERROR:

test: core live

core: $(VENV)/ready lint
	$(BIN)/python -m pytest tests/core

live: $(VENV)/ready
	$(BIN)/python -m pytest tests/live $(if $(HOST),--host $(HOST))

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/ready
	$(BIN)/python docs/selection_map.py

$(VENV)/ready: requirements-dev.txt tools/setup_venv.py
	$(PYTHON) tools/setup_venv.py $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis
