"""One run on changing numbers of processes and devices: the same losses, every sample once."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from seqzoo.eval.evaluate import evaluate_run
from seqzoo.load import load
from seqzoo.train.run_files import read_metrics, read_status

SCRIPT = pathlib.Path(__file__).with_name("logged_train.py")
WORDS = ("trainer.steps=30", "trainer.log_every=1", "trainer.eval_every=15",
         "trainer.save_every=30", "trainer.seed=3")  # fmt: skip
BATCH = 8


@pytest.fixture
def train(tmp_path, tiny_words, quick_flags):
    """Trains in processes of two devices each, up to a step; returns their exit codes."""

    def run(processes, *words, stop_at=0, devices=2, slurm=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = f"--xla_force_host_platform_device_count={devices} {quick_flags}"
        env = os.environ | {"XLA_FLAGS": flags, "SEQZOO_DISTRIBUTED": "1"}
        if slurm:  # as srun would start a step of one task per node
            env |= {"SLURM_STEP_NUM_TASKS": str(processes), "SLURM_STEP_NODELIST": "127.0.0.1"}
            env |= {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_ID": str(os.getpid())}
        elif processes > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
        children = []
        for i in range(processes):
            log = tmp_path / f"samples-{processes}-{i}.jsonl"
            name = "SLURM_PROCID" if slurm else "JAX_PROCESS_ID"
            own = env | ({name: str(i)} if processes > 1 else {})
            command = [sys.executable, SCRIPT, log, str(stop_at if i == processes - 1 else 0)]
            command += [*tiny_words, *WORDS, "mesh.data=null", *words, "--runs", tmp_path / "runs"]
            children.append(subprocess.Popen([str(word) for word in command], env=own))
        try:
            return [child.wait(240) for child in children]
        finally:
            for child in children:
                child.kill()

    return run


def samples_of(tmp_path):
    """Which samples each step read, of all processes, by step."""
    found: dict[int, list[int]] = {}
    for file in tmp_path.glob("samples-*.jsonl"):
        for line in file.read_text().splitlines():
            step, samples = json.loads(line)
            found.setdefault(step, []).extend(samples)
    return found


def losses(run):
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def test_two_processes_then_one_then_two(train, fit, run_folder, tmp_path):
    """The last part on another mesh, whose rows and tokens lie on both processes."""
    assert train(2, "mesh.fsdp=2", stop_at=10) == [75, 75]
    assert train(1, stop_at=20, devices=1) == [75]
    assert train(2, "mesh.sequence=2", "mesh.tensor=2", slurm=True) == [0, 0]
    run = run_folder(tmp_path / "runs")
    status = read_status(run)
    assert status["attempt"] == 3 and status["step"] == 30
    assert "going on from step 20" in (run / "train.log").read_text()

    whole = fit(*WORDS, "mesh.data=1", root=tmp_path / "whole")
    assert len(losses(run)) == 30
    assert losses(run) == pytest.approx(losses(whole.path), rel=1e-6)
    found = samples_of(tmp_path)
    assert sorted(found) == list(range(30))
    for step, samples in found.items():
        # On the last mesh both processes hold all rows, and each reads them.
        once = list(range(step * BATCH, (step + 1) * BATCH))
        assert sorted(samples) == sorted(once * (1 if step < 20 else 2))

    # What two processes saved is evaluated by one, on one device.
    values = evaluate_run(load(run), split="test")["metrics"]
    assert values == pytest.approx(status["test"], rel=1e-5)


@pytest.mark.slow  # step 15 was the best so far and is saved too
@pytest.mark.parametrize("harm", ["flip", "lose"])
def test_two_processes_pass_over_a_damaged_step(train, fit, run_folder, tmp_path, harm):
    assert train(2, "mesh.fsdp=2", "trainer.save_every=10", stop_at=20) == [75, 75]
    run = run_folder(tmp_path / "runs")
    files = [f for f in (run / "checkpoints/20/state").rglob("*") if f.is_file() and "d" in f.parts]
    largest = max(files, key=lambda f: f.stat().st_size)
    if harm == "lose":
        largest.unlink()
    else:
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    assert train(2, "mesh.fsdp=2") == [0, 0]
    assert "going on from step 15" in (run / "train.log").read_text()
    assert (run / "checkpoints/damaged-20").is_dir()
    whole = fit(*WORDS, "mesh.data=1", root=tmp_path / "whole")
    assert losses(run) == pytest.approx(losses(whole.path), rel=1e-6)
