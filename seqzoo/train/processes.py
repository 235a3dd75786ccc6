"""One process is the small case of many: how the processes of a run find each other."""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils

from seqzoo.errors import ConfigError

_SWITCH = "SEQZOO_DISTRIBUTED"
_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# Ports that the first process of a SLURM job step listens on; which one follows from its number.
_PORTS = (61440, 65535)


class Place(NamedTuple):
    """Where a process stands among those of its run.

    Attributes:
        address: of the first of them, HOST:PORT.
        count: how many there are.
        index: which one this is.
        devices: local GPUs that it drives; None = all that it sees.
    """

    address: str
    count: int  # type: ignore[assignment]
    index: int  # type: ignore[assignment]
    devices: tuple[int, ...] | None


def start() -> None:
    """Joins the processes of this run; call it before jax computes anything.

    Several processes are one run where JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say so, in a SLURM job step of several tasks (srun), and on a TPU pod.
    SEQZOO_DISTRIBUTED=0 keeps this process by itself.

    Raises:
        ConfigError: the variables do not fit together, or a GPU of the SLURM job would idle.
    """
    env = os.environ
    if env.get(_SWITCH) == "0" or jax.distributed.is_initialized():
        return
    place = find(env)
    if place is not None:
        jax.distributed.initialize(
            place.address,
            num_processes=place.count,
            process_id=place.index,
            local_device_ids=place.devices,
        )
    elif "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()
    if _slurm_step(env):
        _check_gpus(env)


def find(env: Mapping[str, str]) -> Place | None:
    """What the environment says; None = one process, or a TPU pod that jax knows itself.

    Raises:
        ConfigError: it says half of it, or what cannot be.
    """
    explicit = [name for name in (_ADDRESS, _COUNT, _INDEX) if env.get(name)]
    if _COUNT in explicit or _INDEX in explicit:
        missing = [name for name in (_ADDRESS, _COUNT, _INDEX) if name not in explicit]
        if missing:
            raise ConfigError(
                f"{' and '.join(explicit)} set without {' and '.join(missing)}; several processes "
                f"need all three: {_ADDRESS}=HOST:PORT of process 0, {_COUNT}, and {_INDEX} from 0"
            )
        place = Place(env[_ADDRESS], _number(env, _COUNT), _number(env, _INDEX), None)
        if not 0 <= place.index < place.count:
            raise ConfigError(
                f"{_INDEX}={place.index}; it must lie in 0 .. {place.count - 1}, which is "
                f"{_COUNT}={place.count} less 1"
            )
        if ":" not in place.address:
            raise ConfigError(f"{_ADDRESS}={place.address}; it must be HOST:PORT, as in node1:1234")
        return place
    if not _slurm_step(env) or _number(env, "SLURM_STEP_NUM_TASKS", 1) < 2:
        return None
    return Place(
        env.get(_ADDRESS) or f"{_first_host(env)}:{_port(env)}",
        _number(env, "SLURM_STEP_NUM_TASKS"),
        _number(env, "SLURM_PROCID"),
        _gpus_of_task(env),
    )


def _slurm_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process: a batch script itself is no step of several tasks."""
    return "SLURM_STEP_NUM_TASKS" in env


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r}; it must be a number")
    return int(text)


def _first_host(env: Mapping[str, str]) -> str:
    """The first of node[001-004,007],other."""
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "")
    found = re.match(r"([^,\[]+)(?:\[(\w+))?", hosts)
    if found is None:
        raise ConfigError(
            f"SLURM_STEP_NODELIST={hosts!r} names no host; set {_ADDRESS}=HOST:PORT of task 0"
        )
    return found[1] + (found[2] or "")


def _port(env: Mapping[str, str]) -> int:
    """The same for all tasks of a step, another one for the next step."""
    first, last = _PORTS
    number = 31 * _number(env, "SLURM_JOB_ID", 0) + _number(env, "SLURM_STEP_ID", 0)
    return first + number % (last - first + 1)


# --- GPUs of a node ------------------------------------------------------------------------------


def _gpus_of_task(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """Which of the GPUs that it sees a task drives: all, or its part of those that all tasks see.

    jax by itself would take one GPU per task, and let the others idle (jax issue 16788).

    Raises:
        ConfigError: tasks and GPUs of the node do not come out even.
    """
    seen, tasks = _visible(env), _tasks_here(env)
    allocated = _allocated(env)
    if not seen or env.get("JAX_PLATFORMS", "").startswith("cpu"):
        return None
    if seen * tasks == allocated or tasks == 1:
        return tuple(range(seen))
    if seen == allocated and seen % tasks == 0:
        part, at = seen // tasks, _number(env, "SLURM_LOCALID")
        return tuple(range(at * part, (at + 1) * part))
    raise ConfigError(
        f"SLURM gave this node {allocated} GPUs and {tasks} tasks, and a task sees {seen} of them: "
        "some would idle or serve two tasks. Ask for a task per node (--ntasks-per-node=1) or one "
        f"per GPU (--ntasks-per-node={allocated} --gpus-per-task=1)"
    )


def _check_gpus(env: Mapping[str, str]) -> None:
    """Raises ConfigError if the job has GPUs here that no task of it drives."""
    allocated = _allocated(env)
    if not allocated or env.get("JAX_PLATFORMS", "").startswith("cpu"):
        return
    if jax.default_backend() != "gpu":
        raise ConfigError(
            f"SLURM gave this node {allocated} GPUs and jax runs on the {jax.default_backend()}: "
            "install jax's CUDA wheels (make install EXTRA=cuda13), or ask for no GPUs"
        )
    driven = jax.local_device_count() * _tasks_here(env)
    if driven < allocated:
        raise ConfigError(
            f"SLURM gave this node {allocated} GPUs and its tasks drive {driven}: the others would "
            "idle. Ask for fewer (--gpus-per-node), let each task see its part of them, or set "
            f"{_SWITCH}=0 to run by yourself"
        )


def _allocated(env: Mapping[str, str]) -> int:
    """GPUs of the step, else of the job, on this node; 0 = none, or SLURM does not say."""
    for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if env.get(name):
            return len(_listed(env[name]))
    text = env.get("SLURM_GPUS_ON_NODE", "0")
    return int(text) if text.isdecimal() else 0


def _visible(env: Mapping[str, str]) -> int:
    """GPUs that this process can see."""
    listed = env.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len(_listed(listed))
    return len(list(pathlib.Path("/proc/driver/nvidia/gpus").glob("*"))) or _allocated(env)


def _listed(text: str) -> list[str]:
    """Entries of 0,1,2 or 0-3,5 or GPU-1f2e...,GPU-..."""
    found: list[str] = []
    for word in filter(None, text.split(",")):
        ends = re.fullmatch(r"(\d+)-(\d+)", word)
        found += [word] if ends is None else map(str, range(int(ends[1]), int(ends[2]) + 1))
    return found


def _tasks_here(env: Mapping[str, str]) -> int:
    """Tasks of the step on this node: SLURM_STEP_TASKS_PER_NODE is 4(x2),1 by node."""
    counts: list[int] = []
    for word in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word)
        if found is not None:
            counts += [int(found[1])] * int(found[2] or 1)
    node = env.get("SLURM_NODEID", "0")
    if counts:
        return counts[int(node) if node.isdecimal() and int(node) < len(counts) else 0]
    return _number(env, "SLURM_STEP_NUM_TASKS", 1)


# --- Together ------------------------------------------------------------------------------------


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
