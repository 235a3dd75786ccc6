"""ListOps from our own generator: nested lists of MIN, MAX, MED and SM, classify their value.

Source: google-research/long-range-arena, lra_benchmarks/data/listops.py (the law); symbols as its
readers have them. MED is the median cut to a whole number, SM the sum modulo 10.
Differs from source: row i is a function of (seed, i), so there is no stored set; rows are not made
unique (above 500 tokens none comes twice; short ones do, in different splits too).
"""

import dataclasses

import numpy as np

from seqzoo.data import counter, listops_trees
from seqzoo.data.listops_trees import END_OF_TEXT, SYMBOLS, Law
from seqzoo.data.source import (
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
_MOST_DEPTH = 20
_ROWS = 64  # made at a time, so that their arrays stay in the cache


@dataclasses.dataclass(frozen=True)
class ListOps:
    """Trees by the law of the Long Range Arena, drawn anew until their length is right.

    A node is a digit with `leaf_probability` and at `max_depth`, else a list of 2 to `max_args`
    nodes behind one of four operators. Trees are kept with min_length < tokens < max_length,
    parentheses of the original's binary form not counted. Smaller bounds and a smaller depth make
    an easier task.

    Attributes:
      vocab_size: at least 18: padding, unknown, end of text, ten digits, four operators, the end of
        a list.
      input_dim: null, rows are tokens.
      n_classes: 10, the values.
      seq_len: length of a row, filled up with padding.
      min_length: trees of more tokens are kept,
      max_length: and of fewer than this.
      max_depth: nodes at this depth are digits; the root's depth is 1.
      max_args: a list has 2 to max_args arguments.
      leaf_probability: of a digit where a list might stand.
      append_eos: end the text with a token of its own.
      train_samples: rows of an epoch; null = endless, every row is new; LRA has 96000.
      valid_samples: rows of the valid split.
      test_samples: rows of the test split.
      seed: of the data, apart from trainer.seed.
    """

    vocab_size: int = len(SYMBOLS)
    input_dim: None = None
    n_classes: int = 10
    seq_len: int = 2048
    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10
    leaf_probability: float = 0.75
    append_eos: bool = True
    train_samples: int | None = None
    valid_samples: int = 2000
    test_samples: int = 2000
    seed: int = 0

    group_names = ()
    bytes_per_token = None

    def __post_init__(self) -> None:
        check_samples(self)
        check_symbols(self.vocab_size, self.n_classes)
        at_least("min_length", self.min_length, 1)
        at_least("max_args", self.max_args, 2)
        if not 2 <= self.max_depth <= _MOST_DEPTH:
            raise ConfigError(f"data.max_depth={self.max_depth}; it must be 2 to {_MOST_DEPTH}")
        if not 0 <= self.leaf_probability < 1:
            raise ConfigError(
                f"data.leaf_probability={self.leaf_probability}; it must be at least 0 and below 1"
            )
        if not self.min_length + 1 < self.max_length:
            raise ConfigError(
                f"data.min_length={self.min_length}, data.max_length={self.max_length}; no length "
                "lies between"
            )
        if self._law.longest <= self.min_length:
            raise ConfigError(
                f"data.min_length={self.min_length}; with data.max_depth={self.max_depth} and "
                f"data.max_args={self.max_args} a tree has at most {self._law.longest} tokens"
            )
        needed = self.max_length - 1 + self.append_eos
        if self.seq_len < needed:
            raise ConfigError(
                f"data.seq_len={self.seq_len} is too short for rows of up to {needed} tokens; "
                "make it longer, or data.max_length smaller"
            )

    def source(self, split: Split) -> Source:
        return Generated(self._rows, self.seed, split, samples_of(self, split))

    def fingerprint(self) -> str:
        return fingerprint_of("listops", _VERSION, dataclasses.asdict(self))

    @property
    def _law(self) -> Law:
        return Law(
            self.leaf_probability, self.max_depth, self.max_args, self.min_length, self.max_length
        )

    def _rows(self, key: counter.Keys) -> Batch:
        parts = [self._some(key[first : first + _ROWS]) for first in range(0, len(key), _ROWS)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _some(self, key: counter.Keys) -> Batch:
        roots = listops_trees.draw(key, self._law)
        tokens, length, value = listops_trees.rows(roots, self._law, self.seq_len)
        if self.append_eos:
            tokens[np.arange(len(key)), length] = END_OF_TEXT
            length += 1
        inside = np.arange(self.seq_len) < length[:, None]
        return {"tokens": tokens, "segment_ids": inside.astype(np.int32), "label": value}


def check_symbols(vocab_size: int, n_classes: int) -> None:
    """Refuses sizes that ListOps cannot have."""
    at_least("vocab_size", vocab_size, len(SYMBOLS))
    at_least("n_classes", n_classes, 10)
