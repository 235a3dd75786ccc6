"""What every data set of seqzoo is made of, and what it hands out.

A data set is a frozen dataclass, the node of a configuration; ``dataset.source(split)`` is where
its rows come from. Row i of a source is a pure function of i.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from seqzoo.data import counter
from seqzoo.errors import ConfigError

Split = Literal["train", "valid", "test"]
Batch = dict[str, np.ndarray]

SPLITS: tuple[Split, ...] = ("train", "valid", "test")

# The target of a position where nothing is asked.
IGNORE = -100

# The length of a source that never ends. Splits of a generator are ranges of this size.
ENDLESS = 2**40


class Source(Protocol):
    """Rows of one split.

    Attributes:
      group_names: what the numbers in a batch's `group` stand for; empty where rows are all alike.
      spans: (start, stop) of rows that have one shape; a batch never crosses from one to the next.
      block: rows per unit of the order; a global batch must divide it. 0 = any batch will do.
    """

    group_names: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    block: int

    def __len__(self) -> int: ...

    def order(self, position: np.ndarray) -> np.ndarray:
        """Maps places in the endless order of training, int64 [b], to numbers of rows."""

    def batch(self, index: np.ndarray) -> Batch:
        """Returns rows by number, int64 [b].

        tokens int32 [b t]; targets int32 [b t], IGNORE where nothing is asked; where it applies,
        segment_ids int32 [b t], group int32 [b], and label int32 [b] instead of targets.
        """


@runtime_checkable
class Dataset(Protocol):
    """A node of configs/data/.

    Attributes:
      vocab_size: tokens are in [0, vocab_size).
      seq_len: the longest row of training.
      group_names: of all splits together.
      bytes_per_token: 1.0 where a token is a byte, so that bits per byte make sense; else None.

    One whose rows have few targets may say how many at most, `most_asked: int | None`: logits are
    then computed at those places alone. One whose rows hold answers behind the places that ask for
    them says so, `answers_in_input = True`: a model that looks both ways is then refused. One that
    hides tokens, whose targets they are, says by which: `mask_token: int`; one that asks for the
    next token everywhere says `asks_everywhere = True`; one with a label per row, `n_classes: int`.
    Tasks that would ask for something else are then refused.
    """

    vocab_size: int
    seq_len: int
    group_names: tuple[str, ...]
    bytes_per_token: float | None

    def source(self, split: Split) -> Source: ...

    def fingerprint(self) -> str:
        """Returns a short text that changes when what the data set would hand out changes."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """A source whose rows are made up on the spot.

    Attributes:
      make: row keys, uint64 [b] -> batch.
      seed: the seed of the data set.
      split: train, valid and test are ranges of sample numbers that do not meet.
      samples: how many; None = endless.
      group_names: see Source.
      stream: keeps the parts of a data set apart that share a seed.
    """

    make: Callable[[counter.Keys], Batch]
    seed: int
    split: Split
    samples: int | None
    group_names: tuple[str, ...] = ()
    stream: int = 0
    block: int = 0

    def __len__(self) -> int:
        return ENDLESS if self.samples is None else self.samples

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        return ((0, len(self)),)

    def order(self, position: np.ndarray) -> np.ndarray:
        return position if self.samples is None else shuffled(position, self.samples, self.seed)

    def batch(self, index: np.ndarray) -> Batch:
        index = np.asarray(index, np.int64)
        if self.samples is not None:
            index = index % self.samples
        number = index + SPLITS.index(self.split) * ENDLESS
        return self.make(counter.keys(self.seed, number, stream=self.stream))


@dataclasses.dataclass(frozen=True)
class Joined:
    """Sources one after the other, each with rows of its own shape.

    Attributes:
      parts: the sources.
      seed: of the order.
      shuffle: give blocks of rows in another order in each epoch; false = as listed, every time.
      block: rows that stay together, a divisor of each part's length; 0 where nobody trains on it.
      group_names: see Source.
    """

    parts: tuple[Source, ...]
    seed: int
    shuffle: bool = True
    block: int = 0
    group_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        stops = list(itertools.accumulate(len(part) for part in self.parts))
        return tuple(zip([0, *stops], stops, strict=False))

    def order(self, position: np.ndarray) -> np.ndarray:
        if not self.shuffle:
            return position
        block, row = np.divmod(np.asarray(position, np.int64), self.block or 1)
        return shuffled(block, len(self) // (self.block or 1), self.seed) * (self.block or 1) + row

    def batch(self, index: np.ndarray) -> Batch:
        row = np.asarray(index, np.int64) % len(self)
        for part, (start, stop) in zip(self.parts, self.spans, strict=True):
            inside = (row >= start) & (row < stop)
            if inside.all():
                return part.batch(row - start)
            if inside.any():
                raise ValueError("rows of different shapes were asked for in one batch")
        raise ValueError("no rows were asked for")


def shuffled(position: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Maps places in an endless order to epoch * n + row: each epoch has its own permutation."""
    epoch, place = np.divmod(np.asarray(position, np.int64), n)
    out = epoch * n
    for one in np.unique(epoch):
        of_epoch = epoch == one
        out[of_epoch] += counter.permute(place[of_epoch], n, seed=seed, stream=-1 - int(one))
    return out


def fingerprint_of(name: str, version: int, settings: Any) -> str:
    """Returns ``name-vVERSION-`` and a hash of settings that JSON can hold."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return f"{name}-v{version}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def known_split(split: str) -> Split:
    """Returns `split` if there is such a one."""
    if split not in SPLITS:
        raise ConfigError(f"there is no split '{split}'; there are {', '.join(SPLITS)}")
    return split


def samples_of(dataset: Any, split: str) -> int | None:
    """Returns train_samples, valid_samples or test_samples of a generator."""
    return getattr(dataset, f"{known_split(split)}_samples")


def check_samples(dataset: Any) -> None:
    """Refuses a generator with a split of no samples."""
    for split in SPLITS:
        at_least(f"{split}_samples", samples_of(dataset, split), 1)


def at_least(name: str, value: int | None, least: int) -> None:
    """Refuses a count that is too small; None passes."""
    if value is not None and value < least:
        raise ConfigError(f"data.{name}={value}; it must be at least {least}")
