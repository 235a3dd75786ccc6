"""Induction heads: a marker is followed by a token once; after the next marker, say that token.

Source: the task of Mamba (arXiv 2312.00752, section 4.1.2 and table 11); the authors' code was not
released, so sizes are the paper's and the details are ours: the last token of the vocabulary is the
marker, all others are drawn alike. The loss is on the last token only: with a loss on the random
tokens before it, users saw models learn nothing.
"""

import dataclasses
import functools

import numpy as np

from seqzoo.data import counter
from seqzoo.data.source import (
    IGNORE,
    Batch,
    Generated,
    Joined,
    Source,
    Split,
    at_least,
    check_samples,
    fingerprint_of,
    samples_of,
)
from seqzoo.errors import ConfigError

_VERSION = 1
_TOKENS, _PLACE = range(1, 3)


@dataclasses.dataclass(frozen=True)
class InductionHeads:
    """Random tokens, a marker at a random place, and the marker again as the last token.

    Attributes:
      vocab_size: the marker, vocab_size - 1, and the others.
      seq_len: length of a row of train and valid.
      test_lengths: lengths of test rows, a group of the metrics each; null = seq_len.
      train_samples: rows of an epoch; null = endless, every row is new.
      valid_samples: rows of the valid split.
      test_samples: rows of the test split, per length.
      seed: of the data, apart from trainer.seed.
    """

    vocab_size: int = 16
    seq_len: int = 256
    test_lengths: tuple[int, ...] | None = (64, 128, 256, 512, 1024)
    train_samples: int | None = None
    valid_samples: int = 1000
    test_samples: int = 1000
    seed: int = 0

    bytes_per_token = None

    def __post_init__(self) -> None:
        check_samples(self)
        if self.vocab_size < 3:
            raise ConfigError(
                f"data.vocab_size={self.vocab_size} is too small: the marker and two tokens make 3"
            )
        at_least("seq_len", self.seq_len, 3)
        lengths = self.test_lengths or (self.seq_len,)
        object.__setattr__(self, "test_lengths", tuple(int(length) for length in lengths))
        for length in self.test_lengths:
            at_least("test_lengths", length, 3)

    @property
    def group_names(self) -> tuple[str, ...]:
        return tuple(f"len_{n}" for n in dict.fromkeys((self.seq_len, *self.test_lengths)))

    @property
    def most_asked(self) -> int:
        """Targets per row, at most."""
        return 1

    def source(self, split: Split) -> Source:
        samples = samples_of(self, split)
        if split != "test":
            return self._part(split, self.seq_len, samples)
        parts = tuple(self._part(split, length, samples) for length in self.test_lengths)
        return Joined(parts, self.seed, group_names=self.group_names)

    def fingerprint(self) -> str:
        return fingerprint_of("induction_heads", _VERSION, dataclasses.asdict(self))

    def _part(self, split: Split, length: int, samples: int | None) -> Generated:
        group = self.group_names.index(f"len_{length}")
        make = functools.partial(self._rows, length=length, group=group)
        return Generated(make, self.seed, split, samples, self.group_names, stream=length)

    def _rows(self, key: counter.Keys, *, length: int, group: int) -> Batch:
        rows, marker = np.arange(len(key)), self.vocab_size - 1
        tokens = counter.integers(key, _TOKENS, length, marker)
        place = counter.integers(key, _PLACE, 1, length - 2)[:, 0]
        tokens[rows, place] = marker
        tokens[:, -1] = marker
        targets = np.full(tokens.shape, IGNORE, np.int32)
        targets[:, -1] = tokens[rows, place + 1]
        return {
            "tokens": tokens,
            "targets": targets,
            "group": np.full(len(key), group, np.int32),
        }
