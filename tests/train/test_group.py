"""Runs trained as a group leave what they would leave alone."""

import json
import os
import signal

import numpy as np
import pytest

import seqzoo
from seqzoo.errors import ConfigError, NotFiniteError, Preempted
from seqzoo.train import group as groups
from seqzoo.train.folder import read_metrics, read_status
from seqzoo.train.group import Job, train_group
from seqzoo.train.session import Session

SEEDS = (("trainer.seed=1",), ("trainer.seed=2", "data.seed=1", "optimizer.lr=1e-2"))


@pytest.fixture
def together(tiny, tiny_words, tmp_path):
    """Trains runs of the tiny model as a group: ``together(["trainer.seed=1"], None)``."""

    def run(*lines, by="map", root=None):
        jobs = [
            None if line is None else Job(tiny(*line), [*tiny_words, *line]) for line in lines
        ]
        return train_group(jobs, name="test", root=root or tmp_path / "group", by=by)

    return run


def weights_of(path, step="last"):
    import jax

    run = seqzoo.load(path, step=step)
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(run.params)])


@pytest.mark.parametrize("by", ["map", "vmap"])
def test_a_member_is_its_run_alone(together, fit, by):
    words = ("trainer.log_every=1",)
    found = together(*([*words, *line] for line in SEEDS), by=by)
    for line, one in zip(SEEDS, found, strict=True):
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
