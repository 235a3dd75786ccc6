"""The stage for every test: eight simulated CPU devices, quick compiles, the golden files."""

import os
import pathlib

# Before jax starts. Eight devices so that every operator and train step can be sharded; no backend
# optimisation because tests compile more than they run.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
)

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Reads a golden file: ``golden("mamba/scan_full")`` gives a dict of numpy arrays."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return read
