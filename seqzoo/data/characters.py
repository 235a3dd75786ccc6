"""Text as characters: a vocabulary of those that are common enough, and texts as its numbers.

Numbers 0, 1 and 2 are padding, an unknown character and the end of a text; then the characters of
the training texts, the commonest first, as torchtext orders them.
"""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

from seqzoo.errors import DataError

UNKNOWN, END_OF_TEXT = 1, 2
_SPECIAL = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Characters:
    """Which number stands for which character.

    Attributes:
      known: code points, uint32 [n]; the i-th has number 3 + i.
    """

    known: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str], min_count: int = 1) -> "Characters":
        """Counts the characters of texts and keeps those that occur `min_count` times."""
        counts = np.zeros(128, np.int64)
        for text in texts:
            found = np.bincount(code_points(text))
            if len(found) > len(counts):
                counts = np.pad(counts, (0, len(found) - len(counts)))
            counts[: len(found)] += found
        kept = np.flatnonzero(counts >= max(1, min_count))
        return cls(kept[np.lexsort((kept, -counts[kept]))].astype(np.uint32))

    @property
    def size(self) -> int:
        """Numbers in use."""
        return _SPECIAL + len(self.known)

    def check(self, vocab_size: int, where: str) -> None:
        """Refuses a vocabulary of the model that is too small for these characters."""
        if self.size > vocab_size:
            raise DataError(
                f"{where}: {self.size} different tokens, more than data.vocab_size={vocab_size}; "
                f"set data.vocab_size={self.size}"
            )

    def encode(self, text: str, append_eos: bool) -> np.ndarray:
        """Returns the numbers of a text, uint16 [t]."""
        points = code_points(text)
        inside = points < len(self._table)
        tokens = np.where(inside, self._table[np.where(inside, points, 0)], np.uint16(UNKNOWN))
        return np.append(tokens, np.uint16(END_OF_TEXT)) if append_eos else tokens

    @functools.cached_property
    def _table(self) -> np.ndarray:
        table = np.full(int(self.known.max(initial=0)) + 1, UNKNOWN, np.uint16)
        table[self.known] = _SPECIAL + np.arange(len(self.known), dtype=np.uint16)
        return table


def code_points(text: str) -> np.ndarray:
    """Returns the characters of a text as numbers, uint32 [t]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
