"""`seqzoo sweep` as it is typed: exit codes, messages, and a sweep from end to end."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from seqzoo.cli import main
from seqzoo.sweep import pool, slurm
from seqzoo.sweep.study import Study

GRID = ("optimizer.lr=1e-3,1e-2", "sweep=grid", "sweep.name=rates")


@pytest.fixture
def type_(tiny_words, tmp_path, capsys):
    """Types a command: (exit code, standard output, standard error)."""

    def run(*words: str, tiny: bool = True):
        more = tiny_words if tiny else ()
        code = main.main(["sweep", *words, *more, "--runs", str(tmp_path / "runs")])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def test_a_word_that_does_not_parse_exits_2_with_a_caret(type_):
    code, _, err = type_("optimizer.lr=tag(log,interval(1e-4,1e-2)")
    assert code == 2
    _, word, caret, *_ = err.splitlines()
    assert word.strip() == "optimizer.lr=tag(log,interval(1e-4,1e-2)"
    assert caret.index("^") == len(word)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["sweep.sampler=tep", *GRID[:1]], "did you mean 'tpe'"),
        (["mixer=mamba,basd"], "did you mean 'based'"),
        (["status"], "one study"),
        (["status", "nothing"], "there is no study nothing"),
        (["--worker", "nothing"], "there is no study nothing"),
        (["optimizer.lr=1,2", "sweep.storage=here"], "a URL is needed"),
        (["--worker", "x", "optimizer.lr=1"], "takes everything from its study"),
    ],
)
def test_bad_words_exit_2(type_, words, why):
    code, _, err = type_(*words, tiny=words[0] not in ("status", "--worker"))
    assert code == 2 and why in err


def test_a_dry_run_shows_the_trials_and_makes_nothing(type_, tmp_path):
    code, out, _ = type_(*GRID, "--dry-run")
    assert code == 0 and "2 trials" in out and "optimizer.lr=0.01" in out
    code, out, _ = type_(*GRID, "launcher=slurm", "--dry-run")
    assert code == 0 and out.startswith("#!/bin/bash") and "--signal=USR2@120" in out
    assert not (tmp_path / "runs").exists()


def test_slurm_gets_the_script(type_, monkeypatch, tmp_path):
    monkeypatch.setattr(slurm, "submit", lambda study, launcher: "4711")
    code, out, _ = type_(*GRID, "launcher=slurm", "launcher.nodes=2")
    assert code == 0 and "submitted as job 4711" in out
    code, out, _ = type_("resume", str(tmp_path / "runs/sweeps/rates"), tiny=False)
    assert code == 0 and "submitted as job 4711" in out


def test_status_stop_and_their_exit_codes(create, type_):
    study = create(*GRID, "sweep.max_failures=0")
    code, out, _ = type_("status", "rates", tiny=False)
    assert code == 75 and "2 waiting" in out
    code, _, _ = type_("stop", "rates", tiny=False)
    assert code == 0 and study.stopped()
    with study.claim() as claimed:
        claimed.tell(0.5)
    with study.claim() as claimed:
        claimed.fail("the disk is full")
    code, out, _ = type_("status", "rates", "--format", "json", tiny=False)
    told = json.loads(out)
    assert code == 1 and told["states"] == {"finished": 1, "failed": 1}
    assert told["trials"][1]["failure"] == "the disk is full" and told["stopped"]


def test_failures_are_listed_at_the_end_and_count_above_the_limit(create, type_, monkeypatch):
    study = create(*GRID, "sweep.max_failures=1")

    class Crew:
        """Workers that did all they could."""

        def __init__(self, study, launcher, **more):
            self.study = study

        def run(self):
            while (claimed := self.study.claim()) is not None:
                with claimed:
                    claimed.fail("disk") if claimed.number else claimed.tell(0.5)
            return 0

    monkeypatch.setattr(pool, "Pool", Crew)
    code, out, _ = type_("resume", "rates", tiny=False)
    assert code == 0 and "tries them again" in out and "disk" in out
    assert study.finished()


@pytest.fixture
def start(tmp_path, tiny_words, quick_flags):
    """Starts a sweep in processes of its own; what is left of it is killed at the end."""
    started = []

    def run(*words: str) -> subprocess.Popen:
        env = {**os.environ, "XLA_FLAGS": quick_flags}
        command = [sys.executable, "-m", "seqzoo.cli.main", "sweep", *words, *tiny_words]
        with open(tmp_path / "out", "ab") as out:
            started.append(
                subprocess.Popen(
                    [*command, "--runs", str(tmp_path / "runs")], env=env, stdout=out, stderr=out
                )
            )
        return started[-1]

    yield run
    for one in started:
        if one.poll() is None:
            one.terminate()
            one.wait()


def test_a_sweep_from_end_to_end_and_again(start, tmp_path, type_):
    words = (*GRID, "launcher.workers=1", "launcher.threads=1")
    assert start(*words).wait() == 0, (tmp_path / "out").read_text()
    study = Study.open(tmp_path / "runs/sweeps/rates")
    assert [row.state for row in study.rows()] == ["finished"] * 2
    assert all(row.attrs["size"]["state_total"] > 0 for row in study.rows())
    code, out, _ = type_(*words)  # nothing is left to do
    assert code == 0 and "2 finished" in out and "seqzoo report" in out
    record = json.loads(next(study.path.glob("*/*/env/001.json")).read_text())
    assert record["threads"] == 1 and record["variables"]["NPROC"] == "1"


def _wait(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)


@pytest.mark.slow
def test_kill_9_of_the_pool_and_of_a_worker_loses_nothing(start, tmp_path):
    words = (*GRID, "trainer.steps=600", "launcher.workers=2", "launcher.threads=1")
    first = start(*words)
    place = tmp_path / "runs/sweeps/rates"
    _wait(lambda: len(list(place.glob("mqar/*/metrics.jsonl"))) >= 2)
    first.kill()
    first.wait()
    second = start(*words)
    children = pathlib.Path(f"/proc/{second.pid}/task/{second.pid}/children")
    _wait(lambda: children.read_text().split() or second.poll() is not None)
    for word in children.read_text().split()[:1]:
        os.kill(int(word), signal.SIGKILL)
    assert second.wait() == 0, (tmp_path / "out").read_text()
    rows = Study.open(place).rows()
    assert [row.state for row in rows] == ["finished"] * 2
    assert len(list(place.glob("mqar/*/config.yaml"))) - 1 == 2  # and the link `latest`


@pytest.mark.slow
def test_stop_from_elsewhere_saves_and_ends_with_75(start, tmp_path, type_):
    words = (*GRID, "trainer.steps=100000", "launcher.workers=1", "launcher.threads=1")
    sweep = start(*words)
    place = tmp_path / "runs/sweeps/rates"
    _wait(lambda: list(place.glob("mqar/*/metrics.jsonl")))
    code, _, _ = type_("stop", "rates", tiny=False)
    assert code == 0 and sweep.wait() == 75
    row = Study.open(place).rows()[0]
    assert row.state == "interrupted"
    status = json.loads((place / row.attrs["runs"][0] / "status.json").read_text())
    assert status["state"] == "preempted" and status["step"] > 0


@pytest.mark.slow
def test_usr2_reaches_the_workers_through_the_pool_as_under_slurm(start, tmp_path):
    words = (*GRID, "trainer.steps=100000", "launcher.workers=1", "launcher.threads=1")
    sweep = start(*words)
    place = tmp_path / "runs/sweeps/rates"
    _wait(lambda: list(place.glob("mqar/*/metrics.jsonl")))
    sweep.send_signal(signal.SIGUSR2)
    assert sweep.wait() == 75
    assert not (place / "stop").exists()
