"""One process is the small case of many: how the processes of a run find each other."""

import os
from collections.abc import Mapping

import jax
from jax.experimental import multihost_utils

_SWITCH = "SEQZOO_DISTRIBUTED"


def start() -> None:
    """Joins the processes of this run; call it before jax computes anything.

    Several processes are one run where JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say so, in a SLURM job step of several tasks (srun), and on a TPU pod.
    SEQZOO_DISTRIBUTED=0 keeps this process by itself.
    """
    env = os.environ
    if env.get(_SWITCH) == "0" or jax.distributed.is_initialized():
        return
    if "JAX_COORDINATOR_ADDRESS" in env and "JAX_NUM_PROCESSES" in env:
        jax.distributed.initialize(
            env["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(env["JAX_NUM_PROCESSES"]),
            process_id=int(env.get("JAX_PROCESS_ID", "0")),
        )
    elif _several(env):
        jax.distributed.initialize()


def _several(env: Mapping[str, str]) -> bool:
    slurm = int(env.get("SLURM_STEP_NUM_TASKS", "1") or 1) > 1
    return slurm or "," in env.get("TPU_WORKER_HOSTNAMES", "")


def many() -> bool:
    """Whether other processes work on this run; does not start jax's devices."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process speaks for the run; does not start jax's devices."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for the other processes of this run."""
    if many():
        multihost_utils.sync_global_devices(name)
