"""Groups of trials: which belong together, and that each ends as its run alone would."""

import math

import pytest

from seqzoo.errors import ConfigError
from seqzoo.sweep import trial as trials
from seqzoo.sweep import vectorize, worker
from seqzoo.train import loop
from seqzoo.train.folder import read_metrics

GROUP = ("sweep=grid", "sweep.vectorize=[trainer.seed,optimizer.lr]")


def say_nothing(text: str) -> None:
    """Trials need no words here."""


def test_seeds_and_rates_of_one_group(create, tmp_path):
    study = create(*GROUP, "optimizer.lr=1e-3,1e-2", "sweep.seeds=2", "trainer.log_every=1")
    assert worker.work(study.path, say=say_nothing) == 0
    rows = study.rows()
    assert [row.state for row in rows] == ["finished"] * 2
    for row in rows:
        assert len(row.attrs["values"]) == len(row.attrs["runs"]) == 2
        assert row.last[0] == 12
    words = ["trainer.seed=1", *study.space.words(rows[1].point)]
    alone = loop.train(trials.compose(words), overrides=words, root=tmp_path / "alone")
    inside = study.path / rows[1].attrs["runs"][1]
    assert inside.name == alone.path.name
    for a, b in zip(read_metrics(inside), read_metrics(alone.path), strict=True):
        assert list(a) == list(b)
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-3, abs=1e-4)
    assert "group" in (inside / "env/001.json").read_text()
