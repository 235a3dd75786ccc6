"""`train -m` by submitit: what is submitted, what a job does, what is said without it."""

import contextlib
import importlib.util
import pickle
import signal
import sys
import types

import pytest

from seqzoo.cli import main as command
from seqzoo.cli.main import main
from seqzoo.cli.submit import Command, parameters
from seqzoo.errors import SeqzooError
from seqzoo.sweep.settings import LauncherSettings
from seqzoo.train.run_files import find_runs, read_status

RATES = ("-m", "optimizer.lr=1e-3,1e-2")


@pytest.fixture
def submitit(monkeypatch):
    """A stand-in that remembers what it is given, and runs nothing."""
    module = types.ModuleType("submitit")
    module.submitted, module.given = [], {}

    class AutoExecutor:
        def __init__(self, folder, cluster, **more):
            module.given.update(folder=folder, cluster=cluster, **more)

        def update_parameters(self, **more):
            module.given.update(more)

        @contextlib.contextmanager
        def batch(self):
            yield

        def submit(self, function):
            module.submitted.append(pickle.loads(pickle.dumps(function)))
            return types.SimpleNamespace(job_id=f"7_{len(module.submitted) - 1}")

    module.AutoExecutor = AutoExecutor
    module.core = types.SimpleNamespace(utils=types.SimpleNamespace(FailedJobError=ValueError))
    module.helpers = types.SimpleNamespace(DelayedSubmission=lambda function: function)
    monkeypatch.setitem(sys.modules, "submitit", module)
    return module


def test_each_run_is_a_job(submitit, tiny_words, tmp_path, capsys):
    words = ["launcher=submitit_slurm", "launcher.options=['--qos=long','--exclusive']",
             "launcher.partition=gpu", "launcher.workers=4"]  # fmt: skip
    assert main(["train", *RATES, *words, *tiny_words, "--runs", str(tmp_path), "--force"]) == 0
    assert [job.words[1] for job in submitit.submitted] == [
        "optimizer.lr=0.001",
        "optimizer.lr=0.01",
    ]
    first = submitit.submitted[0]
    assert first.words[0] == "train" and first.words[-3:] == ["--runs", str(tmp_path), "--force"]
    assert not any("launcher" in word for word in first.words)
    given = submitit.given
    assert given["cluster"] == "slurm" and given["slurm_partition"] == "gpu"
    assert given["slurm_additional_parameters"] == {"qos": "long", "exclusive": True}
    assert given["gpus_per_node"] == 1 and given["slurm_array_parallelism"] == 4
    assert "job 7_1: optimizer.lr=0.01" in capsys.readouterr().out
    # What goes into the queue again goes on; it does not begin anew.
    assert first.checkpoint().words == first.words[:-1]


def test_a_job_that_saved_hands_the_signal_on(submitit, monkeypatch):
    monkeypatch.setattr(command, "_command", lambda words: 75)
    heard = []
    earlier = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        assert Command(["train"])() == 75
    finally:
        signal.signal(signal.SIGUSR2, earlier)
    assert heard == [signal.SIGUSR2]
    monkeypatch.setattr(command, "_command", lambda words: 3)
    assert Command(["train"])() == 3
    monkeypatch.setattr(command, "_command", lambda words: 1)
    with pytest.raises(SeqzooError, match="ended with exit 1"):
        Command(["train"])()


def test_a_cpu_job_asks_for_no_gpu():
    found = parameters(LauncherSettings(kind="submitit_slurm", gpus_per_node=0, threads=8))
    assert "gpus_per_node" not in found and found["cpus_per_task"] == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launcher=submitit_slurm"], "pip install 'seqzoo[slurm]'"),
        (["launcher=slurm"], "belongs to 'seqzoo sweep'"),
        (["hydra/launcher=submitit_slurm"], "here it is launcher=submitit_slurm"),
        (["launcher=submitit_slurn"], "submitit_slurm"),
    ],
)
def test_what_cannot_be_submitted(monkeypatch, tiny_words, capsys, words, said):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["train", *RATES, *words, *tiny_words]) == 2
    assert said in capsys.readouterr().err


def test_a_sweep_has_its_own_launcher(tiny_words, capsys):
    assert main(["sweep", "optimizer.lr=1,2", "launcher=submitit_local", *tiny_words]) == 2
    assert "launcher=slurm" in capsys.readouterr().err


@pytest.mark.slow
def test_with_submitit_itself(tiny_words, tmp_path):
    """By its local executor: the jobs are processes that unpickle their words and train."""
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit is not installed here: make install EXTRA=slurm")
    from seqzoo.cli.submit import submit

    lines = [["train", *tiny_words, f"optimizer.lr={lr}", "--runs", str(tmp_path / "runs")]
             for lr in ("1e-3", "1e-2")]  # fmt: skip
    jobs = submit(lines, LauncherSettings(kind="submitit_local", gpus_per_node=0), tmp_path / "%j")
    assert [job.result() for job in jobs] == [0, 0]
    found = find_runs(tmp_path / "runs")
    assert [read_status(path)["state"] for path in found] == ["finished"] * 2
