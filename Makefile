# make demo   calibrate and train on the embedded model; pictures land in demo-output/
# make test   the whole test suite
# Both make .venv and install what they need. Another torch: make test TORCH='torch==2.9.1'
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
BIN = $(VENV)/bin
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint clean node-texts

demo: $(VENV)/.installed
	$(BIN)/python -m cntlora_core demo --output demo-output

# one thread a process and a process a core: twice as fast as torch's threads on small tensors
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[standalone,test,bench]"
	touch $@

clean:
	rm -rf $(VENV) demo-output build dist *.egg-info

# the tables of docs/settings.md and docs/cli.md, of the help pages and locales/en, from the settings and nodes
node-texts: $(VENV)/.installed
	UPDATE_NODE_TEXTS=1 $(BIN)/python -m pytest -q tests/core/test_settings.py tests/core/cli/test_reference.py tests/nodes/test_schema.py tests/nodes/test_locales.py
