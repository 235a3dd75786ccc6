"""Numerics that must be settled before jax starts: determinism on an accelerator."""

import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from seqzoo.train import environment

# Non-deterministic operations are excluded; where one has no other form XLA says so.
_GPU_FLAGS = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_exclude_nondeterministic_ops=true")


def prepare(trainer: Mapping[str, Any], folder: pathlib.Path, *, fresh: bool = False) -> str | None:
    """Sets XLA's flags for `trainer.deterministic` on a GPU; does nothing on a CPU.

    XLA times algorithms and keeps the fastest (autotuning); the choice can differ between starts
    and with it the bits. What it chose at first is kept in the run folder and taken again.

    Args:
        trainer: the section of the configuration.
        folder: of the run.
        fresh: the run begins anew: what lies in the folder will be moved aside.

    Returns:
        What could not be had, for the log; None = all is as asked.
    """
    if not trainer.get("deterministic") or not _has_gpu():
        return None
    if environment.jax_started():
        return (
            "trainer.deterministic=true, but jax has started already without it: exact in data and "
            "state, not bitwise"
        )
    chosen = folder / "autotune.textproto"
    flags = [*_GPU_FLAGS, f"--xla_gpu_dump_autotune_results_to={chosen}"]
    if chosen.exists() and not fresh:
        flags = [*_GPU_FLAGS, f"--xla_gpu_load_autotune_results_from={chosen}"]
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([given, *(f for f in flags if f not in given)]).strip()
    return None


def _has_gpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return False
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_plugins.xla_cuda13")
    return any(_found(name) for name in plugins)


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
