"""Rows cut out of one long sequence: text packed into a stream, or an array of tokens.

Packing is concatenate and cut: row i is a function of a token offset alone.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from seqzoo.data import counter
from seqzoo.data.source import IGNORE, Batch, Split, shuffled
from seqzoo.errors import DataError

# (tokens, targets, whether a token starts a document) at the given offsets, [...] each.
Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None]]

_SHIFT_STREAM = 1 << 48  # apart from the streams of permutations


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Documents one after the other, each behind a token 0.

    The target of a position is the byte after it; that of a document's last byte is 0, the end.

    Attributes:
      stream: uint8 [size + 1]: 0 document 0 document ... 0.
      starts: bool [size], true at the 0 before each document.
    """

    stream: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[bytes]) -> "Packed":
        stream = b"\0".join((b"", *documents, b""))
        lengths = np.array([len(document) + 1 for document in documents], np.int64)
        starts = np.zeros(len(stream) - 1, bool)
        starts[np.cumsum(lengths) - lengths] = True
        return cls(np.frombuffer(stream, np.uint8), starts)

    @property
    def size(self) -> int:
        return len(self.starts)

    def read(self, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.stream[offset], self.stream[offset + 1], self.starts[offset]


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Windows of `seq_len` offsets out of [0, size).

    For training an epoch is one cut of the sequence in a random order; the cut is shifted by
    another amount in each epoch. Otherwise window i starts at i * seq_len, every offset is covered
    once, and the last window is filled up with padding.

    Attributes:
      read: what stands at an offset.
      size: offsets.
      seq_len: length of a row.
      split: train or held out.
      seed: of order and shifts.
      segments: give segment_ids: documents numbered from 1 in each row, 0 = padding.
    """

    read: Read
    size: int
    seq_len: int
    split: Split
    seed: int
    segments: bool

    group_names = ()
    block = 0

    def __post_init__(self) -> None:
        if self.split == "train" and self.size < self.seq_len:
            raise DataError(
                f"the train split holds {self.size:,} tokens, fewer than "
                f"data.seq_len={self.seq_len}; give more data or a shorter seq_len"
            )

    def __len__(self) -> int:
        if self.split == "train":
            return max(1, (self.size - self.seq_len + 1) // self.seq_len)
        return -(-self.size // self.seq_len)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        return ((0, len(self)),)

    def order(self, position: np.ndarray) -> np.ndarray:
        return shuffled(position, len(self), self.seed)

    def batch(self, index: np.ndarray) -> Batch:
        epoch, window = np.divmod(np.asarray(index, np.int64), len(self))
        first = window * self.seq_len
        if self.split == "train":
            first += self._shift(epoch)
        offset = first[:, None] + np.arange(self.seq_len)
        inside = offset < self.size
        tokens, targets, starts = self.read(np.where(inside, offset, 0))
        batch = {
            "tokens": np.where(inside, tokens.astype(np.int32), 0),
            "targets": np.where(inside, targets.astype(np.int32), IGNORE),
        }
        if self.segments:
            ids = np.ones(offset.shape, np.int32)
            if starts is not None:
                ids[:, 1:] += np.cumsum(starts[:, 1:], axis=1, dtype=np.int32)
            batch["segment_ids"] = np.where(inside, ids, 0)
        return batch

    def _shift(self, epoch: np.ndarray) -> np.ndarray:
        choices = min(self.seq_len, self.size - len(self) * self.seq_len + 1)
        key = counter.keys(self.seed, epoch, stream=_SHIFT_STREAM)
        return counter.integers(key, 1, 1, choices)[:, 0].astype(np.int64)
