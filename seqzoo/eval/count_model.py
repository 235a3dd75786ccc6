"""A model of bytes that counts: interpolated Kneser-Ney smoothing up to a fixed order.

The probability of byte x after context c of length k is

    p_k(x | c) = max(n(c x) - D(n(c x)), 0) / n(c) + g(c) * p_{k-1}(x | c without its oldest byte)

down to p_{-1} = 1/256. n counts occurrences at the highest order and different left neighbours
below it; g(c) is what the discounts D took; three discounts (for 1, 2, more) are estimated from the
counts of counts.

Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998),
modified Kneser-Ney.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

SYMBOLS = 256
HIGHEST_ORDER = 7  # a context and a byte fit one 64-bit word


@dataclasses.dataclass(frozen=True, eq=False)
class _Level:
    """One order: what was seen, as sorted words of bytes, the newest lowest.

    Attributes:
      grams: uint64 [n], context and byte.
      share: float64 [n], the discounted count over the count of the context.
      contexts: uint64 [m].
      left: float64 [m], what the discounts took: the weight of the order below.
    """

    grams: np.ndarray
    share: np.ndarray
    contexts: np.ndarray
    left: np.ndarray

    def refine(self, words: np.ndarray, below: np.ndarray) -> np.ndarray:
        """Returns the probability of each word's newest byte, given that of the order below."""
        context, known = _find(self.contexts, words >> np.uint64(8))
        gram, seen = _find(self.grams, words)
        share = np.where(seen, self.share[gram], 0.0)
        return np.where(known, share + self.left[context] * below, below)


class CountModel:
    """Counts of the bytes of documents; a document ends with byte 0 and starts from zeros."""

    def __init__(self, documents: Sequence[bytes], order: int = 6) -> None:
        if not 0 <= order <= HIGHEST_ORDER:
            raise ValueError(f"order={order}; it must be 0 to {HIGHEST_ORDER}")
        self.order = order
        self._model = WordModel(_words(documents, order), order)

    def bits(self, documents: Sequence[bytes]) -> np.ndarray:
        """Returns what each byte costs, and each document's end: float64 [bytes + documents]."""
        return -np.log2(self._model.probabilities(_words(documents, self.order)))

    def next_byte(self, context: bytes) -> np.ndarray:
        """Returns the probabilities of the byte after a context, float64 [256]."""
        padded = bytes(self.order) + context
        last = int.from_bytes(padded[len(padded) - self.order :], "big")
        words = np.uint64(last << 8) + np.arange(SYMBOLS, dtype=np.uint64)
        return self._model.probabilities(words)


class WordModel:
    """The same for any bytes and their contexts, the less important first.

    Args:
        words: uint64 [n], each a context of `order` bytes and the byte behind it, which is the
            lowest. Smoothing forgets the highest byte of a context first.
        order: bytes of a context.
    """

    def __init__(self, words: np.ndarray, order: int) -> None:
        grams, counts = np.unique(words, return_counts=True)
        levels = [_level(grams, counts)]
        for length in range(order, 0, -1):
            # Each gram is a left neighbour, once, of the gram without its oldest byte.
            grams, counts = np.unique(_cut(grams, length), return_counts=True)
            levels.append(_level(grams, counts))
        self._levels = levels[::-1]

    def probabilities(self, words: np.ndarray) -> np.ndarray:
        """Returns the probability of each word's lowest byte after its context, float64 [n]."""
        # Sorted and once each: neighbours then search the same places of the tables.
        words, back = np.unique(words, return_inverse=True)
        found = np.full(len(words), 1 / SYMBOLS)
        for length, level in enumerate(self._levels, start=1):
            found = level.refine(_cut(words, length), found)
        return found[back]


def _words(documents: Sequence[bytes], order: int) -> np.ndarray:
    """Returns every byte with the `order` bytes before it in its document, as one word each."""
    padding = bytes(order)
    stream = np.frombuffer(
        b"".join(part for document in documents for part in (padding, document, b"\0")), np.uint8
    )
    words = np.zeros(len(stream), np.uint64)
    for back in range(order + 1):
        words[back:] |= stream[: len(stream) - back].astype(np.uint64) << np.uint64(8 * back)
    keep = np.ones(len(stream), bool)
    lengths = np.array([order + len(document) + 1 for document in documents])
    starts = np.cumsum(lengths) - lengths
    keep[(starts[:, None] + np.arange(order)).ravel()] = False
    return words[keep]


def _level(grams: np.ndarray, counts: np.ndarray) -> _Level:
    first = np.flatnonzero(np.diff(grams >> np.uint64(8), prepend=np.uint64(2**64 - 1)))
    discount = _discounts(counts)[np.minimum(counts, 3)]
    total = np.add.reduceat(counts, first)
    share = (counts - discount) / np.repeat(total, np.diff(first, append=len(grams)))
    return _Level(
        grams=grams,
        share=share,
        contexts=grams[first] >> np.uint64(8),
        left=np.add.reduceat(discount, first) / total,
    )


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Returns the discounts of counts 0, 1, 2, and 3 or more."""
    once, twice, thrice, four = (max(1, int((counts == n).sum())) for n in (1, 2, 3, 4))
    y = once / (once + 2 * twice)
    found = [0.0, 1 - 2 * y * twice / once, 2 - 3 * y * thrice / twice, 3 - 4 * y * four / thrice]
    # With few counts the estimates can leave their range.
    return np.clip(found, [0.0, 0.1, 0.1, 0.1], [0.0, 0.9, 1.8, 2.7])


def _cut(words: np.ndarray, length: int) -> np.ndarray:
    """Keeps the newest `length` bytes."""
    return words & np.uint64((1 << (8 * length)) - 1)


def _find(table: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of words in a sorted table, and whether they are there."""
    place = np.minimum(np.searchsorted(table, words), len(table) - 1)
    return place, table[place] == words
