"""ListOps as the Long Range Arena published it: three tables of trees and their values.

Source of the reading: state-spaces/s4, src/dataloaders/lra.py: parentheses of the binary form are
dropped, "]" is X, rows are cut at the length of a row.
Differs from source: which number stands for which symbol (ours is fixed, as in listops).
"""

import dataclasses
import functools
import pathlib

import numpy as np

from seqzoo.data import files
from seqzoo.data.files import Origin
from seqzoo.data.listops import check_symbols
from seqzoo.data.listops_trees import END_OF_TEXT, SYMBOLS
from seqzoo.data.source import Batch, Source, Split, at_least, fingerprint_of, known_split
from seqzoo.data.stored import Ragged, Stored
from seqzoo.errors import DataError

_VERSION = 1
_FILES = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
_ROWS = {"train": 96_000, "valid": 2_000, "test": 2_000}
_ORIGIN = Origin(
    "the Long Range Arena (Google Research)",
    "lra_release.gz (release 1.0), and unpack it",
    f"its folder listops-1000 with {', '.join(_FILES.values())}",
)
_HEADER = b"Source\tTarget"
# Operators become one byte each, so that a row is read at once.
_SHORT = {b"[MIN": b"a", b"[MAX": b"b", b"[MED": b"c", b"[SM": b"d", b"]": b"X"}
_DROPPED = b"() "


@dataclasses.dataclass(frozen=True)
class ListOpsTSV:
    """Classify a tree's value; see ListOps for the trees.

    Attributes:
      path: the folder listops-1000 of the release.
      vocab_size: at least 18: padding, unknown, end of text, digits, operators, the end of a list.
      input_dim: null, rows are tokens.
      n_classes: 10, the values.
      seq_len: length of a row, filled up with padding; longer trees are cut.
      append_eos: end the text with a token of its own.
      official: there must be 96,000, 2,000 and 2,000 rows; false = any number.
      seed: of the order of training, apart from trainer.seed.
    """

    path: str
    vocab_size: int = len(SYMBOLS)
    input_dim: None = None
    n_classes: int = 10
    seq_len: int = 2048
    append_eos: bool = True
    official: bool = True
    seed: int = 0

    group_names = ()
    bytes_per_token = None

    def __post_init__(self) -> None:
        check_symbols(self.vocab_size, self.n_classes)
        at_least("seq_len", self.seq_len, 2)

    def source(self, split: Split) -> Source:
        known_split(split)
        rows, labels = self._read(split)

        def make(index: np.ndarray) -> Batch:
            return {**rows.padded(index, self.seq_len), "label": labels[index]}

        return Stored(make, np.arange(len(labels)), self.seed)

    def fingerprint(self) -> str:
        settings = files.settings_of(self)
        settings["content"] = {}
        for split in _FILES:
            rows, labels = self._read(split)
            settings["content"][split] = files.digest_of([rows.values, rows.starts, labels])
        return fingerprint_of("listops_tsv", _VERSION, settings)

    # Read once: what the run began with is what it goes on with.
    def _read(self, split: Split) -> tuple[Ragged, np.ndarray]:
        if split not in self._splits:
            self._splits[split] = self._parsed(split)
        return self._splits[split]

    @functools.cached_property
    def _splits(self) -> dict[str, tuple[Ragged, np.ndarray]]:
        return {}

    def _parsed(self, split: Split) -> tuple[Ragged, np.ndarray]:
        file = _ORIGIN.find(_ORIGIN.folder(self.path), _FILES[split])
        rows, labels = [], []
        with file.open("rb") as lines:
            if next(lines, b"").rstrip(b"\r\n") != _HEADER:
                raise _ORIGIN.damaged(file, "does not begin with the line Source, tab, Target")
            for number, line in enumerate(lines, 2):
                row, label = _row(file, number, line)
                row = row[: self.seq_len - self.append_eos]
                rows.append(np.append(row, np.uint8(END_OF_TEXT)) if self.append_eos else row)
                labels.append(label)
        if self.official:
            _ORIGIN.check_count(f"{file}, rows", len(labels), _ROWS[split])
        if not labels:
            raise DataError(f"{file} has no rows")
        return Ragged.of(rows), np.array(labels, np.int32)


def _lookup() -> np.ndarray:
    table = np.zeros(256, np.uint8)
    for symbol, short in [*_SHORT.items(), *((b"%d" % n, b"%d" % n) for n in range(10))]:
        name = "X" if symbol == b"]" else symbol.decode()
        table[ord(short)] = SYMBOLS.index(name)
    return table


_TOKEN = _lookup()


def _row(file: pathlib.Path, number: int, line: bytes) -> tuple[np.ndarray, int]:
    tree, _, label = line.rstrip(b"\r\n").partition(b"\t")
    for symbol, short in _SHORT.items():
        tree = tree.replace(symbol, short)
    row = _TOKEN[np.frombuffer(tree.translate(None, _DROPPED), np.uint8)]
    if not len(row) or not row.all():
        raise _ORIGIN.damaged(file, f"has a line {number} that is no tree of ListOps")
    if not (len(label) == 1 and label.isdigit()):
        raise _ORIGIN.damaged(file, f"has a line {number} whose value is no digit")
    return row, int(label)
