"""Runs trained as a group leave what they would leave alone."""

import os
import shutil
import signal

import jax
import numpy as np
import pytest

import seqzoo
from seqzoo.errors import ConfigError, NotFiniteError, Preempted, SeqzooError
from seqzoo.train.group import Group, Job, train_group
from seqzoo.train.run_files import read_metrics, read_status
from seqzoo.train.session import Session

# Always three places, so that tests share a program.
SEEDS = (("trainer.seed=1",), None, ("trainer.seed=2", "data.seed=1", "optimizer.lr=1e-2"))
slow = pytest.mark.slow


@pytest.fixture
def together(tiny, tiny_words, tmp_path):
    """Trains runs of the tiny model as a group: ``together(["trainer.seed=1"], None)``."""

    def run(*lines, by="map", root=None):
        jobs = [None if line is None else Job(tiny(*line), [*tiny_words, *line]) for line in lines]
        return train_group(jobs, name="test", root=root or tmp_path / "group", by=by)

    return run


def weights_of(path, step="last"):
    run = seqzoo.load(path, step=step)
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(run.params)])


def every_step(lines):
    return [line and ["trainer.log_every=1", *line] for line in lines]


@pytest.mark.parametrize("by", ["map", pytest.param("vmap", marks=slow)])
def test_a_member_is_its_run_alone(together, fit, by):
    words = ("trainer.log_every=1",)
    found = together(*every_step(SEEDS), by=by)
    assert found[1] is None
    for line, one in ((SEEDS[place], found[place]) for place in (0, 2)):
        alone = fit(*words, *line)
        assert one.path.name == alone.path.name and one.path != alone.path
        lines, others = read_metrics(one.path), read_metrics(alone.path)
        assert [list(a) for a in lines] == [list(b) for b in others]
        for a, b in zip(lines, others, strict=True):
            assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-3, abs=1e-4)
        first = [line["train/loss"] for line in (lines[0], others[0])]
        assert first[0] == pytest.approx(first[1], rel=1e-6)
        assert one.value == pytest.approx(alone.value, abs=1e-6) and one.step == alone.step
        np.testing.assert_allclose(weights_of(one.path), weights_of(alone.path), atol=1e-5)


@slow
@pytest.mark.parametrize("by", ["map", "vmap"])
def test_200_steps_stay_beside_their_runs_alone(together, fit, by):
    words = ["trainer.steps=200", "trainer.eval_every=100", "trainer.log_every=1"]
    lines = [["trainer.seed=1", "optimizer.weight_decay=0.3"], ["optimizer.lr=3e-2"],
             ["data.seed=4", "model.embed_std=0.3"]]  # fmt: skip
    found = together(*([*words, *line] for line in lines), by=by)
    for line, one in zip(lines, found, strict=True):
        losses = [
            np.array([line["train/loss"] for line in read_metrics(path) if "train/loss" in line])
            for path in (one.path, fit(*words, *line).path)
        ]
        assert len(losses[0]) == len(losses[1]) == 200
        np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-6)
        np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.parametrize("by", ["map", pytest.param("vmap", marks=slow)])
def test_what_is_not_finite_ends_alone(together, tmp_path, by):
    good, bad = ["trainer.seed=1"], ["trainer.seed=2", "optimizer.lr=1e38"]
    other = ["trainer.seed=3", "model.embed_std=0.5"]
    one, ended, two = together(good, bad, other, by=by)
    assert isinstance(ended, NotFiniteError) and "is not finite" in str(ended)
    same, _, like = together(good, ["trainer.seed=2"], other, by=by, root=tmp_path / "without")
    for a, b in ((one, same), (two, like)):
        assert (a.path / "metrics.jsonl").read_bytes() == (b.path / "metrics.jsonl").read_bytes()
        assert np.array_equal(weights_of(a.path), weights_of(b.path))
    paths = (path.parent for path in (tmp_path / "group").glob("mqar/*/env"))
    states = {read_status(path)["state"] for path in paths}
    assert states == {"finished", "not_finite"}
    again = together(good, bad, other, by=by)  # nothing is left to do
    assert [type(a) for a in again] == [type(one), NotFiniteError, type(two)]
    assert again[0].status == "finished before" and again[0].value == one.value


def test_what_reaches_its_target_ends_alone(together, tmp_path):
    lines = [["trainer.seed=1"], ["trainer.seed=2"], ["trainer.seed=3"]]
    whole = together(*lines)
    first = [read_metrics(one.path)[1]["valid/accuracy"] for one in whole]
    target = max(first)
    assert min(first) < target
    stopping = [f"task.target={target}", "trainer.stop_at_target=true"]
    found = together(*([*stopping, *line] for line in lines))
    assert found[first.index(target)].step == 4
    for one, other in zip(found, whole, strict=True):
        lines = [line for line in read_metrics(one.path) if "test/loss" not in line]
        assert lines == read_metrics(other.path)[: len(lines)]
        assert read_status(one.path)["state"] == "finished"
    assert {one.step for one in found} != {4}


class Killed(BaseException):
    """No handler of ours sees it, as with SIGKILL."""


@pytest.mark.parametrize("by", ["map", pytest.param("vmap", marks=slow)])
def test_a_killed_group_goes_on_bit_by_bit(together, monkeypatch, tmp_path, by):
    lines = every_step(SEEDS)
    whole = together(*lines, by=by, root=tmp_path / "whole")
    advance = Group._advance

    def die(group):
        if group._there()[0].step == 9:
            raise Killed
        advance(group)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Group, "_advance", die)
        together(*lines, by=by)
    # One of them had not saved yet when the other had.
    behind = max(path for path in (tmp_path / "group").glob("mqar/*/checkpoints/8"))
    shutil.rmtree(behind)
    found, whole = (list(filter(None, one)) for one in (together(*lines, by=by), whole))
    told = [(one.path / "train.log").read_text() for one in found]
    assert sorted("going on from step 8" in text for text in told) == [False, True]
    for one, other in zip(found, whole, strict=True):
        names = [(a.path / "metrics.jsonl").read_bytes() for a in (one, other)]
        assert names[0] == names[1]
        assert np.array_equal(weights_of(one.path), weights_of(other.path))
        assert one.value == other.value and one.test == other.test


def test_a_signal_saves_all_of_them(together, monkeypatch, tmp_path):
    advance = Group._advance

    def signalled(group):
        if group._there()[0].step == 5:
            os.kill(os.getpid(), signal.SIGUSR2)
        advance(group)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="SIGUSR2 at step 6, saved"):
        patch.setattr(Group, "_advance", signalled)
        together(*SEEDS)
    paths = [path.parent for path in (tmp_path / "group").glob("mqar/*/env")]
    stopped = [read_status(path) for path in paths if not path.parent.is_symlink()]
    assert {(one["state"], one["step"]) for one in stopped} == {("preempted", 6)}
    assert [one and one.step for one in together(*SEEDS)] == [12, None, 12]


def test_an_error_stays_with_its_run(together, monkeypatch):
    save = Session.save

    def full(session):
        if session.run.trainer.seed == 2:
            raise OSError(28, "No space left on device")
        save(session)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", full)
        one, _, failed = together(*SEEDS)
    assert one.step == 12 and isinstance(failed, SeqzooError) and "make room" in str(failed)
    assert [found and found.step for found in together(*SEEDS)] == [12, None, 12]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.dropout=0.1"], "share one program, and graphdef differ"),
        (["trainer.steps=8"], "trainer.steps differ"),
        (["mesh.data=2"], "mesh has 2"),
    ],
)
def test_what_is_no_group(together, words, said):
    lines = [words, words] if said.startswith("mesh") else [["trainer.seed=1"], words]
    with pytest.raises(ConfigError, match=said):
        together(*lines)
