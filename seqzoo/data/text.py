"""Files of text or of any bytes, read from a path, one token per byte."""

import dataclasses
import functools
import hashlib
import pathlib

from seqzoo.data.source import Source, Split, fingerprint_of, known_split
from seqzoo.data.stdlib import BYTE_VALUES, check_bytes
from seqzoo.data.windows import Packed, Windows
from seqzoo.errors import ConfigError, DataError

_VERSION = 1
_FEW = 3  # files: with fewer, each split gets a part of the bytes rather than files


@dataclasses.dataclass(frozen=True)
class Text:
    """Next byte of the files under a path, which are read into memory.

    A folder is split by file, in the order of a hash of the names; one file (or two) is cut: first
    the training part, then valid, then test, as enwik8 is.

    Attributes:
      path: a file or a folder.
      extensions: endings of the files to take from a folder, as [.txt, .md]; null = all but
        hidden ones.
      encoding: utf-8 = files must be valid UTF-8 text; bytes = anything.
      valid_fraction: share of the bytes (of a folder: about) that is held out to choose by.
      test_fraction: share that is held out to report on.
      vocab_size: at least 256, the values of a byte; 0 also starts and ends a document.
      seq_len: bytes per row.
      eval_seq_len: bytes per row of held-out text; null = seq_len.
      segment_ids: keep documents apart in packed rows; false = they run into each other.
      seed: of order and cuts, apart from trainer.seed.
    """

    path: str
    extensions: tuple[str, ...] | None = None
    encoding: str = "utf-8"
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    vocab_size: int = BYTE_VALUES
    seq_len: int = 256
    eval_seq_len: int | None = None
    segment_ids: bool = True
    seed: int = 0

    group_names = ()
    bytes_per_token = 1.0
    asks_everywhere = True

    def __post_init__(self) -> None:
        check_bytes(self.vocab_size, self.seq_len, self.eval_seq_len)
        check_fractions(self.valid_fraction, self.test_fraction)
        if self.encoding not in ("utf-8", "bytes"):
            raise ConfigError(f"data.encoding={self.encoding}; it must be utf-8 or bytes")
        if self.extensions is not None:
            dotted = tuple("." + extension.lstrip(".") for extension in self.extensions)
            object.__setattr__(self, "extensions", dotted)

    def source(self, split: Split) -> Source:
        known_split(split)
        length = self.seq_len if split == "train" else self.eval_seq_len or self.seq_len
        packed = self._packed[split]
        return Windows(packed.read, packed.size, length, split, self.seed, self.segment_ids)

    def documents(self, split: Split) -> tuple[bytes, ...]:
        """Returns the documents of a split."""
        return self._documents[known_split(split)]

    def fingerprint(self) -> str:
        settings = dataclasses.asdict(self)
        for place in ("path", "extensions", "encoding"):  # the content says more
            del settings[place]
        settings["content"] = {
            split: [hashlib.sha256(document).hexdigest() for document in documents]
            for split, documents in self._documents.items()
        }
        return fingerprint_of("text", _VERSION, settings)

    # Read once: what the run began with is what it goes on with.
    @functools.cached_property
    def _documents(self) -> dict[str, tuple[bytes, ...]]:
        files = _read(pathlib.Path(self.path).expanduser(), self.extensions, self.encoding)
        if len(files) < _FEW:
            return self._cut(files)
        return self._dealt(files)

    @functools.cached_property
    def _packed(self) -> dict[str, Packed]:
        return {split: Packed.of(documents) for split, documents in self._documents.items()}

    def _cut(self, files: dict[str, bytes]) -> dict[str, tuple[bytes, ...]]:
        parts: dict[str, list[bytes]] = {"train": [], "valid": [], "test": []}
        for content in files.values():
            test = round(len(content) * (1 - self.test_fraction))
            valid = round(len(content) * (1 - self.test_fraction - self.valid_fraction))
            parts["train"].append(content[:valid])
            parts["valid"].append(content[valid:test])
            parts["test"].append(content[test:])
        if not all(any(documents) for documents in parts.values()):
            raise DataError(
                f"data.path={self.path}: {sum(map(len, files.values()))} bytes are too few to hold "
                f"out data.valid_fraction={self.valid_fraction} and "
                f"data.test_fraction={self.test_fraction}"
            )
        return {split: tuple(filter(None, documents)) for split, documents in parts.items()}

    def _dealt(self, files: dict[str, bytes]) -> dict[str, tuple[bytes, ...]]:
        total = sum(map(len, files.values()))
        room = {"test": self.test_fraction * total, "valid": self.valid_fraction * total}
        split_of, todo = {}, sorted(files, key=lambda n: hashlib.sha256(n.encode()).digest())
        for held_out, left in room.items():
            while left > 0 and len(todo) > 1:  # at least one file, and one left to train on
                name = todo.pop()
                split_of[name] = held_out
                left -= len(files[name])
        dealt: dict[str, list[bytes]] = {"train": [], "valid": [], "test": []}
        for name, content in files.items():
            dealt[split_of.get(name, "train")].append(content)
        return {split: tuple(documents) for split, documents in dealt.items()}


def check_fractions(valid: float, test: float) -> None:
    """Refuses shares that leave nothing to hold out or to train on."""
    if not (valid > 0 and test > 0 and valid + test < 1):
        raise ConfigError(
            f"data.valid_fraction={valid}, data.test_fraction={test}; both must be above 0 and "
            "together below 1"
        )


def _read(path: pathlib.Path, extensions, encoding: str) -> dict[str, bytes]:
    """Reads the files, by their name below `path`, in the order of these names."""
    if not path.exists():
        raise DataError(
            f"data.path={path}: there is no such file or folder; it was looked for at "
            f"{path.absolute()}"
        )
    if path.is_file():
        names = {path.name: path}
    else:
        names = {
            file.relative_to(path).as_posix(): file
            for file in sorted(path.rglob("*"))
            if _taken(file.relative_to(path), extensions) and file.is_file()
        }
    files = {}
    for name, file in names.items():
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        if encoding == "utf-8":
            _check_text(file, content)
        if content:
            files[name] = content
    if not files:
        what = "is empty" if path.is_file() else "holds no file with something in it"
        ending = f" that ends in {' or '.join(extensions)}" if extensions else ""
        raise DataError(f"data.path={path} {what}{ending}")
    return files


def _taken(name: pathlib.PurePath, extensions: tuple[str, ...] | None) -> bool:
    if any(part.startswith(".") for part in name.parts):  # .git and the like
        return False
    return extensions is None or name.suffix in extensions


def _check_text(file: pathlib.Path, content: bytes) -> None:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}. "
            "data.encoding=bytes takes it as it is; data.extensions chooses among files"
        ) from None
