"""A model that compiles in a moment, runs of it in this process, and the folders they leave."""

import copy
import functools
import os
import pathlib
import signal
from typing import Any

import pytest

from seqzoo.config.compose import compose
from seqzoo.errors import Preempted
from seqzoo.train import loop, programs
from seqzoo.train.session import Session


@functools.cache
def _composed(overrides: tuple[str, ...]):
    return compose(overrides)


@pytest.fixture(scope="session")
def tiny(tiny_words):
    """Composes the tiny configuration with more overrides: ``tiny("trainer.seed=1")``."""

    def make(*overrides: str) -> Any:
        return copy.deepcopy(_composed((*tiny_words, *overrides)))

    return make


@pytest.fixture
def fit(tiny, tiny_words, tmp_path):
    """Trains the tiny model in this process; returns the Result."""

    def run(*overrides: str, root: pathlib.Path | None = None, **options: Any):
        words = [*tiny_words, *overrides]
        return loop.train(
            tiny(*overrides), overrides=words, root=root or tmp_path / "runs", **options
        )

    return run


@pytest.fixture
def stop_at(fit, monkeypatch):
    """Trains until a signal comes while update number `step` is begun; returns what was said."""

    def run(step: int, *overrides: str, number: int = signal.SIGTERM) -> str:
        advance = Session.advance

        def and_stop(session):
            if session.step == step:
                os.kill(os.getpid(), number)
            advance(session)

        with monkeypatch.context() as patch, pytest.raises(Preempted) as caught:
            patch.setattr(Session, "advance", and_stop)
            fit(*overrides)
        return str(caught.value)

    return run


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    """Executables of tests are no business of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(programs.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def run_folder(tmp_path):
    """The only run folder that there is."""

    def find(root: pathlib.Path | None = None) -> pathlib.Path:
        files = (root or tmp_path / "runs").glob("*/*/status.json")
        (found,) = (file.parent for file in files if not file.parent.is_symlink())
        return found

    return find
