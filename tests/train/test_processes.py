"""How the processes of a run find each other; test_topologies.py trains in several."""

import os

import pytest

from seqzoo.errors import ConfigError
from seqzoo.train import processes

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
EIGHT = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"}
GPUS = {"SLURM_STEP_GPUS": "0,1,2,3,4,5,6,7"}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "4"}, None),  # a batch script of four tasks, outside srun
        (EXPLICIT, ("a:1", 2, 1, None)),
        (SLURM, ("node03:61658", 2, 1, None)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu7,gpu9"}, ("gpu7:61658", 2, 1, None)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "b:2"}, ("b:2", 2, 1, None)),
        # one task per node drives all GPUs of it
        (SLURM | GPUS, ("node03:61658", 2, 1, tuple(range(8)))),
        # one task per GPU: SLURM shows each its own, or all of them to all
        (SLURM | EIGHT | GPUS | {"CUDA_VISIBLE_DEVICES": "0"}, ("node03:61658", 16, 1, (0,))),
        (SLURM | EIGHT | GPUS, ("node03:61658", 16, 1, (3,))),
        # four tasks, two GPUs each
        (
            SLURM | EIGHT | {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "4"},
            ("node03:61658", 16, 1, (6, 7)),
        ),
        (SLURM | GPUS | {"JAX_PLATFORMS": "cpu"}, ("node03:61658", 2, 1, None)),
    ],
)
def test_who_works_together(monkeypatch, env, place):
    monkeypatch.setattr(processes.pathlib.Path, "glob", lambda *a: iter(()))  # of real GPUs
    assert processes.find(env) == place


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES set without JAX_COORDINATOR_ADDRESS and"),
        (EXPLICIT | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2; it must lie in 0 .. 1"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two'; it must be a number"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "a"}, "=a; it must be HOST:PORT"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "names no host; set JAX_COORDINATOR_ADDRESS"),
        (
            SLURM | GPUS | {"SLURM_STEP_TASKS_PER_NODE": "3"},
            "8 GPUs and 3 tasks, and a task sees 8 of them",
        ),
        (
            SLURM | GPUS | {"SLURM_STEP_TASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0"},
            "8 GPUs and 2 tasks, and a task sees 1 of them",
        ),
    ],
)
def test_what_cannot_be(env, said):
    with pytest.raises(ConfigError, match=said):
        processes.find(env)


def test_gpus_that_would_idle_are_an_error(monkeypatch):
    joined = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *a, **k: joined.append((a, k)))
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: False)
    for name in os.environ:
        if name.startswith(("SLURM", "JAX_")):
            monkeypatch.delenv(name)
    for name, value in (SLURM | GPUS | {"SLURM_STEP_NUM_TASKS": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="8 GPUs and jax runs on the cpu: install"):
        processes.start()
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setattr("jax.local_device_count", lambda: 1)
    with pytest.raises(ConfigError, match="8 GPUs and its tasks drive 1: the others would idle"):
        processes.start()
    monkeypatch.setattr("jax.local_device_count", lambda: 8)
    processes.start()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SEQZOO_DISTRIBUTED", "0")
    processes.start()
    assert not joined
    monkeypatch.delenv("SEQZOO_DISTRIBUTED")
    processes.start()
    ((address, options),) = joined
    assert address == ("node03:61658",) and options == {
        "num_processes": 2, "process_id": 1, "local_device_ids": tuple(range(8)),
    }  # fmt: skip
