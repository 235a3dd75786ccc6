"""Token arrays that somebody else made: .npy, or raw .bin as nanoGPT and Megatron tools write it.

Arrays are mapped, not read: they may be larger than memory.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np

from seqzoo.data import files
from seqzoo.data.source import SPLITS, Source, Split, at_least, fingerprint_of, known_split
from seqzoo.data.text import check_fractions
from seqzoo.data.windows import Windows
from seqzoo.errors import ConfigError, DataError

_VERSION = 1
_DTYPES = ("uint8", "uint16", "int16", "uint32", "int32", "int64", "uint64")
# Files up to this size are hashed and checked whole; of larger ones head, tail and samples are,
# and every batch is checked again as it is read.
_WHOLE_BYTES = 2**30
_SAMPLE_BYTES = 2**20
_SAMPLES = 64


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Next token of one array cut in three, or of three arrays.

    Attributes:
      vocab_size: tokens must be in [0, vocab_size).
      path: one array; its first part is for training, then valid, then test. Or null and
      paths: an array for each of train, valid and test.
      dtype: of a .bin file: uint16, uint8, int32, ...; a .npy file says its own.
      valid_fraction: share of one array that is held out to choose by.
      test_fraction: share that is held out to report on.
      seq_len: tokens per row.
      eval_seq_len: tokens per row of held-out data; null = seq_len.
      end_token: the token that ends a document, so that packed documents are kept apart; null = one
        long document.
      bytes_per_token: mean length of a token in bytes of text, for bits per byte; null = unknown.
      seed: of order and cuts, apart from trainer.seed.
    """

    vocab_size: int
    path: str | None = None
    paths: dict[str, str] | None = None
    dtype: str = "uint16"
    valid_fraction: float = 0.01
    test_fraction: float = 0.01
    seq_len: int = 256
    eval_seq_len: int | None = None
    end_token: int | None = None
    bytes_per_token: float | None = None
    seed: int = 0

    group_names = ()
    asks_everywhere = True

    def __post_init__(self) -> None:
        at_least("vocab_size", self.vocab_size, 1)
        at_least("seq_len", self.seq_len, 1)
        at_least("eval_seq_len", self.eval_seq_len, 1)
        check_fractions(self.valid_fraction, self.test_fraction)
        if self.dtype not in _DTYPES:
            raise ConfigError(f"data.dtype={self.dtype}; it must be one of {', '.join(_DTYPES)}")
        if (self.path is None) == (self.paths is None):
            raise ConfigError("data.path or data.paths: give one of them")
        if self.paths is not None:
            paths = dict(self.paths)
            if set(paths) != set(SPLITS):
                raise ConfigError(
                    f"data.paths has {', '.join(paths)}; it must have {', '.join(SPLITS)}"
                )
            object.__setattr__(self, "paths", tuple(sorted(paths.items())))  # hashable

    def source(self, split: Split) -> Source:
        known_split(split)
        file, start, stop = self._parts[split]
        length = self.seq_len if split == "train" else self.eval_seq_len or self.seq_len
        reader = _Reader(file, start, self.vocab_size, self.end_token)
        segments = self.end_token is not None
        return Windows(reader.read, stop - start - 1, length, split, self.seed, segments)

    def fingerprint(self) -> str:
        settings = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("path", "paths", "dtype")
        }
        settings["content"] = {
            split: [file.digest, start, stop] for split, (file, start, stop) in self._parts.items()
        }
        return fingerprint_of("tokens", _VERSION, settings)

    # Opened once: what the run began with is what it must go on with.
    @functools.cached_property
    def _parts(self) -> "dict[str, tuple[TokenFile, int, int]]":
        if self.paths is not None:
            opened = {split: self._open(path) for split, path in dict(self.paths).items()}
            parts = {split: (file, 0, len(file.array)) for split, file in opened.items()}
        else:
            file = self._open(self.path)
            n = len(file.array)
            valid = round(n * (1 - self.test_fraction - self.valid_fraction))
            test = round(n * (1 - self.test_fraction))
            parts = {
                "train": (file, 0, valid),
                "valid": (file, valid, test),
                "test": (file, test, n),
            }
        for split, (file, start, stop) in parts.items():
            if stop - start < 2:
                raise DataError(
                    f"{file.path}: the {split} split has {stop - start} tokens, which is nothing "
                    "to predict; give more data or larger fractions"
                )
        return parts

    def _open(self, path: str) -> "TokenFile":
        file = TokenFile.open(pathlib.Path(path).expanduser(), self.dtype)
        file.check(self.vocab_size)
        return file


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """A mapped array of tokens, and what its file was when it was opened."""

    path: pathlib.Path
    array: np.ndarray
    stamp: tuple[int, int]

    @classmethod
    def open(cls, path: pathlib.Path, dtype: str) -> "TokenFile":
        if not path.is_file():
            raise DataError(
                f"data.path={path}: there is no such file; it was looked for at {path.absolute()}"
            )
        stamp = files.stamp(path)
        if not stamp[0]:
            raise DataError(f"{path} is empty")
        if path.suffix == ".npy":
            array = _npy(path)
        elif path.suffix == ".bin":
            width = np.dtype(dtype).itemsize
            if stamp[0] % width:
                raise DataError(
                    f"{path} has {stamp[0]} bytes, no whole number of {dtype} tokens; is it cut "
                    "off, or is data.dtype another?"
                )
            array = np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r")
        else:
            raise DataError(
                f"{path}: tokens are read from .npy and .bin files, not '{path.suffix}'"
            )
        return cls(path, array, stamp)

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the size and of all tokens; of a file above 1 GiB: of head, tail and samples."""
        digest = hashlib.sha256(f"{len(self.array)} {self.array.dtype}".encode())
        for part in self._probes():
            digest.update(np.ascontiguousarray(part))
        return digest.hexdigest()

    def check(self, vocab_size: int) -> None:
        for part in self._probes():
            check_range(self.path, part, vocab_size)

    def _probes(self) -> Iterator[np.ndarray]:
        n, step = len(self.array), _SAMPLE_BYTES // self.array.itemsize
        if self.array.nbytes <= _WHOLE_BYTES:
            firsts = range(0, n, step)
        else:
            firsts = np.linspace(0, n - step, _SAMPLES).astype(np.int64)
        for first in firsts:
            yield self.array[first : first + step]


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    file: TokenFile
    start: int
    vocab_size: int
    end_token: int | None

    def read(self, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        files.check_unchanged(self.file.path, self.file.stamp)
        offset = offset + self.start
        tokens, targets = self.file.array[offset], self.file.array[offset + 1]
        check_range(self.file.path, tokens, self.vocab_size)
        check_range(self.file.path, targets, self.vocab_size)
        if self.end_token is None:
            return tokens, targets, None
        before = self.file.array[np.maximum(offset - 1, 0)]
        return tokens, targets, before == self.end_token


def check_range(path: pathlib.Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Refuses tokens outside [0, vocab_size)."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        worst = low if low < 0 else high
        raise DataError(
            f"{path} holds token {worst}, outside data.vocab_size={vocab_size}; set a larger "
            "vocab_size, or check data.dtype"
        )


def _npy(path: pathlib.Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is no readable .npy array: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{path} is an array of {array.dtype} with shape {array.shape}; tokens are one row of "
            "integers"
        )
    if not len(array):
        raise DataError(f"{path} is empty")
    return array
