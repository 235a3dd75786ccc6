"""What can go wrong for a user, and the exit code that each kind of trouble ends a command with.

Imports nothing heavy: the command line needs these before jax is loaded.
"""

import difflib
from collections.abc import Iterable


class SeqzooError(Exception):
    """An error that the user can act on: the command line prints its text without a traceback."""

    exit_code = 1


class ConfigError(SeqzooError):
    """The configuration asks for something that does not exist or does not fit."""

    exit_code = 2


class MeshError(ConfigError, ValueError):
    """The mesh does not fit the model; what an operator finds while a step is traced."""


class DataError(ConfigError):
    """A data file is missing, damaged or not what the run began with."""


class CheckpointError(SeqzooError):
    """A checkpoint could not be written or read."""


class LockedError(SeqzooError):
    """Another process works in this run folder."""


class NotFiniteError(SeqzooError):
    """The loss or the gradients are no longer finite."""

    exit_code = 3


class Preempted(SeqzooError):
    """The run was asked to stop and saved itself; the same command goes on."""

    exit_code = 75


class Pruned(SeqzooError):
    """A sweep found that the run lags behind others; it ends early, which is a result."""


def suggest(word: str, candidates: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the candidate nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
