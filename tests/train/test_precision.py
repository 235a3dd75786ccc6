"""Determinism on a GPU: flags that must stand before jax starts."""

import os

import pytest

from seqzoo.train import environment, precision


@pytest.fixture
def gpu(monkeypatch):
    """A machine with jax for GPUs, where jax has not started."""
    monkeypatch.setattr(precision, "_has_gpu", lambda: True)
    monkeypatch.setattr(environment, "jax_started", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1")


def test_flags_and_what_was_chosen_are_kept(gpu, tmp_path):
    assert precision.prepare({"deterministic": True}, tmp_path) is None
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[0] == "--xla_mine=1" and "--xla_gpu_deterministic_ops=true" in flags
    assert flags[-1] == f"--xla_gpu_dump_autotune_results_to={tmp_path}/autotune.textproto"


def test_the_second_start_takes_what_the_first_chose(gpu, tmp_path):
    (tmp_path / "autotune.textproto").touch()
    precision.prepare({"deterministic": True}, tmp_path)
    last = os.environ["XLA_FLAGS"].split()[-1]
    assert last == f"--xla_gpu_load_autotune_results_from={tmp_path}/autotune.textproto"


def test_a_run_that_begins_anew_chooses_anew(gpu, tmp_path):
    (tmp_path / "autotune.textproto").touch()  # of the run that --force moves aside
    precision.prepare({"deterministic": True}, tmp_path, fresh=True)
    flags = os.environ["XLA_FLAGS"]
    assert "load_autotune" not in flags
    assert flags.endswith(f"--xla_gpu_dump_autotune_results_to={tmp_path}/autotune.textproto")


def test_nothing_is_set_unless_asked(gpu, tmp_path):
    precision.prepare({"deterministic": False}, tmp_path)
    assert os.environ["XLA_FLAGS"] == "--xla_mine=1"


def test_too_late_is_said(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "jax_started", lambda: True)
    told = precision.prepare({"deterministic": True}, tmp_path)
    assert "not bitwise" in told and os.environ["XLA_FLAGS"] == "--xla_mine=1"


def test_a_cpu_needs_none(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert precision.prepare({"deterministic": True}, tmp_path) is None
    assert os.environ["XLA_FLAGS"] == ""
