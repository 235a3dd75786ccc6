"""Needle in a haystack: "One of the special magic numbers for brave-eagle is: 5173926."

Source: RULER (arXiv 2404.06654), as in EleutherAI/lm-evaluation-harness, lm_eval/tasks/ruler/
niah_utils.py and prepare_niah.py, in the forms that need no essay:

    S-NIAH-1       haystack=sentences n_keys=1    repeated sentences hide one needle
    multi-key 1    haystack=sentences n_keys=4    three more needles with other keys
    multi-key 2    haystack=needles               the haystack is made of needles
    multi-key 3    haystack=needles keys=uuids values=uuids

Differs from source: lengths are bytes and every row has exactly `seq_len` of them; sentences stand
on one line and are cut at the start; multi-key 1 hides in sentences, not in essays; keys are two
words of five letters each from our own lists, and numbers may begin with 0. Only the value is
asked, byte by byte.
"""

import dataclasses

import numpy as np

from seqzoo.data import counter, haystack
from seqzoo.data.haystack import Haystack
from seqzoo.data.source import Batch, at_least
from seqzoo.errors import ConfigError

_VALUES, _KEYS, _PLACES = range(2, 5)
_DASHES = (8, 13, 18, 23)  # of a UUID
_UUID = 36


@dataclasses.dataclass(frozen=True)
class Needles(Haystack):
    """RULER's task as bytes: say what it is about, hide needles, ask for the value of one key.

    Attributes:
      vocab_size: at least 256, bytes.
      seq_len: bytes of a row of train and valid.
      test_lengths: of test rows; null = seq_len. Each with each depth is a group of the metrics.
      depths: where the needle of test rows stands that is asked for, in percent of the haystack; in
        train and valid any place is alike. Others always stand anywhere.
      haystack: "sentences", five of them again and again, or "needles" with other keys.
      n_keys: needles among sentences; 1 where the haystack is made of needles.
      keys: "words" or "uuids".
      values: "numbers" or "uuids".
      n_digits: of numbers.
      train_on: "answers", the value that is asked, or "text", every byte of a row of train, as a
        language model is trained; valid and test ask the answers alone.
      documents: that share a row of train, at most: each row has 1 .. documents of one length,
        drawn anew, kept apart by segment_ids. Short ones ask more often and from nearer.
      train_samples: rows of an epoch; null = endless, every row is new.
      valid_samples: rows of the valid split.
      test_samples: rows of the test split, per length and depth.
      seed: of the data, apart from trainer.seed.
    """

    vocab_size: int = 256
    seq_len: int = 1024
    test_lengths: tuple[int, ...] | None = None
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    haystack: str = "sentences"
    n_keys: int = 1
    keys: str = "words"
    values: str = "numbers"
    n_digits: int = 7
    train_on: str = "answers"
    documents: int = 1
    train_samples: int | None = None
    valid_samples: int = 500
    test_samples: int = 100
    seed: int = 0

    name = "niah"
    version = 1

    def __post_init__(self) -> None:
        at_least("vocab_size", self.vocab_size, 256)
        at_least("n_digits", self.n_digits, 1)
        at_least("n_keys", self.n_keys, 1)
        for name, allowed in dict(
            haystack=("sentences", "needles"), keys=("words", "uuids"), values=("numbers", "uuids")
        ).items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"data.{name}={getattr(self, name)}; it must be one of {', '.join(allowed)}"
                )
        if self.haystack == "needles" and self.n_keys != 1:
            raise ConfigError(
                f"data.n_keys={self.n_keys} with haystack=needles, which holds as many keys as fit "
                "anyway; set n_keys=1"
            )
        self.check()
        longest = max(self.seq_len, *(self.test_lengths or ()))
        if self.keys == "words" and self._fit(longest) > len(_WORDS):
            raise ConfigError(
                f"data.keys=words has {len(_WORDS)} keys, too few for a row of {longest} bytes "
                "made of needles; set keys=uuids or a shorter length"
            )

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / (10 if self.values == "numbers" else 16)

    def answer_length(self) -> int:
        return self.n_digits if self.values == "numbers" else _UUID

    def least_length(self) -> int:
        return self._around() + self.n_keys * self._needle_length()

    def rows(self, key: counter.Keys, *, length: int, depth: int | None) -> Batch:
        b, m = len(key), self._needle_length()
        space = length - self._around()
        count = self.n_keys if self.haystack == "sentences" else self._fit(length)
        names, values = self._names(key, count), self._values(key, count)
        needles = haystack.repeated(
            b * count,
            f"One of the special magic {self.values} for ",
            names.reshape(b * count, -1),
            " is: ",
            values.reshape(b * count, -1),
            ". ",
        ).reshape(b, count, m)
        if self.haystack == "sentences":
            filler, places = haystack.sentences(space - count * m)
            where = counter.integers(key, _PLACES, count, len(places)).astype(np.int64)
            where[:, 0] = haystack.place(key, depth, len(places))
            context, which = haystack.insert(filler, needles, places[where]), np.zeros(b, int)
        else:
            first = count - space // m  # 1 where the first needle is cut and not asked for
            which = first + haystack.place(key, depth, count - first)
            context = needles.reshape(b, count * m)[:, count * m - space :]
        row = np.arange(b)
        kind, name = _singular(self.values), names[row, which]
        introduction = haystack.repeated(b, self._introduction())
        question = haystack.repeated(
            b,
            f"What is the special magic {kind} for ",
            name,
            f" mentioned in the provided text? The special magic {kind} for ",
            name,
            " mentioned in the provided text is ",
        )
        context = np.concatenate([introduction, context], axis=1)
        return haystack.asked(context, question, values[row, which])

    def _names(self, key: counter.Keys, count: int) -> np.ndarray:
        """Different keys, ASCII [b count n]."""
        if self.keys == "uuids":
            return _uuids(key, _KEYS, count)
        return _WORDS[counter.distinct(key, _KEYS, count, len(_WORDS))]

    def _values(self, key: counter.Keys, count: int) -> np.ndarray:
        if self.values == "uuids":
            return _uuids(key, _VALUES, count)
        return haystack.digits(key, _VALUES, count * self.n_digits).reshape(len(key), count, -1)

    def _introduction(self) -> str:
        return (
            f"Some special magic {self.values} are hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {self.values} afterwards. "
        )

    def _key_length(self) -> int:
        return _UUID if self.keys == "uuids" else _WORDS.shape[1]

    def _value_length(self) -> int:
        return _UUID if self.values == "uuids" else self.n_digits

    def _needle_length(self) -> int:
        words = len(f"One of the special magic {self.values} for ") + len(" is: ") + len(". ")
        return words + self._key_length() + self._value_length()

    def _around(self) -> int:
        """Bytes of a row that are no haystack."""
        kind = _singular(self.values)
        question = (
            f"What is the special magic {kind} for  mentioned in the provided text? The special "
            f"magic {kind} for  mentioned in the provided text is "
        )
        shown = 2 * self._key_length() + self._value_length() - 1
        return len(self._introduction()) + len(question) + shown

    def _fit(self, length: int) -> int:
        """Needles that a row is made of, the cut one among them; as many as asked in sentences."""
        if self.haystack == "sentences":
            return self.n_keys
        return -(-(length - self._around()) // self._needle_length())


def _singular(values: str) -> str:
    return values.removesuffix("s")


def _uuids(key: counter.Keys, purpose: int, count: int) -> np.ndarray:
    """ASCII [b count 36]: random hexadecimal digits, and dashes where UUIDs have them."""
    hexadecimal = haystack.text("0123456789abcdef")
    drawn = hexadecimal[counter.integers(key, purpose, count * _UUID, 16)]
    found = drawn.reshape(len(key), count, _UUID)
    found[:, :, _DASHES] = ord("-")
    return found


def _pairs(first: str, second: str) -> np.ndarray:
    """All words of five letters of the one list with those of the other, ASCII [n 11]."""
    words = [f"{a}-{b}" for a in first.split() for b in second.split()]
    return haystack.text("".join(words)).reshape(len(words), 11)


_WORDS = _pairs(
    "acute agile ample angry basic black blank blind bland bleak blond bossy brave brief brisk"
    " broad brown burly civic civil clean clear close cocky coral crazy crisp cruel curly dense"
    " dizzy dirty dusty eager early elite empty equal exact faint false fancy fatal fiery first"
    " fixed fluid fresh frank funny giant given grand great green happy harsh heavy humid ideal"
    " jolly juicy level known",
    "acorn angel ankle apple arena arrow badge basin beach beard bench berry birch board bread"
    " brick brush cabin camel candy canoe cargo chain chair chalk chess cliff clock cloud coast"
    " couch crane crown daisy diner dress eagle earth easel fence ferry flame flute forge frost"
    " glove grape guard heron hinge honey horse hotel house ivory jewel knife lemon lever linen"
    " llama lotus maple medal",
)
