"""What data sets share that hide something in filler and ask for it at the end of the row.

The filler ends where the question begins and is cut at its start, so that it has the length that is
left over. The answer is read token by token: row and targets end in

    tokens   ... question  a1 a2 ... a(n-1)
    targets  ...       a1  a2 a3 ...  a(n)
"""

from collections.abc import Callable
from typing import Any

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

# Drawn by every data set here: where the thing lies that is asked for, and among how many documents
# a row of train is shared out.
DEPTH, DOCUMENTS = 1, 100


class Haystack:
    """Train and valid hide at a place drawn anew for each row; test on a grid of length and depth.

    A data set adds fields (seq_len, test_lengths, depths, the numbers of samples, seed among them;
    train_on and documents, where rows are text) and `rows(key, length=..., depth=...)`.
    """

    seq_len: int
    test_lengths: tuple[int, ...] | None
    depths: tuple[int, ...]
    seed: int
    train_on: str = "answers"  # or "text": every next token of train rows is a target
    documents: int = 1  # that share a row of train, at most

    name: str
    version: int
    bytes_per_token = None
    answers_in_input = True  # an answer of several tokens is read while it is asked for

    def rows(self, key: counter.Keys, *, length: int, depth: int | None) -> Batch:
        """Makes rows of one length; depth in percent of the filler, None = drawn."""
        raise NotImplementedError

    def least_length(self) -> int:
        """Of a row that holds what is hidden and what is asked."""
        raise NotImplementedError

    def answer_length(self) -> int:
        """Tokens that are asked."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuses settings that do not fit, and makes lists tuples."""
        check_samples(self)
        lengths = (self.seq_len,) if self.test_lengths is None else self.test_lengths
        object.__setattr__(self, "test_lengths", tuple(int(n) for n in lengths))
        object.__setattr__(self, "depths", tuple(int(d) for d in self.depths))
        for name, given in (("test_lengths", self.test_lengths), ("depths", self.depths)):
            if not given or len(set(given)) < len(given):
                raise ConfigError(f"data.{name}={list(given)}; give at least one, and none twice")
        for depth in self.depths:
            if not 0 <= depth <= 100:
                raise ConfigError(
                    f"data.depths={list(self.depths)}; a depth is a percentage, 0 = the filler's "
                    "beginning, 100 = its end"
                )
        if self.train_on not in ("answers", "text"):
            raise ConfigError(f"data.train_on={self.train_on}; it must be one of answers, text")
        at_least("documents", self.documents, 1)
        at_least("seq_len", self.seq_len, self.least_length())
        if self.documents * self.least_length() > self.seq_len:
            raise ConfigError(
                f"data.documents={self.documents}; a row of data.seq_len={self.seq_len} holds at "
                f"most {self.seq_len // self.least_length()} of {self.least_length()} tokens, "
                "the shortest there are"
            )
        for length in self.test_lengths:
            at_least("test_lengths", length, self.least_length())

    @property
    def most_asked(self) -> int | None:
        """Targets per row, at most; None = all."""
        return None if self.train_on == "text" else self.documents * self.answer_length()

    @property
    def cells(self) -> tuple[tuple[int, int], ...]:
        """(length, depth) of the groups of the test split, in order."""
        return tuple((n, d) for n in self.test_lengths or () for d in self.depths)

    @property
    def group_names(self) -> tuple[str, ...]:
        return tuple(group_name(*cell) for cell in self.cells)

    def source(self, split: Split) -> Source:
        samples = samples_of(self, split)
        if split != "test":
            make: Callable[[counter.Keys], Batch] = _Rows(self, self.seq_len)
            if split == "train":
                make = _Shared(self) if self.documents > 1 else make
                make = _Read(make) if self.train_on == "text" else make
            return Generated(make, self.seed, split, samples, self.group_names)
        parts = tuple(
            Generated(
                _Rows(self, length, depth, group),
                self.seed,
                split,
                samples,
                self.group_names,
                stream=length * 101 + depth,
            )
            for group, (length, depth) in enumerate(self.cells)
        )
        return Joined(parts, self.seed, group_names=self.group_names)

    def fingerprint(self) -> str:
        return fingerprint_of(self.name, self.version, vars(self))


class _Rows:
    """What makes the rows of one cell of the grid."""

    def __init__(
        self, data: Haystack, length: int, depth: int | None = None, group: int | None = None
    ):
        self._data, self._length, self._depth, self._group = data, length, depth, group

    def __call__(self, key: counter.Keys) -> Batch:
        batch = self._data.rows(key, length=self._length, depth=self._depth)
        if self._group is not None:
            batch["group"] = np.full(len(key), self._group, np.int32)
        return batch


class _Shared:
    """Makes rows that 1 .. n documents share, as many as are drawn, all of a row of one length.

    Short documents ask more often, and what they ask for is nearer: a task of long ones is learned
    from them. Where the length does not divide, the last document is longer.
    """

    def __init__(self, data: Haystack):
        self._data = data

    def __call__(self, key: counter.Keys) -> Batch:
        data = self._data
        counts = counter.integers(key, DOCUMENTS, 1, data.documents)[:, 0] + 1
        shape = (len(key), data.seq_len)
        batch = {name: np.empty(shape, np.int32) for name in ("tokens", "targets", "segment_ids")}
        for count in np.unique(counts):
            of_count, size = counts == count, data.seq_len // count
            for number in range(count):
                start = number * size
                stop = data.seq_len if number == count - 1 else start + size
                part = counter.children(key[of_count], np.full(of_count.sum(), number))
                document = data.rows(part, length=stop - start, depth=None)
                document["segment_ids"] = np.full(document["tokens"].shape, number + 1)
                for name, values in document.items():
                    batch[name][of_count, start:stop] = values
        return batch


class _Read:
    """Asks every next token of what `make` makes: rows end in a token that is asked anyway."""

    def __init__(self, make: Callable[[counter.Keys], Batch]):
        self._make = make

    def __call__(self, key: counter.Keys) -> Batch:
        batch = self._make(key)
        tokens, targets = batch["tokens"], batch["targets"]
        batch["targets"] = np.where(targets == IGNORE, np.roll(tokens, -1, axis=1), targets)
        return batch


def group_name(length: int, depth: int) -> str:
    """Of the rows of one length with the needle at one depth."""
    return f"len_{length}_depth_{depth}"


def place(key: counter.Keys, depth: int | None, n: int) -> np.ndarray:
    """Chooses one of places 0 .. n - 1 per row, int64 [b]: at a depth in percent, None = drawn."""
    if depth is None:
        return counter.integers(key, DEPTH, 1, n)[:, 0].astype(np.int64)
    return np.full(len(key), round(depth * (n - 1) / 100), np.int64)


def insert(filler: np.ndarray, pieces: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Puts pieces between the tokens of a filler.

    Args:
      filler: [f] or [b f].
      pieces: [b k m], k pieces of m tokens per row.
      places: [b k], how many tokens of the filler stand before each piece.

    Returns:
      int32 [b, f + k * m].
    """
    b, k, m = pieces.shape
    order = np.argsort(places, axis=1, kind="stable")
    pieces = np.take_along_axis(pieces, order[:, :, None], axis=1)
    start = np.take_along_axis(places, order, axis=1) + m * np.arange(k)
    columns = (start[:, :, None] + np.arange(m)).reshape(b, k * m)
    row = np.arange(b)[:, None]
    out = np.empty((b, filler.shape[-1] + k * m), np.int32)
    free = np.ones(out.shape, bool)
    out[row, columns] = pieces.reshape(b, k * m)
    free[row, columns] = False
    out[free] = np.broadcast_to(filler, (b, filler.shape[-1])).reshape(-1)
    return out


def asked(context: np.ndarray, question: np.ndarray, answer: np.ndarray) -> Batch:
    """Joins context [b c], question [b q] and answer [b n] to rows of c + q + n - 1 tokens."""
    tokens = np.concatenate([context, question, answer[:, :-1]], axis=1).astype(np.int32)
    targets = np.full(tokens.shape, IGNORE, np.int32)
    targets[:, -answer.shape[1] :] = answer
    return {"tokens": tokens, "targets": targets}


def text(words: str) -> np.ndarray:
    """ASCII as uint8 [n]."""
    return np.frombuffer(words.encode("ascii"), np.uint8)


def repeated(b: int, *parts: Any) -> np.ndarray:
    """Joins texts that all rows share with [b n] arrays: int32 [b, all of them]."""
    whole = [text(part) if isinstance(part, str) else part for part in parts]
    return np.concatenate([np.broadcast_to(p, (b, p.shape[-1])) for p in whole], axis=1)


# The filler of the passkey task and of RULER's "noise" haystack.
SENTENCES = (
    "The grass is green. ",
    "The sky is blue. ",
    "The sun is yellow. ",
    "Here we go. ",
    "There and back again. ",
)


def sentences(length: int) -> tuple[np.ndarray, np.ndarray]:
    """The last `length` bytes of SENTENCES said again and again, and where something may stand.

    Returns:
      uint8 [length], and the places between two sentences, int64 [n], ascending: from the start of
      the first whole sentence to the end.
    """
    cycle = text("".join(SENTENCES))
    filler = np.tile(cycle, -(-length // len(cycle)))
    filler = filler[len(filler) - length :]
    ends = np.cumsum([len(sentence) for sentence in SENTENCES])[::-1]
    back = (len(cycle) - ends) + len(cycle) * np.arange(-(-length // len(cycle)) + 1)[:, None]
    places = length - back.reshape(-1)
    return filler, np.sort(places[places >= 0])


def digits(key: counter.Keys, purpose: int, count: int) -> np.ndarray:
    """ASCII digits, each of ten alike, int32 [b, count]."""
    return counter.integers(key, purpose, count, 10) + ord("0")
