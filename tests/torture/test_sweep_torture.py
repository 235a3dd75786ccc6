"""A few kills of a small sweep; `make torture` has ten of a larger one, and a database."""

import importlib.util
import pathlib
import sys

import pytest


@pytest.fixture(scope="module")
def torture():
    """The script beside this file, as a module."""
    place = pathlib.Path(__file__).with_name("sweep_torture.py")
    spec = importlib.util.spec_from_file_location("sweep_torture", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_three_kills_of_a_sweep(torture, tmp_path, monkeypatch, quick_flags, sampler):
    monkeypatch.setenv("XLA_FLAGS", quick_flags)
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))
    short = (*torture.OVERRIDES, "model=mamba_small", "model.n_layers=1", "trainer.steps=120")
    wrong = torture.torture(
        tmp_path, sampler, kills=3, seed=5, server=None, trials=8, overrides=short
    )
    assert wrong == []
