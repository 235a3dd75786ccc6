"""A trace of some steps for TensorBoard or Perfetto: trainer.profile=10:15."""

import pathlib
from typing import Any

import jax

from seqzoo.train.hooks.hook import Hook


class Profiler(Hook):
    """Traces updates first .. last - 1 into a folder; operators bear the names of their mixers.

    A run that goes on in between traces what is left of them.
    """

    name = "profiler"

    def __init__(self, folder: pathlib.Path, first: int, last: int):
        self._folder, self._first, self._last = folder, first, last
        self._tracing = False

    def before_step(self, step: int, state: Any) -> None:
        if self._first <= step < self._last and not self._tracing:  # it may go on inside
            jax.block_until_ready(state)
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif step >= self._last and self._tracing:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
