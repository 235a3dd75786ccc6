"""What readers of files share: rows by number, splits by seed, padded rows, pixels."""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from seqzoo.data import counter
from seqzoo.data.source import Batch, shuffled
from seqzoo.errors import ConfigError

PIXEL_VALUES = 256

_SPLIT_STREAM = 1 << 49  # apart from the streams of orders and shifts


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """Rows that exist once, in a random order per epoch.

    Attributes:
      make: numbers of rows of the whole set, int64 [b] -> batch.
      rows: int64 [n], those of this split.
      seed: of the order.
    """

    make: Callable[[np.ndarray], Batch]
    rows: np.ndarray
    seed: int

    group_names = ()
    block = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        return ((0, len(self)),)

    def order(self, position: np.ndarray) -> np.ndarray:
        return shuffled(position, len(self), self.seed)

    def batch(self, index: np.ndarray) -> Batch:
        return self.make(self.rows[np.asarray(index, np.int64) % len(self)])


@dataclasses.dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of tokens of different lengths, one behind the other in one array.

    Attributes:
      values: all of them.
      starts: int64 [n + 1], where each row begins, and the end.
    """

    values: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[np.ndarray]) -> "Ragged":
        rows = list(rows)
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        return cls(np.concatenate(rows) if rows else np.zeros(0, np.int32), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def padded(self, rows: np.ndarray, seq_len: int) -> Batch:
        """Returns tokens and segment_ids int32 [b t]: 1 where there is a token, 0 = padding."""
        length = self.starts[rows + 1] - self.starts[rows]
        inside = np.arange(seq_len) < length[:, None]
        place = np.where(inside, self.starts[rows][:, None] + np.arange(seq_len), 0)
        tokens = np.where(inside, self.values[place].astype(np.int32), 0)
        return {"tokens": tokens, "segment_ids": inside.astype(np.int32)}


def split_rows(n: int, sizes: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Deals the numbers 0 .. n - 1 out at random: int64 [size] for each of `sizes`, the rest last.

    Each part is in ascending order; the order of training is another matter.
    """
    dealt = np.empty(n, np.int64)
    dealt[counter.permute(np.arange(n), n, seed=seed, stream=_SPLIT_STREAM)] = np.arange(n)
    return [np.sort(part) for part in np.split(dealt, np.cumsum(sizes))]


def pixel_rows(
    pixels: np.ndarray, input_dim: int | None, mean: np.ndarray | float, std: np.ndarray | float
) -> Batch:
    """Images as sequences, row after row.

    Args:
      pixels: uint8 [b t c].
      input_dim: c, or None for tokens.
      mean: of pixels / 255, one number or [c].
      std: see `mean`.

    Returns:
      inputs float32 [b t c], (pixels / 255 - mean) / std; or tokens int32 [b t*c], 0 to 255.
    """
    if input_dim is None:
        return {"tokens": pixels.reshape(len(pixels), -1).astype(np.int32)}
    scaled = (pixels / np.float32(255) - np.float32(mean)) / np.float32(std)
    return {"inputs": scaled.astype(np.float32)}


def check_pixels(vocab_size: int, input_dim: int | None, channels: int) -> None:
    """Refuses sizes that images with so many channels cannot have."""
    if vocab_size < PIXEL_VALUES:
        raise ConfigError(
            f"data.vocab_size={vocab_size} is too small for pixels; it must be at least "
            f"{PIXEL_VALUES}"
        )
    if input_dim not in (None, channels):
        raise ConfigError(
            f"data.input_dim={input_dim}; it must be {channels}, numbers per place, or null for "
            "tokens 0 to 255"
        )


def check_share(name: str, value: float) -> None:
    """Refuses a share to hold out that leaves nothing of either."""
    if not 0 < value < 1:
        raise ConfigError(f"data.{name}={value}; it must be above 0 and below 1")
