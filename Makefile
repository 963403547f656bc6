# make demo          K-LoRA seen in a small world: one picture, a page, a table of scores
# make test          everything that needs no WebUI, then a few minutes in each WebUI that is found
# make live HOST=…   all tests in one installed WebUI: a1111, forge, neo, neo-2025 or reforge; without
#                    HOST in all of them; KLORA_DEVICE=second on a second device with a GPU's rules,
#                    built with a C++ compiler and ninja
# make soak HOST=…   hundreds of pictures of every kind in a row, with memory and open files;
#                    PICTURES=300 SEED=1
# make storm HOST=…  hostile tags, fields and files; CASES=1000 SEED=1
# make bench         analysis and switching, measured; QUICK=1 in about two minutes, HOSTS=1 real hosts too
# make screenshots   the README's pictures of the page
# make lint          ruff
# make docs          the pictures in docs/
# make evaluate      docs/EVALUATION.md: K-LoRA against the other ways, in the small world
# make playground-train  the small world's model, LoRAs and judges, made anew from a seed

# The first Python from 3.10 to 3.13 that runs.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.10; do $$p -c \
  'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
  && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
CORES := $(shell getconf _NPROCESSORS_ONLN)
RECORDS = $(shell $(PYTHON) tests/live/hosts.py)

.PHONY: demo test core smoke live soak storm lint bench screenshots docs evaluate playground-train clean
.DELETE_ON_ERROR:

test: core smoke

core: $(VENV)/ready lint
	$(BIN)/python -m pytest tests/core

demo: $(VENV)/ready
	OMP_NUM_THREADS=$(CORES) $(BIN)/python -m playground.demo

# Two hosts side by side, each one's output in one piece.
smoke: $(VENV)/ready
	$(MAKE) -k -j2 --output-sync=target $(RECORDS:%=smoke-%)

smoke-%: $(VENV)/ready
	$(BIN)/python -m pytest tests/live --host $* -m smoke

# One host after the other, each with two servers side by side.
live: $(VENV)/ready
	$(if $(filter-out $(RECORDS),$(HOST)),$(error There are no live tests for HOST=$(HOST): call make \
	  live with HOST= and one of $(RECORDS), or without HOST for all of them))
	$(MAKE) -k $(patsubst %,live-%,$(or $(HOST),$(RECORDS)))

live-%: $(VENV)/ready
	$(BIN)/python -m pytest tests/live --host $* -n 2 --dist loadgroup

soak: $(VENV)/ready
	set -e; for host in $(or $(HOST),$(RECORDS)); do \
	  $(BIN)/python tests/live/soak.py $$host $(or $(PICTURES),300) $(or $(SEED),1); done

storm: $(VENV)/ready
	set -e; for host in $(or $(HOST),$(RECORDS)); do \
	  $(BIN)/python tests/live/storm.py $$host $(or $(CASES),1000) $(or $(SEED),1); done

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/ready
	$(BIN)/python docs/selection_map.py
	OMP_NUM_THREADS=$(CORES) $(BIN)/python -m playground.demo
	cp build/demo/demo.png docs/demo.png

$(VENV)/ready: requirements-dev.txt tools/setup_venv.py
	$(if $(PYTHON),,$(error There is no Python from 3.10 to 3.13 on the PATH: \
	  install one, or call make with PYTHON=/path/to/python3.11))
	$(PYTHON) tools/setup_venv.py $(VENV)
	touch $@

bench: $(VENV)/ready
	$(BIN)/python bench/run.py $(if $(QUICK),--quick) $(if $(HOSTS),--hosts)

screenshots: $(VENV)/ready
	$(BIN)/python tools/screenshots.py $(or $(HOST),forge) docs/screenshots

evaluate: $(VENV)/ready
	OMP_NUM_THREADS=$(CORES) $(BIN)/python -m playground.evaluate

playground-train: $(VENV)/ready
	$(BIN)/python -m pip install --quiet -r playground/requirements-train.txt
	OMP_NUM_THREADS=$(CORES) $(BIN)/python -m playground.train

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis
