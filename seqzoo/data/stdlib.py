"""The source code of Python's standard library as bytes: real text on every machine.

stdlib_files.txt lists the files with their hashes, as Python 3.11.7 has them, without tests and
without tables that a program wrote. A file that is missing or different under this Python is left
out, and the fingerprint says so. Modules that share passages or a subject are in one split.
"""

import dataclasses
import functools
import hashlib
import pathlib
import sysconfig

from seqzoo.data.source import Source, Split, at_least, fingerprint_of, known_split
from seqzoo.data.windows import Packed, Windows
from seqzoo.errors import ConfigError, DataError

_VERSION = 1
LIST = pathlib.Path(__file__).with_name("stdlib_files.txt")
BYTE_VALUES = 256


@dataclasses.dataclass(frozen=True)
class StdlibText:
    """Next byte of the standard library's source code.

    Attributes:
      vocab_size: at least 256, the values of a byte; 0 also starts and ends a document.
      seq_len: bytes per row.
      eval_seq_len: bytes per row of held-out text; null = seq_len.
      segment_ids: keep documents apart in packed rows; false = they run into each other.
      seed: of order and cuts, apart from trainer.seed.
    """

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

    def source(self, split: Split) -> Source:
        known_split(split)
        length = self.seq_len if split == "train" else self.eval_seq_len or self.seq_len
        packed = self._packed[split]
        return Windows(packed.read, packed.size, length, split, self.seed, self.segment_ids)

    def documents(self, split: Split) -> tuple[bytes, ...]:
        """Returns the files of a split."""
        return tuple(read_library()[known_split(split)].values())

    def fingerprint(self) -> str:
        listed = sum(1 for _ in _listed())
        kept = {split: sorted(files) for split, files in read_library().items()}
        count = sum(len(names) for names in kept.values())
        settings = {**dataclasses.asdict(self), "files": kept, "list": _list_hash()}
        text = fingerprint_of("stdlib", _VERSION, settings)
        return text if count == listed else f"{text}-{count}of{listed}"

    @functools.cached_property
    def _packed(self) -> dict[str, Packed]:
        return {split: Packed.of(self.documents(split)) for split in read_library()}


def check_bytes(vocab_size: int, seq_len: int, eval_seq_len: int | None) -> None:
    """Refuses settings that no text of bytes can have."""
    if vocab_size < BYTE_VALUES:
        raise ConfigError(
            f"data.vocab_size={vocab_size} is too small for bytes; it must be at least "
            f"{BYTE_VALUES}"
        )
    at_least("seq_len", seq_len, 2)
    at_least("eval_seq_len", eval_seq_len, 2)


def library_folder() -> pathlib.Path:
    """Returns where this Python keeps the source of its library."""
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


@functools.cache
def read_library() -> dict[str, dict[str, bytes]]:
    """Reads the listed files that are here as listed: split -> name -> content."""
    root, found = library_folder(), {"train": {}, "valid": {}, "test": {}}
    for split, digest, name in _listed():
        try:
            content = (root / name).read_bytes()
        except OSError:
            continue
        if hashlib.sha256(content).hexdigest() == digest:
            found[split][name] = content
    empty = [split for split, files in found.items() if not files]
    if empty:
        raise DataError(
            f"the standard library's source in {root} holds no file of the {empty[0]} split as "
            f"{LIST.name} lists it; a Python 3.11 with its source has them all. Or train on text "
            "of your own: data=text data.path=..."
        )
    return found


def _listed():
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            split, digest, _, name = line.split(" ", 3)
            yield split, digest, name


def _list_hash() -> str:
    return hashlib.sha256(LIST.read_bytes()).hexdigest()
