"""Which devices this machine gives to workers, found without starting jax.

A worker sees its device alone: it is pinned by environment variables before jax is imported.
"""

import glob
import importlib.util
import os
import pathlib
import subprocess
from collections.abc import Mapping

from seqzoo.errors import ConfigError
from seqzoo.sweep.settings import LauncherSettings
from seqzoo.train import environment

_CUDA, _ROCM = "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"
_GPU_PLUGINS = {_CUDA: ("jax_cuda12_plugin", "jax_cuda13_plugin"), _ROCM: ("jax_rocm7_plugin",)}
_THREADS = 2  # of a worker on a CPU: more of them help small models little
_MEMORY = 0.9  # of a GPU, shared by its workers

Variables = dict[str, str]


def slots(launcher: LauncherSettings) -> list[Variables]:
    """The environment of each worker here; one per GPU, on a CPU as many as threads allow.

    Raises:
        ConfigError: SLURM gave this node GPUs that no worker would use.
    """
    variable, gpus = visible_gpus()
    _check_allocation(len(gpus))
    if not gpus:
        count = launcher.workers or (1 if has_tpu() else _cpu_workers(launcher))
        return [{} for _ in range(count)]
    count = launcher.workers or len(gpus)
    if os.environ.get("SLURM_JOB_ID") and count < len(gpus):
        raise ConfigError(
            f"launcher.workers={count}, but SLURM gave this node {len(gpus)} GPUs: some would "
            "stand idle; leave launcher.workers out"
        )
    each = -(-count // len(gpus))
    share = {} if each == 1 else {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY / each:.2f}"}
    return [{variable: gpus[i % len(gpus)], **share} for i in range(count)]


def threads(launcher: LauncherSettings) -> int:
    """CPU threads of every worker of a new study: what was asked for, else a share of what is."""
    there = environment.threads()
    if launcher.threads:
        return launcher.threads
    _, gpus = visible_gpus()
    if launcher.workers or gpus:
        return max(1, there // (launcher.workers or len(gpus)))
    return min(_THREADS, there)


def visible_gpus() -> tuple[str, list[str]]:
    """The variable that pins a GPU, and the names of those that jax could use here."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu", "rocm"} & set(platforms.split(",")):
        return _CUDA, []
    for variable, plugins in _GPU_PLUGINS.items():
        if not any(importlib.util.find_spec(plugin) for plugin in plugins):
            continue
        told = os.environ.get(variable)
        if told is not None:
            return variable, [name for name in told.split(",") if name and name != "-1"]
        count = _nvidia() if variable == _CUDA else len(glob.glob("/dev/dri/renderD*"))
        return variable, [str(number) for number in range(count)]
    return _CUDA, []


def has_tpu() -> bool:
    """Whether there is a TPU: one process at a time may use it."""
    return bool(glob.glob("/dev/accel[0-9]*")) and bool(importlib.util.find_spec("libtpu"))


def _cpu_workers(launcher: LauncherSettings) -> int:
    return max(1, environment.threads() // (launcher.threads or _THREADS))


def _nvidia() -> int:
    listed = list(pathlib.Path("/proc/driver/nvidia/gpus").glob("*"))
    if listed:
        return len(listed)
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def _check_allocation(seen: int, env: Mapping[str, str] = os.environ) -> None:
    """GPUs that SLURM allocated and nobody would use are an error, not a silence."""
    allocated = env.get("SLURM_GPUS_ON_NODE", "")
    if env.get("SLURM_JOB_ID") and allocated.isdigit() and int(allocated) > seen:
        raise ConfigError(
            f"SLURM gave this node {allocated} GPUs and jax could use {seen}: check "
            f"{_CUDA}={env.get(_CUDA)}, JAX_PLATFORMS={env.get('JAX_PLATFORMS')}, and that jax's "
            "CUDA wheels are installed ('seqzoo doctor')"
        )
