"""Several processes on one run: the same rows in the same order, one stop, one checkpoint."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from seqzoo.train import processes
from seqzoo.train.folder import read_metrics, read_status


@pytest.mark.parametrize(
    ("env", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # a batch script of four tasks, outside srun
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, True),
        ({"SLURM_STEP_NUM_TASKS": "4", "SEQZOO_DISTRIBUTED": "0"}, False),
    ],
)
def test_who_works_together(monkeypatch, env, several):
    joined = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *a, **k: joined.append((a, k)))
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: False)
    for name in ("SLURM_STEP_NUM_TASKS", "JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    processes.start()
    assert bool(joined) == several
    if "JAX_NUM_PROCESSES" in env:
        assert joined == [(("a:1",), {"num_processes": 2, "process_id": 1})]


def test_two_processes_stop_together_and_one_goes_on(fit, tiny_words, tmp_path):
    words = ("mesh.fsdp=2", "optimizer.lr=0.01", "trainer.steps=100", "trainer.log_every=20",
             "trainer.eval_every=20", "trainer.save_every=20")  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-m", "seqzoo.cli.main", "train", *tiny_words, *words]
    children = [
        subprocess.Popen(
            [*command, "--runs", str(tmp_path / "runs")], env=env | {"JAX_PROCESS_ID": str(i)}
        )
        for i in range(2)
    ]
    deadline = time.monotonic() + 120
    while not any(f.stat().st_size for f in tmp_path.glob("runs/*/*/metrics.jsonl")):
        assert all(child.poll() is None for child in children) and time.monotonic() < deadline
        time.sleep(0.01)
    children[1].send_signal(signal.SIGTERM)
    assert [child.wait(120) for child in children] == [75, 75]

    result = fit(*words)
    assert read_status(result.path)["attempt"] == 2 and result.step == 100
    assert "going on from step" in (result.path / "train.log").read_text()
    assert "processes 2" in (result.path / "train.log").read_text()
    whole = fit(*words, root=tmp_path / "whole")
    for line, other in zip(read_metrics(result.path), read_metrics(whole.path), strict=True):
        assert line.keys() == other.keys()
        assert line == pytest.approx(other, rel=1e-4)
