"""Tiny sweeps: studies in a folder of the test, trials that end in a moment."""

import importlib.util
import os
import pathlib
import sys

import pytest

from seqzoo.sweep import storage
from seqzoo.sweep.settings import split
from seqzoo.sweep.study import Study
from seqzoo.train import programs


@pytest.fixture
def create(tiny_words, tmp_path):
    """Creates a study of tiny runs: ``create("optimizer.lr=1e-3,3e-3", "sweep=grid")``."""

    def make(*words: str) -> Study:
        settings = split([*tiny_words, "sweep.patience_minutes=0.05", *words])
        return Study.create(settings, root=tmp_path / "runs")

    return make


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server, or a skip that says what is missing."""
    place = pathlib.Path(__file__).parents[1] / "torture/postgres.py"
    spec = importlib.util.spec_from_file_location("seqzoo_test_postgres", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    why = module.missing()
    if why:
        pytest.skip(f"PostgreSQL is not tested here: {why}")
    with module.Postgres() as server:
        yield server


@pytest.fixture(autouse=True, scope="session")
def _a_place_of_its_own(tmp_path_factory):
    """Neither the user's cache nor the user's database."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(programs.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        patch.delenv(storage.VARIABLE, raising=False)
        yield


@pytest.fixture(autouse=True)
def _what_a_worker_sets():
    """A worker's process is its own; here it is that of the tests, and others come after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
