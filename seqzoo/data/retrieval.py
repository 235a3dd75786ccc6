"""Two papers as characters, does one cite the other? The Retrieval task of the Long Range Arena.

Source of the protocol: state-spaces/s4, src/dataloaders/lra.py: all characters of the training
texts, an end of text, each text cut at 4,000 tokens.
Differs from source: the tables (gigabytes) stay where they are; a row is read when it is asked for.
Texts are taken as they stand there, in the notation b'...' of Python, as the source takes them.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import numpy as np

from seqzoo.data import files
from seqzoo.data.characters import Characters
from seqzoo.data.files import Origin
from seqzoo.data.source import Batch, Source, Split, at_least, fingerprint_of, known_split
from seqzoo.data.stored import Stored
from seqzoo.errors import DataError

_VERSION = 1
_FILES = {
    split: f"new_aan_pairs.{name}.tsv"
    for split, name in {"train": "train", "valid": "eval", "test": "test"}.items()
}
_TRAIN_ROWS = 147_086
_ORIGIN = Origin(
    "the Long Range Arena (Google Research)",
    "lra_release.gz (release 1.0), and unpack it",
    f"its folder tsv_data with {', '.join(_FILES.values())}",
)
_FIELDS = 5  # label, number and number of the papers, text and text


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Does one paper cite the other? A row is two texts, tokens [2 t].

    Attributes:
      path: the folder tsv_data of the release.
      vocab_size: at least padding, unknown, end of text and the characters in use (98 in all); a
        message says the number if it is too small.
      input_dim: null, rows are tokens.
      n_classes: 2: 1 = cites.
      seq_len: length of each text; longer ones are cut, shorter ones filled up with padding.
      append_eos: end each text with a token of its own.
      official: there must be 147,086 rows of training; false = any number.
      seed: of the order of training, apart from trainer.seed.
    """

    path: str
    vocab_size: int = 128
    input_dim: None = None
    n_classes: int = 2
    seq_len: int = 4000
    append_eos: bool = True
    official: bool = True
    seed: int = 0

    group_names = ()
    bytes_per_token = None

    def __post_init__(self) -> None:
        at_least("vocab_size", self.vocab_size, 4)
        at_least("n_classes", self.n_classes, 2)
        at_least("seq_len", self.seq_len, 2)

    def source(self, split: Split) -> Source:
        table = self._table(known_split(split))
        self._characters.check(self.vocab_size, str(table.path))

        def make(rows: np.ndarray) -> Batch:
            tokens = np.zeros((len(rows), 2, self.seq_len), np.int32)
            ids = np.zeros_like(tokens)
            for row, texts in enumerate(table.read(rows)):
                for which, text in enumerate(texts):
                    found = self._characters.encode(text[: self._cut], self.append_eos)
                    tokens[row, which, : len(found)] = found
                    ids[row, which, : len(found)] = 1
            return {"tokens": tokens, "segment_ids": ids, "label": table.labels[rows]}

        return Stored(make, np.arange(len(table.labels)), self.seed)

    def fingerprint(self) -> str:
        settings = files.settings_of(self)
        settings["content"] = {}
        for split in _FILES:  # where lines begin says how long each is
            table = self._table(split)
            settings["content"][split] = files.digest_of([table.starts, table.labels])
        settings["characters"] = self._characters.known.tolist()
        return fingerprint_of("retrieval", _VERSION, settings)

    @property
    def _cut(self) -> int:
        return self.seq_len - self.append_eos

    # Looked through once: what the run began with is what it goes on with.
    def _table(self, split: Split) -> "_Table":
        if split not in self._tables:
            file = _ORIGIN.find(_ORIGIN.folder(self.path), _FILES[split])
            table = _Table.of(file)
            if self.official and split == "train":
                _ORIGIN.check_count(f"{file}, rows", len(table.labels), _TRAIN_ROWS)
            self._tables[split] = table
        return self._tables[split]

    @functools.cached_property
    def _tables(self) -> "dict[str, _Table]":
        return {}

    @functools.cached_property
    def _characters(self) -> Characters:
        pairs = self._table("train").read(None)
        return Characters.of(text[: self._cut] for pair in pairs for text in pair)


@dataclasses.dataclass(frozen=True, eq=False)
class _Table:
    """A file of rows, and where each begins."""

    path: pathlib.Path
    stamp: tuple[int, int]
    starts: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, path: pathlib.Path) -> "_Table":
        stamp, starts, labels = files.stamp(path), [0], []
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                starts.append(starts[-1] + len(line))
                labels.append(_label(path, number, line))
        if not labels:
            raise DataError(f"{path} has no rows")
        return cls(path, stamp, np.array(starts[:-1], np.int64), np.array(labels, np.int32))

    def read(self, rows: np.ndarray | None) -> Iterator[tuple[str, str]]:
        """Yields the two texts of rows by number, None = of all in order."""
        files.check_unchanged(self.path, self.stamp)
        with self.path.open("rb") as file:
            for row in range(len(self.labels)) if rows is None else rows.tolist():
                if rows is not None:
                    file.seek(self.starts[row])
                one, other = file.readline().rstrip(b"\r\n").split(b"\t")[-2:]
                yield one.decode("utf-8", "replace"), other.decode("utf-8", "replace")


def _label(path: pathlib.Path, number: int, line: bytes) -> int:
    """Returns the label of a line, 0 or 1; the files write it as a decimal fraction."""
    label = line[: line.find(b"\t")]
    if line.count(b"\t") != _FIELDS - 1 or label not in (b"0", b"1", b"0.0", b"1.0"):
        raise _ORIGIN.damaged(
            path, f"has a line {number} that is not label, two numbers and two texts between tabs"
        )
    return int(label[:1])
