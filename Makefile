# Needs Python 3.11+, make and a PyPI index. Nothing else is installed on the machine: all goes to .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA driver take the CPU build where the index offers one; never gigabytes of CUDA.
HAS_GPU := $(shell command -v nvidia-smi 2>/dev/null)
# No newer version than was tested, so that a release elsewhere cannot break a fresh clone.
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile -c constraints.txt

# Where bytecode is not kept, each of the many processes of a test compiles all of torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check bench gpu compose-test clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(HAS_GPU),)
	$(PIP_INSTALL) 'torch==2.13.0+cpu' || $(PIP_INSTALL) 'torch>=2.11,<2.14'
endif
	$(PIP_INSTALL) -e '.[dev,clients]'
	$(PIP_INSTALL) --no-deps lm-eval
	touch $@

demo: $(VENV)/installed
	$(BIN)/lemix demo

# Three at a time on two cores: a fifth of the time a test waits, for processes that start or messages that come.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal --durations 25

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

# What needs a card, in at most 6 minutes; results in runs/gpu. GPU_PYTHON: a Python that has torch already; what else
# it lacks can lie in wheels/ (see benchmarks/gpu/collect_wheels.py).
gpu: $(if $(GPU_PYTHON),,$(VENV)/installed)
ifneq ($(wildcard wheels/*.whl),)
	$(or $(GPU_PYTHON),$(BIN)/python) -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
	  --target build/gpu_site wheels/*.whl
endif
	PATH="$(CURDIR)/build/gpu_site/bin:$$PATH" PYTHONPATH="$(CURDIR)/build/gpu_site:$(CURDIR)" \
	  $(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu $(GPU_OPTIONS)

# compose.yaml on a real Docker engine, about ten minutes. PIP_EXTRA_INDEX_URL names an index with CPU builds of torch.
compose-test: $(VENV)/installed
	$(BIN)/python -m tools.compose_test docs/compose_transcript.txt

clean:
	rm -rf $(VENV) runs
