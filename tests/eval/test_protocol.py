"""Tuning alike, and what is said of seeds."""

import pytest

from seqzoo.errors import NotFiniteError, Preempted
from seqzoo.eval import protocol


def test_a_best_rate_at_an_edge_widens_the_grid():
    peak = lambda best: lambda rate: -abs(rate / best - 1)
    assert protocol.tuned(peak(3e-3)) == (3e-3, 4)
    rate, tried = protocol.tuned(peak(0.09))
    assert rate == pytest.approx(0.09) and tried == 6  # 0.09 and what lies beyond it
    rate, tried = protocol.tuned(peak(1e-3 / 9))
    assert rate == pytest.approx(1e-3 / 9) and tried == 7
    rate, tried = protocol.tuned(lambda rate: rate)  # no end: three times as many and no more
    assert tried == 12


def test_a_row_is_told_by_its_median_and_interval():
    told = protocol.summary([0.9, 1.0, 0.2, 0.95, 0.97])
    assert told["median"] == 0.95 and (told["low"], told["high"]) == (0.2, 1.0)
    assert told["low"] <= told["ci_low"] <= told["median"] <= told["ci_high"] <= told["high"]
    assert protocol.solved([0.9, 1.0, 0.2, 0.95, 0.97]) == "3/5"


def test_tables_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "results.csv"
    assert protocol.read(file) == []
    protocol.write([{"row": "a", "median": 0.5}, {"row": "b", "exact": 0.1}], file)
    assert protocol.read(file) == [
        {"row": "a", "median": "0.5", "exact": ""},
        {"row": "b", "median": "", "exact": "0.1"},
    ]


def test_a_run_that_was_stopped_stops_the_study(monkeypatch, capsys):
    def stopped(*args, **kwargs):
        raise Preempted("stopped at step 3, saved")

    monkeypatch.setattr(protocol.loop, "train", stopped)
    with pytest.raises(SystemExit) as ended:
        protocol.train(["trainer.steps=3"])
    assert ended.value.code == 75 and "stopped at step 3" in capsys.readouterr().err


def test_a_run_that_diverged_counts_as_worst(monkeypatch):
    def diverged(*args, **kwargs):
        raise NotFiniteError("nan at step 3")

    monkeypatch.setattr(protocol.loop, "train", diverged)
    run = protocol.train(["trainer.steps=3"])
    assert run["valid"] == run["test"] == 0.0 and run["path"] is None
    assert protocol.rank(run) < protocol.rank({"valid": 0.0, "first": 3})


def test_of_rates_that_learn_all_the_soonest_is_taken():
    found = {1e-3: (1.0, -1500), 3e-3: (1.0, -500), 1e-2: (0.5, -100), 3e-2: (0.1, -100)}
    assert protocol.tuned(found.__getitem__) == (3e-3, 4)


def test_a_run_tells_the_step_that_was_its_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["experiment=mqar", "model=mamba_small", "model.pattern=[identity]", "model.d_model=16"]
    steps = ["trainer.steps=4", "trainer.eval_every=2", "trainer.eval_samples=8"]
    run = protocol.train([*small, *steps, "trainer.global_batch_size=8", "trainer.test_samples=8"])
    assert run["first"] in (2, 4) and 0 <= run["valid"] <= 1 and run["path"].exists()
    again = protocol.train(
        [*small, *steps, "trainer.global_batch_size=8", "trainer.test_samples=8"]
    )
    assert again == {**run, "seconds": None}


def test_a_metric_that_is_to_be_small_is_refused():
    with pytest.raises(ValueError, match="task.metric=bits_per_byte"):
        protocol.train(["experiment=text_mamba"])
