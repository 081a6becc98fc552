# Two commands do all the set-up: `make demo` searches on this machine, `make test` runs the tests.
# `make check` is what a commit must pass beside the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA driver the CPU build of torch is installed, from the version that constraints-cpu.txt pins.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "--constraint constraints-cpu.txt")

.PHONY: demo test check oracles clean

demo: $(VENV)/.installed
	$(BIN)/codesign search profiles/cpu.yaml

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

# Other projects in an environment of their own: what they say about what we write. Never part of the tests.
oracles: $(VENV)/.installed-dev
	$(PYTHON) -m venv .oracles
	.oracles/bin/pip install --quiet $(CONSTRAINTS) torch
	.oracles/bin/pip install --quiet $(CONSTRAINTS) 'transformers>=5' accelerate compressed-tensors
	PYTHONPATH=. $(BIN)/python tests/oracles/exported_weights.py --python .oracles/bin/python

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit("codesign needs Python >= 3.11; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first: another package that asks for it would otherwise choose the newest build.
$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints-cpu.txt
	$(BIN)/pip install --quiet $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .oracles build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
