"""From a data set to a stream of batches, on grain: any step, any number of processes.

The rows of training stand in one global order. Step k of a run with global batch G takes the rows
k * G to (k + 1) * G of it, and process p of P the p-th part of those, whatever P is. A position in
the data is therefore a number, and nothing else needs saving.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import numpy as np

from seqzoo.data.source import ENDLESS, IGNORE, Batch, Dataset, Source, Split
from seqzoo.errors import ConfigError, DataError

T = TypeVar("T")

# One thread makes batches while the accelerator (or the other core) trains; a few wait ready.
WORKERS = 1
PREFETCH = 4


class Stream(Generic[T]):
    """An iterator that measures how long its user waited for it.

    Attributes:
      waited: seconds spent inside next() so far, the first batch included.
      delivered: items handed out so far.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self.waited = 0.0
        self.delivered = 0

    def __iter__(self) -> "Stream[T]":
        return self

    def __next__(self) -> T:
        started = time.perf_counter()
        try:
            item = next(self._items)
        finally:
            self.waited += time.perf_counter() - started
        self.delivered += 1
        return item

    def close(self) -> None:
        """Stops the threads that read ahead."""
        close = getattr(self._items, "close", None)
        if close is not None:
            close()


def batches(
    dataset: Dataset,
    split: Split,
    *,
    global_batch_size: int,
    start_step: int = 0,
    stop_step: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = WORKERS,
    prefetch: int = PREFETCH,
) -> Stream[tuple[int, Batch]]:
    """Returns the batches of steps start_step, start_step + 1, ... of this process.

    Args:
      dataset: what to read.
      split: which part of it, usually "train".
      global_batch_size: rows per step, of all processes together.
      start_step: the first step; starting late costs nothing.
      stop_step: the step after the last; None = no end.
      process_index: which part of each batch is ours.
      process_count: parts per batch.
      workers: threads that make batches; 0 = made when asked for.
      prefetch: batches that may wait ready.

    Returns:
      Pairs (step, batch); the batch has global_batch_size / process_count rows.
    """
    source = dataset.source(split)
    _check_rows(source, split)
    _check_batch(source, global_batch_size, process_index, process_count)
    stop = ENDLESS if stop_step is None else stop_step
    steps = _Steps(source, global_batch_size, start_step, stop, process_index, process_count)
    return Stream(_read(steps, workers, prefetch))


def eval_batches(
    dataset: Dataset,
    split: Split,
    *,
    batch_size: int,
    max_samples: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = WORKERS,
    prefetch: int = PREFETCH,
) -> Stream[Batch]:
    """Returns every row of a split once, in order.

    Rows of one shape come together. The last batch of each shape is filled up with rows that ask
    nothing, so that one shape means one compilation.

    Args:
      dataset: what to read.
      split: which part of it.
      batch_size: rows per batch, of all processes together.
      max_samples: so many rows, spread evenly over the split, rounded up for each shape of rows;
        None = all.
      process_index: which part of each batch is ours.
      process_count: parts per batch.
      workers: as in `batches`.
      prefetch: as in `batches`.
    """
    source = dataset.source(split)
    _check_rows(source, split)
    if max_samples is None and len(source) >= ENDLESS:
        raise ConfigError(
            f"the {split} split has no end; say how many rows to look at: trainer."
            f"{'test_samples' if split == 'test' else 'eval_samples'}=N, or --samples N of "
            "'seqzoo eval'"
        )
    if max_samples is not None and max_samples < 1:
        raise ConfigError(f"max_samples={max_samples}; it must be at least 1")
    _check_parts(batch_size, process_index, process_count)
    parts = tuple(_parts(source, batch_size, max_samples))
    chunks = _Chunks(source, parts, batch_size, process_index, process_count)
    return Stream(_read(chunks, workers, prefetch))


@dataclasses.dataclass(frozen=True)
class _Steps:
    """What grain reads: item k is the batch of step start + k."""

    source: Source
    global_batch_size: int
    start: int
    stop: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __getitem__(self, k: int) -> tuple[int, Batch]:
        step = self.start + int(k)
        rows = self.global_batch_size // self.process_count
        first = step * self.global_batch_size + self.process_index * rows
        index = self.source.order(np.arange(first, first + rows, dtype=np.int64))
        return step, self.source.batch(index)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A batch of evaluation: `rows` rows from the `first`-th of `taken` out of start .. stop."""

    start: int
    stop: int
    taken: int
    first: int
    rows: int


@dataclasses.dataclass(frozen=True)
class _Chunks:
    source: Source
    parts: tuple[_Part, ...]
    batch_size: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, k: int) -> Batch:
        part = self.parts[int(k)]
        ours = self.batch_size // self.process_count
        place = np.arange(ours, dtype=np.int64) + self.process_index * ours
        real = place < part.rows
        nth = part.first + np.where(real, place, 0)
        # The n-th of `taken` rows spread evenly over the span; all of them when taken = span.
        batch = self.source.batch(part.start + nth * (part.stop - part.start) // part.taken)
        if not real.all():
            for name in ("targets", "label"):
                if name in batch:
                    batch[name] = batch[name].copy()
                    batch[name][~real] = IGNORE
        return batch


def _parts(source: Source, batch_size: int, max_samples: int | None) -> Iterator[_Part]:
    total = len(source)
    for start, stop in source.spans:
        size = stop - start
        taken = size if max_samples is None else min(size, -(-size * max_samples // total))
        for first in range(0, taken, batch_size):
            yield _Part(start, stop, taken, first, min(batch_size, taken - first))


def _read(items: Any, workers: int, prefetch: int) -> Iterator[Any]:
    if not len(items):
        return iter(())
    import grain  # takes a second: not before somebody needs batches

    threads = grain.ReadOptions(
        num_threads=workers, prefetch_buffer_size=max(prefetch, workers) if workers else 0
    )
    return iter(grain.MapDataset.source(items).to_iter_dataset(threads))


def _check_rows(source: Source, split: Split) -> None:
    if not len(source):
        raise DataError(
            f"the {split} split of this data has no rows; give more data, or a larger share to it "
            "(docs/keys.md lists the keys of each data set)"
        )


def _check_parts(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"the batch size is {batch_size}; it must be at least 1")
    if batch_size % process_count:
        raise ConfigError(
            f"a global batch of {batch_size} rows cannot be shared by {process_count} processes; "
            f"it must be a multiple of {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ConfigError(f"there is no process {process_index} among {process_count}")


def _check_batch(
    source: Source, global_batch_size: int, process_index: int, process_count: int
) -> None:
    _check_parts(global_batch_size, process_index, process_count)
    if source.block and source.block % global_batch_size:
        raise ConfigError(
            f"trainer.global_batch_size={global_batch_size} does not divide "
            f"data.block={source.block}: rows of different lengths would meet in one batch. Choose "
            "a divisor of the block, or another block"
        )
