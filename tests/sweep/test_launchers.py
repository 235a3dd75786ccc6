"""Devices, the pool, and SLURM by stand-ins for its commands."""

import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest

from seqzoo.errors import ConfigError, LockedError, SeqzooError
from seqzoo.sweep import devices, slurm
from seqzoo.sweep.pool import Pool
from seqzoo.sweep.settings import LauncherSettings
from seqzoo.sweep.study import Study

GRID = ("optimizer.lr=1e-3,1e-2", "sweep=grid", "sweep.name=rates")


@pytest.fixture
def machine(monkeypatch):
    """A machine with some GPUs, or none: ``machine(4)``."""

    def make(gpus: int, **variables: str) -> None:
        for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "NPROC"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        there = lambda name: name == "jax_cuda13_plugin" if gpus else None
        monkeypatch.setattr(devices.importlib.util, "find_spec", there)
        monkeypatch.setattr(devices, "_nvidia", lambda: gpus)
        monkeypatch.setattr(devices.environment, "threads", lambda: 8)

    return make


def test_one_worker_per_gpu_sees_it_alone(machine):
    machine(3)
    assert devices.slots(LauncherSettings()) == [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(3)]
    assert devices.threads(LauncherSettings()) == 2


def test_gpus_that_the_user_gave_are_the_ones(machine):
    machine(8, CUDA_VISIBLE_DEVICES="5,GPU-abc")
    found = [slot["CUDA_VISIBLE_DEVICES"] for slot in devices.slots(LauncherSettings())]
    assert found == ["5", "GPU-abc"]


def test_more_workers_than_gpus_share_their_memory(machine):
    machine(2)
    slots = devices.slots(LauncherSettings(workers=4))
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "1", "0", "1"]
    assert {slot["XLA_PYTHON_CLIENT_MEM_FRACTION"] for slot in slots} == {"0.45"}


def test_a_cpu_has_as_many_workers_as_threads_allow(machine):
    machine(0)
    assert devices.slots(LauncherSettings()) == [{}] * 4
    assert devices.slots(LauncherSettings(threads=8)) == [{}]
    assert devices.slots(LauncherSettings(workers=3)) == [{}] * 3
    assert devices.threads(LauncherSettings()) == 2
    assert devices.threads(LauncherSettings(workers=3)) == 2
    assert devices.threads(LauncherSettings(workers=20)) == 1
    machine(4, JAX_PLATFORMS="cpu")
    assert devices.slots(LauncherSettings()) == [{}] * 4


def test_gpus_that_slurm_gave_and_nobody_uses_are_an_error(machine):
    machine(0, SLURM_JOB_ID="7", SLURM_GPUS_ON_NODE="4")
    with pytest.raises(ConfigError, match="gave this node 4 GPUs and jax could use 0"):
        devices.slots(LauncherSettings())
    machine(4, SLURM_JOB_ID="7", SLURM_GPUS_ON_NODE="4")
    with pytest.raises(ConfigError, match="stand idle"):
        devices.slots(LauncherSettings(workers=2))
    assert len(devices.slots(LauncherSettings())) == 4


def _stand_in(folder: pathlib.Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """sbatch, srun and scontrol that write down how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "calls"
    log.touch()
    for name in ("sbatch", "srun", "scontrol"):
        _stand_in(folder, name, f'echo "{name} $*" >> {log}\nexit ${{{name.upper()}_CODE:-0}}')
    _stand_in(folder, "sbatch", f'echo "sbatch $*" >> {log}\necho "Submitted batch job 4711"')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return lambda: log.read_text().splitlines()


SLURM = LauncherSettings(
    kind="slurm", nodes=2, gpus_per_node=4, minutes=90, partition="gpu", account="lab",
    options=["--qos=long"], setup=["module load cuda"],
)  # fmt: skip


def test_the_script_asks_for_whole_nodes_and_says_when_to_save():
    text = slurm.script("rates", pathlib.Path("/shared/my runs/rates"), SLURM)
    for option in (
        "--nodes=2", "--exclusive", "--gpus-per-node=4", "--ntasks-per-node=1", "--time=1:30:00",
        "--signal=USR2@120", "--requeue", "--partition=gpu", "--account=lab", "--qos=long",
        "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {option}\n" in text
    assert "\nmodule load cuda\n" in text and 'sweep --workers "$study"' in text
    assert "study='/shared/my runs/rates'" in text
    assert subprocess.run(["bash", "-n"], input=text.encode(), check=False).returncode == 0
    cpus = slurm.script("rates", pathlib.Path("/shared"), LauncherSettings(gpus_per_node=0))
    assert "gpus" not in cpus.replace("per GPU", "")


def test_a_study_is_submitted(create, cluster):
    study = create(*GRID)
    assert slurm.submit(study, SLURM) == "4711"
    assert cluster() == [f"sbatch {study.path}/sbatch.sh"]


@pytest.mark.parametrize(
    ("code", "stopped", "requeued"), [(0, False, False), (75, False, True), (75, True, False),
                                      (1, False, False)]
)  # fmt: skip
def test_the_script_requeues_itself_on_75_alone(create, cluster, code, stopped, requeued):
    study = create(*GRID)
    if stopped:
        study.stop("enough")
    text = slurm.script("rates", study.path, SLURM)
    env = {**os.environ, "SRUN_CODE": str(code), "SLURM_JOB_ID": "4711"}
    done = subprocess.run(["bash"], input=text.encode(), env=env, check=False)
    srun, *rest = cluster()
    assert srun.startswith("srun ") and f"sweep --workers {study.path}" in srun
    assert rest == (["scontrol requeue 4711"] if requeued else [])
    assert done.returncode == (0 if requeued else code)


def test_without_sbatch_the_way_is_told(create, monkeypatch):
    study = create(*GRID)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SeqzooError, match="login node of SLURM"):
        slurm.submit(study, SLURM)


def test_one_pool_per_machine_works_on_a_study(create):
    from seqzoo.sweep.locks import held

    study = create(*GRID)
    pool = Pool(study, LauncherSettings(workers=1))
    with (
        held(study.path / "claims" / f"pool-{os.uname().nodename}"),
        pytest.raises(LockedError, match="works on the study 'rates' already"),
    ):
        pool.run()


class FakeWorker:
    """A command in the place of a worker, which notes its environment and follows a script."""

    def __init__(self, monkeypatch, folder: pathlib.Path, body: str):
        file = folder / "worker.py"
        file.write_text(body)
        popen = subprocess.Popen
        monkeypatch.setattr(
            subprocess,
            "Popen",
            lambda command, **more: popen([sys.executable, str(file), command[-1]], **more),
        )


def test_a_worker_that_dies_is_begun_again_on_its_device(create, monkeypatch, tmp_path):
    study = create(*GRID)
    FakeWorker(
        monkeypatch,
        tmp_path,
        "import os, sys, pathlib\n"
        "told = pathlib.Path(sys.argv[1]) / 'starts'\n"
        "with told.open('a') as file:\n"
        "    print(os.environ['NPROC'], os.environ['SEQZOO_DISTRIBUTED'], file=file)\n"
        "if len(told.read_text().splitlines()) < 3: os.kill(os.getpid(), 9)\n",
    )
    for claimed in (study.claim(), study.claim()):
        claimed.tell(0.5)
    said = []
    assert Pool(study, LauncherSettings(workers=1), say=said.append).run() == 0
    assert (study.path / "starts").read_text().splitlines() == ["1 0"] * 3
    assert said == ["worker 0 died by signal 9; another one goes on"] * 2


def test_a_signal_to_the_pool_lets_workers_save(create, monkeypatch, tmp_path):
    study = create(*GRID)
    FakeWorker(
        monkeypatch,
        tmp_path,
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "(pathlib.Path(sys.argv[1]) / 'ready').touch()\n"
        "time.sleep(60)\n",
    )
    sent = []

    def watch():
        if (study.path / "ready").exists() and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGUSR2)

    began = time.monotonic()
    assert Pool(study, LauncherSettings(workers=2), say=lambda text: None, watch=watch).run() == 75
    assert time.monotonic() - began < 50 and signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def test_a_worker_with_an_error_ends_the_pool_with_it(create, monkeypatch, tmp_path):
    study = create(*GRID)
    FakeWorker(monkeypatch, tmp_path, "import sys; sys.exit(1)\n")
    assert Pool(study, LauncherSettings(workers=1), say=lambda text: None).run() == 1
    assert isinstance(study, Study)
