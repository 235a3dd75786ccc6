"""Batches for several runs: what more than one of them wants is made once."""

from seqzoo.data import pipeline
from seqzoo.data.source import Batch
from seqzoo.train.session import stream_of
from seqzoo.train.setup import Setup


class Feed:
    """The batches of one data set, each made once for all runs that are at the same step."""

    def __init__(self, run: Setup):
        self._run = run
        self._stream: pipeline.Stream | None = None
        self._at = -1
        self._batch: Batch = {}
        self._waited = 0.0

    def reader(self, start: int) -> "Reader":
        return Reader(self, start)

    def read(self, step: int) -> Batch:
        """The batch of a step of the data."""
        if step == self._at:
            return self._batch
        if self._stream is None or step != self._at + 1:
            self.close()
            self._stream = stream_of(self._run, step, None)
        self._at, self._batch = next(self._stream)
        return self._batch

    @property
    def waited(self) -> float:
        return self._waited + (0.0 if self._stream is None else self._stream.waited)

    def close(self) -> None:
        if self._stream is not None:
            self._waited = self.waited
            self._stream.close()
            self._stream = None


class Reader:
    """One run's place in a feed; in its session it stands for a stream."""

    def __init__(self, feed: Feed, start: int):
        self._feed, self._next = feed, start

    def __next__(self) -> tuple[int, Batch]:
        step, self._next = self._next, self._next + 1
        return step, self._feed.read(step)

    @property
    def waited(self) -> float:
        """Seconds that its feed kept all of them waiting."""
        return self._feed.waited

    def close(self) -> None:
        """The feed stays open for the others."""
