"""Reviews of films as characters, for or against: the Text task of the Long Range Arena.

Source of the protocol: state-spaces/s4, src/dataloaders/lra.py: characters that the training texts
(as cut) hold 15 times, an end of text, cut at 4,096 tokens; the test texts serve for choosing too.
Differs from source: LRA's own reader works on bytes. Ties of the vocabulary's order are by number.
"""

import dataclasses
import functools
import pathlib

import numpy as np

from seqzoo.data import files
from seqzoo.data.characters import Characters
from seqzoo.data.files import Origin
from seqzoo.data.source import Batch, Source, Split, at_least, fingerprint_of, known_split
from seqzoo.data.stored import Ragged, Stored, split_rows
from seqzoo.errors import ConfigError

_VERSION = 1
_LABELS = ("neg", "pos")
_PARTS = ("train", "test")
_TEXTS = 12_500  # of each label in each part
_ORIGIN = Origin(
    "the Large Movie Review Dataset (Maas et al., 2011)",
    "aclImdb_v1.tar.gz, md5 7c2ac02c03563afcf9b574c7e56c153a, and unpack it",
    "its folder aclImdb with train/pos, train/neg, test/pos and test/neg",
)


@dataclasses.dataclass(frozen=True)
class IMDB:
    """Is a review for or against the film?

    Attributes:
      path: the folder aclImdb.
      vocab_size: at least padding, unknown, end of text and the characters in use; a message says
        the number if it is too small.
      input_dim: null, rows are tokens.
      n_classes: 2: 0 = against, 1 = for.
      seq_len: length of a row; longer texts are cut, shorter ones filled up with padding.
      min_count: characters that the training texts hold less often are unknown.
      append_eos: end the text with a token of its own.
      valid_fraction: share of the training texts to choose by; 0 = the test texts, as LRA does,
        where figures are then chosen on what is reported.
      split_seed: which of them.
      official: there must be 12,500 texts in each folder; false = any number.
      seed: of the order of training, apart from trainer.seed.
    """

    path: str
    vocab_size: int = 160
    input_dim: None = None
    n_classes: int = 2
    seq_len: int = 4096
    min_count: int = 15
    append_eos: bool = True
    valid_fraction: float = 0.0
    split_seed: int = 42
    official: bool = True
    seed: int = 0

    group_names = ()
    bytes_per_token = None

    def __post_init__(self) -> None:
        at_least("vocab_size", self.vocab_size, 4)
        at_least("n_classes", self.n_classes, len(_LABELS))
        at_least("seq_len", self.seq_len, 2)
        at_least("min_count", self.min_count, 1)
        if not 0 <= self.valid_fraction < 1:
            raise ConfigError(
                f"data.valid_fraction={self.valid_fraction}; it must be at least 0 and below 1"
            )

    def source(self, split: Split) -> Source:
        return Stored(self._batch, self._rows[known_split(split)], self.seed)

    def fingerprint(self) -> str:
        tokens, labels, _ = self._content
        settings = files.settings_of(self)
        settings["content"] = files.digest_of([tokens.values, tokens.starts, labels])
        return fingerprint_of("imdb", _VERSION, settings)

    # Read once: what the run began with is what it goes on with.
    @functools.cached_property
    def _content(self) -> tuple[Ragged, np.ndarray, int]:
        cut = self.seq_len - self.append_eos
        train, test = ([text[:cut] for text in self._texts(part)] for part in _PARTS)
        characters = Characters.of(train, self.min_count)
        characters.check(self.vocab_size, f"data.path={self.path}")
        tokens = Ragged.of(characters.encode(text, self.append_eos) for text in (*train, *test))
        labels = [np.repeat(np.arange(len(_LABELS)), self._counts(part)) for part in _PARTS]
        return tokens, np.concatenate(labels).astype(np.int32), len(train)

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        _, labels, n = self._content
        test = np.arange(n, len(labels))
        if not self.valid_fraction:
            return {"train": np.arange(n), "valid": test, "test": test}
        train, valid = split_rows(n, (n - round(n * self.valid_fraction),), self.split_seed)
        return {"train": train, "valid": valid, "test": test}

    def _batch(self, rows: np.ndarray) -> Batch:
        tokens, labels, _ = self._content
        return {**tokens.padded(rows, self.seq_len), "label": labels[rows]}

    @functools.cached_property
    def _files(self) -> dict[tuple[str, str], list[pathlib.Path]]:
        found = {}
        for part in _PARTS:
            for label in _LABELS:
                folder = _ORIGIN.folder(self.path, f"{part}/{label}")
                found[part, label] = sorted(folder.glob("*.txt"))
                count = len(found[part, label])
                _ORIGIN.check_some(folder, "texts (*.txt)", count)
                if self.official:
                    _ORIGIN.check_count(f"{folder}, texts", count, _TEXTS)
        return found

    def _counts(self, part: str) -> list[int]:
        return [len(self._files[part, label]) for label in _LABELS]

    def _texts(self, part: str) -> list[str]:
        return [_text(file) for label in _LABELS for file in self._files[part, label]]


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _ORIGIN.damaged(file, f"is not UTF-8 at byte {error.start}") from None
