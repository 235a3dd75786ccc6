"""Selective copying: a few tokens stand somewhere among noise; repeat them in order.

Source: the data generator of state-spaces/s4 (copying) as adapted by MinhZou/selective-copying-
mamba; the task is that of Mamba (arXiv 2312.00752, section 4.1.1), whose own code was not released.
"""

import dataclasses

import numpy as np

from seqzoo.data import counter
from seqzoo.data.source import (
    IGNORE,
    Batch,
    Generated,
    Source,
    Split,
    at_least,
    check_samples,
    fingerprint_of,
    samples_of,
)
from seqzoo.errors import ConfigError

_VERSION = 1
_TOKENS, _PLACES = range(1, 3)


@dataclasses.dataclass(frozen=True)
class SelectiveCopying:
    """`num_tokens` M tokens among noise, then M markers, each asking for one of them in order.

    Tokens are uniform in 1 .. vocab_size - 2, noise is 0, the marker is vocab_size - 1. The paper's
    sizes are vocab_size 16, seq_len 4128 = 4096 noise + 16 tokens + 16 markers.

    Attributes:
      vocab_size: noise, tokens to copy, and the marker.
      seq_len: length of a row, markers included; at least 2 * num_tokens.
      num_tokens: tokens to copy.
      selective: tokens at random places; false = at the start, the plain copying task, which a
        model can solve by counting.
      train_samples: rows of an epoch; null = endless, every row is new.
      valid_samples: rows of the valid split.
      test_samples: rows of the test split.
      seed: of the data, apart from trainer.seed.
    """

    vocab_size: int = 16
    seq_len: int = 288
    num_tokens: int = 16
    selective: bool = True
    train_samples: int | None = None
    valid_samples: int = 1000
    test_samples: int = 3000
    seed: int = 0

    group_names = ()
    bytes_per_token = None

    def __post_init__(self) -> None:
        check_samples(self)
        at_least("num_tokens", self.num_tokens, 1)
        if self.vocab_size < 3:
            raise ConfigError(
                f"data.vocab_size={self.vocab_size} is too small: noise, marker and one token to "
                "copy make 3"
            )
        if self.seq_len < 2 * self.num_tokens:
            raise ConfigError(
                f"data.seq_len={self.seq_len} with num_tokens={self.num_tokens}; it must be at "
                f"least 2 * num_tokens = {2 * self.num_tokens}"
            )

    @property
    def most_asked(self) -> int:
        """Targets per row, at most."""
        return self.num_tokens

    def source(self, split: Split) -> Source:
        return Generated(self._rows, self.seed, split, samples_of(self, split))

    def fingerprint(self) -> str:
        return fingerprint_of("selective_copying", _VERSION, dataclasses.asdict(self))

    def _rows(self, key: counter.Keys) -> Batch:
        b, count, read = len(key), self.num_tokens, self.seq_len - self.num_tokens
        copied = counter.integers(key, _TOKENS, count, self.vocab_size - 2) + 1
        if self.selective:
            places = np.sort(counter.distinct(key, _PLACES, count, read), axis=1)
        else:
            places = np.broadcast_to(np.arange(count), (b, count))
        tokens = np.zeros((b, self.seq_len), np.int32)
        np.put_along_axis(tokens, places, copied, axis=1)
        tokens[:, read:] = self.vocab_size - 1
        targets = np.full((b, self.seq_len), IGNORE, np.int32)
        targets[:, read:] = copied
        return {"tokens": tokens, "targets": targets}
