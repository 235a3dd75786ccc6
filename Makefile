# seqzoo. Every target works from nothing: it makes .venv, installs what it needs, then runs.
#   make train                       trains the default experiment to its target
#   make test                        the test suite;  PYTHON=python3.12 runs the other stack
#   make install EXTRA=cuda13        a GPU: installs jax's CUDA wheels into .venv as well

PYTHON ?= python3
EXTRA ?=
# A pyenv machine holds other Pythons without putting them on PATH.
PYTHON_EXE := $(shell $(PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null || ls -d $$(pyenv root 2>/dev/null)/versions/*/bin/$(PYTHON) 2>/dev/null | tail -n 1)
PYTHON_VERSION := $(shell $(PYTHON_EXE) -c 'import sys; print("3.11" if sys.version_info[:2] == (3, 11) else "3.12")' 2>/dev/null)
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
CONSTRAINTS := constraints/python$(PYTHON_VERSION).txt
STAMP := $(VENV)/.installed$(if $(EXTRA),-$(EXTRA))
comma := ,
EXTRAS := dev$(if $(EXTRA),$(comma)$(EXTRA))

# libtpu compiles for TPUs on any machine. It stays out of the environment, where jax would load it.
LIBTPU := build/libtpu-python$(PYTHON_VERSION)
CHECK_TPU := PYTHONPATH=$(LIBTPU) $(BIN)/python -m pallas_kernels.check_tpu
# So do the four wheels that compile for a GPU: jax's CUDA plugin, ptxas, libdevice; no cuDNN or cuBLAS.
CUDA := build/cuda-python$(PYTHON_VERSION)
CUDA_WHEELS := jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm
CHECK_GPU := PYTHONPATH=$(CUDA) $(BIN)/python -m pallas_kernels.check_gpu
CHECK_STEPS := PYTHONPATH=$(LIBTPU) $(BIN)/python -m seqzoo.eval.mesh_check

ARGS ?=
# Processes that share the tests; a test file stays in one.
WORKERS ?= 2

.PHONY: help install train test test-slow bench long-streams torture torture-resume frontier passkey titans-ablation docs check lint types libtpu check-tpu check-tpu-full check-tpu-table cuda check-gpu check-gpu-full check-gpu-table gpu-report clean

help:  ## lists the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -e 's/:.*##/\t/' | expand -t 18

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON_EXE)" || { echo "no $(PYTHON) found: name one that exists, as in 'make test PYTHON=python3.12'"; exit 2; }
	test -x $(BIN)/python || $(PYTHON_EXE) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]' --constraint $(CONSTRAINTS)
	@touch $@

install: $(STAMP)  ## makes the environment (EXTRA=cuda12|cuda13|tpu|wandb|hf|slurm|postgres adds to it)

train: $(STAMP)  ## trains the default experiment to its target (ARGS="key=value ..." changes it)
	$(BIN)/seqzoo train $(ARGS)

test: $(STAMP)  ## the test suite
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(STAMP)  ## the long tests as well: more lengths, twenty kills, 262,144 tokens
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'slow or not slow' $(ARGS)

torture-resume: $(STAMP)  ## twenty SIGKILLs of one run; its end must equal an unbroken one bit by bit
	$(BIN)/python tests/torture/torture.py $(ARGS)

long-streams: $(STAMP)  ## a million tokens through four models, chunk by chunk, in under 2 GiB
	$(BIN)/python tests/streams/long_streams.py $(ARGS)

torture: $(STAMP)  ## sweeps under SIGKILLs and a restart of their database; nothing may be lost or doubled
	$(BIN)/python tests/torture/sweep_torture.py $(ARGS)

bench: $(STAMP)  ## measures the operators and the train loop on this machine
	$(BIN)/seqzoo bench $(ARGS)

frontier: $(STAMP)  ## recall against state size, tuned alike (hours; goes on where it stopped; ARGS="--help")
	$(BIN)/python experiments/recall_frontier/frontier.py $(ARGS)

passkey: $(STAMP)  ## a key in longer and longer filler, seven architectures (hours; goes on where it stopped)
	$(BIN)/python experiments/passkey/passkey.py $(ARGS)

titans-ablation: $(STAMP)  ## what the parts of a Titans memory are worth (hours; goes on where it stopped)
	$(BIN)/python experiments/titans_ablation/titans_ablation.py $(ARGS)

docs: $(STAMP)  ## writes docs/keys.md anew from the constructors
	$(BIN)/python -m seqzoo.config.keys > docs/keys.md

check: lint types  ## ruff and the type checker

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

libtpu: $(LIBTPU)/.installed  ## installs the TPU compiler into build/ (half a gigabyte)

$(LIBTPU)/.installed: $(STAMP) $(CONSTRAINTS)
	rm -rf $(LIBTPU)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(LIBTPU) libtpu --constraint $(CONSTRAINTS) || \
	    { echo "libtpu COULD NOT BE INSTALLED, so nothing can be compiled for TPUs here"; exit 3; }
	@touch $@

check-tpu: $(LIBTPU)/.installed  ## compiles the kernels for v5e and TPU7x without a TPU, against docs/kernels.csv
	$(CHECK_TPU) --check $(ARGS)

check-tpu-full: $(LIBTPU)/.installed  ## every tagged shape and generation, and train steps on a mesh (PYTHON=python3.12 too)
	$(CHECK_TPU) --full --check $(ARGS)
	$(CHECK_STEPS) --check

check-tpu-table: $(LIBTPU)/.installed  ## measures everything anew into docs/kernels.csv and docs/kernels.md
	$(CHECK_TPU) --full --write $(ARGS)
	$(CHECK_STEPS) --write

cuda: $(CUDA)/.installed  ## installs a compiler for GPUs into build/ (0.7 GB, no driver needed)

$(CUDA)/.installed: $(STAMP) $(CONSTRAINTS)
	rm -rf $(CUDA)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(CUDA) $(CUDA_WHEELS) --constraint $(CONSTRAINTS) || \
	    { echo "the CUDA wheels COULD NOT BE INSTALLED, so nothing can be compiled for GPUs here"; exit 3; }
	@touch $@

check-gpu: $(CUDA)/.installed  ## compiles the kernels for an H200 without a GPU, against docs/kernels_gpu.csv
	$(CHECK_GPU) --check $(ARGS)

check-gpu-full: $(CUDA)/.installed  ## every tagged shape (PYTHON=python3.12 too)
	$(CHECK_GPU) --full --check $(ARGS)

check-gpu-table: $(CUDA)/.installed  ## measures everything anew into docs/kernels_gpu.csv and docs/kernels.md
	$(CHECK_GPU) --full --write $(ARGS)

gpu-report:  ## on a GPU: numerics, then times, into docs/gpu/ (PYTHON=its python with jax; nothing is installed)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON_EXE)) -m pallas_kernels.gpu_report $(ARGS)

clean:  ## removes environments and caches, never runs/
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
