"""Any data set of tokens with some of them hidden: masked language modelling, as for BERT.

Which tokens of a row are hidden, and what stands in their place, is a pure function of (seed,
split, number of the row): held-out rows are hidden alike every time, and a row of training comes
back in another epoch under another number.
"""

import dataclasses
from typing import Any

import numpy as np

from seqzoo.data import counter
from seqzoo.data.source import IGNORE, SPLITS, Batch, Dataset, Source, Split, fingerprint_of
from seqzoo.errors import ConfigError

_VERSION = 1
_STREAM = 1 << 49  # apart from the streams of the data set itself
_CHOSEN, _SHOWN, _OTHER = range(3)  # purposes of draws


@dataclasses.dataclass(frozen=True)
class Masked:
    """Tokens of another data set, some of them chosen: their targets are what stood there.

    Of the chosen, mask_share are shown as mask_token, random_share as any token, the rest as they
    are, so that a model cannot rely on what it sees anywhere (80 / 10 / 10 in BERT). What is not
    chosen has no target.

    Attributes:
      text: a data set of tokens. Its own targets are not used, but where it gives no segment_ids
        no token without one is chosen: so padding is known.
      vocab_size: tokens of text and the mask.
      mask_token: shown in place of a hidden token; text itself must not have it.
      mask_rate: probability that a token is chosen.
      eval_mask_rate: that in held-out splits; null = mask_rate.
      mask_share: share of the chosen that is shown as mask_token.
      random_share: share of the chosen that is shown as a token drawn uniformly.
      seq_len: tokens per row; of text.
      seed: of the choice, and of order and cuts of text; apart from trainer.seed.
    """

    text: Any
    vocab_size: int = 257
    mask_token: int = 256
    mask_rate: float = 0.15
    eval_mask_rate: float | None = None
    mask_share: float = 0.8
    random_share: float = 0.1
    seq_len: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.text, Dataset):
            raise ConfigError(f"data.text is {type(self.text).__name__}; it must be a data set")
        for name in ("mask_rate", "eval_mask_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate <= 1:
                raise ConfigError(f"data.{name}={rate}; it must be above 0 and not above 1")
        shares = (self.mask_share, self.random_share)
        if min(shares) < 0 or sum(shares) > 1:
            raise ConfigError(
                f"data.mask_share={shares[0]}, data.random_share={shares[1]}; neither may be below "
                "0, nor both together above 1"
            )
        if self.text.seq_len != self.seq_len:
            raise ConfigError(
                f"data.seq_len={self.seq_len}, but data.text.seq_len={self.text.seq_len}; they "
                "must be equal"
            )
        if not self.text.vocab_size <= self.mask_token < self.vocab_size:
            raise ConfigError(
                f"data.mask_token={self.mask_token}; it must be at least data.text.vocab_size="
                f"{self.text.vocab_size}, so that no token is mistaken for it, and below "
                f"data.vocab_size={self.vocab_size}"
            )

    @property
    def group_names(self) -> tuple[str, ...]:
        return self.text.group_names

    @property
    def bytes_per_token(self) -> float | None:
        return self.text.bytes_per_token

    def source(self, split: Split) -> Source:
        rate = self.mask_rate if split == "train" else self.eval_mask_rate or self.mask_rate
        return MaskedSource(self.text.source(split), self, split, rate)

    def fingerprint(self) -> str:
        settings = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "text"
        }
        return fingerprint_of("masked", _VERSION, settings | {"text": self.text.fingerprint()})


@dataclasses.dataclass(frozen=True)
class MaskedSource:
    """Rows of one split; see Masked.

    Attributes:
      plain: the rows as they are.
      data: the settings.
      split: which split it is.
      rate: probability that a token is chosen.
    """

    plain: Source
    data: Masked
    split: Split
    rate: float

    @property
    def group_names(self) -> tuple[str, ...]:
        return self.plain.group_names

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        return self.plain.spans

    @property
    def block(self) -> int:
        return self.plain.block

    def __len__(self) -> int:
        return len(self.plain)

    def order(self, position: np.ndarray) -> np.ndarray:
        return self.plain.order(position)

    def batch(self, index: np.ndarray) -> Batch:
        plain, data = self.plain.batch(index), self.data
        tokens = plain["tokens"]
        # Padding has segment id 0; without ids, it is where text asks for nothing.
        real = plain["segment_ids"] > 0 if "segment_ids" in plain else plain["targets"] != IGNORE
        key = counter.keys(data.seed, index, stream=_STREAM + SPLITS.index(self.split))
        count = tokens.shape[1]
        chosen = real & (_uniform(key, _CHOSEN, count) < self.rate)
        shown = _uniform(key, _SHOWN, count)
        other = counter.integers(key, _OTHER, count, data.text.vocab_size)
        stand_in = np.where(shown < data.mask_share, np.int32(data.mask_token), other)
        hidden = chosen & (shown < data.mask_share + data.random_share)
        return plain | {
            "tokens": np.where(hidden, stand_in, tokens),
            "targets": np.where(chosen, tokens, np.int32(IGNORE)),
        }


def _uniform(key: counter.Keys, purpose: int, count: int) -> np.ndarray:
    """Draws of [0, 1), float64 [b, count]."""
    return counter.bits(key, purpose, count) * 2.0**-32
