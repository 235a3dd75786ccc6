"""A worker at work: values, one compilation, pruning, failures, and going on where one died."""

import json
import math
import os
import random
import signal

import pytest

from seqzoo.cli.sweep import _size
from seqzoo.errors import NotFiniteError, SeqzooError
from seqzoo.eval.bench.compile import compilations
from seqzoo.sweep import trial as trials
from seqzoo.sweep import worker
from seqzoo.sweep.claim import Claimed
from seqzoo.sweep.results import results
from seqzoo.sweep.storage import StorageError
from seqzoo.sweep.study import Stopped, Study
from seqzoo.train import loop
from seqzoo.train.run_files import read_json, read_metrics, read_status
from seqzoo.train.session import Session


def say_nothing(text: str) -> None:
    """Trials need no words here."""


def test_trials_are_run_folders_and_compile_once(create):
    study = create(
        "optimizer.lr=tag(log,interval(1e-3,1e-2))",
        "optimizer.weight_decay=0,0.1",
        "optimizer.clip_norm=interval(0.5,2)",
        "data.seed=int(interval(0,9))",
        "trainer.seed=int(interval(0,9))",
        "sweep=random",
        "sweep.n_trials=4",
        "trainer.eval_every=12",
        # b1 is a constant of the program: this one is in no cache, on disk or in memory.
        f"optimizer.b1={random.uniform(0.8, 0.9):.9f}",
    )
    with compilations() as names:
        assert worker.work(study.path, say=say_nothing, size=_size) == 0
    assert sum("step" in name and "eval" not in name for name in names) == 1
    rows = study.rows()
    assert [row.state for row in rows] == ["finished"] * 4
    for row in rows:
        (name,) = row.attrs["runs"]
        status = read_status(study.path / name)
        assert status["state"] == "finished" and status["metric"]["value"] == row.value
        assert row.last == (12, row.value) and row.attrs["size"]["state_total"] > 0
        record = read_json(study.path / name / "env/001.json")
        assert record["hash"] == status["hash"] and isinstance(record["threads"], int)
    assert len({row.attrs["runs"][0] for row in rows}) == 4


def test_a_trial_equals_its_command_run_alone(create, tmp_path):
    study = create("optimizer.lr=tag(log,interval(1e-3,1e-2))", "sweep.n_trials=1")
    worker.work(study.path, say=say_nothing)
    (row,) = study.rows()
    words = study.space.words(row.point)
    alone = loop.train(trials.compose(words), overrides=words, root=tmp_path / "alone")
    assert alone.value == row.value
    inside = study.path / row.attrs["runs"][0]
    assert (inside / "metrics.jsonl").read_bytes() == (alone.path / "metrics.jsonl").read_bytes()


def test_seeds_are_replicas_and_their_median_counts(create):
    study = create("optimizer.lr=1e-2", "sweep=grid", "sweep.seeds=3", "trainer.seed=5")
    worker.work(study.path, say=say_nothing)
    (row,) = study.rows()
    values = [float(value) for value in row.attrs["values"]]
    assert len(values) == 3 and row.value == sorted(values)[1]
    firsts = [
        (study.path / name / "overrides.txt").read_text().split("\n")[0]
        for name in row.attrs["runs"]
    ]
    assert firsts == ["trainer.seed=5", "trainer.seed=6", "trainer.seed=7"]
    found = results(study).trials[0]
    assert found.values == values and len(found.tests) == 3


def test_what_diverges_counts_as_worst_and_is_not_run_twice(create, monkeypatch):
    study = create("optimizer.lr=1e-3,1e-2", "sweep=grid", "sweep.seeds=1")
    train, calls = loop.train, []

    def diverging(config, **options):
        calls.append(config["optimizer"]["lr"])
        if config["optimizer"]["lr"] == 1e-2:
            raise NotFiniteError("step 3 is not finite")
        return train(config, **options)

    monkeypatch.setattr(loop, "train", diverging)
    worker.work(study.path, say=say_nothing)
    rows = study.rows()
    assert [row.state for row in rows] == ["finished", "diverged"]
    assert rows[1].value == -math.inf and rows[1].attrs["diverged"] == 1
    assert calls == [1e-3, 1e-2]


def test_a_trial_that_lags_is_ended_and_says_so(create, monkeypatch):
    study = create("optimizer.lr=1e-3,2e-3", "sweep=grid", "sweep.pruner=median",
                   "sweep.pruner_startup=1")  # fmt: skip
    with study.claim() as claimed:  # a trial that was good from the beginning
        for step in (4, 8, 12):
            claimed.report(step, 2.0)
        claimed.tell(2.0)
    worker.work(study.path, say=say_nothing)
    row = study.rows()[1]
    assert row.state == "pruned" and row.last[0] == 4
    status = read_status(study.path / row.attrs["runs"][0])
    assert status["state"] == "pruned" and status["step"] == 4
    assert "lags behind" in status["error"]


def test_halving_keeps_the_first_rung_from_the_settings(create):
    study = create("optimizer.lr=1e-3,2e-3,4e-3", "sweep=grid", "sweep.pruner=halving",
                   "sweep.pruner_min_step=8", "sweep.pruner_factor=2")  # fmt: skip
    for number in (0, 1):
        with study.claim() as claimed:
            for step in (4, 8, 12):
                claimed.report(step, 2.0 + number)
                assert not claimed.lags() or number == 0
            claimed.tell(2.0 + number)
    worker.work(study.path, say=say_nothing)
    row = study.rows()[2]
    assert row.state == "pruned" and row.last[0] == 8


def test_a_failure_stays_with_its_trial_until_it_is_resumed(create, monkeypatch):
    study = create("optimizer.lr=1e-3,1e-2", "sweep=grid", "sweep.max_failures=1")
    train = loop.train

    def full(config, **options):
        if config["optimizer"]["lr"] == 1e-3:
            raise SeqzooError("the disk or the quota is full")
        return train(config, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", full)
        assert worker.work(study.path, say=say_nothing) == 0
    assert [row.state for row in study.rows()] == ["failed", "finished"]
    assert study.finished() and not study.too_many_failures()
    study.resume()
    worker.work(study.path, say=say_nothing)
    assert [row.state for row in study.rows()] == ["finished", "finished"]


def test_a_bug_is_a_failure_and_too_many_of__the_study(create, monkeypatch, capsys):
    study = create("optimizer.lr=1e-3,1e-2", "sweep=grid", "sweep.max_failures=0")
    monkeypatch.setattr(trials, "run", lambda study, claimed, size: 1 / 0)
    with pytest.raises(Stopped, match="more than 0 trials failed"):
        worker.work(study.path, say=say_nothing)
    assert [row.state for row in study.rows()] == ["failed", "waiting"]
    assert "ZeroDivisionError" in study.failures()[0].attrs["failure"]
    assert "Traceback" in capsys.readouterr().err


def test_a_killed_trial_goes_on_from_its_checkpoint_bit_by_bit(create, monkeypatch, tmp_path):
    words = ("optimizer.lr=1e-2", "sweep=grid", "trainer.log_every=1")
    whole = create(*words, "sweep.name=whole")
    worker.work(whole.path, say=say_nothing)

    study = create(*words, "sweep.name=broken")
    advance = Session.advance

    class Killed(BaseException):
        """No handler of ours sees it, as with SIGKILL."""

    def die(session):
        if session.step == 9:
            session._checkpoints.wait()
            raise Killed
        advance(session)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Session, "advance", die)
        worker.work(study.path, say=say_nothing)
    (row,) = study.rows()
    assert row.state == "interrupted" and row.last[0] == 8
    worker.work(study.path, say=say_nothing)
    (row,), (same,) = study.rows(), whole.rows()
    assert row.state == "finished" and row.value == same.value and row.attrs["starts"] == 2
    one, other = (s.path / r.attrs["runs"][0] for s, r in ((study, row), (whole, same)))
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert "going on from step 8" in (one / "train.log").read_text()
    assert [line["step"] for line in read_metrics(one) if "train/loss" in line][-1] == 12


def test_a_signal_saves_the_trial_and_ends_the_worker(create, monkeypatch):
    study = create("optimizer.lr=1e-3,1e-2", "sweep=grid")
    advance = Session.advance

    def signalled(session):
        if session.step == 5:
            os.kill(os.getpid(), signal.SIGUSR2)
        advance(session)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="SIGUSR2.*saved") as caught:
        patch.setattr(Session, "advance", signalled)
        worker.work(study.path, say=say_nothing)
    assert caught.value.exit_code == 75
    row = study.rows()[0]
    assert row.state == "interrupted" and row.attrs["deaths"] == []
    assert read_status(study.path / row.attrs["runs"][0])["step"] == 6
    worker.work(study.path, say=say_nothing)
    assert study.finished() and len(study.rows()) == 2


def test_a_worker_leaves_when_its_parent_is_gone(create, monkeypatch):
    study = create("optimizer.lr=1e-3,1e-2", "sweep=grid")
    monkeypatch.setenv(worker.PARENT, "1234567")
    monkeypatch.setattr(worker, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(Study, "claim", lambda self: None)
    monkeypatch.setattr(worker, "_POLL_SECONDS", 0.05)
    with pytest.raises(Stopped, match="the process that started it is gone|SIGTERM"):
        worker.work(study.path, say=say_nothing)


def test_a_worker_leaves_when_the_study_is_stopped(create):
    study = create("optimizer.lr=1e-3,1e-2", "sweep=grid")
    study.stop("enough")
    with pytest.raises(Stopped, match="enough"):
        worker.work(study.path, say=say_nothing)
    assert json.loads((study.path / "study.json").read_text())["name"] == study.definition.name


def test_a_seed_cannot_be_searched_and_replicated(create):
    from seqzoo.errors import ConfigError

    with pytest.raises(ConfigError, match="trainer.seed"):
        create("trainer.seed=1,2", "sweep=grid", "sweep.seeds=2")


def test_a_storage_that_stays_away_saves_the_run_and_ends_the_worker(create, monkeypatch):
    study = create("optimizer.lr=1e-2", "sweep=grid", "trainer.save_every=100")
    report = Claimed.report

    def away(claimed, step, value):
        if step == 8:
            raise StorageError("the storage cannot be reached")
        report(claimed, step, value)

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(Claimed, "report", away)
        worker.work(study.path, say=say_nothing)
    (row,) = study.rows()
    assert row.state == "interrupted" and row.last[0] == 4
    assert read_status(study.path / row.attrs["runs"][0])["step"] == 8
    worker.work(study.path, say=say_nothing)
    frozen = study.trials()[0]
    assert sorted(frozen.intermediate_values) == [4, 8, 12]  # told when it was back
