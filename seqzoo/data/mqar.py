"""Multi-query associative recall: read key-value pairs, later answer each key with its value.

Source: HazyResearch/zoology, zoology/data/multiquery_ar.py ("Zoology", arXiv 2312.04927).
Differs from source: sample i is a function of (seed, i), so there is no stored set of examples;
the law is the same, the numbers are not. `num_passes` is not here (the original fails with it).
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
    at_least,
    check_samples,
    fingerprint_of,
    samples_of,
)
from seqzoo.errors import ConfigError

_VERSION = 1
_KEYS, _VALUES, _PLACES, _NOISE = range(1, 5)
_CACHE_ROWS = 256  # rows made at a time, so that their arrays stay in the cache


@dataclasses.dataclass(frozen=True)
class MQAR:
    """One length, one number of pairs.

    The row: k1 v1 k2 v2 ... for `num_kv_pairs` K, then (seq_len - 2K) / 2 slots of two tokens. Each
    key comes again at the first place of one slot, slot i (from 1) with odds i ** (power_a - 1)
    among those left; the target there is the value of the key. Nothing else is asked. Keys are
    different tokens of 1 .. V/2 - 1, values different tokens of V/2 .. V - 1.

    Attributes:
      vocab_size: half of it keys, half values.
      seq_len: length of a row, even, at least 4 * num_kv_pairs.
      num_kv_pairs: pairs to remember.
      power_a: 1 = a key comes again anywhere, towards 0 = rather soon.
      random_non_queries: fill the rest with random tokens, which may equal a key or a value; false
        = with token 0.
      train_samples: rows of an epoch; null = endless, every row is new.
      valid_samples: rows of the valid split.
      test_samples: rows of the test split.
      seed: of the data, apart from trainer.seed.
    """

    vocab_size: int = 256
    seq_len: int = 64
    num_kv_pairs: int = 4
    power_a: float = 0.01
    random_non_queries: bool = True
    train_samples: int | None = None
    valid_samples: int = 1000
    test_samples: int = 3000
    seed: int = 0

    bytes_per_token = None

    def __post_init__(self) -> None:
        check_shape(self.vocab_size, self.seq_len, self.num_kv_pairs)
        check_power(self.power_a)
        check_samples(self)

    @property
    def most_asked(self) -> int:
        """Targets per row, at most."""
        return self.num_kv_pairs

    @property
    def group_names(self) -> tuple[str, ...]:
        return (f"pairs_{self.num_kv_pairs}",)

    def source(self, split: Split) -> Source:
        make = functools.partial(
            recall_rows,
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            num_kv_pairs=self.num_kv_pairs,
            power_a=self.power_a,
            noise=self.random_non_queries,
        )
        return Generated(make, self.seed, split, samples_of(self, split), self.group_names)

    def fingerprint(self) -> str:
        return fingerprint_of("mqar", _VERSION, dataclasses.asdict(self))


def recall_rows(
    key: counter.Keys,
    *,
    vocab_size: int,
    seq_len: int,
    num_kv_pairs: int,
    power_a: float,
    noise: bool,
    group: int = 0,
) -> Batch:
    """Makes the rows of the given keys (of random numbers), uint64 [b]; see MQAR for the law."""
    b, pairs = len(key), num_kv_pairs
    half, context = vocab_size // 2, 2 * num_kv_pairs
    tokens = np.empty((b, seq_len), np.int32)
    targets = np.full((b, seq_len), IGNORE, np.int32)
    slots = (seq_len - context) // 2
    weights = np.arange(1, slots + 1, dtype=np.float64) ** (power_a - 1)
    for start in range(0, b, _CACHE_ROWS):
        rows = slice(start, min(b, start + _CACHE_ROWS))
        some, inside = key[rows], tokens[rows]
        words = counter.distinct(some, _KEYS, pairs, half - 1) + 1
        values = counter.distinct(some, _VALUES, pairs, vocab_size - half) + half
        if noise:
            inside[:, context:] = counter.integers(some, _NOISE, seq_len - context, vocab_size)
        else:
            inside[:, context:] = 0
        inside[:, 0:context:2] = words
        inside[:, 1:context:2] = values
        places = context + 2 * counter.weighted_order(some, _PLACES, pairs, weights)
        places += np.arange(len(some), dtype=np.int32)[:, None] * seq_len
        np.put(inside, places, words)
        np.put(targets[rows], places, values)
    return {"tokens": tokens, "targets": targets, "group": np.full(b, group, np.int32)}


def check_shape(vocab_size: int, seq_len: int, num_kv_pairs: int) -> None:
    at_least("num_kv_pairs", num_kv_pairs, 1)
    if seq_len % 2 or seq_len < 4 * num_kv_pairs:
        raise ConfigError(
            f"data.seq_len={seq_len} with num_kv_pairs={num_kv_pairs}; the length must be even and "
            f"at least 4 * num_kv_pairs = {4 * num_kv_pairs}"
        )
    least = 2 * (num_kv_pairs + 1)
    if vocab_size < least:
        raise ConfigError(
            f"data.vocab_size={vocab_size} is too small for {num_kv_pairs} different keys and as "
            f"many values; it must be at least {least}"
        )


def check_power(power_a: float) -> None:
    if not power_a >= 0:
        raise ConfigError(f"data.power_a={power_a}; it must be 0 or more (1 = uniform)")
