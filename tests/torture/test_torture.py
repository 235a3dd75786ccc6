"""Kills of one run: three of them in the fast set, twenty in the slow one."""

import importlib.util
import pathlib
import sys

import pytest


@pytest.fixture(scope="module")
def torture():
    """The script beside this file, as a module."""
    place = pathlib.Path(__file__).with_name("torture.py")
    spec = importlib.util.spec_from_file_location("torture", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_three_kills(torture, tmp_path, quick_flags):
    short = (*torture.OVERRIDES, "model=mamba_small", "model.n_layers=1", "trainer.steps=300")
    one = torture.Torture(tmp_path, 1, short, env={"XLA_FLAGS": quick_flags})
    whole = one.unbroken()
    broken = one.broken(["save", "eval", "compile"])
    assert [kill.resumed_from > 0 for kill in one.kills[:3]] == [False, True, True]
    assert set(one.hits()) >= {"save", "compile"}
    assert torture.differences(whole, broken) == []


@pytest.mark.slow
def test_twenty_kills(torture, tmp_path):
    one = torture.Torture(tmp_path, 2026)
    whole = one.unbroken()
    broken = one.broken(torture.plan_of(20, 2026))
    hits = one.hits()
    assert all(hits[phase] >= least for phase, least in torture.LEAST.items())
    assert sum(kill.resumed_from > 0 for kill in one.kills) >= torture.LEAST_RESUMED
    assert torture.differences(whole, broken) == []
