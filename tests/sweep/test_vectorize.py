"""Groups of trials: which belong together, and that each ends as its run alone would."""

import json
import math
import os
import signal

import pytest

from seqzoo.cli.main import main
from seqzoo.errors import ConfigError, SeqzooError
from seqzoo.eval.bench.compile import compilations
from seqzoo.sweep import vectorize, worker
from seqzoo.sweep.claim import Claimed
from seqzoo.sweep.settings import split
from seqzoo.sweep.storage import StorageError
from seqzoo.sweep.study import Stopped, Study
from seqzoo.train import group as train_groups
from seqzoo.train.run_files import read_status

GROUP = ("sweep=grid", "sweep.vectorize=[trainer.seed,optimizer.lr]")


def say_nothing(text: str) -> None:
    """Trials need no words here."""


def test_seeds_rates_and_data_of_two_groups_one_of_them_diverges(create):
    study = create("sweep=grid", "sweep.vectorize=[optimizer.lr,data.seed,trainer.seed]",
                   "optimizer.lr=1e-3,1e38", "data.seed=0,1", "sweep.seeds=2",
                   "sweep.vectorize_most=4")  # fmt: skip
    assert [[t.number for t in group.trials] for group in vectorize.groups(study)] == [
        [0, 1],
        [2, 3],
    ]
    with compilations() as names:
        assert worker.work(study.path, say=say_nothing) == 0
    assert sum("_mapped" in name for name in names) == 1  # both groups share the program
    rows = study.rows()
    assert [row.state for row in rows] == ["finished"] * 2 + ["diverged"] * 2
    for row in rows:
        assert len(row.attrs["values"]) == len(set(row.attrs["runs"])) == 2
        states = {read_status(study.path / name)["state"] for name in row.attrs["runs"]}
        assert states == {"finished" if row.state == "finished" else "not_finite"}
    assert rows[0].last[0] == 12 and len(rows[0].attrs["tests"]) == 2
    assert rows[2].value == -math.inf and rows[2].attrs["diverged"] == 2
    record = (study.path / rows[0].attrs["runs"][0] / "env/001.json").read_text()
    assert "4 by map" in record


def test_groups_are_what_shares_a_program(create):
    study = create(*GROUP, "model.n_layers=1,2", "optimizer.lr=1e-3,1e-2,3e-2", "sweep.seeds=3",
                   "sweep.vectorize_most=7")  # fmt: skip
    found = [[t.number for t in group.trials] for group in vectorize.groups(study)]
    assert found == [[0, 1], [2], [3, 4], [5]]
    names = {group.name for group in vectorize.groups(study)}
    assert len(names) == 4 == len(names | {g.name for g in vectorize.groups(study)})


def test_two_workers_never_have_the_same_group(create):
    one = create(*GROUP, "optimizer.lr=1e-3,1e-2,3e-2,5e-2", "sweep.vectorize=[optimizer.lr]",
                 "sweep.vectorize_most=2")  # fmt: skip
    two = Study.open(one.path)
    taken = [vectorize.claim(one), vectorize.claim(two)]
    assert [[claimed.number for claimed in claims] for claims in taken] == [[0, 1], [2, 3]]
    assert vectorize.claim(one) == [] == vectorize.claim(two)
    for claimed in taken[0]:  # as the kernel does for a process that dies
        claimed.__exit__()
    again = vectorize.claim(Study.open(one.path))
    assert [claimed.number for claimed in again] == [0, 1]
    assert [claimed.attrs["starts"] for claimed in again] == [2, 2]


@pytest.mark.slow  # of its parts, tests/train/test_group.py and the test above are quicker
def test_a_killed_group_comes_together_again(create, monkeypatch):
    words = (*GROUP, "sweep.vectorize=[optimizer.lr]", "optimizer.lr=1e-3,1e-2",
             "trainer.log_every=1")  # fmt: skip
    whole = create(*words, "sweep.name=whole")
    worker.work(whole.path, say=say_nothing)
    study = create(*words, "sweep.name=broken")
    advance = train_groups.Group._advance

    class Killed(BaseException):
        """No handler of ours sees it, as with SIGKILL."""

    def die(group):
        if group._there()[0].step == 9:
            raise Killed
        advance(group)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_groups.Group, "_advance", die)
        worker.work(study.path, say=say_nothing)
    assert [row.state for row in study.rows()] == ["interrupted"] * 2
    worker.work(study.path, say=say_nothing)
    for row, same in zip(study.rows(), whole.rows(), strict=True):
        assert row.state == "finished" and row.value == same.value and row.attrs["starts"] == 2
        lines = [
            (s.path / r.attrs["runs"][0] / "metrics.jsonl").read_bytes()
            for s, r in ((study, row), (whole, same))
        ]
        assert lines[0] == lines[1]


def test_a_storage_that_stays_away_saves_the_group(create, monkeypatch):
    study = create(*GROUP, "optimizer.lr=1e-3,1e-2", "sweep.seeds=2",
                   "trainer.save_every=100")  # fmt: skip
    report = Claimed.report

    def away(claimed, step, value):
        if step == 8:
            raise StorageError("the storage cannot be reached")
        report(claimed, step, value)

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(Claimed, "report", away)
        worker.work(study.path, say=say_nothing)
    assert {read_status(study.path / row.attrs["runs"][0])["step"] for row in study.rows()} == {8}
    worker.work(study.path, say=say_nothing)
    for frozen in study.trials():
        assert sorted(frozen.intermediate_values) == [4, 8, 12]


def test_a_stop_leaves_a_trial_of_the_group_that_ended_alone(create, monkeypatch):
    study = create(*GROUP, "sweep.vectorize=[optimizer.lr]", "optimizer.lr=1e38,1e-3",
                   "trainer.log_every=1")  # fmt: skip
    advance = train_groups.Group._advance

    def signalled(group):
        there = group._there()
        if there[0].step == 9:
            assert len(there) == 1  # the other diverged, and the study was told
            os.kill(os.getpid(), signal.SIGUSR2)
        advance(group)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="SIGUSR2.*saved") as caught:
        patch.setattr(train_groups.Group, "_advance", signalled)
        worker.work(study.path, say=say_nothing)
    assert caught.value.exit_code == 75
    assert [row.state for row in study.rows()] == ["diverged", "interrupted"]
    assert study.rows()[1].attrs["deaths"] == []
    worker.work(study.path, say=say_nothing)
    assert [row.state for row in study.rows()] == ["diverged", "finished"]


def test_an_error_of_the_group_spares_a_trial_that_ended(create, monkeypatch):
    study = create(*GROUP, "optimizer.lr=1e-3,1e-2", "sweep.vectorize=[optimizer.lr]")
    heard = []

    def broken(study, claims, **options):
        claims[0].tell(0.5)
        raise SeqzooError("the disk is full")

    monkeypatch.setattr(vectorize, "run", broken)
    assert worker.work(study.path, say=heard.append) == 0
    assert [row.state for row in study.rows()] == ["finished", "failed"]
    assert [line for line in heard if "failed" in line] == ["trial 1 failed: the disk is full"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep.vectorize=[model.d_model]", "sweep=grid"], "holds model.d_model.*one compiled"),
        (["sweep.vectorize=[optimizer.l]", "sweep=grid"], "did you mean 'optimizer.lr'"),
        (["sweep.vectorize=[optimizer.lr]"], "tpe draws each point from trials that have ended"),
        (
            ["sweep.vectorize=[optimizer.lr]", "sweep=grid", "sweep.pruner=median"],
            "are one program",
        ),
        (["sweep.vectorize=[data.seed]", "sweep=grid"], "data.seed, which is not searched"),
        (["sweep.vectorize=[optimizer.lr]", "sweep=grid", "sweep.seeds=2"], "put trainer.seed"),
        (["sweep.vectorize=[optimizer.lr]", "sweep=grid", "sweep.vectorize_by=map2"], "map, vmap"),
        (["sweep.vectorize_most=0", "sweep=grid"], "at least 1"),
    ],
)
def test_what_cannot_be_vectorised(create, words, said):
    with pytest.raises(ConfigError, match=said):
        create(*words, "optimizer.lr=1e-3,1e-2")


def test_a_study_without_it_is_the_study_that_it_was(create):
    """Hashes of studies that are there must stay."""
    plain = create("sweep=grid", "optimizer.lr=1e-3,1e-2")
    fixed = create("sweep=grid", "optimizer.lr=1e-3,1e-2", "sweep.vectorize_most=8")
    assert plain.definition.hash == fixed.definition.hash
    other = split(["sweep=grid", "optimizer.lr=1e-3,1e-2", "sweep.vectorize=[optimizer.lr]"])
    assert other.sweep.vectorize == ["optimizer.lr"] and other.sweep.vectorize_by is None


def test_a_dry_run_shows_the_groups(tiny_words, capsys):
    words = ["optimizer.lr=1e-3,1e-2,3e-2", *GROUP, "sweep.seeds=5", "sweep.vectorize_most=10"]
    assert main(["sweep", *words, *tiny_words, "--dry-run"]) == 0
    assert "trained in 2 groups of 10, 5 runs" in capsys.readouterr().out


@pytest.mark.slow
def test_the_bench(capsys):
    assert main(["bench", "vectorize", "--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]["vectorize"]
    assert [row["case"] for row in rows] == [
        "step of one run",
        "step of 2 runs by map",
        "step of 2 runs by vmap",
        "one run of 8 steps",
        "2 of them as a group",
    ]
    assert all(row["ms"] > 0 for row in rows)
