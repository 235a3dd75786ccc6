"""The stage for every test: eight simulated CPU devices, quick compiles, the golden files."""

import gc
import os
import pathlib
import sys

# Tests compile more than they run: no backend optimisation, one module of LLVM per program.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if sys.version_info < (3, 12):
    # XLA's older emitters compile four times as fast. Those of jax 0.11 (Python 3.12) are the
    # newer ones alone, and an unknown flag is fatal.
    QUICK += " --xla_cpu_use_fusion_emitters=false"

# Before jax starts. Eight devices so that every operator and train step can be sharded.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {QUICK}")

import numpy as np
import pytest

# Traces make many objects and few cycles: the collector looks at what is new, and not so often.
gc.set_threshold(50_000, 10, 5)

GOLDEN = pathlib.Path(__file__).parent / "golden"

# Files with a test that takes long: first, or one worker ends with them while the other is idle.
LONG = ("torture/test_torture", "stranger/test_stranger", "train/test_topologies", "sweep/")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


def pytest_collection_finish():
    """Modules and tests stay to the end; the collector need not go through them again."""
    gc.collect()
    gc.freeze()


# A run that ends in a moment.
TINY = (
    "task=masked_answers",
    "data=mqar",
    "data.vocab_size=32",
    "data.seq_len=16",
    "data.num_kv_pairs=2",
    "data.valid_samples=32",
    "data.test_samples=32",
    "model=transformer_small",
    "model.d_model=8",
    "model.n_layers=1",
    "model.channel_mixer=null",
    "mesh.data=1",
    "schedule=constant",
    "trainer.steps=12",
    "trainer.global_batch_size=8",
    "trainer.eval_every=4",
    "trainer.save_every=4",
    "trainer.log_every=3",
    "logger.progress=none",
    "logger.tensorboard=false",
)


@pytest.fixture(scope="session")
def golden():
    """Reads a golden file: ``golden("mamba/scan_full")`` gives a dict of numpy arrays."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return read


@pytest.fixture(scope="session")
def tiny_words() -> tuple[str, ...]:
    """The words of a run that ends in a moment."""
    return TINY


@pytest.fixture(scope="session")
def quick_flags() -> str:
    """XLA's flags for quick compiles, for tests that start processes."""
    return QUICK
