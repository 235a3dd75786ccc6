"""Passkey: a number stands somewhere in filler; at the end it is asked for.

Source: Mohtashami and Jaggi, "Landmark Attention" (arXiv 2305.16300), whose sentences the filler
repeats, and the form that most later papers use.
Differs from source: rows have exactly `seq_len` tokens (the filler is cut at its start), the key
stands between two sentences, it has always `n_digits` digits (the first may be 0), and only those
are asked. No instructions stand before the filler.
"""

import dataclasses

import numpy as np

from seqzoo.data import counter, haystack
from seqzoo.data.haystack import Haystack
from seqzoo.data.source import Batch, at_least
from seqzoo.errors import ConfigError

_VALUE, _NOISE = range(2, 4)
_QUESTION = "What is the pass key? The pass key is "


@dataclasses.dataclass(frozen=True)
class Passkey(Haystack):
    """Bytes: a key between two sentences, and each of its digits asked at the byte before it.

        The grass is green. ... The pass key is 71432. Remember it. 71432 is the pass key. ...
        ... There and back again. What is the pass key? The pass key is 7143

    Attributes:
      vocab_size: at least 256, bytes.
      seq_len: bytes of a row of train and valid.
      test_lengths: of test rows; null = seq_len. Each with each depth is a group of the metrics.
      depths: where the key of test rows stands, in percent of the filler; in train and valid it may
        stand between any two sentences, all alike.
      n_digits: of the key.
      train_on: "answers", the digits that are asked, or "text", every byte of a row of train, as a
        language model is trained; valid and test ask the answers alone.
      documents: that share a row of train, at most: each row has 1 .. documents of one length,
        drawn anew, kept apart by segment_ids. Short ones ask more often and from nearer.
      train_samples: rows of an epoch; null = endless, every row is new.
      valid_samples: rows of the valid split.
      test_samples: rows of the test split, per length and depth.
      seed: of the data, apart from trainer.seed.
    """

    vocab_size: int = 256
    seq_len: int = 512
    test_lengths: tuple[int, ...] | None = None
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    n_digits: int = 5
    train_on: str = "answers"
    documents: int = 1
    train_samples: int | None = None
    valid_samples: int = 500
    test_samples: int = 100
    seed: int = 0

    name = "passkey"
    version = 1

    def __post_init__(self) -> None:
        at_least("vocab_size", self.vocab_size, 256)
        at_least("n_digits", self.n_digits, 1)
        self.check()

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / 10

    def answer_length(self) -> int:
        return self.n_digits

    def least_length(self) -> int:
        return len(_needle(np.zeros((1, self.n_digits), np.int32))[0]) + self._question()

    def rows(self, key: counter.Keys, *, length: int, depth: int | None) -> Batch:
        answer = haystack.digits(key, _VALUE, self.n_digits)
        needle = _needle(answer)
        filler, places = haystack.sentences(length - self._question() - needle.shape[1])
        where = places[haystack.place(key, depth, len(places))]
        context = haystack.insert(filler, needle[:, None], where[:, None])
        return haystack.asked(context, haystack.repeated(len(key), _QUESTION), answer)

    def _question(self) -> int:
        """Length of the question and of the digits that the row shows."""
        return len(_QUESTION) + self.n_digits - 1


@dataclasses.dataclass(frozen=True)
class PasskeyTokens(Haystack):
    """Tokens: noise, a marker and the key behind it, noise, a second marker that asks for the key.

    The last token of the vocabulary is the marker of the key, the one before it the marker of the
    question. The key's tokens are drawn from 0 .. n_values - 1.

    Attributes:
      vocab_size: values, noise, two markers.
      seq_len: tokens of a row of train and valid.
      test_lengths: of test rows; null = seq_len. Each with each depth is a group of the metrics.
      depths: where the key of test rows stands, in percent of the noise; in train and valid it may
        stand anywhere, all places alike.
      n_values: tokens that keys are made of.
      n_digits: tokens of a key.
      noise: from the tokens that are neither value nor marker ("apart"), or from the values too
        ("alike"), so that only the marker tells the key.
      train_samples: rows of an epoch; null = endless, every row is new.
      valid_samples: rows of the valid split.
      test_samples: rows of the test split, per length and depth.
      seed: of the data, apart from trainer.seed.
    """

    vocab_size: int = 32
    seq_len: int = 256
    test_lengths: tuple[int, ...] | None = None
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    n_values: int = 10
    n_digits: int = 5
    noise: str = "alike"
    train_samples: int | None = None
    valid_samples: int = 500
    test_samples: int = 100
    seed: int = 0

    name = "passkey_tokens"
    version = 1

    def __post_init__(self) -> None:
        at_least("n_values", self.n_values, 2)
        at_least("n_digits", self.n_digits, 1)
        if self.noise not in ("apart", "alike"):
            raise ConfigError(f"data.noise={self.noise}; it must be one of apart, alike")
        least = self.n_values + 2 + (self.noise == "apart")
        if self.vocab_size < least:
            raise ConfigError(
                f"data.vocab_size={self.vocab_size} is too small for n_values={self.n_values}, two "
                f"markers and noise={self.noise}; it must be at least {least}"
            )
        self.check()

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / self.n_values

    def answer_length(self) -> int:
        return self.n_digits

    def least_length(self) -> int:
        return 2 * self.n_digits + 1

    def rows(self, key: counter.Keys, *, length: int, depth: int | None) -> Batch:
        b, size = len(key), length - self.least_length()
        answer = counter.integers(key, _VALUE, self.n_digits, self.n_values)
        low = self.n_values if self.noise == "apart" else 0
        filler = counter.integers(key, _NOISE, size, self.vocab_size - 2 - low) + low
        needle = np.concatenate([np.full((b, 1), self.vocab_size - 1), answer], axis=1)
        where = haystack.place(key, depth, size + 1)
        context = haystack.insert(filler, needle[:, None], where[:, None])
        return haystack.asked(context, np.full((b, 1), self.vocab_size - 2), answer)


def _needle(answer: np.ndarray) -> np.ndarray:
    """The sentence that holds the key, int32 [b m]."""
    parts = ("The pass key is ", answer, ". Remember it. ", answer, " is the pass key. ")
    return haystack.repeated(len(answer), *parts)
