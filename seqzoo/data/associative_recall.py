"""Associative recall: key-value pairs with repetition, then a marker and a key; say its value.

Source: HazyResearch/safari, src/dataloaders/synthetics.py (Hyena, arXiv 2302.10866), with one key
per pair and allow_dot=False: the key that is asked occurred.
Differs from source: token numbers follow their meaning rather than the order of their names as
text; test rows are not made unique.
"""

import dataclasses
import functools

import numpy as np

from seqzoo.data import counter
from seqzoo.data.source import (
    IGNORE,
    Batch,
    Generated,
    Source,
    Split,
    check_samples,
    fingerprint_of,
    samples_of,
)
from seqzoo.errors import ConfigError

_VERSION = 1
_MAP, _PAIRS, _ASKED = range(1, 4)
_SPECIAL = 2  # the marker, and the original's "no answer", which is never used here


@dataclasses.dataclass(frozen=True)
class AssociativeRecall:
    """A map from keys to values per row, shown by example, asked for at the last position.

    Of vocab_size - 2 ordinary tokens the first half are keys, the others values; the marker is
    vocab_size - 1. Each key has a value drawn for the row; pairs are drawn with repetition. A row
    is (seq_len - 2) / 2 pairs, the marker, and a key among those seen.

    Attributes:
      vocab_size: keys, values, and two special tokens.
      seq_len: length of a row, even: 42 = the original's length 40, marker and key.
      train_targets: all = every next token is a target in training, as in the original; last = only
        the answer. In valid and test only the answer is.
      train_samples: rows of an epoch; null = endless, every row is new.
      valid_samples: rows of the valid split.
      test_samples: rows of the test split.
      seed: of the data, apart from trainer.seed.
    """

    vocab_size: int = 20
    seq_len: int = 42
    train_targets: str = "all"
    train_samples: int | None = 5000
    valid_samples: int = 500
    test_samples: int = 500
    seed: int = 0

    group_names = ()
    bytes_per_token = None

    def __post_init__(self) -> None:
        check_samples(self)
        if self.vocab_size < 2 + _SPECIAL:
            raise ConfigError(
                f"data.vocab_size={self.vocab_size} is too small: a key, a value and {_SPECIAL} "
                f"special tokens make {2 + _SPECIAL}"
            )
        if self.seq_len < 4 or self.seq_len % 2:
            raise ConfigError(f"data.seq_len={self.seq_len}; it must be even and at least 4")
        if self.train_targets not in ("all", "last"):
            raise ConfigError(f"data.train_targets={self.train_targets}; it must be all or last")

    @property
    def most_asked(self) -> int | None:
        """Targets per row, at most; None = everywhere."""
        return None if self.train_targets == "all" else 1

    @property
    def answers_in_input(self) -> bool:
        """Whether a target stands in the row as well: every next token does."""
        return self.train_targets == "all"

    def source(self, split: Split) -> Source:
        everything = split == "train" and self.train_targets == "all"
        make = functools.partial(self._rows, everything=everything)
        return Generated(make, self.seed, split, samples_of(self, split))

    def fingerprint(self) -> str:
        return fingerprint_of("associative_recall", _VERSION, dataclasses.asdict(self))

    def _rows(self, key: counter.Keys, *, everything: bool) -> Batch:
        b, pairs = len(key), (self.seq_len - 2) // 2
        n_keys = (self.vocab_size - _SPECIAL) // 2
        n_values = self.vocab_size - _SPECIAL - n_keys
        value_of = counter.integers(key, _MAP, n_keys, n_values) + n_keys
        shown = counter.integers(key, _PAIRS, pairs, n_keys)
        tokens = np.empty((b, self.seq_len), np.int32)
        tokens[:, 0:-2:2] = shown
        tokens[:, 1:-2:2] = np.take_along_axis(value_of, shown, axis=1)
        # Uniform over the keys that occurred: the lowest of random scores, absent keys left out.
        scores = counter.bits(key, _ASKED, n_keys).astype(np.int64)
        absent = np.ones((b, n_keys), bool)
        np.put_along_axis(absent, shown, False, axis=1)
        scores[absent] = 2**32
        asked = scores.argmin(axis=1)
        tokens[:, -2] = self.vocab_size - 1
        tokens[:, -1] = asked
        answer = value_of[np.arange(b), asked]
        targets = np.full((b, self.seq_len), IGNORE, np.int32)
        if everything:
            targets[:, :-1] = tokens[:, 1:]
        targets[:, -1] = answer
        return {"tokens": tokens, "targets": targets}
